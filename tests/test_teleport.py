"""Teleport: the closed-form jump to a later step of the grid."""

import math
import time
from typing import Any

import pytest
import torch
from cases import COVARIANCES, DTYPES, denoiser, gaussian, k_diffusion_sampling, randn, relative_error
from torch import Tensor

from gaussnet import (
    SOLVERS,
    Gate,
    GaussianDenoiser,
    afs,
    count_nfe,
    dop853,
    euler,
    find_sigma_skip,
    heun,
    karras_sigmas,
    teleport,
    warm_start,
)
from gaussnet.samplers import flow_of, runge_kutta, teleport_cost
from gaussnet.samplers.choosing import table

GRID = karras_sigmas(18)
kinds = pytest.mark.parametrize("kind", COVARIANCES)


@kinds
@pytest.mark.parametrize("skip", [0, 1, 5, 17])
def test_skip_is_the_flow_to_that_level(kind: str, skip: int) -> None:
    g = gaussian(kind)
    x = 80 * randn(4, *g.event_shape)
    moved, rest = teleport(g, x, GRID, skip=skip)
    assert rest.equal(GRID[skip:])
    assert moved.equal(g.flow(x, 80.0, float(GRID[skip])))
    if skip == 0:
        assert relative_error(moved, x) < 1e-14


@kinds
@pytest.mark.parametrize("sigma_skip", [80.0, 12.9, 0.3, 0.002, 0.001])
def test_sigma_skip_need_not_be_on_the_grid(kind: str, sigma_skip: float) -> None:
    g = gaussian(kind)
    x = 80 * randn(4, *g.event_shape)
    moved, rest = teleport(g, x, GRID, sigma_skip=sigma_skip)
    assert rest.tolist() == [sigma_skip, *(level for level in GRID.tolist() if level < sigma_skip)]
    assert moved.equal(g.flow(x, 80.0, sigma_skip))


def test_both_ways_to_name_a_level_agree() -> None:
    g = gaussian("low-rank")
    x = 80 * randn(4, *g.event_shape)
    by_step, by_level = teleport(g, x, GRID, skip=5), teleport(g, x, GRID, sigma_skip=float(GRID[5]))
    assert by_step[0].equal(by_level[0])
    assert by_step[1].equal(by_level[1])


@kinds
def test_two_jumps_are_one(kind: str) -> None:
    g = gaussian(kind)
    x = 80 * randn(4, *g.event_shape)
    halfway = teleport(g, x, GRID, skip=3)
    twice, rest = teleport(g, *halfway, skip=4)
    once, expected = teleport(g, x, GRID, skip=7)
    assert relative_error(twice, once) < 1e-12
    assert rest.equal(expected)


@pytest.mark.parametrize("skip", [1, 5, 9])
@pytest.mark.parametrize("kind", ["full", "low-rank", "isotropic"])
def test_on_a_gaussian_model_it_is_exact(kind: str, skip: int) -> None:
    # The jump keeps to the trajectory: however far it goes, a fine solver ends where the flow does.
    g = gaussian(kind)
    x = g.mean + 80 * randn(4, *g.event_shape)
    exact, grid = g.flow(x, 80.0, 0.0), karras_sigmas(400, sigma_min=1e-4)
    moved, rest = teleport(g, x, grid, skip=40 * skip)
    assert relative_error(g.flow(moved, float(rest[0]), 0.0), exact) < 1e-12
    ends = [relative_error(heun(g, x, grid), exact), relative_error(heun(g, moved, rest), exact)]
    assert ends[1] < ends[0] < 1e-4, "fewer steps leave less error"


def test_it_helps_on_digits() -> None:
    # A mixture's trajectories are Gaussian at high noise: skipping leaves the end where it was.
    g, m = denoiser("gaussian-full"), denoiser("mixture-kmeans")
    x = 80 * randn(16, 1, 8, 8)
    exact = heun(m, x, karras_sigmas(120))
    coarse = relative_error(heun(m, x, GRID), exact)
    skipped = relative_error(heun(m, *teleport(g, x, GRID, skip=3)), exact)
    assert skipped < coarse + 0.02
    assert relative_error(heun(m, *teleport(g, x, GRID, skip=12)), exact) > 2 * skipped, "too far"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_dtypes_and_devices_follow_x(dtype: torch.dtype) -> None:
    x = (80 * randn(2, 1, 8, 8)).to(dtype).requires_grad_()
    moved, rest = teleport(denoiser("gaussian-full", torch.float32), x, GRID.float(), skip=5)
    assert moved.dtype == torch.promote_types(dtype, torch.float32)
    assert (moved.shape, rest.dtype, moved.requires_grad) == (x.shape, torch.float64, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either skip, sigma_skip or tol, got skip=None, sigma_skip=None, tol=None"),
        ({"skip": 1, "sigma_skip": 2.0}, "got skip=1, sigma_skip=2.0, tol=None"),
        ({"skip": -1}, "0 <= skip < 18, the number of steps, got -1"),
        ({"skip": 18}, "0 <= skip < 18, the number of steps, got 18"),
        ({"sigma_skip": 81.0}, r"0 < sigma_skip <= sigmas\[0\] = 80, got 81.0"),
        ({"sigma_skip": 0.0}, "0 < sigma_skip .* got 0.0"),
        ({"sigma_skip": math.nan}, "0 < sigma_skip .* got nan"),
        ({"skip": 1, "sigmas": GRID.flip(0)}, "levels that end in 0"),
        ({"skip": 1, "sigmas": GRID[:-1]}, "levels that end in 0"),
        ({"skip": 1, "x": torch.zeros(2, 1, 3, 2)}, r"expected x of shape \(\*batch, 1, 2, 3\)"),
    ],
)
def test_impossible_jumps(arguments: dict[str, Any], message: str) -> None:
    g = gaussian()
    with pytest.raises(ValueError, match=message):
        teleport(g, **{"x": randn(2, *g.event_shape), "sigmas": GRID, **arguments})


# Regrid and history -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_regrid_spends_its_steps_from_the_jump_down(steps: int) -> None:
    g = gaussian("full")
    x = 80 * randn(4, *g.event_shape)
    moved, _ = teleport(g, x, GRID, sigma_skip=8.0, steps=steps)
    assert moved.equal(g.flow(x, 80.0, 8.0))
    choices: list[tuple[float, dict[str, Any]]] = [(4.0, {}), (7.0, {"rho": 7.0})]
    for rho, options in choices:
        _, rest = teleport(g, x, GRID, sigma_skip=8.0, steps=steps, **options)
        expected = karras_sigmas(steps, 0.002, 8.0, rho) if steps > 1 else torch.tensor([8.0, 0.0]).double()
        assert rest.equal(expected), rho


@pytest.mark.parametrize("level", [0.002, 0.001])
def test_a_single_step_fits_below_the_last_level(level: float) -> None:
    g = gaussian("full")
    x = 80 * randn(4, *g.event_shape)
    moved, rest = teleport(g, x, GRID, sigma_skip=level, steps=1)
    assert rest.tolist() == [level, 0.0]
    assert moved.equal(g.flow(x, 80.0, level))
    with pytest.raises(
        ValueError, match=rf"expected steps >= 1 from {level} down to below it, got 2 to 0.002"
    ):
        teleport(g, x, GRID, sigma_skip=level, steps=2)


@pytest.mark.parametrize(
    ("how", "above"),
    [
        ({"skip": 5}, [40.79, 28.37, 19.35]),
        ({"skip": 1}, [143.76, 108.4, 80.0]),  # even in sigma^(1/4)
        ({"sigma_skip": 10.0}, [32.78, 22.55, 15.19]),  # 0.355 of each step above 8.40, 12.91, ...
        ({"sigma_skip": 0.001}, [0.04144, 0.01523, 0.004764]),
        ({"sigma_skip": 8.0, "steps": 6}, [43.22, 26.55, 15.24]),
        ({"sigma_skip": 8.0, "steps": 6, "rho": 7.0}, [91.55, 44.47, 19.88]),
        ({"sigma_skip": 0.5, "steps": 3}, [10.15, 4.674, 1.783]),
        ({"sigma_skip": 8.0, "steps": 1}, [38.10, 24.16, 14.44]),  # as if 4 came next, in sigma^(1/4)
    ],
)
def test_history_is_the_trajectory_a_step_apart(how: dict[str, Any], above: list[float]) -> None:
    g = gaussian("low-rank")
    x = 80 * randn(4, *g.event_shape)
    moved, rest, history = teleport(g, x, GRID, **how, return_history=True)
    plain = teleport(g, x, GRID, **how)
    assert moved.equal(plain[0])
    assert rest.equal(plain[1])
    assert [level for level, _, _ in history] == pytest.approx(above, rel=1e-3)
    for level, state, denoised in history:
        assert relative_error(state, g.flow(x, 80.0, level)) < 1e-12
        assert relative_error(denoised, g(state, level)) < 1e-12


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis"])
@pytest.mark.parametrize("shift", [-1e-3, -3e-8, 3e-8, 1e-5])
def test_a_jump_beside_a_level_is_the_jump_to_it(solver: str, shift: float) -> None:
    # As of a level that was read off a grid in float32: nothing is divided by how near they are.
    g, m = denoiser("gaussian-full", torch.float32), denoiser("mixture-kmeans", torch.float32)
    x = (80 * randn(4, 1, 8, 8)).float()
    method: Any = SOLVERS[solver]
    for known in (True, False):
        ends: list[Tensor] = []
        for level in (float(GRID[5]), float(GRID[5]) * (1 + shift)):
            moved, rest, history = teleport(g, x, GRID, sigma_skip=level, return_history=True)
            ends.append(method(m, moved, rest, history=history if known else ()))
        assert relative_error(*ends) < 1e-3, f"with history: {known}"


def test_history_has_the_classes() -> None:
    m, labels = denoiser("mixture-classes"), torch.arange(4)
    x = 80 * randn(4, 1, 8, 8)
    *_, history = teleport(m, x, GRID, sigma_skip=8.0, class_labels=labels, return_history=True)
    flow = flow_of(m, labels)
    for level, state, denoised in history:
        assert state.equal(flow(x, 80.0, level))
        assert relative_error(denoised, m(state, level, labels)) < 1e-12


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm"])
def test_every_multistep_solver_goes_on_from_the_history(solver: str) -> None:
    g = denoiser("gaussian-full")
    x = 80 * randn(16, *g.event_shape)
    exact = g.flow(x, 80.0, 0.0)
    method: Any = SOLVERS[solver]
    errors: list[float] = []
    for steps in (16, 32):
        moved, rest, history = teleport(g, x, GRID, sigma_skip=8.0, steps=steps, return_history=True)
        warm, cold = method(g, moved, rest, history=history), method(g, moved, rest)
        assert not warm.equal(cold), "the history is used"
        errors.append(float((warm - exact).norm()))
    assert errors[1] < errors[0] / 2 < 1, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpm_fast", "dpm_adaptive"])
def test_samplers_of_k_diffusion_go_on(name: str, dtype: torch.dtype) -> None:
    sampling = k_diffusion_sampling()
    m, labels = denoiser("mixture-classes", dtype), torch.arange(4)
    x = (80 * randn(4, 1, 8, 8)).to(dtype)
    moved, rest = teleport(m, x, GRID, sigma_skip=8.0, steps=40, class_labels=labels)
    ends = {"dpm_fast": (0.002, 8.0, 60), "dpm_adaptive": (0.002, 8.0)}
    end = getattr(sampling, f"sample_{name}")(
        m, moved, *ends.get(name, (rest.to(dtype),)), extra_args={"class_labels": labels}, disable=True
    )
    exact = flow_of(m, labels)(x.double(), 80.0, 0.002)
    assert end.dtype == dtype
    assert relative_error(end, exact) < 0.05


# The gate chooses ---------------------------------------------------------------------------------


def test_tolerance_of_the_gate() -> None:
    g = gaussian("full")
    x = 80 * randn(4, *g.event_shape)
    gate = Gate(torch.tensor([0.1, 1.0, 10.0, 100.0]), torch.tensor([1.0, 0.5, 0.01, 0.001]))
    _, rest = teleport(g, x, GRID, tol=0.05, gate=gate)
    assert float(rest[0]) == pytest.approx(gate.closes(0.05))
    with pytest.raises(ValueError, match=r"below tol = 1e-05 by sigmas\[0\] = 80, got 0.00187"):
        teleport(g, x, GRID, tol=1e-5, gate=gate)
    with pytest.raises(ValueError, match="gate of the data with tol"):
        teleport(g, x, GRID, tol=0.1)


def test_a_gate_may_close_within_the_first_step() -> None:
    g, gate = gaussian("full"), Gate(torch.tensor([60.0, 70.0]), torch.tensor([1.0, 0.0]))
    _, rest = teleport(g, 80 * randn(4, *g.event_shape), GRID, tol=0.5, gate=gate)
    assert rest.tolist() == [gate.closes(0.5), *GRID.tolist()[1:]]
    assert float(GRID[1]) < float(rest[0]) < 80


def test_a_gate_that_never_opens_leaves_the_last_step() -> None:
    g, gate = gaussian("full"), Gate(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.0]))
    _, rest = teleport(g, 80 * randn(4, *g.event_shape), GRID, tol=0.5, gate=gate)
    assert (gate.closes(0.5), rest.tolist()) == (0.0, [0.002, 0.0])


# Other denoisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian-full", "mixture-kmeans", "mixture-classes", "delta", "guided"])
@pytest.mark.parametrize("sigma_skip", [20.0, 2.0])
def test_the_trajectory_of_any_analytic_denoiser(name: str, sigma_skip: float) -> None:
    d = denoiser(name)
    x = 80 * randn(4, *d.event_shape)
    labels = torch.arange(4) if name == "mixture-classes" else None
    moved, rest = teleport(d, x, GRID, sigma_skip=sigma_skip, class_labels=labels)
    grid = torch.tensor([80.0, sigma_skip, 0.0], dtype=torch.float64)
    states: list[Any] = []
    dop853(d, x, grid, class_labels=labels, rtol=1e-9, atol=1e-9, callback=states.append)
    assert relative_error(moved, states[-1]["x"]) < 1e-5
    assert float(rest[0]) == sigma_skip


def test_one_gaussian_a_class_has_a_closed_flow() -> None:
    d = denoiser("mixture-classes")
    x = 80 * randn(5, *d.event_shape)
    rows = torch.eye(10)[[3, 1, 4, 1, 5]]
    rows[4] = 0  # of no class: the whole mixture
    flow = flow_of(d, rows)
    moved = flow(x, 80.0, 0.5)
    assert relative_error(flow(flow(x[:], 80.0, 7.0), 7.0, 0.5)[:4], moved[:4]) < 1e-10
    fine = runge_kutta(d, x, 80.0, 0.5, rows, steps=400)
    assert relative_error(moved, fine) < 1e-5
    assert relative_error(moved[:4], fine[:4]) < 1e-7
    narrow = flow(x.bfloat16(), 80.0, 0.5)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, flow(x.bfloat16().double(), 80.0, 0.5)) < 1e-5


def test_classes_of_other_denoisers_reach_them() -> None:
    d, labels = denoiser("delta-classes"), torch.tensor([3, 1, 4, 1])
    x = 80 * randn(4, *d.event_shape)
    moved = flow_of(d, labels)(x, 80.0, 0.5)
    assert moved.equal(runge_kutta(d, x, 80.0, 0.5, labels))
    assert relative_error(moved, flow_of(d)(x, 80.0, 0.5)) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runge_kutta_is_of_order_4_and_goes_both_ways(dtype: torch.dtype) -> None:
    g = gaussian("full")
    x = (80 * randn(4, *g.event_shape)).to(dtype)
    exact = g.flow(x.double(), 80.0, 0.5)
    errors = [float((runge_kutta(g, x, 80.0, 0.5, steps=n).double() - exact).norm()) for n in (20, 40)]
    if dtype == torch.float64:
        assert 3.6 < math.log2(errors[0] / errors[1]) < 4.6
    once = runge_kutta(g, x, 80.0, 75.0, steps=1)
    assert relative_error(once, g.flow(x.double(), 80.0, 75.0)) < 1e-5
    back = runge_kutta(g, runge_kutta(g, x, 80.0, 0.5), 0.5, 80.0)
    assert back.dtype == dtype
    assert relative_error(back, x) < 1e-4
    assert relative_error(runge_kutta(g, x, 80.0, 80.0), x) == 0
    for ends in ((80.0, 0.0), (0.0, 80.0), (80.0, math.inf), (math.inf, 80.0)):
        with pytest.raises(ValueError, match=f"finite levels > 0, got {ends[0]} and {ends[1]}"):
            runge_kutta(g, x, *ends)
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        runge_kutta(g, x, 80.0, 1.0, steps=0)
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        runge_kutta(g, x, 80.0, 79.0, steps=0)


# Warm start and AFS -------------------------------------------------------------------------------


def test_warm_start_draws_the_marginal() -> None:
    g = gaussian("full")
    generator = torch.Generator().manual_seed(0)
    x, rest = warm_start(g, 50_000, GRID, 3.0, steps=5, generator=generator)
    assert rest.equal(karras_sigmas(5, 0.002, 3.0, 4.0))
    assert warm_start(g, 1, GRID, 3.0, steps=5, rho=7.0)[1].equal(karras_sigmas(5, 0.002, 3.0, 7.0))
    flat = (x - g.mean).flatten(1).double()
    cov = flat.mT @ flat / len(flat)
    expected = g.covariance.dense() + 9 * torch.eye(6)
    assert relative_error(cov, expected) < 0.03


def test_warm_start_draws_from_the_generator() -> None:
    g, before = gaussian("full"), torch.get_rng_state()
    x, other = (warm_start(g, 4, GRID, 3.0, generator=torch.Generator().manual_seed(k))[0] for k in (0, 1))
    assert x.equal(g.sample(4, 3.0, torch.Generator().manual_seed(0)))
    assert not x.equal(other)
    assert torch.get_rng_state().equal(before)


def test_afs_is_eulers_first_step_on_a_unit_gaussian() -> None:
    unit = GaussianDenoiser.isotropic(torch.zeros(1, 2, 3, dtype=torch.float64), 1.0)
    x = 80 * randn(4, 1, 2, 3)
    states: list[Any] = []
    euler(unit, x, GRID, callback=states.append)
    moved, rest = afs(x, GRID)
    assert relative_error(moved, states[1]["x"]) < 1e-12
    assert rest.equal(GRID[1:])
    with pytest.raises(ValueError, match="two steps or more"):
        afs(x, torch.tensor([80.0, 0.0]))
    _, last = afs(x, torch.tensor([80.0, 2.0, 0.0]))
    assert last.tolist() == [2.0, 0.0]


# Choosing on a model ------------------------------------------------------------------------------


class Off(GaussianDenoiser):
    """A Gaussian that errs by 0.2 e(sigma) below sigma = 5."""

    def forward(self, x: Any, sigma: Any, class_labels: Any = None) -> Any:
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        error = 0.2 * self.bayes_error(level.flatten()).sqrt().reshape(level.shape)
        return super().forward(x, sigma) + torch.where(level < 5, error, 0)


@pytest.mark.parametrize("measure", ["denoiser", "trajectory"])
def test_finds_the_last_level_where_the_model_is_its_gaussian(measure: Any) -> None:
    g = gaussian("full")
    model = Off(g.mean, g.covariance)
    x = 80 * randn(8, *g.event_shape)
    tol = 0.03 if measure == "denoiser" else 0.05
    choice = find_sigma_skip(model, g, x, GRID, tol, measure=measure)
    assert choice.sigma_skip == float(GRID[choice.skip])
    assert choice.rows[-1].deviation > tol
    assert all(row.deviation <= tol for row in choice.rows[:-1])
    if measure == "denoiser":
        assert 5 < choice.sigma_skip < 6
        assert choice.rows[-1].deviation == pytest.approx(0.04, rel=1e-3)
    assert [row.saved for row in choice.rows] == [2 * row.skip for row in choice.rows]
    head, line, *rows = table(choice.rows).split("\n")
    assert head == "| skip | sigma | deviation | evaluations saved |"
    assert line == "|---|---|---|---|"
    assert [row.split(" | ")[1] for row in rows] == [f"{row.sigma:.4g}" for row in choice.rows]
    whole = find_sigma_skip(g, g, x, GRID, 1e9, measure=measure)
    assert whole.skip == 17
    other = GaussianDenoiser(g.mean + 1, g.covariance)
    with pytest.raises(
        ValueError, match=r"deviation <= 0.001 at the first level, sigma = 57.586, got [0-9.]+: "
    ):
        find_sigma_skip(other, g, x, GRID, 1e-3, measure=measure)
    with pytest.raises(ValueError, match="two steps or more, got 1: "):  # there is none to skip
        find_sigma_skip(g, g, x, karras_sigmas(1), 1e9, measure=measure)
    unknown: Any = "time"
    with pytest.raises(ValueError, match="expected measure to be denoiser or trajectory, got 'time'"):
        find_sigma_skip(g, g, x, GRID, 1e9, measure=unknown)


def test_a_gaussian_stands_in_for_itself_at_any_tolerance() -> None:
    g = gaussian("full")
    choice = find_sigma_skip(g, g, 80 * randn(8, *g.event_shape), GRID, tol=0.0)
    assert {row.deviation for row in choice.rows} == {0.0}
    assert choice.skip == 17


@pytest.mark.parametrize("measure", ["denoiser", "trajectory"])
def test_the_choice_is_made_with_the_classes(measure: Any) -> None:
    m, g, labels = denoiser("mixture-classes"), denoiser("gaussian-full"), torch.arange(4)
    x, grid = 80 * randn(4, 1, 8, 8), karras_sigmas(6)
    rows = find_sigma_skip(m, g, x, grid, 1e9, measure=measure, class_labels=labels).rows
    assert [(row.skip, row.sigma) for row in rows] == list(enumerate(grid.tolist()))[1:-1]
    whole = heun(m, x, grid, class_labels=labels)
    for row in rows:
        moved, rest = teleport(g, x, grid, skip=row.skip)
        if measure == "trajectory":
            off = heun(m, moved, rest, class_labels=labels) - whole
            expected = off.square().mean().sqrt()
        else:
            off = m(moved, row.sigma, labels) - g(moved, row.sigma)
            expected = off.square().mean() / g.bayes_error(row.sigma)
        assert row.deviation == pytest.approx(float(expected), rel=1e-9), row.skip


# Costs --------------------------------------------------------------------------------------------


class Slow(torch.nn.Module):
    """A model whose evaluation takes 20 ms, and that keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Any, sigma: Any, class_labels: Any = None) -> Any:
        time.sleep(0.02)
        self.seen.append((x, sigma, class_labels))
        return x


class Slower(GaussianDenoiser):
    """A Gaussian whose flow takes 60 ms."""

    def flow(self, x: Any, sigma_from: Any, sigma_to: Any) -> Any:
        time.sleep(0.06)
        return super().flow(x, sigma_from, sigma_to)


def test_costs_are_in_evaluations_of_the_model() -> None:
    g, model = gaussian("full"), Slow()
    x = 80 * randn(3, *g.event_shape)
    slower = Slower(g.mean, g.covariance)
    cost = teleport_cost(slower, model, x, GRID, 8.0, repeats=3)
    assert 2 < cost.evaluations < 4.5, cost
    assert 0.02 <= cost.evaluation_seconds < 0.06 <= cost.jump_seconds < 0.2
    assert len(model.seen) == 4, "each turn, and one before"
    seen, sigma, _ = model.seen[-1]
    assert seen.equal(g.flow(x, 80.0, 8.0))
    assert sigma.tolist() == [8.0] * 3
    mixture, labels = denoiser("mixture-classes"), torch.arange(3)
    whole = teleport_cost(mixture, model, 80 * randn(3, 1, 8, 8), GRID, 8.0, class_labels=labels, repeats=1)
    assert whole.evaluations == pytest.approx(whole.jump_seconds / whole.evaluation_seconds)
    assert model.seen[-1][2] is labels
    assert teleport_cost(g, model, x, GRID, 8.0).evaluations < 1
    with pytest.raises(ValueError, match="repeats >= 1, got 0"):
        teleport_cost(g, model, x, GRID, 8.0, repeats=0)


def test_jumps_are_timed_with_the_classes() -> None:
    mixture, model, labels = denoiser("mixture-classes"), Slow(), torch.arange(3)
    with count_nfe(mixture) as nfe:
        x = 80 * randn(3, 1, 8, 8)
        teleport_cost(mixture, model, x, GRID, 8.0, class_labels=labels, repeats=1)
    assert nfe() == 0, "the flow of each class is closed"
    assert model.seen[-1][0].equal(flow_of(mixture, labels)(x, 80.0, 8.0))
