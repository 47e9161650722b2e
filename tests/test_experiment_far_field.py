"""The far field: errors in closed form, and the slopes that theory gives them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaussnet import open_images
from gaussnet.data import ImageData
from gaussnet.experiments import Setting, defaults, far_field, run
from gaussnet.experiments.far_field import APPROXIMATIONS, error_from, slope
from gaussnet.experiments.running import Row

FAR = {"ratios": [0.3, 4.0, 8.0, 16.0], "queries": 32}


def cross() -> ImageData:
    """The 2 D points -e_k and e_k, D = 4: mean 0, covariance I/4, tr Sigma = 1."""
    points = torch.cat([torch.eye(4), -torch.eye(4)]).reshape(8, 1, 2, 2)
    return ImageData(points, scaling="none", name="cross")


def digits(mirrored: bool = False) -> ImageData:
    data = open_images("digits")
    images = data.to_float(data.raw(range(300)))
    both = torch.cat([images, -images]) if mirrored else images
    return ImageData(both, scaling="none", name="digits")


def rows_of(setting: Setting, **changed: Any) -> list[Row]:
    options = defaults(far_field, **{**FAR, **changed})
    units = far_field.units(setting, options)
    return [row for unit in units for row in far_field.measure(setting, options, unit)]


def pick(rows: list[Row], kind: str, approximation: str) -> list[Row]:
    return [row for row in rows if (row["queries"], row["approximation"]) == (kind, approximation)]


def test_errors_of_an_isotropic_gaussian() -> None:
    """With Sigma = I/4, the errors are exactly lam/sigma^2 and its square, at any query."""
    rows = rows_of(Setting("gaussian", cross(), shrinkage="none"))
    assert len(rows) == 4 * 2 * 3
    for row in rows:
        assert row["sigma"] == pytest.approx(row["ratio"]), "tr Sigma is 1"
        assert row["top"] == pytest.approx(0.5)
        first = 0.25 / row["sigma"] ** 2
        expected = {"order-1": first, "order-2": first**2, "gaussian": 0.0}[row["approximation"]]
        assert row["error"] == pytest.approx(expected, rel=1e-3, abs=1e-7), row


def test_levels_are_relative_to_the_radius() -> None:
    """Four axes with variances .81/4 and three times .09/4."""
    points = torch.diag(torch.tensor([0.9, 0.3, 0.3, 0.3]))
    data = ImageData(torch.cat([points, -points]).reshape(8, 1, 2, 2), scaling="none", name="long cross")
    for row in rows_of(Setting("delta", data)):
        assert row["sigma"] == pytest.approx(row["ratio"] * 0.27**0.5)
        assert row["top"] == pytest.approx(0.75**0.5)


@pytest.mark.parametrize(
    ("mirrored", "expected"), [(False, (-2, -3, -3)), (True, (-2, -4, -4))], ids=["data", "symmetric data"]
)
def test_slopes_of_the_data_set(mirrored: bool, expected: tuple[int, int, int]) -> None:
    rows = rows_of(Setting("delta", digits(mirrored)))  # cross-validated eigenvalues would leave -2
    for kind in ("noised", "noise"):
        slopes = [slope(pick(rows, kind, name), 4.0) for name in APPROXIMATIONS]
        assert slopes == pytest.approx(expected, abs=0.1), kind


def test_slope() -> None:
    rows = [{"ratio": x, "error": 3 * x**-2.5} for x in (2.0, 4.0, 8.0)] + [{"ratio": 1.0, "error": 9.0}]
    assert slope(rows, 2.0) == pytest.approx(-2.5)
    assert slope(rows, 8.0) is None
    assert slope([{"ratio": 2.0, "error": 0.0}, *rows[1:2]], 2.0) is None


def test_error_from() -> None:
    errors = {0.1: 0.05, 0.2: 0.3, 0.5: 0.08, 1.0: 0.01}  # small by chance at 0.1
    rows = [{"ratio": ratio, "error": error} for ratio, error in errors.items()]
    assert error_from(rows, 0.1) == 0.5
    assert error_from(rows, 0.01) is None
    assert error_from(rows, 0.5) == 0.1, "from the lowest measured on"
    assert error_from([], 0.5) is None


def test_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = defaults(far_field, **FAR)
    one = Setting("delta", cross())
    assert far_field.units(one, options) == ["queries=noised", "queries=noise"]
    reading = run("far-field", far_field, one, options, tmp_path)
    for suffix in ("csv", "png", "pdf", "md"):
        assert (tmp_path / f"far-field.{suffix}").stat().st_size > 100, suffix
    lines = (tmp_path / "far-field.csv").read_text().splitlines()
    assert lines[0] == "ratio,sigma,queries,approximation,error,count,top"
    assert len(lines) == 1 + 4 * 2 * 3
    assert [list(row) for row in reading.table] == [["ratio", "sigma", *APPROXIMATIONS]] * 4
    assert "from 3 up: order-1 -2.00, order-2 -" in reading.text
    assert "at a ratio of 0.5." in reading.text
    assert "order-1 errs by less than 10% from 4 up." in reading.text
    monkeypatch.setattr(far_field, "ScoreProbe", pytest.fail)
    assert run("far-field", far_field, one, options, tmp_path) == reading


def test_figure() -> None:
    rows = [
        {"ratio": ratio, "error": scale / ratio, "queries": "noise", "approximation": name, "top": 0.4}
        for ratio in (1.0, 10.0)
        for name, scale in (("order-2", 2.0), ("gaussian", 0.0), ("order-1", 1.0))
    ]
    figure = far_field.draw(rows, defaults(far_field))
    (panel,) = figure.axes
    first, second, mark = panel.get_lines()
    assert first.get_xydata() == pytest.approx(torch.tensor([[1.0, 1.0], [10.0, 0.1]]).numpy())
    assert second.get_ydata() == pytest.approx([2.0, 0.2])
    assert list(mark.get_xdata()) == [0.4, 0.4]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["order-1", "order-2", r"$\sqrt{\lambda_{max}}$", "far field"], "no line at 0"
    (panel,) = far_field.draw(rows, defaults(far_field, far=10.0)).axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == labels[:-1], "none was measured"
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        far_field.draw([], defaults(far_field))


@pytest.mark.parametrize("changed", [{"ratios": [0.0]}, {"far": 0.0}, {"queries": 0}], ids=str)
def test_experiment_refuses(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected ratios > 0, far > 0 and queries >= 1"):
        far_field.units(Setting("delta", cross()), defaults(far_field, **changed))
