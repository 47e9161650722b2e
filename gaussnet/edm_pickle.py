"""Network snapshots of NVlabs/edm: class name, arguments and tensors, without running anything in the file.

A snapshot pickles {ema, loss_fn, augment_pipe, dataset_kwargs}. `ema` is a preconditioner, and its __dict__
holds its arguments, `_init_args` and `_init_kwargs`, and the dictionaries of `nn.Module`: `_parameters`,
`_buffers`, `_non_persistent_buffers_set` and `_modules`. `gaussnet.edm_unpickler` makes plain data of it, and
here it is walked as `nn.Module.state_dict` walks a module.

Reference: https://github.com/NVlabs/edm, training/training_loop.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gaussnet.edm_unpickler import EDMPickleError, Persistent, check_types, kind_of, shown, unpickle

CLASS_NAMES = ("VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond")
MAX_DEPTH = 16  # of modules and of arguments; EDM's modules are 4 deep
MAX_ARGUMENTS = 10_000
MAX_NAME = 100


class EDMSnapshot(NamedTuple):
    """What a snapshot says about its network `ema`.

    Attributes:
        class_name: the preconditioner, one of `CLASS_NAMES`.
        init_args: its positional arguments, usually none.
        init_kwargs: its keyword arguments, with those of the network inside.
        state_dict: parameters and persistent buffers on the CPU, named as `nn.Module.state_dict` names them.
        metadata: `loss_fn` and `augment_pipe` (class_name, init_args and init_kwargs each, or None) and
            `dataset_kwargs`, as far as the file has them.
    """

    class_name: str
    init_args: tuple[Any, ...]
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]


def read_edm_pickle(path: str | Path) -> EDMSnapshot:
    """Reads a `network-snapshot-*.pkl` of NVlabs/edm. Nothing in the file is executed.

    Args:
        path: of the snapshot.

    Returns:
        Class name, arguments and tensors of its network `ema`; the tensors on the CPU, as in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        EDMPickleError: (a ValueError) if the file is no such snapshot (those of EDM2 and StyleGAN are
            not), is damaged, or names a class, function or opcode that such a snapshot does not need.

    Example:
        >>> import pickle, tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:  # doctest: +IGNORE_EXCEPTION_DETAIL
        ...     file.write(pickle.dumps({"ema": eval}))  # a pickle may name any function
        ...     file.flush()
        ...     read_edm_pickle(file.name)
        Traceback (most recent call last):
        gaussnet.edm_unpickler.EDMPickleError: expected none but the names of such snapshots
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a network-snapshot-*.pkl of NVlabs/edm")
    if not path.stat().st_size:
        raise EDMPickleError(f"{path}: expected a pickle, got an empty file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        try:
            if stream[0] != 0x80:  # PROTO, the first opcode since protocol 2
                kind = " (a zip file, as torch.save writes)" if stream[:2] == b"PK" else ""
                raise EDMPickleError(f"expected a pickle, got a file that begins with {stream[:8]}{kind}")
            return _snapshot(unpickle(stream))
        except EDMPickleError as error:
            if stream.find(b"MPConv", 0) >= 0:  # EDM2's layer, named in each of its snapshots
                raise EDMPickleError(
                    f"{path}: expected a snapshot of EDM, got one of EDM2, whose magnitude-preserving "
                    f"networks are others ({error})"
                ) from error
            raise EDMPickleError(f"{path}: {error}") from error


def _snapshot(data: Any) -> EDMSnapshot:
    if type(data) is not dict or "ema" not in data:
        got = ", ".join(map(shown, list(data)[:10])) if type(data) is dict else kind_of(data)
        raise EDMPickleError(f"expected a dict with the key 'ema', as snapshots of EDM have it, got {got}")
    ema = data["ema"]
    if type(ema) is not Persistent or ema.class_name not in CLASS_NAMES:
        got = shown(ema.class_name) if type(ema) is Persistent else kind_of(ema)
        raise EDMPickleError(f"expected ema to be one of {', '.join(CLASS_NAMES)}, got {got}")
    metadata = {
        key: _call(key, value) if type(value) is Persistent else _plain(key, value)
        for key, value in data.items()
        if key in ("loss_fn", "augment_pipe", "dataset_kwargs")
    }
    tensors = dict(_named_tensors(ema, "", set()))
    return EDMSnapshot(**_call("ema", ema), state_dict=tensors, metadata=metadata)


def _call(name: str, persistent: Persistent) -> dict[str, Any]:
    """The class name and the arguments that made a persistent object."""
    state = persistent.state or {}
    arguments = state.get("_init_args"), state.get("_init_kwargs")
    check_types(f"_init_args and _init_kwargs of {name}", arguments, (tuple, dict))
    args, kwargs = (_plain(f"the arguments of {name}", value) for value in arguments)
    return {"class_name": persistent.class_name, "init_args": args, "init_kwargs": kwargs}


def _plain(name: str, value: Any) -> Any:
    """A copy of numbers, strings, lists, tuples and dicts; parts may be shared, but not without end."""
    left = MAX_ARGUMENTS

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise EDMPickleError(
                f"{name}: expected at most {MAX_ARGUMENTS} values, {MAX_DEPTH} deep, got more"
            )
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is dict:
            return {key: copy(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([copy(item, depth + 1) for item in value])
        raise EDMPickleError(f"{name}: expected numbers, strings, lists and dicts, got {kind_of(value)}")

    return copy(value, 0)


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """What `nn.Module.state_dict` holds, in its order: parameters, persistent buffers, then each child."""
    where = f"the module {shown(prefix)}"
    if type(module) is not Persistent or module.state is None:
        raise EDMPickleError(f"{where}: expected a module, got {kind_of(module)}")
    if id(module) in seen or prefix.count(".") > MAX_DEPTH:  # it would be walked again and again
        raise EDMPickleError(f"{where}: expected a tree of modules, {MAX_DEPTH} deep at most")
    seen.add(id(module))
    groups: tuple[Any, ...] = tuple(
        module.state.get(key)
        for key in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
    )
    check_types(f"parameters, buffers and modules of {where}", groups, (dict, dict, set, dict))
    parameters, buffers, non_persistent, modules = groups
    for name in (*parameters, *buffers, *modules):
        if "." in name or not 0 < len(name) <= MAX_NAME:
            raise EDMPickleError(f"{where}: expected short names without dots, got {shown(name)}")
    persistent = {name: tensor for name, tensor in buffers.items() if name not in non_persistent}
    for name, tensor in (*parameters.items(), *persistent.items()):
        if type(tensor) is Tensor:
            yield prefix + name, tensor
        elif tensor is not None:
            raise EDMPickleError(f"{prefix}{name}: expected a tensor, got {kind_of(tensor)}")
    for name, child in modules.items():
        if child is not None:
            yield from _named_tensors(child, f"{prefix}{name}.", seen)
