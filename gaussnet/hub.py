"""Saving and loading: safetensors + config.json, on the conventions of huggingface_hub, without pickle.

A folder (or hub repository) holds `model.safetensors`, the state dict, and `config.json`:

    {"class_name": "GaussianDenoiser", "arguments": {...}, "gaussnet_version": "...", "provenance": {...}}

`arguments` holds what the class needs to build an empty object of the same architecture
(`from_arguments`); all numbers come from the safetensors file. `provenance`, where it is known, tells data
and fit. Nested modules nest their own `{"class_name", "arguments"}`. Only classes that registered themselves
here are ever built.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from gaussnet.model_card import CARD, is_edited, seal, tell
from gaussnet.version import __version__

if TYPE_CHECKING:
    from gaussnet.denoisers import Denoiser

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SPARE_NUMBERS = 1 << 24  # that a model may hold beyond those of its file

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace)


@runtime_checkable
class Rebuildable(Protocol):
    """What a module offers to be saved.

    `to_arguments` gives JSON-able arguments, from which `from_arguments` builds an object of the same
    architecture, whose tensors are then overwritten.
    """

    def to_arguments(self) -> dict[str, Any]: ...

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> nn.Module: ...


_REGISTRY: dict[str, type[Rebuildable]] = {}

C = TypeVar("C", bound=type)


def register(cls: C) -> C:
    """Class decorator: lets `from_pretrained` build this class from its name.

    Use it on your own networks, too; they need `to_arguments` and `from_arguments`.

    Raises:
        TypeError: if the class lacks one of the two methods.
    """
    if not issubclass(cls, Rebuildable):
        raise TypeError(f"expected {cls.__name__} to have to_arguments and from_arguments")
    _REGISTRY[cls.__name__] = cls
    return cls


def describe(module: nn.Module) -> dict[str, Any]:
    """The `{"class_name", "arguments"}` of a module.

    Raises:
        TypeError: if the module's class is not registered.
    """
    name = type(module).__name__
    if not isinstance(module, Rebuildable) or _REGISTRY.get(name) is not type(module):
        raise TypeError(
            f"{name} cannot be saved: decorate its class with @gaussnet.hub.register "
            f"(it needs to_arguments and from_arguments)"
        )
    return {"class_name": name, "arguments": module.to_arguments()}


def build(description: Mapping[str, Any]) -> Any:
    """An empty module from its description; the inverse of `describe`.

    Raises:
        ValueError: if the description is malformed or names an unknown class.
    """
    # Of a file it may be anything.
    if not isinstance(description, Mapping) or not {"class_name", "arguments"} <= set(description):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"expected a mapping with class_name and arguments, got {description!r:.200}")
    name = description["class_name"]
    cls = _REGISTRY.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"unknown class_name {name!r:.200}; expected one of {known}")
    try:
        return cls.from_arguments(description["arguments"])
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{name}: cannot be built from its arguments: {error!r:.500}") from error


def record(data: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was made from, for its config.json.

    Args:
        data: facts about the data, such as name, size and scaling.
        arguments: of the fit, JSON-able but for numbers of NumPy or PyTorch.

    Returns:
        `{"data", "arguments", "arguments_sha256"}`, as they come back from JSON. Equal hashes mean equal
        arguments.

    Raises:
        TypeError: if JSON cannot hold something.
    """
    text = json.dumps(dict(arguments), sort_keys=True, default=_number)
    digest = hashlib.sha256(text.encode()).hexdigest()
    facts = json.loads(json.dumps(dict(data), default=_number))
    return {"data": facts, "arguments": json.loads(text), "arguments_sha256": digest}


def _number(value: Any) -> Any:
    if getattr(value, "ndim", None) != 0:  # of NumPy and PyTorch, 0-d things are numbers
        raise TypeError(f"expected what JSON can hold, got {type(value).__name__}: {value!r:.100}")
    return value.item()


class Pretrained(
    nn.Module, ModelHubMixin, library_name="gaussnet", repo_url="https://arxiv.org/abs/2412.09726"
):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for modules that are `Rebuildable`.

    Attributes:
        provenance: JSON-able facts about data and fit; saved and loaded with the model. See `record`.
    """

    provenance: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "to_arguments"):
            register(cls)

    def facts(self) -> dict[str, str]:
        """What it is, in few words: name -> value."""
        parameters = sum(p.numel() for p in self.parameters())
        buffers = sum(b.numel() * b.element_size() for b in self.buffers())
        return {
            "class": type(self).__name__,
            "parameters": f"{parameters:,}",
            "buffers": f"{buffers / 2**20:.2f} MiB",
        }

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved model: how to load it, what it is, and the numbers of its run."""
        facts = self.facts()
        shape = facts.get("event shape", "(...)")
        return ModelCard.from_template(
            card_data=ModelCardData(
                library_name="gaussnet", tags=["diffusion", "denoiser", facts["class"]], license=None
            ),
            template_str=CARD,
            title=f"{facts['class']} of {shape}",
            shape=f"(B, {shape[1:]}",
            facts=facts,
            provenance={name: tell(value) for name, value in self.provenance.items()},
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_arguments: Any) -> Self:
        """As `gaussnet.from_pretrained`, and checks that what was saved is of this class."""
        # Not the mixin's: for it, what stands in config.json are arguments of this call and of downloads.
        name = str(pretrained_model_name_or_path)
        try:
            config = _read_json(_locate(name, CONFIG_NAME, hub_arguments))
            return cls._from_pretrained(model_id=name, config=config, **hub_arguments)
        except (HFValidationError, EntryNotFoundError, HfHubHTTPError) as error:
            raise FileNotFoundError(f"no folder {name}, and no such model on the hub: {error}") from error

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """As `ModelHubMixin.save_pretrained`, but an old model stays in the folder until the new is written.

        Raises:
            OSError: if it cannot be written; the old one is intact then.
        """
        folder = Path(save_directory)
        if arguments.get("push_to_hub"):
            arguments["repo_id"] = _with_owner(arguments.get("repo_id") or folder.resolve().name, arguments)
        if arguments.get("repo_id"):
            _name_in_card(arguments["repo_id"], arguments)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".partial"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            url = super().save_pretrained(aside, **arguments)
            seal(aside / "README.md")
            # First away with the old description: it never stands beside the new weights.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == CONFIG_NAME):
                if file.name != "README.md" or not is_edited(folder / file.name):
                    file.replace(folder / file.name)
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return url

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """As `ModelHubMixin.push_to_hub`; the card names the repository, which the mixin's does not."""
        repo_id = _with_owner(repo_id, arguments)
        _name_in_card(repo_id, arguments)
        return super().push_to_hub(repo_id, **arguments)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {**describe(self), "gaussnet_version": __version__}
        if self.provenance:
            config["provenance"] = dict(self.provenance)
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.state_dict().items():
            tensor = tensor.detach().contiguous()
            # What is in two places, such as slices of one array, is written twice: safetensors refuses
            # memory that is shared.
            memory = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if memory in seen else tensor
            seen.add(memory)
        save_file(tensors, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any], **hub_arguments: Any) -> Self:
        weights = _locate(model_id, WEIGHTS_NAME, hub_arguments)
        try:
            with _Bounded(weights.stat().st_size):
                model = build(config)
        except ValueError as error:
            raise ValueError(f"{model_id}: {error}") from error
        if not isinstance(model, cls):
            raise TypeError(f"{model_id} holds a {type(model).__name__}, expected a {cls.__name__}")
        try:
            tensors = load_file(weights)
            _check_numbers(model.state_dict(), tensors)
            # assign: the stored dtype survives, float64 included
            model.load_state_dict(tensors, assign=True)
        except (RuntimeError, TypeError, SafetensorError) as error:
            raise ValueError(f"{weights} does not fit its {CONFIG_NAME}: {str(error)[:2000]}") from error
        provenance = config.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ValueError(f"{model_id}: expected provenance to be an object, got {provenance!r:.100}")
        model.provenance = provenance
        return model.eval()


def _with_owner(repo_id: str, arguments: Mapping[str, Any]) -> str:
    """OWNER/NAME: of a name alone, the hub tells the owner when the repository is made."""
    if "/" in repo_id:
        return repo_id
    private = {"private": arguments["private"]} if "private" in arguments else {}
    return HfApi(token=arguments.get("token")).create_repo(repo_id=repo_id, exist_ok=True, **private).repo_id


def _name_in_card(repo_id: str, arguments: dict[str, Any]) -> None:
    arguments["model_card_kwargs"] = {"repo_id": repo_id, **(arguments.get("model_card_kwargs") or {})}


class _Bounded(TorchFunctionMode):
    """Raises a ValueError when tensors are made of far more numbers than a file of `size` bytes can fill."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = SPARE_NUMBERS + 4 * size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self.left -= func(*args, **{**kwargs, "device": "meta"}).numel()  # before there is memory for it
            if self.left < 0:
                raise ValueError(f"its arguments describe more numbers than {WEIGHTS_NAME} can hold")
        return func(*args, **kwargs)


def _check_numbers(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a TypeError if there is NaN, or integers in the place of floats, or the reverse."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]
    if broken:
        raise TypeError(f"expected numbers, got NaN in {', '.join(broken[:5])}")
    for name in expected.keys() & tensors.keys():
        own, got = expected[name].dtype, tensors[name].dtype
        if own != got and not (own.is_floating_point and got.is_floating_point and got.itemsize > 1):
            raise TypeError(f"{name}: expected numbers as {own}, got {got}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _locate(model_id: str, name: str, hub_arguments: Mapping[str, Any]) -> Path:
    folder = Path(model_id)
    if not folder.is_dir():
        if model_id.count("/") != 1:  # the hub would be asked again and again where it is out of reach
            raise FileNotFoundError(
                f"no folder {model_id}, and no such model on the hub: expected OWNER/NAME"
            )
        return Path(hf_hub_download(repo_id=model_id, filename=name, **hub_arguments))
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no {name} in {folder}: expected a folder that save_pretrained wrote")
    return folder / name


def from_pretrained(path_or_id: str | Path, **hub_arguments: Any) -> Denoiser:
    """Loads whatever denoiser was saved at a path or on the Hugging Face hub.

    Args:
        path_or_id: a folder that `save_pretrained` wrote, or a hub repository id.
        **hub_arguments: revision, token, cache_dir, local_files_only, force_download.

    Returns:
        The denoiser, in eval mode, in its stored dtype, on the CPU.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or a file is missing from it.
        ValueError: if config.json names an unknown class, or the tensors do not fit it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaussnet import GaussianDenoiser
        >>> with TemporaryDirectory() as folder:
        ...     _ = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0).save_pretrained(folder)
        ...     from_pretrained(folder)
        GaussianDenoiser(
          (covariance): Covariance(dim=4, rank=0)
        )
    """
    return cast("Denoiser", Pretrained.from_pretrained(path_or_id, **hub_arguments))
