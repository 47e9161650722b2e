"""Learning dynamics from a run's folder, complete or still going."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from gaussnet import GaussianDenoiser, ImageData
from gaussnet.experiments import Setting, defaults, learning_dynamics, run
from gaussnet.plots.runs import dynamics_panels
from gaussnet.plots.runs import learning_dynamics as save_dynamics
from gaussnet.probes import ScoreProbe

STEPS = (0, 10, 100)
# Deviations from each reference at these steps: left again, still falling, growing from the start.
MEANS = {"gaussian": (0.5, 0.1, 0.4), "delta": (0.9, 0.8, 0.7), "isotropic": (0.2, 0.3, 0.6)}


def run_folder(folder: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """What a run has written by the last of these steps."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    with (folder / "probes.csv").open("w", newline="") as file:
        names = ("step", "weights", "sigma", "queries", "reference", "quantity", "mean", "std", "count")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for place, step in enumerate(steps):
            for sigma in (0.5, 5.0):
                for reference, means in MEANS.items():
                    for weights, quantity, kind, scale in (
                        ("ema", "score", "noised", 1.0),
                        ("raw", "score", "noised", 2.0),
                        ("ema", "denoiser", "noised", 3.0),
                        ("ema", "score", "noise", 4.0),
                    ):
                        mean = scale * means[place] / sigma
                        writer.writerow((step, weights, sigma, kind, reference, quantity, mean, 0.1, 20))
    return folder


def going(folder: Path) -> Any:
    """A setting that names a run without a saved model."""
    return SimpleNamespace(model_name=str(folder), identity={"model": str(folder)}, data=None)


def test_experiment_on_a_complete_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = run_folder(tmp_path / "run"), tmp_path / "out"
    GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0).save_pretrained(folder)
    reading = run("dynamics", learning_dynamics, Setting(str(folder)), defaults(learning_dynamics), out)
    for suffix in ("csv", "png", "pdf", "md"):
        assert (out / f"dynamics.{suffix}").stat().st_size > 100, suffix
    assert len((out / "dynamics.csv").read_text().splitlines()) == 1 + 3 * 2 * 3
    assert reading.table == [
        {
            "sigma": sigma,
            "isotropic": f"{0.2 / sigma:.3g} @ 0 -> {0.6 / sigma:.3g}",
            "gaussian": f"{0.1 / sigma:.3g} @ 10 -> {0.4 / sigma:.3g}",
            "delta": f"{0.7 / sigma:.3g} @ 100",
        }
        for sigma in (0.5, 5.0)
    ]
    assert "The steps are 0 to 100." in reading.text
    assert "It approached gaussian and left it again at sigma = 0.5, 5." in reading.text
    assert "It approached delta and left it again at no level." in reading.text
    assert "It approached isotropic and left it again at no level." in reading.text, "it began there"


@pytest.mark.parametrize(
    ("changed", "scale"),
    [({"weights": "raw"}, 2.0), ({"quantity": "denoiser"}, 3.0), ({"kind": "noise"}, 4.0)],
    ids=str,
)
def test_options_pick_rows(changed: dict[str, str], scale: float, tmp_path: Path) -> None:
    options = defaults(learning_dynamics, **changed)
    rows = learning_dynamics.measure(going(run_folder(tmp_path / "run")), options, "")
    assert len(rows) == 3 * 2 * 3
    delta = [row["mean"] for row in rows if (row["reference"], row["sigma"]) == ("delta", 0.5)]
    assert delta == pytest.approx([2 * scale * mean for mean in MEANS["delta"]])
    axis = learning_dynamics.draw(rows, options).axes[0]
    line = next(line for line in axis.get_lines() if line.get_label() == "delta")
    assert list(line.get_ydata()) == pytest.approx(delta)


def test_tolerance() -> None:
    rows = [
        {"step": step, "weights": "ema", "sigma": 1.0, "queries": "noised", "reference": "gaussian",
         "quantity": "score", "mean": mean}
        for step, mean in ((0, 1.0), (5, 0.5), (9, 0.54))
    ]  # fmt: skip
    for tol, cell in ((0.05, "0.5 @ 5 -> 0.54"), (0.1, "0.5 @ 5")):
        (row,) = learning_dynamics.read(rows, defaults(learning_dynamics, tol=tol)).table
        assert row["gaussian"] == cell


def test_a_reference_that_a_level_lacks() -> None:
    rows = [
        {"step": step, "weights": "ema", "sigma": sigma, "queries": "noised", "reference": reference,
         "quantity": "score", "mean": 1.0 / (1 + step)}
        for step in (0, 5)
        for sigma, reference in ((1.0, "gaussian"), (2.0, "gaussian"), (2.0, "delta"))
    ]  # fmt: skip
    first, second = learning_dynamics.read(rows, defaults(learning_dynamics)).table
    assert first == {"sigma": 1.0, "gaussian": "0.167 @ 5", "delta": "-"}
    assert second == {"sigma": 2.0, "gaussian": "0.167 @ 5", "delta": "0.167 @ 5"}


def test_a_run_that_is_going_is_read_again(tmp_path: Path) -> None:
    folder, out, options = tmp_path / "run", tmp_path / "out", defaults(learning_dynamics)
    run_folder(folder, STEPS[:2])
    with (folder / "probes.csv").open("a") as file:
        file.write("100,ema,0.5,noised,gaus")  # the writer was cut off
    early = run("dynamics", learning_dynamics, going(folder), options, out)
    assert [row["gaussian"] for row in early.table] == ["0.2 @ 10", "0.02 @ 10"]
    assert run("dynamics", learning_dynamics, going(folder), options, out) == early
    assert len(list(out.glob("parts/*/*.json"))) == 1, "nothing new was measured"
    run_folder(folder)
    late = run("dynamics", learning_dynamics, going(folder), options, out)
    assert [row["gaussian"] for row in late.table] == ["0.2 @ 10 -> 0.8", "0.02 @ 10 -> 0.08"]


def test_experiment_refuses(tmp_path: Path) -> None:
    options = defaults(learning_dynamics)
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a run, got .*nowhere"):
        learning_dynamics.units(going(tmp_path / "nowhere"), options)
    folder = run_folder(tmp_path / "run", ())
    with pytest.raises(ValueError, match=r"queries='noised' in .*probes\.csv, got none"):
        learning_dynamics.units(going(folder), options)
    with pytest.raises(ValueError, match="expected tol >= 0, got -1"):
        learning_dynamics.units(going(folder), defaults(learning_dynamics, tol=-1.0))
    images = ImageData(torch.zeros(4, 1, 2, 2), scaling="none", name="others")
    with pytest.raises(ValueError, match="no --data, as the run has measured on its own, got others"):
        learning_dynamics.units(Setting("gaussian", images), options)


def test_the_rows_of_a_probe_fit(tmp_path: Path) -> None:
    """What ScoreProbe measures is what a run writes."""
    model = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
    other = GaussianDenoiser.isotropic(torch.ones(1, 2, 2), 1.0)
    rows = ScoreProbe({"gaussian": other}, torch.zeros(3, 1, 2, 2), [1.0])(model)
    probed = [{"step": step, "weights": "ema", **row} for step in (0, 3) for row in rows]
    with (run_folder(tmp_path / "run") / "probes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, probed[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(probed)
    read = learning_dynamics.measure(going(tmp_path / "run"), defaults(learning_dynamics), "")
    expected = [row["mean"] for row in probed if (row["quantity"], row["queries"]) == ("score", "noised")]
    assert [row["mean"] for row in read] == expected


def test_the_saved_picture_is_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = learning_dynamics.measure(
        going(run_folder(tmp_path / "run")), defaults(learning_dynamics, weights="raw"), ""
    )
    figure = dynamics_panels(rows, weights="raw")
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "a.png", dpi=130)
    save_dynamics(rows, tmp_path / "b.png", weights="raw")
    figure_made, saved = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(figure_made, saved)
