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
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast, runtime_checkable

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gaussnet.version import __version__

if TYPE_CHECKING:
    from gaussnet.denoisers import Denoiser

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


@runtime_checkable
class Rebuildable(Protocol):
    """What a module offers to be saved.

    `to_arguments` gives JSON-able arguments, from which `from_arguments` builds an object of the same
    architecture, whose tensors are then overwritten.
    """

    def to_arguments(self) -> dict[str, Any]: ...

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> nn.Module: ...


CARD = """---
{{ card_data }}
---

# {{ title }}

A denoiser D(x, sigma) = E[x_0 | x_0 + sigma n = x], made with gaussnet
(Wang and Vastola, [arXiv 2412.09726](https://arxiv.org/abs/2412.09726)).

```python
import gaussnet

model = gaussnet.from_pretrained("{{ repo_id | default("path or id of this repository", true) }}")
denoised = model(x, sigma)  # x of shape {{ shape }}
```

| | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- for name, text in provenance.items() %}
## {{ name }}

{{ text }}
{% endfor -%}
"""

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
    if _REGISTRY.get(name) is not type(module) or not isinstance(module, Rebuildable):
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
    if not isinstance(description, Mapping) or not {"class_name", "arguments"} <= set(description):
        raise ValueError(f"expected a mapping with class_name and arguments, got {description!r:.200}")
    cls = _REGISTRY.get(description["class_name"])
    if cls is None:
        known = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"unknown class_name {description['class_name']!r}; expected one of {known}")
    try:
        return cls.from_arguments(description["arguments"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{description['class_name']}: cannot be built from its arguments: {error!r}"
        ) from error


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


def tell(value: Any) -> str:
    """An entry of a provenance in Markdown: mappings of numbers and words as a table, texts as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and not any(isinstance(part, Mapping) for part in value.values()):
        rows = [
            f"| {key} | {part if isinstance(part, str) else json.dumps(part)} |"
            for key, part in value.items()
        ]
        return "\n".join(["| | |", "|---|---|", *rows])
    return f"```json\n{json.dumps(value, indent=2)}\n```"


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
        name = pretrained_model_name_or_path
        if Path(name).is_dir():
            _check_json(Path(name) / CONFIG_NAME)
            return super().from_pretrained(name, **hub_arguments)
        try:
            return super().from_pretrained(name, **hub_arguments)
        except (HFValidationError, EntryNotFoundError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(f"no folder {name}, and no such model on the hub: {error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {**describe(self), "gaussnet_version": __version__}
        if self.provenance:
            config["provenance"] = dict(self.provenance)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: dict[str, Any] | None = None, **hub_arguments: Any
    ) -> Self:
        if config is None:
            raise FileNotFoundError(
                f"no {CONFIG_NAME} in {model_id}: expected a folder that save_pretrained wrote"
            )
        model = build(config)
        if not isinstance(model, cls):
            raise TypeError(f"{model_id} holds a {type(model).__name__}, expected a {cls.__name__}")
        weights = _locate(model_id, WEIGHTS_NAME, hub_arguments)
        try:
            # assign: the stored dtype survives, float64 included
            model.load_state_dict(load_file(weights), assign=True)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{weights} does not fit its {CONFIG_NAME}: {error}") from error
        model.provenance = config.get("provenance", {})
        return model.eval()


def _check_json(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: expected a folder that save_pretrained wrote"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")


def _locate(model_id: str, name: str, hub_arguments: Mapping[str, Any]) -> Path:
    folder = Path(model_id)
    if not folder.is_dir():
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
    """
    return cast("Denoiser", Pretrained.from_pretrained(path_or_id, **hub_arguments))
