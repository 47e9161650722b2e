"""Saving and loading. Everything is local: no test asks the network."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from cases import DENOISERS, DTYPES, EVENT, denoiser, gaussian, noised, relative_error, tiny_unet
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gaussnet
from gaussnet import (
    BypassPrecond,
    Covariance,
    DeltaDenoiser,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    from_pretrained,
)
from gaussnet.hub import build, describe, register

every = pytest.mark.parametrize("name", DENOISERS)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    d, x = denoiser(name, dtype), noised(0.5, 4, dtype)
    d.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for load in (from_pretrained, type(d).from_pretrained, Denoiser.from_pretrained):
        loaded: Any = load(str(tmp_path))
        assert type(loaded) is type(d)
        assert not loaded.training
        state = loaded.state_dict()
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in d.state_dict().items()}
        assert all(state[key].equal(value) for key, value in d.state_dict().items())
        assert loaded(x, 0.5).equal(d(x, 0.5))
        assert loaded.score(x, 0.5).equal(d.score(x, 0.5))
        assert loaded.to_arguments() == d.to_arguments()


def test_the_card_tells_what_it_is_and_the_numbers_of_its_run(tmp_path: Path) -> None:
    model = copy.deepcopy(denoiser("bypass"))
    model.provenance = {
        "training": {"steps": 100, "optimizer": "adam"},
        "report": "| sigma | error |\n|---|---|\n| 1 | 0.25 |",
        "fit": {"nested": {"a": 1}},
    }
    model.save_pretrained(tmp_path, model_card_kwargs={"repo_id": "someone/digits"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["library_name"] == "gaussnet"
    assert card.data.to_dict()["tags"] == ["diffusion", "denoiser", "BypassPrecond"]
    for line in (
        'model = gaussnet.from_pretrained("someone/digits")',
        "# x of shape (B, 1, 8, 8)",
        "| class | BypassPrecond |",
        "| network | SongUNet |",
        "## training",
        "| steps | 100 |",
        "| optimizer | adam |",
        "| 1 | 0.25 |",
        '"a": 1',
    ):
        assert line in card.text, line
    assert "| sigma_gate | " in card.text
    parameters = sum(p.numel() for p in model.parameters())
    assert f"| parameters | {parameters:,} |" in card.text


@pytest.mark.parametrize("given", ["someone/digits", "digits"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained", "of its folder"])
def test_the_card_names_its_repository(
    given: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name alone gets its owner from the hub."""
    made: list[tuple[str, Any]] = []
    pushed: list[str] = []

    def create_repo(_: HfApi, *, repo_id: str, private: bool | None = None, **__: Any) -> Any:
        made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, **__: Any) -> str:
        pushed.append(repo_id)
        pushed.append((folder_path / "README.md").read_text())
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model, folder, line = denoiser("isotropic"), tmp_path / "digits", 'from_pretrained("someone/digits")'
    if way == "push_to_hub":
        assert model.push_to_hub(given, private=True) == "url"
    else:
        repository = {"repo_id": given} if way == "save_pretrained" else {}
        assert model.save_pretrained(folder, push_to_hub=True, private=True, **repository) == "url"
        assert line in (folder / "README.md").read_text()
    assert pushed[0] == "someone/digits"
    assert line in pushed[1]
    assert {private for _, private in made} == {True}, "it is private from the first"
    own = {"model_card_kwargs": {"repo_id": "other/name"}}
    model.push_to_hub(given, **own)
    assert 'from_pretrained("other/name")' in pushed[-1]
    assert own == {"model_card_kwargs": {"repo_id": "other/name"}}


def test_the_card_of_a_folder_names_no_repository(tmp_path: Path) -> None:
    denoiser("isotropic").save_pretrained(tmp_path)
    assert 'from_pretrained("path or id of this repository")' in (tmp_path / "README.md").read_text()


@every
def test_every_denoiser_has_a_card(name: str) -> None:
    card = denoiser(name).generate_model_card()
    assert f"# {type(denoiser(name)).__name__} of (1, 8, 8)" in card.text
    assert "{{" not in card.text


def test_parameters_can_be_trained_after_loading(tmp_path: Path) -> None:
    denoiser("bypass", torch.float32).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert len(list(loaded.parameters())) > 0
    assert all(p.requires_grad for p in loaded.parameters())
    assert {key.split(".")[0] for key, _ in loaded.named_parameters()} == {"model"}


def test_config_names_class_arguments_and_version(tmp_path: Path) -> None:
    denoiser("bypass").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == {"class_name", "arguments", "gaussnet_version"}
    assert (config["class_name"], config["gaussnet_version"]) == ("BypassPrecond", gaussnet.__version__)
    assert config["arguments"]["network"]["class_name"] == "SongUNet"
    assert config["arguments"]["gate"] == {"class_name": "Gate", "arguments": {"shape": [3]}}
    assert "pickle" not in str(list(tmp_path.iterdir()))


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    for name in ("mixture-kmeans", "isotropic"):
        denoiser(name).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, GaussianDenoiser)
    assert loaded(noised(0.5), 0.5).equal(denoiser("isotropic")(noised(0.5), 0.5))


def test_a_card_is_replaced_unless_it_was_edited(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for name, kind in (("mixture-kmeans", "GaussianMixtureDenoiser"), ("isotropic", "GaussianDenoiser")):
        denoiser(name).save_pretrained(tmp_path)
        assert f"# {kind} of" in card.read_text()
    made = card.read_text()
    for mine in ("mine alone", made.replace("A denoiser", "My denoiser"), made + "and more\n"):
        assert mine != made
        card.write_text(mine)
        denoiser("mixture-kmeans").save_pretrained(tmp_path)
        assert card.read_text() == mine


def test_views_of_shared_memory_are_saved(tmp_path: Path) -> None:
    numbers = torch.arange(1.0, 8.0)
    g = GaussianDenoiser(numbers[:3], Covariance(torch.eye(3)[:, :2], numbers[3:5], numbers[6]))
    g.save_pretrained(tmp_path)
    x = torch.ones(2, 3)
    assert from_pretrained(tmp_path)(x, 0.5).equal(g(x, 0.5))


def test_settings_are_restored(tmp_path: Path) -> None:
    DeltaDenoiser(torch.rand(5, 3), torch.arange(5), chunk_size=17).save_pretrained(tmp_path / "delta")
    delta = DeltaDenoiser.from_pretrained(tmp_path / "delta")
    assert delta.chunk_size == 17
    assert delta.data_labels is not None
    assert delta.data_labels.tolist() == [0, 1, 2, 3, 4]
    EDMPrecond(tiny_unet(), sigma_data=0.7).save_pretrained(tmp_path / "edm")
    assert EDMPrecond.from_pretrained(tmp_path / "edm").sigma_data == 0.7
    model = BypassPrecond(tiny_unet(), gaussian(event_shape=EVENT), show_gaussian=False, base="gaussian")
    model.float().save_pretrained(tmp_path / "bypass")
    loaded = BypassPrecond.from_pretrained(tmp_path / "bypass")
    assert (loaded.show_gaussian, loaded.base, loaded.gate) == (False, "gaussian", None)


# Errors -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved Gaussian of rank 10."""
    denoiser("gaussian-rank-10", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_wrong_class(saved: Path) -> None:
    with pytest.raises(TypeError, match="holds a GaussianDenoiser, expected a GaussianMixtureDenoiser"):
        GaussianMixtureDenoiser.from_pretrained(saved)
    with pytest.raises(TypeError, match="holds a GaussianDenoiser, expected a EDMPrecond"):
        EDMPrecond.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*folder that save_pretrained wrote"):
        from_pretrained(saved)


@pytest.mark.parametrize("load", [from_pretrained, GaussianDenoiser.from_pretrained])
def test_no_such_folder(load: Any, tmp_path: Path) -> None:
    for name in ("nothing", "a/b/c", "nobody/nothing", tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match=f"no folder {name}, and no such model"):
            load(name)


@pytest.mark.parametrize(
    "content", [b"", b"not a safetensors file", bytes([8, 0, 0, 0, 0, 0, 0, 0]) + b"{}{}{}{}"]
)
def test_corrupted_weights(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit its config.json"):
        from_pretrained(saved)


def test_truncated_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors does not fit"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": [1, 8, 8], "rank": 11}, r"does not fit its config.json.*size mismatch"),
        ({"event_shape": [1, 8, 4], "rank": 10}, "size mismatch"),
        ({"event_shape": [1, 4, 16], "rank": 10}, "size mismatch"),
        ({"event_shape": [1, 8, 8]}, r"GaussianDenoiser: cannot be built .*: KeyError\('rank'\)"),
        ({"event_shape": "wide", "rank": 10}, "cannot be built from its arguments: TypeError"),
        ([], "cannot be built from its arguments"),
    ],
    ids=["rank", "size", "shape", "missing", "type", "list"],
)
def test_config_that_disagrees(saved: Path, arguments: Any, message: str) -> None:
    edit_config(saved, arguments=arguments)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_pretrained(saved)


def test_tensors_that_disagree(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit its config.json.*surplus"):
        from_pretrained(saved)
    save_file({key: value for key, value in tensors.items() if key != "mean"}, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit its config.json.*mean"):
        from_pretrained(saved)


def test_weights_that_are_no_numbers(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["mean"][0, 0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"does not fit its config.json: expected numbers, got NaN in mean$"):
        from_pretrained(saved)


def test_integers_in_the_place_of_floats(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    for dtype in (torch.int32, torch.float8_e4m3fn):
        save_file({**tensors, "mean": torch.zeros_like(tensors["mean"]).to(dtype)}, path)
        message = rf"does not fit its config.json: mean: expected numbers as torch.float32, got {dtype}$"
        with pytest.raises(ValueError, match=message):
            from_pretrained(saved)
    save_file({**tensors, "mean": tensors["mean"].to(torch.bfloat16)}, path)
    assert from_pretrained(saved).mean.dtype == torch.bfloat16, "the stored precision is kept"


@pytest.mark.parametrize("provenance", ["digits", [1, 2], None])
def test_provenance_that_is_no_object(saved: Path, provenance: Any) -> None:
    edit_config(saved, provenance=provenance)
    message = f"^{saved}: expected provenance to be an object, got {re.escape(repr(provenance))}$"
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved)


def test_unknown_class(saved: Path) -> None:
    edit_config(saved, class_name="os.system")
    with pytest.raises(ValueError, match=r"unknown class_name 'os.system'; expected one of .*Gaussian"):
        from_pretrained(saved)


@pytest.mark.parametrize("content", ["{}", '{"class_name": "Gate"}', "not json", "[1, 2]"])
def test_malformed_config(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"class_name and arguments|not valid JSON: Expecting|expected a JSON object, got a list",
    ):
        from_pretrained(saved)


# Registry -----------------------------------------------------------------------------------------


class Plain(nn.Module):
    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return x[:, :1]


@register
class Scale(nn.Module):
    """A network of one's own: a learned factor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((size,), 0.3))

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.factor * x[:, :1]

    def to_arguments(self) -> dict[str, Any]:
        return {"size": len(self.factor)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(**arguments)


def test_unregistered_networks_cannot_be_saved(tmp_path: Path) -> None:
    model = BypassPrecond(Plain(), denoiser("isotropic"))
    with pytest.raises(TypeError, match=r"Plain cannot be saved: decorate .* @gaussnet.hub.register"):
        model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected Plain to have to_arguments and from_arguments"):
        register(Plain)


def test_registered_networks_round_trip(tmp_path: Path) -> None:
    model, x = BypassPrecond(Scale(8), denoiser("gaussian-full")), noised(0.5)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded(x, 0.5).equal(model(x, 0.5))
    assert relative_error(loaded(x, 0.5), model.untrained(x, 0.5)) > 1e-6


def test_describe_and_build_are_inverse() -> None:
    gate = Gate(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    assert describe(build(describe(gate))) == describe(gate)
    with pytest.raises(ValueError, match="mapping with class_name and arguments, got 3"):
        build(3)  # pyright: ignore[reportArgumentType]


def test_slices_of_one_array_are_saved_each(tmp_path: Path) -> None:
    data = torch.linspace(-1, 1, 12).reshape(6, 2)
    guided = GuidedDenoiser(DeltaDenoiser(data[3:]), DeltaDenoiser(data), w=2.0)
    guided.save_pretrained(tmp_path)
    x = torch.zeros(1, 2)
    assert torch.equal(gaussnet.from_pretrained(tmp_path)(x, 0.5), guided(x, 0.5))
