"""Trajectories from the same noise: exact references, their deviations, and the experiment on them."""

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, covariance, denoiser, digits, gaussian, mixture, randn, relative_error, tiny_unet
from scipy import stats
from torch import Tensor

from gaussnet import GaussianDenoiser, GaussianMixtureDenoiser, VEPrecond, euler, heun, karras_sigmas
from gaussnet.data import ImageData
from gaussnet.experiments import Setting, defaults, run, trajectory_deviation
from gaussnet.plots import trajectories as plots
from gaussnet.probes import paired_difference
from gaussnet.probes.trajectories import (
    Trajectory,
    check_trajectory,
    deviation_rows,
    deviations,
    divergence,
    exact_sample,
    exact_trajectory,
    solver_trajectory,
)

GRID = karras_sigmas(6)
NAME = "trajectory-deviation"


def images(count: int = 120) -> ImageData:
    pixels, labels = digits()
    return ImageData(pixels[:count].float(), labels[:count], name="digits")


def setting(model: str = "gaussian", **changes: Any) -> Setting:
    return Setting(model, images(), **{"shrinkage": "none", **changes})


def options(**changes: Any) -> Any:
    small = {"trajectories": 5, "steps": 6, "references": ["gaussian"], "check": 0}
    return defaults(trajectory_deviation, **{**small, **changes})


def test_levels_are_those_of_the_network(tmp_path: Path) -> None:
    VEPrecond(tiny_unet()).save_pretrained(tmp_path)
    rows = trajectory_deviation.measure(setting(str(tmp_path)), options(), "gaussian")
    levels = {row["sigma"] for row in rows} - {0.0}
    assert (min(levels), max(levels)) == (pytest.approx(0.02), 80.0)


def start(count: int, event: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return 80 * randn(count, *event, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["full", "low-rank", "isotropic"])
def test_gaussian_trajectory_against_dense_matrices(name: str, dtype: torch.dtype) -> None:
    exact = gaussian(name)
    dense = exact.covariance.apply(lambda lam: lam, torch.eye(6, dtype=torch.float64))
    x = start(3, (1, 2, 3))
    found = exact_trajectory(exact.to(dtype), x.to(dtype), GRID)
    levels = GRID.tolist()
    lam, axes = torch.linalg.eigh(dense)
    lam = lam.clamp_min(0)
    u = (x.flatten(1) - exact.mean.double().flatten()) @ axes
    for i, sigma in enumerate(levels[:-1]):
        state = u * ((lam + sigma**2) / (lam + 80**2)).sqrt()  # Eq. 15
        denoised = u * lam / ((lam + sigma**2) * (lam + 80**2)).sqrt()  # Eq. 16
        for label, values, coordinates in (("state", found.x, state), ("denoised", found.denoised, denoised)):
            expected = exact.mean.double() + (coordinates @ axes.T).reshape(x.shape)
            assert relative_error(values[i], expected) < (1e-12 if dtype == torch.float64 else 1e-5), label
    assert torch.equal(found.x[-1], found.denoised[-1])
    assert found.levels.tolist() == levels
    assert found.x.dtype == found.denoised.dtype == torch.float64


def test_a_mixture_is_solved_by_runge_kutta() -> None:
    one = gaussian()
    same = GaussianMixtureDenoiser(torch.ones(2).double(), torch.stack([one.mean] * 2), [one.covariance] * 2)
    x = start(3, (1, 2, 3))
    closed, solved = exact_trajectory(one, x, GRID), exact_trajectory(same, x, GRID)
    for i, (a, b) in enumerate(zip(closed.x, solved.x, strict=True)):
        assert relative_error(b, a) < 2e-6, i
    assert not torch.equal(closed.x, solved.x)


def test_classes_move_by_the_flow_of_their_own_gaussian() -> None:
    parts = [gaussian(seed=k) for k in range(2)]
    classes = GaussianMixtureDenoiser(
        torch.ones(2).double(),
        torch.stack([part.mean for part in parts]),
        [part.covariance for part in parts],
        torch.arange(2),
    )
    x = start(3, (1, 2, 3))
    for label, part in enumerate(parts):
        found = exact_trajectory(classes, x, GRID, torch.full((3,), label))
        own = exact_trajectory(part, x, GRID)
        assert relative_error(found.x, own.x) < 1e-12, label
        assert relative_error(found.denoised, own.denoised) < 1e-12, label


@pytest.mark.parametrize("name", ["gaussian", "mixture", "delta"])
def test_references_agree_with_scipy(name: str) -> None:
    model: Any = {"gaussian": gaussian, "mixture": mixture}.get(name, lambda: denoiser("delta"))()
    x = start(2, tuple(model.event_shape))
    found = check_trajectory(model, x, GRID)
    assert len(found) == len(GRID)
    assert max(found) < 1e-3, found
    assert found[0] == 0


def test_the_check_finds_a_wrong_flow() -> None:
    wrong = GaussianDenoiser(randn(1, 2, 3), covariance("full"))
    wrong.flow = lambda x, sigma_from, sigma_to: x * (sigma_to / sigma_from)  # pyright: ignore
    x = start(2, (1, 2, 3))
    found = check_trajectory(wrong, x, GRID)
    right = exact_trajectory(GaussianDenoiser(wrong.mean, wrong.covariance), x, GRID)
    for i, sigma in enumerate(GRID.tolist()[:-1]):
        expected = float((x * (sigma / 80) - right.x[i]).abs().max())
        assert found[i] == pytest.approx(expected, rel=1e-3, abs=1e-6), i
    assert min(found[1:]) > 0.05, found


@pytest.mark.parametrize("model", [gaussian(), mixture()], ids=["gaussian", "mixture"])
def test_samples_are_the_ends_of_trajectories(model: Any) -> None:
    x = start(3, (1, 2, 3))
    assert relative_error(exact_sample(model, x, GRID), exact_trajectory(model, x, GRID).x[-1]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", [euler, heun])
def test_solver_trajectory_is_the_solvers_own(solver: Any, dtype: torch.dtype) -> None:
    model = denoiser("gaussian-full", dtype)
    x = start(3, (1, 8, 8), dtype)
    found = solver_trajectory(model, x, GRID, solver)
    calls: list[dict[str, Any]] = []
    sample = solver(model, x, GRID, callback=calls.append, dtype=torch.float64)
    assert torch.equal(found.x, torch.stack([*(call["x"] for call in calls), sample]))
    assert torch.equal(found.denoised, torch.stack([call["denoised"] for call in calls]))
    assert found.x.dtype == torch.float64
    assert relative_error(found.denoised[2], model(found.x[2].to(dtype), float(GRID[2]))) < 1e-6


def test_class_labels_reach_the_denoiser() -> None:
    model = denoiser("mixture-classes")
    x = start(2, (1, 8, 8))
    labels = torch.tensor([3, 5])
    found = solver_trajectory(model, x, GRID, class_labels=labels)
    assert torch.equal(found.x[-1], heun(model, x, GRID, class_labels=labels))
    exact = [exact_trajectory(model, x, GRID, given).x[-1] for given in (labels, None)]
    assert relative_error(*exact) > 0.01


def test_a_solver_that_does_not_call_back() -> None:
    with pytest.raises(ValueError, match="calls back at each of 6 levels, got 0"):
        solver_trajectory(gaussian(), start(1, (1, 2, 3)), GRID, lambda denoiser, x, sigmas, **_: x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deviation_of_two_isotropic_gaussians(dtype: torch.dtype) -> None:
    a, b = 0.3, 1.7
    x = start(4, (1, 2, 3), dtype)
    paths = [
        exact_trajectory(GaussianDenoiser.isotropic(torch.zeros(1, 2, 3, dtype=dtype), v), x, GRID)
        for v in (a, b)
    ]
    found = deviations(*paths)
    power = x.double().square().flatten(1).mean(1)
    levels = GRID.tolist()[:-1]
    for i, s in enumerate(levels):
        states = [math.sqrt((v + s**2) / (v + 80**2)) for v in (a, b)]
        denoised = [v / math.sqrt((v + s**2) * (v + 80**2)) for v in (a, b)]
        for quantity, (first, second) in (("state", states), ("denoised", denoised)):
            expected = (first - second) ** 2 * power
            torch.testing.assert_close(
                found[quantity][i], expected, rtol=1e-4, atol=1e-9, msg=f"{quantity} at {s}"
            )
    assert found["state"].shape == (7, 4)
    torch.testing.assert_close(found["state"][-1], found["denoised"][-1])


def test_deviations_of_unlike_trajectories() -> None:
    x = start(2, (1, 2, 3))
    path = exact_trajectory(gaussian(), x, GRID)
    with pytest.raises(ValueError, match="on one grid"):
        deviations(path, exact_trajectory(gaussian(), x, karras_sigmas(5)))
    with pytest.raises(ValueError, match=r"of one shape, got \(7, 2, 1, 2, 3\) and \(7, 1, 1, 2, 3\)"):
        deviations(path, exact_trajectory(gaussian(), x[:1], GRID))


def test_deviations_by_hand() -> None:
    levels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    zero = Trajectory(levels, torch.zeros(2, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2))
    one = Trajectory(
        levels, torch.full((2, 1, 1, 2, 2), 3.0), torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 1, 2, 2)
    )
    found = deviations(zero, one)
    assert found["state"].tolist() == [[9.0], [9.0]]
    assert found["denoised"].tolist() == [[30 / 4]]


def test_rows_by_hand() -> None:
    errors = torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0], [0.0, 0.0, 0.0, 0.0, 5.0]])
    rows = deviation_rows([2.0, 0.0], {"state": errors, "denoised": errors[:1]})
    assert rows[0] == {
        "step": 0, "sigma": 2.0, "quantity": "state", "mean": 4.0, "q25": 2.0, "q75": 4.0, "count": 5,
    }  # fmt: skip
    assert [(row["quantity"], row["step"], row["sigma"], row["mean"]) for row in rows] == [
        ("state", 0, 2.0, 4.0),
        ("state", 1, 0.0, 1.0),
        ("denoised", 0, 2.0, 4.0),
    ]


def test_divergence() -> None:
    rows = [
        {"step": i, "sigma": 9.0 - i, "mean": mean} for i, mean in enumerate([0.0, 0.01, 0.02, 0.001, 0.5])
    ]
    assert divergence(rows) == (2, 7.0)
    assert divergence(rows[::-1]) == (2, 7.0)
    assert divergence(rows, 0.1) == (4, 5.0)
    assert divergence(rows, 1.0) is None
    assert divergence([*rows, {**rows[0], "step": 9, "sigma": 3.0, "mean": math.nan}], 1.0) == (9, 3.0)


def test_paired_difference_against_scipy() -> None:
    first, second = randn(40), randn(40, seed=1) + 0.3
    found = paired_difference(first, second, level=0.9)
    result: Any = stats.ttest_rel(first.numpy(), second.numpy())
    interval = result.confidence_interval(0.9)
    assert found.mean == pytest.approx(float((first - second).mean()))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    test: Any = stats.wilcoxon(first.numpy(), second.numpy())
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.pairs == 40


def test_paired_difference_of_equal_measurements() -> None:
    same = randn(5)
    assert paired_difference(same, same.clone()) == (0.0, 0.0, 0.0, 1.0, 5)


@pytest.mark.parametrize(("first", "second"), [(3, 4), (1, 1)])
def test_no_pairs(first: int, second: int) -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        paired_difference(torch.ones(first), torch.ones(second))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_impossible_levels(level: float) -> None:
    with pytest.raises(ValueError, match="0 < level < 1"):
        paired_difference(torch.ones(3), torch.ones(3), level)


# The experiment -----------------------------------------------------------------------------------


def measured(model: str = "gaussian", unit: str = "gaussian", batch: int = 256, **changes: Any) -> list[Any]:
    return trajectory_deviation.measure(setting(model, batch=batch), options(**changes), unit)


@pytest.mark.parametrize("name", ["isotropic", "gaussian", "classes", "delta"])
def test_a_model_deviates_from_itself_by_rounding(name: str) -> None:
    rows = measured(name, name, solver="dop853")
    assert max(row["mean"] for row in rows) < 1e-8, name


def test_heun_deviates_by_its_own_error() -> None:
    # Of order 2, so that the squared error falls as the fourth power of the step.
    ends = [next(row["mean"] for row in measured(steps=steps) if row["sigma"] == 0) for steps in (18, 36, 72)]
    for coarse, fine in pairwise(ends):
        assert 8 < coarse / fine < 40, ends


def test_rows_of_a_unit() -> None:
    rows = measured(unit="isotropic", check=2)
    assert list(rows[0]) == ["reference", "step", "sigma", "quantity", "mean", "q25", "q75", "count", "check"]
    assert [row["step"] for row in rows] == [*range(7), *range(6)]
    assert {row["count"] for row in rows} == {5}
    assert [row["sigma"] for row in rows[:7]] == GRID.tolist()
    first = {row["quantity"]: row["mean"] for row in rows if row["step"] == 0}
    assert first["state"] == 0
    own = setting()
    x = 80 * own.noise(5, "trajectories")
    gap = own.model(x, 80.0) - own.reference("isotropic")(x, 80.0)
    assert first["denoised"] == pytest.approx(float(gap.square().mean()), rel=1e-4)
    checks = check_trajectory(own.reference("isotropic"), x[:2], GRID)
    assert [row["check"] for row in rows[:7]] == pytest.approx(checks, rel=1e-3, abs=1e-9)
    assert max(checks) < 1e-3
    assert {row["check"] for row in rows[7:]} == {None}
    assert {row["check"] for row in measured(unit="isotropic")} == {None}


def test_batches_do_not_matter() -> None:
    whole, parts = (measured(unit="delta", batch=batch) for batch in (256, 2))
    for a, b in zip(whole, parts, strict=True):
        assert a == {
            **b,
            **{key: pytest.approx(b[key], rel=1e-4, abs=1e-9) for key in ("mean", "q25", "q75")},
        }


def test_it_writes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(references=["isotropic", "gaussian"], check=1)
    reading = run(NAME, trajectory_deviation, setting(), chosen, tmp_path)
    files = [tmp_path / f"{NAME}{suffix}" for suffix in (".csv", ".png", ".pdf", ".md")]
    assert all(file.stat().st_size > 0 for file in files)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 13
    assert {row["reference"] for row in rows} == {"isotropic", "gaussian"}
    with monkeypatch.context() as patched:
        patched.setattr(trajectory_deviation, "measure", lambda *_: pytest.fail("measured twice"))
        assert run(NAME, trajectory_deviation, setting(), chosen, tmp_path) == reading


def test_reading() -> None:
    def rows(name: str, check: float, **means: list[float]) -> list[dict[str, Any]]:
        return [
            {"reference": name, "step": step, "sigma": 10.0 - step, "quantity": quantity, "mean": mean,
             "q25": mean, "q75": mean, "count": 4, "check": check if quantity == "state" else None}
            for quantity, column in means.items() for step, mean in enumerate(column)
        ]  # fmt: skip

    both = [
        *rows("gaussian", 1e-5, state=[0.0, 0.001, 0.02, 0.1], denoised=[0.001, 0.03, 0.1]),
        *rows("delta", 2e-4, state=[0.0, 0.001, 0.002, 0.009], denoised=[0.001, 0.002, 0.009]),
    ]
    table, text = trajectory_deviation.read(both, options())
    assert table[:2] == [
        {"reference": "gaussian", "quantity": "state", "step": 2, "sigma": 8.0, "last": 0.1},
        {"reference": "gaussian", "quantity": "denoised", "step": 1, "sigma": 9.0, "last": 0.1},
    ]
    assert [(row["reference"], row["step"]) for row in table[2:]] == [("delta", "-")] * 2
    assert "gaussian exceeds it at step 2, sigma = 8." in text
    assert "delta stays below it" in text
    assert "At the end delta is closest." in text
    assert "at most 2.0e-04" in text
    unchecked = trajectory_deviation.read([{**row, "check": None} for row in both], options())
    assert unchecked.table == table
    assert unchecked.text == text[: text.index(" The references' states differ from scipy's")]


@pytest.mark.parametrize("changes", [{"trajectories": 0}, {"steps": 1}, {"check": -1}])
def test_impossible_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected trajectories >= 1, steps >= 2 and check >= 0"):
        trajectory_deviation.units(setting(), options(**changes))


def test_a_unit_a_reference() -> None:
    names = ["delta", "gaussian", "delta"]
    assert trajectory_deviation.units(setting(), options(references=names)) == ["delta", "gaussian"]


def test_figure() -> None:
    rows = [row for name in ("isotropic", "gaussian") for row in measured(unit=name)]
    figure = plots.trajectory_deviation(rows, 0.01)
    state, denoised = figure.axes[:2]
    lines = {line.get_label(): line for line in state.get_lines()}
    assert {"isotropic", "gaussian"} <= set(lines)
    means = [row["mean"] for row in rows if (row["reference"], row["quantity"]) == ("isotropic", "state")]
    drawn = lines["isotropic"].get_ydata()
    assert math.isnan(drawn[0])
    assert list(drawn[1:]) == means[1:]
    assert len(denoised.get_lines()[0].get_ydata()) == 6
    bare = plots.trajectory_deviation(rows)
    counts = [[len(axis.get_lines()) for axis in each.axes] for each in (figure, bare)]
    assert counts == [[3, 3], [2, 2]], "no line without a bound"
    plots.pyplot().close("all")
    with pytest.raises(ValueError, match="got none"):
        plots.trajectory_deviation([])
