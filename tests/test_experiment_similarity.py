"""Distances between samples from the same noise: the distances themselves, and the experiment."""

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest
import torch
from cases import DTYPES, digits, randn
from torch import Tensor, nn

from gaussnet import GaussianDenoiser, heun, karras_sigmas
from gaussnet.data import ImageData
from gaussnet.experiments import Setting, defaults, run, sample_similarity
from gaussnet.metrics import perceptual, to_uint8
from gaussnet.metrics.perceptual import PerceptualDistance, SquaredError, load_distance
from gaussnet.plots import similarity as plots

NAME = "sample-similarity"


class Absolute(nn.Module):
    """Stands in for a network: the mean absolute difference, and what it was given."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.given: list[Tensor] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.given += [a, b]
        return self.weight * (a - b).abs().mean((1, 2, 3), keepdim=True)


def setting(model: str = "gaussian", shape: tuple[int, ...] = (1, 8, 8), **changes: Any) -> Setting:
    pixels = digits()[0][:120].float().expand(-1, shape[0], -1, -1).clone()
    return Setting(model, ImageData(pixels, name="digits"), **{"shrinkage": "none", **changes})


def options(**changes: Any) -> Any:
    small = {"samples": 5, "steps": 6, "references": ["gaussian", "isotropic"], "examples": 2}
    return defaults(sample_similarity, **{**small, **changes})


def fake_lpips(monkeypatch: pytest.MonkeyPatch, network: Any) -> None:
    module = ModuleType("lpips")
    module.LPIPS = network  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lpips", module)


# Distances ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_error_by_hand(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 2, 3, 4], dtype=dtype).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    b = torch.zeros_like(a)
    b[1] = 1
    found = load_distance("mse")(a, b)
    assert found.tolist() == [30 / 4, (0 + 1 + 4 + 9) / 4]
    assert found.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_network_is_given(channels: int, dtype: torch.dtype) -> None:
    network = Absolute()
    a, b = 2 * randn(3, channels, 8, 8, dtype=dtype), randn(3, channels, 8, 8, seed=1, dtype=dtype)
    found = PerceptualDistance(network, size=16)(a, b)
    assert [tuple(given.shape) for given in network.given] == [(3, 3, 16, 16)] * 2
    assert all(given.dtype == torch.float32 and given.abs().max() <= 1 for given in network.given)
    assert found.shape == (3,)
    assert not found.requires_grad
    expected = [
        torch.nn.functional.interpolate(part.clamp(-1, 1).float(), (16, 16), mode="bilinear")
        for part in (a, b)
    ]
    torch.testing.assert_close(network.given[0], expected[0].expand(-1, 3, -1, -1))
    torch.testing.assert_close(network.given[1], expected[1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, (expected[0] - expected[1]).abs().mean((1, 2, 3)))


def test_images_as_they_are() -> None:
    network = Absolute()
    a, b = randn(2, 3, 8, 8).clamp(-1, 1).float(), torch.zeros(2, 3, 8, 8)
    PerceptualDistance(network, size=None)(a, b)
    assert torch.equal(network.given[0], a)


def test_a_large_image_is_smoothed_before_it_shrinks() -> None:
    network = Absolute()
    stripes = torch.tensor([-1.0, -1, -1, 1, 1, -1, -1, -1]).repeat(8).expand(1, 1, 64, 64)
    PerceptualDistance(network, size=8)(stripes, stripes)
    assert float(network.given[0].max()) < 0, "pixels between those that are kept do not count"


@pytest.mark.parametrize("distance", [SquaredError(), PerceptualDistance(Absolute())])
def test_images_that_are_no_pairs(distance: nn.Module) -> None:
    for shapes in (((2, 1, 8, 8), (3, 1, 8, 8)), ((1, 8, 8), (1, 8, 8))):
        with pytest.raises(ValueError, match="two batches of images"):
            distance(*(torch.zeros(shape) for shape in shapes))


def test_images_and_networks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"grey or RGB images \(B, 1 or 3, H, W\), got \(1, 2, 8, 8\)"):
        PerceptualDistance(Absolute())(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="size >= 1, got 0"):
        PerceptualDistance(Absolute(), size=0)

    class Whole(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).mean()

    with pytest.raises(ValueError, match=r"Whole: expected 2 distances, got \(\)"):
        PerceptualDistance(Whole())(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("name", ["alex", "vgg", "squeeze"])
def test_lpips_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def network(**arguments: Any) -> nn.Module:
        asked.update(arguments)
        return Absolute()

    fake_lpips(monkeypatch, network)
    distance = load_distance(f"lpips-{name}")
    assert asked == {"net": name, "verbose": False}
    assert not distance.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    distance(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    network_inside: Any = distance.network
    assert tuple(network_inside.given[0].shape) == (1, 3, 224, 224)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("alex", "alexnet-owt-7be5be79.pth"),
        ("vgg", "vgg16-397923af.pth"),
        ("squeeze", "squeezenet1_1-b8a52dc0.pth"),
    ],
)
def test_weights_that_cannot_be_downloaded(
    name: str, file: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(**_: Any) -> nn.Module:
        raise error

    fake_lpips(monkeypatch, network)
    with pytest.raises(FileNotFoundError, match=f"lpips-{name}: no weights in .*{file}.*Get them from https"):
        load_distance(f"lpips-{name}")


def test_lpips_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"lpips-vgg needs lpips: pip install 'gaussnet\[eval\]'"):
        load_distance("lpips-vgg")


def test_unknown_distances() -> None:
    with pytest.raises(ValueError, match="among mse, lpips-alex, lpips-vgg, lpips-squeeze, got 'ssim'"):
        load_distance("ssim")


def test_lpips_itself() -> None:
    lpips = pytest.importorskip("lpips")
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    a, b = (randn(2, 1, 8, 8, seed=seed).clamp(-1, 1) for seed in (0, 1))
    distance = PerceptualDistance(network)
    assert distance(a, a).abs().max() < 1e-6
    assert distance(a, b).min() > 1e-4


# The experiment -----------------------------------------------------------------------------------


def measured(
    model: str = "gaussian", unit: str = "samples=0-4", batch: int = 256, **changes: Any
) -> list[Any]:
    return sample_similarity.measure(setting(model, batch=batch), options(**changes), unit)


def distances(rows: list[Any], reference: str, metric: str = "mse") -> list[float]:
    return [row["distance"] for row in rows if (row["reference"], row["metric"]) == (reference, metric)]


def test_a_model_is_like_itself() -> None:
    rows = measured(solver="dop853")
    assert len(distances(rows, "gaussian")) == 5
    assert max(distances(rows, "gaussian")) < 1e-9
    assert min(distances(rows, "isotropic")) > 1e-2


def test_distances_in_closed_form() -> None:
    own = setting()
    rows = measured()
    sigmas = karras_sigmas(6)
    for seed in (0, 3):
        x = 80 * own.noise(1, "sample", seed)
        for name in ("gaussian", "isotropic"):
            reference = own.reference(name)
            assert isinstance(reference, GaussianDenoiser)
            end = reference(reference.flow(x, 80.0, 0.002), 0.002)
            expected = (heun(own.model, x, sigmas, dtype=torch.float64) - end).square().mean()
            assert distances(rows, name)[seed] == pytest.approx(float(expected), rel=1e-4), name


def test_a_sample_does_not_depend_on_its_unit_or_batch() -> None:
    whole, small = measured(), measured(batch=2)
    late = measured(unit="samples=3-4")
    for name in ("gaussian", "isotropic"):
        assert distances(small, name) == pytest.approx(distances(whole, name), rel=1e-4, abs=1e-9)
        assert distances(late, name) == pytest.approx(distances(whole, name)[3:], rel=1e-4, abs=1e-9)


def test_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_similarity, "CHUNK", 2)
    assert sample_similarity.units(setting(), options()) == ["samples=0-1", "samples=2-3", "samples=4-4"]


def test_several_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_lpips(monkeypatch, Absolute)
    rows = measured(metrics=["mse", "lpips-alex"])
    for name in ("gaussian", "isotropic"):
        assert len(distances(rows, name, "lpips-alex")) == 5
    assert distances(rows, "isotropic", "lpips-alex") != distances(rows, "isotropic")


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_the_samples(channels: int) -> None:
    own = setting(shape=(channels, 8, 8))
    rows = sample_similarity.measure(own, options(), "samples=0-4")
    shown = [row for row in rows if row["metric"] == "image"]
    assert [(row["reference"], row["seed"]) for row in shown] == [
        (name, seed) for name in ("model", "gaussian", "isotropic") for seed in (0, 1)
    ]
    x = 80 * own.noise(1, "sample", 1)
    sample = heun(own.model, x, karras_sigmas(6), dtype=torch.float64)[0]
    pixels = torch.from_numpy(sample_similarity.decoded(shown[1]["image"]).copy())
    expected = to_uint8(sample)[0] if channels == 1 else to_uint8(sample).permute(1, 2, 0)
    assert pixels.shape == expected.shape
    assert int((pixels.int() - expected.int()).abs().max()) <= 1
    assert not [row for row in measured(unit="samples=2-4") if row["metric"] == "image"]


def test_it_writes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_similarity, "CHUNK", 3)
    reading = run(NAME, sample_similarity, setting(), options(), tmp_path)
    files = [tmp_path / f"{NAME}{suffix}" for suffix in (".csv", ".png", ".pdf", ".md")]
    assert all(file.stat().st_size > 0 for file in files)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["metric"] == "mse"]) == 2 * 5
    assert len([row for row in rows if row["metric"] == "image"]) == 3 * 2
    with monkeypatch.context() as patched:
        patched.setattr(sample_similarity, "measure", lambda *_: pytest.fail("measured twice"))
        assert run(NAME, sample_similarity, setting(), options(), tmp_path) == reading


def test_reading() -> None:
    values = {"gaussian": [0.3, 0.5, 0.4, 0.6, 0.5, 0.4], "delta": [0.7, 0.8, 0.9, 0.9, 0.7, 0.85]}
    values["classes"] = [0.31, 0.48, 0.42, 0.57, 0.5, 0.41]
    rows = [
        {"seed": seed, "reference": name, "metric": "mse", "distance": value}
        for name, column in values.items()
        for seed, value in enumerate(column)
    ]
    chosen = options(references=["delta", "gaussian", "classes"], samples=6)
    table, text = sample_similarity.read(rows, chosen)
    assert [(row["nearer"], row["farther"]) for row in table] == [
        ("classes", "gaussian"),
        ("classes", "delta"),
        ("gaussian", "delta"),
    ]
    assert table[2]["mean"] == pytest.approx((2.7 - 4.85) / 6)
    assert table[2]["low"] < table[2]["mean"] < table[2]["high"] < 0
    assert table[2]["p_value"] == pytest.approx(2 / 2**6)
    assert "classes and gaussian do not differ significantly" in text
    assert "classes 0.4483, gaussian 0.45, delta 0.8083" in text


@pytest.mark.parametrize("changes", [{"samples": 1}, {"steps": 1}, {"examples": -1}])
def test_impossible_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected samples >= 2, steps >= 2 and examples >= 0"):
        sample_similarity.units(setting(), options(**changes))


def test_a_missing_metric_fails_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="needs lpips"):
        sample_similarity.units(setting(), options(metrics=["lpips-alex"]))


def test_default_metric_needs_nothing() -> None:
    assert defaults(sample_similarity).metrics == ["mse"]
    assert perceptual.DISTANCES == ("mse", "lpips-alex", "lpips-vgg", "lpips-squeeze")


def test_figure() -> None:
    rows = [
        {"metric": metric, "reference": name, "distance": value}
        for metric in ("mse", "lpips-alex")
        for name, value in (("gaussian", 1.0), ("gaussian", 2.0), ("delta", 3.0), ("delta", 3.0))
    ]
    picture = to_uint8(randn(8, 8, 3).float()).numpy()
    figure = plots.sample_similarity(rows, {"model": [picture] * 2, "delta": [picture] * 2})
    panels = [axis for part in figure.subfigs for axis in part.axes]
    assert [axis.get_title() for axis in panels[:2]] == ["mse", "lpips-alex"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["gaussian", "delta"]
    assert [line.get_ydata()[0] for line in panels[0].get_lines()] == [1.5, 3.0]
    assert [axis.get_ylabel() for axis in panels[2:]] == ["model", "delta"]
    assert panels[2].get_images()[0].get_array().shape == (8, 17, 3)
    plots.pyplot().close(figure)
    bare = plots.sample_similarity(rows)
    assert len(bare.subfigs) == 1
    plots.pyplot().close(bare)
    with pytest.raises(ValueError, match="got none"):
        plots.sample_similarity([])
