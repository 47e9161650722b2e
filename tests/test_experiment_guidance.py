"""Guidance of a conditional model against analytic denoisers of its classes."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import denoiser, digits, tiny_unet
from torch import Tensor

from gaussnet import EDMPrecond, GuidedDenoiser, heun, karras_sigmas
from gaussnet.data import ImageData
from gaussnet.experiments import EXPERIMENTS, Setting, defaults, guidance, run
from gaussnet.experiments.running import UNLABELLED
from gaussnet.experiments.setting import has_classes
from gaussnet.plots import trajectories as plots
from gaussnet.probes.trajectories import exact_trajectory, solver_trajectory

NAME = "guidance"
GRID = karras_sigmas(6)


def setting(model: str = "classes", labelled: bool = True, **changes: Any) -> Setting:
    images, labels = digits()
    mine = labels[:150] < 3
    data = ImageData(images[:150][mine].float(), labels[:150][mine] if labelled else None, name="digits")
    return Setting(model, data, **{"shrinkage": "none", **changes})


def options(**changes: Any) -> Any:
    small = {"weights": [0.0, 1.0, 2.0], "samples": 2, "steps": 6, "classes": [0, 2]}
    return defaults(guidance, **{**small, **changes})


def network(label_dim: int) -> EDMPrecond:
    return EDMPrecond(tiny_unet(label_dim=label_dim)).eval()


def saved(folder: Path, label_dim: int = 3) -> str:
    network(label_dim).save_pretrained(folder)
    return str(folder)


def errors(rows: list[Any], quantity: str = "state", **wanted: Any) -> Tensor:
    """Means over steps."""
    chosen = [row for row in rows if ({**wanted, "quantity": quantity}).items() <= row.items()]
    assert chosen, f"no rows of {wanted}"
    return torch.tensor([row["mean"] for row in chosen], dtype=torch.float64)


def measured(unit: str, model: str = "classes", batch: int = 256, **changes: Any) -> list[Any]:
    return guidance.measure(setting(model, batch=batch), options(**changes), unit)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("name", ["classes", "delta"])
def test_a_model_guided_as_its_reference(name: str, weight: float) -> None:
    rows = measured(f"weight={weight} class=2", name, solver="dop853", references=[name])
    for quantity in ("state", "denoised"):
        found = errors(rows, quantity, analytic="guided")
        assert float(found.max()) < 1e-7, quantity
        alone = errors(rows, quantity, analytic="conditional")
        if weight == 1:
            assert torch.equal(alone, found), quantity
        else:
            assert float(alone.max()) > 1e-2, quantity


def test_rows_of_a_unit() -> None:
    rows = measured("weight=2.0 class=0")
    assert list(rows[0]) == [
        "weight", "class", "reference", "analytic",
        "step", "sigma", "quantity", "mean", "q25", "q75", "count",
    ]  # fmt: skip
    assert len(rows) == 2 * 2 * (7 + 6)
    assert {(row["weight"], row["class"], row["count"]) for row in rows} == {(2.0, 0, 2)}
    assert {(row["reference"], row["analytic"]) for row in rows} == {
        (name, kind) for name in ("classes", "delta") for kind in ("conditional", "guided")
    }


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_a_network_gets_one_hot_rows(weight: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    own = setting(path)
    x = 80 * own.noise(2, "guidance")
    rows = guidance.measure(own, options(analytic=["conditional"]), f"weight={weight} class=2")
    labels = torch.eye(3)[[2, 2]]
    cond, uncond = (own.model, own.model)
    path_of_model = solver_trajectory(GuidedDenoiser(cond, uncond, weight), x, GRID, class_labels=labels)
    for name in ("classes", "delta"):
        exact = exact_trajectory(own.reference(name), x, GRID, torch.tensor([2, 2]))
        expected = (path_of_model.x - exact.x).square().flatten(2).mean((1, 2))
        torch.testing.assert_close(errors(rows, reference=name), expected, rtol=1e-5, atol=1e-9)


def test_weight_0_is_unconditional_and_1_conditional(tmp_path: Path) -> None:
    own = setting(saved(tmp_path / "model"))
    x = 80 * own.noise(2, "guidance")
    labels = torch.eye(3)[[1, 1]]
    exact = own.reference("delta")
    end = exact_trajectory(exact, x, GRID, torch.tensor([1, 1])).x[-1]
    samples = {0.0: heun(own.model, x, GRID, dtype=torch.float64)}
    samples[1.0] = heun(own.model, x, GRID, class_labels=labels, dtype=torch.float64)
    for weight, sample in samples.items():
        rows = guidance.measure(own, options(analytic=["conditional"]), f"weight={weight} class=1")
        expected = float((sample - end).square().mean())
        found = float(errors(rows, reference="delta")[-1])
        assert found == pytest.approx(expected, rel=1e-5), f"weight {weight}"
    assert not torch.allclose(samples[0.0], samples[1.0], rtol=1e-3)


def test_batches_do_not_matter() -> None:
    changes: dict[str, Any] = {"samples": 3, "analytic": ["conditional"]}
    whole, parts = (measured("weight=2.0 class=0", batch=batch, **changes) for batch in (256, 2))
    for name in ("classes", "delta"):
        found = [errors(rows, reference=name) for rows in (whole, parts)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-9)


def test_it_writes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(weights=[0.0, 1.0], classes=[1], references=["classes"], analytic=["conditional"])
    reading = run(NAME, guidance, setting(), chosen, tmp_path)
    files = [tmp_path / f"{NAME}{suffix}" for suffix in (".csv", ".png", ".pdf", ".md")]
    assert all(file.stat().st_size > 0 for file in files)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 13
    with monkeypatch.context() as patched:
        patched.setattr(guidance, "measure", lambda *_: pytest.fail("measured twice"))
        assert run(NAME, guidance, setting(), chosen, tmp_path) == reading


# Errors and units ---------------------------------------------------------------------------------


def test_units() -> None:
    assert guidance.units(setting(), options(weights=[2.0, 0.5, 2.0])) == [
        "weight=0.5 class=0",
        "weight=0.5 class=2",
        "weight=2.0 class=0",
        "weight=2.0 class=2",
    ]
    assert len(guidance.units(setting(), options(classes=None))) == 3 * 3


def test_images_without_classes() -> None:
    with pytest.raises(ValueError, match="images with class labels, got digits, which has none"):
        guidance.units(setting("gaussian", labelled=False), options())


@pytest.mark.parametrize("name", ["gaussian", "isotropic", "mixture-2"])
def test_analytic_models_without_classes(name: str) -> None:
    with pytest.raises(ValueError, match=rf"a model with classes, got {name} \(Gaussian.*\), which has none"):
        guidance.units(setting(name), options())


def test_networks_without_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a model with classes, got .* \(EDMPrecond\), which"):
        guidance.units(setting(saved(tmp_path / "model", 0)), options())


def test_a_network_with_fewer_classes_than_the_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes in \[0, 2\), those of the network, got \[0, 2\]"):
        guidance.units(setting(saved(tmp_path / "model", 2)), options())


def test_unknown_classes() -> None:
    with pytest.raises(ValueError, match=r"classes among \[0, 1, 2\], got \[7\]"):
        guidance.units(setting(), options(classes=[1, 7]))


@pytest.mark.parametrize("changes", [{"samples": 0}, {"steps": 1}])
def test_impossible_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="samples >= 1 and steps >= 2"):
        guidance.units(setting(), options(**changes))


def test_infinite_weights() -> None:
    with pytest.raises(ValueError, match=r"finite weights, got \[inf\]"):
        guidance.units(setting(), options(weights=[float("inf")]))


def test_which_denoisers_have_classes() -> None:
    labelled = {name: denoiser(name) for name in ("mixture-classes", "delta-classes")}
    others = {name: denoiser(name) for name in ("gaussian-full", "mixture-kmeans", "delta", "edm")}
    labelled["network"] = network(3)
    labelled["guided"] = GuidedDenoiser(labelled["delta-classes"], others["delta"], 2.0)
    others["guided"] = GuidedDenoiser(others["delta"], others["delta"], 2.0)
    found = {name: has_classes(model) for name, model in labelled.items()}
    assert all(found.values()), found
    found = {name: has_classes(model) for name, model in others.items()}
    assert not any(found.values()), found


def test_networks_with_classes_that_get_no_labels_are_told(tmp_path: Path) -> None:
    """Where an experiment asks a model without labels, its text says so."""
    deviation = EXPERIMENTS["score-deviation"]
    few = defaults(deviation, queries=4, sigmas=[1.0], references=["gaussian"])
    for label_dim, told in ((3, True), (0, False)):
        model = setting(saved(tmp_path / f"classes-{label_dim}", label_dim))
        text = run(NAME, deviation, model, few, tmp_path / f"out-{label_dim}").text
        assert (UNLABELLED in text) == told, text
    text = run(NAME, guidance, setting(saved(tmp_path / "again")), options(), tmp_path / "out").text
    assert UNLABELLED not in text, "guidance gives labels"


# Reading and figure -------------------------------------------------------------------------------


def rows_of(ends: dict[tuple[float, int, str], float]) -> list[dict[str, Any]]:
    return [
        {"weight": weight, "class": label, "reference": "delta", "analytic": kind, "step": step,
         "sigma": 80.0 if step == 0 else 0.0, "quantity": "state", "mean": end * step, "q25": 0.0, "q75": 0.0,
         "count": 4}
        for (weight, label, kind), end in ends.items() for step in (0, 1)
    ]  # fmt: skip


ENDS = {
    (weight, label, kind): 0.1 * (abs(weight - 1) + 1) * (label + 1) * (1 if kind == "conditional" else 2)
    for weight in (0.0, 1.0, 4.0)
    for label in (0, 2)
    for kind in ("conditional", "guided")
}


def test_reading() -> None:
    table, text = guidance.read(rows_of(ENDS), options())
    assert [row["weight"] for row in table] == [0.0, 1.0, 4.0]
    assert [row["delta, conditional"] for row in table] == pytest.approx([0.4, 0.2, 0.8])
    assert [row["delta, guided"] for row in table] == pytest.approx([0.8, 0.4, 1.6])
    assert "4 samples of each of 2 classes" in text
    assert "delta (conditional) is nearest at weight 1 with 0.2, and at 4 off by 0.8." in text


def test_figure() -> None:
    figure = plots.guidance(rows_of(ENDS), 0.01)
    samples, states = figure.axes[:2]
    lines = {line.get_label(): list(line.get_ydata()) for line in samples.get_lines()}
    assert lines["delta, conditional"] == pytest.approx([0.4, 0.2, 0.8])
    assert lines["delta, guided"] == pytest.approx([0.8, 0.4, 1.6])
    ends = {
        line.get_label(): line.get_ydata()[-1] for line in states.get_lines() if line.get_label() in "014"
    }
    assert ends == pytest.approx({"0": 0.4, "1": 0.2, "4": 0.8})
    plots.pyplot().close(figure)
    with pytest.raises(ValueError, match="got none"):
        plots.guidance([])
