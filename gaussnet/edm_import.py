"""A snapshot of NVlabs/edm as a denoiser: the preconditioner and the network that its arguments name.

EDM's preconditioners are built as Precond(img_resolution, img_channels, label_dim, use_fp16, ..., model_type,
**model_kwargs), where `...` are the settings in the table below, and build their network by themselves:

    model_type(img_resolution, in_channels, out_channels, label_dim, **model_kwargs)

with out_channels = in_channels = img_channels, twice as many for iDDPM. Here the network comes first. The
names and defaults of arguments are the same, and so are the keys of state dicts, which are loaded strictly.

Reference: https://github.com/NVlabs/edm, training/networks.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gaussnet.denoisers import Denoiser
from gaussnet.edm import EDMPrecond
from gaussnet.edm_pickle import EDMSnapshot, read_edm_pickle
from gaussnet.edm_preconds import VEPrecond, VPPrecond, iDDPMPrecond
from gaussnet.edm_unpickler import EDMPickleError, shown
from gaussnet.networks.dhariwal_unet import DhariwalUNet
from gaussnet.networks.song_unet import SongUNet

MAX_PIXELS = 2**26  # of one image, all channels

_NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class _Precond(NamedTuple):
    """A preconditioner, its settings in EDM's order, and EDM's default network."""

    cls: type[Denoiser]
    settings: tuple[str, ...]
    model_type: str
    output_multiple: int = 1


_PRECONDS = {
    "VPPrecond": _Precond(VPPrecond, ("beta_d", "beta_min", "M", "epsilon_t"), "SongUNet"),
    "VEPrecond": _Precond(VEPrecond, ("sigma_min", "sigma_max"), "SongUNet"),
    "iDDPMPrecond": _Precond(iDDPMPrecond, ("C_1", "C_2", "M"), "DhariwalUNet", output_multiple=2),
    "EDMPrecond": _Precond(EDMPrecond, ("sigma_min", "sigma_max", "sigma_data"), "DhariwalUNet"),
}


def import_edm(path: str | Path) -> Denoiser:
    """The denoiser of a `network-snapshot-*.pkl` of NVlabs/edm. Nothing in the file is executed.

    EDM's `use_fp16`, a precision at run time on GPUs, is not taken over: weights are float32 in the file,
    and autocast does the same.

    Args:
        path: of the snapshot, a file of EDM's training or one that NVIDIA published.

    Returns:
        An `EDMPrecond`, `VPPrecond`, `VEPrecond` or `iDDPMPrecond` around a `SongUNet` or `DhariwalUNet`, in
        eval mode, float32, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        EDMPickleError: (a ValueError) as of `read_edm_pickle`, and if the arguments in the file make no
            model, or the tensors do not fit it.
    """
    snapshot = read_edm_pickle(path)
    try:
        model = _build(snapshot, numbers=Path(path).stat().st_size)
        _load(model, snapshot)
    except EDMPickleError as error:
        raise EDMPickleError(f"{path}: {error}") from error
    return model.eval()


def _build(snapshot: EDMSnapshot, numbers: int) -> Denoiser:
    """The model that the arguments describe, with new weights: at most as many as there are `numbers`."""
    precond = _PRECONDS[snapshot.class_name]
    arguments = _by_name(snapshot, precond)
    model_type = arguments.pop("model_type", precond.model_type)
    network_cls = _NETWORKS.get(model_type) if isinstance(model_type, str) else None
    if network_cls is None:
        got = shown(str(model_type))
        raise EDMPickleError(f"expected model_type to be one of {', '.join(_NETWORKS)}, got {got}")
    arguments.pop("use_fp16", None)
    settings = {name: arguments.pop(name) for name in precond.settings if name in arguments}
    channels = arguments.pop("img_channels")
    try:
        arguments |= {"in_channels": channels, "out_channels": channels * precond.output_multiple}
        _check_size(network_cls, arguments, numbers - abs(settings.get("M", 0)))
        network = network_cls(**arguments)
        return precond.cls(network, **settings)
    except EDMPickleError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise EDMPickleError(f"{snapshot.class_name} of {model_type}: {str(error)[:300]}") from error


def _by_name(snapshot: EDMSnapshot, precond: _Precond) -> dict[str, Any]:
    """The arguments of the preconditioner, positional ones included, by their names."""
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16", *precond.settings, "model_type")
    args, kwargs = snapshot.init_args, snapshot.init_kwargs
    positional = dict(zip(names, args, strict=False))
    twice = positional.keys() & kwargs.keys()
    arguments = {**positional, **kwargs}
    missing = {"img_resolution", "img_channels"} - arguments.keys()
    if len(args) > len(names) or twice or missing:
        raise EDMPickleError(
            f"{snapshot.class_name}: expected img_resolution and img_channels, and every argument once; got "
            f"{len(args)} positional arguments and {', '.join(map(shown, kwargs)) or 'no others'}"
        )
    return arguments


def _check_size(network: type[nn.Module], arguments: Mapping[str, Any], numbers: int) -> None:
    """Raises an EDMPickleError if the network would be larger than the file, before it is built.

    Counted are some of its layers: the second convolution of each encoder block, those at both ends, the
    embeddings, a filter.
    """
    defaults = {name: p.default for name, p in inspect.signature(network).parameters.items()}
    config: dict[str, Any] = {"channel_mult_noise": 1, "resample_filter": (), **defaults, **arguments}
    counts = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels")
    for name in (*counts, "num_blocks", "channel_mult_emb", "channel_mult_noise"):
        if type(config[name]) is not int or config[name] < 0:
            raise EDMPickleError(f"{name}: expected an integer >= 0, got {config[name]!r:.50}")
    if not all(type(mult) is int for mult in config["channel_mult"]):
        raise EDMPickleError(f"channel_mult: expected integers, got {config['channel_mult']!r:.50}")
    pixels, ends, labels = (
        config["in_channels"] * config["img_resolution"] ** 2,
        9 * (config["in_channels"] + config["out_channels"]),
        config["label_dim"] + config["augment_dim"],
    )
    c, emb, noise = (config[name] for name in ("model_channels", "channel_mult_emb", "channel_mult_noise"))
    blocks = config["num_blocks"] * sum(9 * (c * mult) ** 2 for mult in config["channel_mult"])
    least = blocks + (c * emb) ** 2 + c * emb * c * noise + c * (ends + labels)
    least += len(config["resample_filter"]) ** 2
    if not (least <= numbers and pixels <= MAX_PIXELS):  # numbers may be NaN
        raise EDMPickleError(
            f"the arguments describe a network of {least} numbers or more for images of {pixels}; "
            f"expected at most {max(numbers, 0)}, the size of the file, and {MAX_PIXELS}"
        )


def _load(model: nn.Module, snapshot: EDMSnapshot) -> None:
    if not all(tensor.is_floating_point() for tensor in snapshot.state_dict.values()):
        raise EDMPickleError("expected tensors of floating-point numbers, got others")
    try:
        model.load_state_dict(snapshot.state_dict, strict=True)
    except RuntimeError as error:
        raise EDMPickleError(f"the tensors do not fit the arguments: {str(error)[:1000]}") from error
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise EDMPickleError(f"expected finite numbers, got others in {', '.join(broken[:5])}")
