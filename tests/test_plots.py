"""Figures: what is drawn, and that it is written."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from gaussnet import plots
from gaussnet.plots.style import colours

REFERENCES = ("delta", "mixture-50", "isotropic", "mixture-2", "marginal", "gaussian", "mixture-10")


@pytest.fixture(autouse=True)
def no_figures() -> None:
    """Other tests may have left some open."""
    pyplot.close("all")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def probe_rows(sigmas: tuple[float, ...] = (0.1, 1.0, 10.0, 20.0, 80.0)) -> list[dict[str, str]]:
    """A run's probes.csv: all references but delta are closest at step 10."""
    return [
        {
            "step": str(step),
            "weights": weights,
            "sigma": str(sigma),
            "queries": kind,
            "reference": reference,
            "quantity": quantity,
            "mean": str(mean * scale),
        }
        for step, mean in ((100, 0.5), (0, 1.0), (10, 0.2))
        for sigma in sigmas
        for reference in REFERENCES
        for quantity in ("score", "denoiser")
        for weights, scale in (("raw", 1.0), ("ema", 2.0))
        for kind in ("noised", "noise")
        for scale in [scale * (3.0 if kind == "noise" else 1.0) * (7.0 if quantity == "denoiser" else 1.0)]
    ]


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len(colours) > 10, "an empty picture"
    assert not pyplot.get_fignums(), "a figure is left open"


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"weights": "raw"}, 1.0),
        ({"kind": "noise"}, 6.0),
        ({"quantity": "denoiser"}, 14.0),
    ],
    ids=str,
)
def test_learning_dynamics(
    options: dict[str, str], scale: float, tmp_path: Path, drawn: list[Figure]
) -> None:
    path = tmp_path / "probes.png"
    plots.learning_dynamics(probe_rows(), path, **options)
    assert_picture(path)
    (figure,) = drawn
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [panel.get_title() for panel in panels] == [
        f"$\\sigma$ = {s}" for s in ("0.1", "1", "10", "20", "80")
    ]
    for panel in panels:
        curves = [line for line in panel.get_lines() if line.get_linestyle() != "None"]
        dots = [line for line in panel.get_lines() if line.get_linestyle() == "None"]
        assert len(curves) == len(dots) == len(REFERENCES)
        for line, dot in zip(curves, dots, strict=True):
            expected = [[0.5, scale], [10, 0.2 * scale], [100, 0.5 * scale]]
            assert np.asarray(line.get_xydata()) == pytest.approx(np.array(expected))
            assert np.asarray(dot.get_xydata()) == pytest.approx(np.array(expected[1:2]))
            assert to_rgb(dot.get_color()) == to_rgb(line.get_color())


def test_references_keep_their_colours_and_order(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.learning_dynamics(probe_rows((1.0,)), tmp_path / "probes.png")
    lines = [line for line in drawn[0].axes[0].get_lines() if line.get_linestyle() != "None"]
    names = ["isotropic", "gaussian", "marginal", "mixture-2", "mixture-10", "mixture-50", "delta"]
    assert [line.get_label() for line in lines] == names
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == names
    colours = {line.get_label(): to_rgb(line.get_color()) for line in lines}
    fixed = {"isotropic": "0.6", "gaussian": "tab:orange", "marginal": "tab:red", "delta": "black"}
    for name, colour in fixed.items():
        assert colours[name] == to_rgb(colour), name
    lightness = [sum(colours[name]) for name in names[3:6]]
    assert lightness == sorted(lightness, reverse=True)
    assert len(set(lightness)) == 3


def test_mixtures_are_graded_by_components_not_by_rank() -> None:
    names = ["mixture-100r8", "mixture-10r64", "mixture-10"]
    assert list(colours(names)) == ["mixture-10", "mixture-10r64", "mixture-100r8"]


def test_zeros_and_missing_curves_have_no_place(tmp_path: Path, drawn: list[Figure]) -> None:
    # An untrained bypass model is its base; delta was measured at one level only.
    rows = probe_rows((1.0, 2.0))
    for row in rows:
        if row["step"] == "0" and row["reference"] == "gaussian":
            row["mean"] = "0.0"
    rows = [row for row in rows if row["reference"] != "delta" or row["sigma"] == "2.0"]
    plots.learning_dynamics(rows, tmp_path / "probes.png")
    counts = [len(panel.get_lines()) for panel in drawn[0].axes]
    assert counts == [2 * 6 - 1, 2 * 7 - 1], "curves and dots, but no dot at 0"


def test_a_probe_that_is_nan_leaves_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    lost = [row | {"mean": "nan"} for row in probe_rows((1.0,)) if row["step"] == "100"]
    rows = [row for row in probe_rows((1.0,)) if row["step"] != "100"] + lost
    rows += [row | {"reference": "gone", "mean": "nan"} for row in lost if row["reference"] == "delta"]
    plots.learning_dynamics(rows, tmp_path / "probes.png")
    lines = drawn[0].axes[0].get_lines()
    assert len(lines) == 2 * len(REFERENCES) + 1, "a curve and a dot each, but of nothing but gaps a curve"
    (one,) = (line for line in lines if line.get_label() == "gaussian")
    assert np.isfinite(one.get_ydata()).tolist() == [True, True, False]


def test_no_rows_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantity='score', weights='best', queries='noised', got none"):
        plots.learning_dynamics(probe_rows(), tmp_path / "probes.png", weights="best")


@pytest.mark.parametrize("cast", [float, str])
def test_loss_curve(cast: Any, tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        {"step": cast(step), "loss": cast(1 / step), "lr": cast(1e-3), "images_per_second": cast(200 + step)}
        for step in (1, 10, 100)
    ]
    path = tmp_path / "loss.png"
    plots.loss_curve(rows, path)
    assert_picture(path)
    above, below = drawn[0].axes
    assert (above.get_xscale(), above.get_yscale()) == ("log", "log")
    assert (below.get_xscale(), below.get_yscale()) == ("log", "linear")
    for axis, expected in ((above, [1, 0.1, 0.01]), (below, [201, 210, 300])):
        (line,) = axis.get_lines()
        assert np.asarray(line.get_xydata()) == pytest.approx(np.array([(1, 10, 100), expected]).T)
    assert below.get_ylim() == pytest.approx((0, 330))


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    losses = ((1, 0.5), (10, None), (100, 0.25))
    rows = [{"step": step, "loss": loss, "images_per_second": 200.0} for step, loss in losses]
    plots.loss_curve(rows, tmp_path / "loss.png")
    (line,) = drawn[0].axes[0].get_lines()
    assert np.isfinite(line.get_ydata()).tolist() == [True, False, True]
    plots.loss_curve([{**row, "images_per_second": None} for row in rows[:1]] + rows[1:], tmp_path / "l.png")
    assert drawn[1].axes[1].get_ylim() == pytest.approx((0, 220)), "nor does a speed that is not known hurt"


def test_no_loss_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row of metrics"):
        plots.loss_curve([], tmp_path / "loss.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_image_rows(channels: int, tmp_path: Path) -> None:
    images = torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / "images.png"
    plots.image_rows({"a": images, "b": images[:3]}, path)
    assert_picture(path)
    with pytest.raises(ValueError, match="at least one row of images"):
        plots.image_rows({}, path)
    with pytest.raises(ValueError, match="in each an image"):
        plots.image_rows({"a": images, "b": images[:0]}, path)


def test_scores_of_another_quantity() -> None:
    rows = [{"quantity": "score", "queries": "noise", "reference": "delta", "sigma": 1.0, "mean": 0.5}]
    with pytest.raises(ValueError, match="expected rows of quantity 'denoiser', got none"):
        plots.score_deviation(rows, quantity="denoiser")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'gaussnet\[train\]'"):
        plots.loss_curve([{"step": 1, "loss": 0.5, "images_per_second": 200.0}], tmp_path / "loss.png")
