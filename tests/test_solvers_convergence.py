"""Orders of convergence against exact trajectories, evaluations, and what a history is worth."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import gaussian, mixture, randn, relative_error
from scipy.integrate import solve_ivp
from torch import Tensor

from gaussnet import GaussianDenoiser, count_nfe, karras_sigmas
from gaussnet.samplers import (
    SOLVERS,
    History,
    deis,
    dop853,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    edm_stochastic,
    euler,
    heun,
    ipndm,
    log_snr_sigmas,
    pndm,
    unipc,
    weights,
)

Function = Callable[..., Tensor]
HIGH, LOW = 2.0, 1.0  # where trajectories bend, and steps are small enough for their order to show
STEPS = (32, 48, 72)

SINGLESTEP: dict[str, tuple[Function, int]] = {
    "euler": (euler, 1),
    "heun": (heun, 2),
    "edm_stochastic": (partial(edm_stochastic, S_churn=0), 2),
    "dpmpp_2s": (dpmpp_2s, 2),
}
MULTISTEP: dict[str, tuple[Function, int]] = {
    "dpmpp_2m": (dpmpp_2m, 2),
    "dpmpp_3m": (dpmpp_3m, 2),
    "dpmpp_3m-exact": (partial(dpmpp_3m, variant="exact"), 3),
    **{  # the corrector adds one order
        f"unipc-{p}-{variant}": (partial(unipc, order=p, variant=variant, lower_order_final=False), p + 1)
        for p in (1, 2, 3)
        for variant in ("bh1", "bh2")
    },
    **{
        f"deis-{order}-{variant}": (partial(deis, order=order, variant=variant), order)
        for order in (1, 2, 3, 4)
        for variant in ("tab", "log_rho")
    },
}
EVEN: dict[str, tuple[Function, int]] = {
    **{f"ipndm-{order}": (partial(ipndm, order=order), order) for order in (1, 2, 3, 4)},
    "pndm": (pndm, 4),
}


@cache
def trajectory(kind: str, levels: tuple[float, ...]) -> list[tuple[float, Tensor, Tensor]]:
    """(sigma, x, denoised) on one trajectory from sigma = 30: of a Gaussian in closed form, or by dop853."""
    if kind == "gaussian":
        g = gaussian()
        start = g.mean + 30 * randn(8, *g.event_shape, seed=1)
        states = [g.flow(start, 30.0, level) for level in levels]
        return [(level, x, g(x, level)) for level, x in zip(levels, states, strict=True)]
    m, seen = mixture(), list[dict[str, Any]]()
    start = 30 * randn(8, *m.event_shape, seed=1)
    dop853(m, start, torch.tensor([30.0, *levels, 0.0]), callback=seen.append, rtol=1e-12, atol=1e-12)
    return [(step["sigma"], step["x"], step["denoised"]) for step in seen[1:]]


def solve(kind: str, solver: Function, grid: Tensor, history: History | None) -> float:
    """The error at the last level above 0."""
    (_, x, _), (_, exact, _) = trajectory(kind, (float(grid[0]), float(grid[-2])))
    seen: list[dict[str, Any]] = []
    arguments = {} if history is None else {"history": history}
    solver(gaussian() if kind == "gaussian" else mixture(), x, grid, callback=seen.append, **arguments)
    return relative_error(seen[-1]["x"], exact)


def levels_above(grid: Tensor, count: int, even: bool = False) -> tuple[float, ...]:
    """Levels that go on upwards as the grid begins, in equal steps or in equal ratios."""
    first, second = grid[:2].tolist()
    step, ratio = first - second, first / second
    return tuple(first + k * step if even else first * ratio**k for k in range(count, 0, -1))


def slope(steps: Sequence[float], errors: Sequence[float]) -> float:
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


kinds = pytest.mark.parametrize("kind", ["gaussian", "mixture"])


# Orders -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", SINGLESTEP)
def test_order_of_singlestep_solvers(name: str, kind: str) -> None:
    solver, order = SINGLESTEP[name]
    errors = [solve(kind, solver, karras_sigmas(n + 1, LOW, HIGH), None) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(-order, abs=0.3), f"{errors}"


@kinds
@pytest.mark.parametrize("name", MULTISTEP)
def test_order_of_multistep_solvers(name: str, kind: str) -> None:
    solver, order = MULTISTEP[name]
    errors = []
    for n in STEPS:
        grid = log_snr_sigmas(n + 1, LOW, HIGH)
        errors.append(solve(kind, solver, grid, trajectory(kind, levels_above(grid, 3))))
    assert slope(STEPS, errors) == pytest.approx(-order, abs=0.3), f"{errors}"


@kinds
@pytest.mark.parametrize("name", EVEN)
def test_order_on_even_grids(name: str, kind: str) -> None:
    solver, order = EVEN[name]
    errors = []
    for n in STEPS:
        grid = karras_sigmas(n + 1, LOW, HIGH, rho=1)
        history = trajectory(kind, levels_above(grid, 3, even=True))
        errors.append(solve(kind, solver, grid, None if name == "pndm" else history))
    assert slope(STEPS, errors) == pytest.approx(-order, abs=0.3), f"{errors}"


@pytest.mark.parametrize(("name", "order"), [("dpmpp_2m", 2), ("unipc-2-bh2", 3), ("deis-3-log_rho", 2)])
def test_order_without_history(name: str, order: int) -> None:
    solver = MULTISTEP[name][0]
    errors = [solve("gaussian", solver, log_snr_sigmas(n + 1, LOW, HIGH), None) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(-order, abs=0.3), f"{errors}"


@pytest.mark.parametrize("kind", ["full", "low-rank", "isotropic"])
def test_dop853_is_the_closed_form_to_its_tolerances(kind: str) -> None:
    g = gaussian(kind)
    x = g.mean + 80 * randn(4, *g.event_shape)
    exact = g.flow(x, 80.0, 1e-3)
    errors = []
    for rtol in (1e-4, 1e-7, 1e-10):
        seen: list[dict[str, Any]] = []
        dop853(g, x, torch.tensor([80.0, 1.0, 1e-3, 0.0]), callback=seen.append, rtol=rtol, atol=rtol)
        assert relative_error(seen[1]["x"], g.flow(x, 80.0, 1.0)) < 100 * rtol
        errors.append(relative_error(seen[2]["x"], exact))
    assert errors[0] < 1e-2
    assert errors[1] < 1e-5
    assert errors[2] < 1e-8


def test_dop853_takes_the_steps_of_its_method() -> None:
    g = gaussian()
    x = g.mean + 80 * randn(4, *g.event_shape)

    def rate(time: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(x.shape)
        return (g(state, math.exp(-time)) - state).numpy().ravel()

    span = (-math.log(80.0), -math.log(0.01))
    expected = solve_ivp(
        rate, span, x.numpy().ravel(), method="DOP853", t_eval=span[1:], rtol=1e-6, atol=1e-6
    )
    seen: list[dict[str, Any]] = []
    with count_nfe(g) as nfe:
        dop853(g, x, torch.tensor([80.0, 9.0, 3.0, 0.7, 0.01, 0.0], dtype=torch.float64))
    assert nfe() == expected.nfev + 1, "the last step is one more, and levels between are none"
    dop853(g, x, torch.tensor([80.0, 0.01, 0.0], dtype=torch.float64), callback=seen.append)
    end = torch.from_numpy(expected.y[:, -1]).reshape(x.shape)
    assert relative_error(seen[-1]["x"], end) < 1e-12
    kept = dop853(g, x.float(), torch.tensor([80.0, 0.01, 0.0]), dtype=torch.float64)
    assert kept.dtype == torch.float64


def test_dop853_says_that_it_failed() -> None:
    g = gaussian()
    explosive = torch.nn.Identity()
    explosive.forward = lambda x, sigma: x + x**3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="expected a solution to rtol=1e-06"), np.errstate(all="ignore"):
        dop853(explosive, 80 * randn(1, *g.event_shape), karras_sigmas(5))


# Histories ----------------------------------------------------------------------------------------


FIRST = (1 / 16, 1 / 32, 1 / 64)


def first_steps(solver: Function, entries: int, even: bool) -> list[float]:
    """The errors of a first step of log-length h, with exact entries of a history."""
    errors = []
    for h in FIRST:
        grid = torch.tensor([1.5, 1.5 * np.exp(-h), 0.0], dtype=torch.float64)
        history = trajectory("gaussian", levels_above(grid, entries, even)) if entries else ()
        errors.append(solve("gaussian", solver, grid, history))
    return errors


@pytest.mark.parametrize(
    ("name", "solver", "order"),
    [
        ("dpmpp_2m", dpmpp_2m, 2),
        ("dpmpp_3m", partial(dpmpp_3m, variant="exact", lower_order_final=False), 3),
        ("unipc-2-bh1", partial(unipc, order=2, variant="bh1"), 2),
        ("unipc-2-bh2", partial(unipc, order=2), 2),
        ("unipc-3", partial(unipc, order=3, lower_order_final=False), 3),
        ("deis-tab", partial(deis, order=3, variant="tab"), 3),
        ("deis-log_rho", deis, 3),
        ("ipndm", ipndm, 4),
        ("pndm", pndm, 4),
    ],
)
def test_first_step_has_the_order_of_its_history(name: str, solver: Function, order: int) -> None:
    # A step of order p errs by O(h^(p + 1)).
    even = name in ("ipndm", "pndm")
    for entries in range(3 if name == "pndm" else 0, order + 1):  # one more than is used, at last
        errors = first_steps(solver, entries, even)
        expected = min(entries + 1, order) + 1
        assert slope(FIRST, errors) == pytest.approx(expected, abs=0.3), f"{entries}: {errors}"


@pytest.mark.parametrize("name", ["dpmpp_3m-exact", "deis-3-log_rho", "deis-4-tab", "unipc-2-bh2"])
def test_history_goes_on_as_if_never_interrupted(name: str) -> None:
    # Cut in two, a run ends where the whole one does.
    solver, m, grid = MULTISTEP[name][0], mixture(), karras_sigmas(14)
    x = 80 * randn(4, *m.event_shape)
    seen: list[dict[str, Any]] = []
    whole = solver(m, x, grid, callback=seen.append)
    history = [(step["sigma"], step["x"], step["denoised"]) for step in seen[:6]]
    resumed = solver(m, seen[6]["x"], grid[6:], history=history)
    if name.startswith("unipc"):  # which corrects the state at the cut only when it has come from above
        assert 1e-12 < relative_error(resumed, whole) < 0.1
    else:
        assert resumed.equal(whole)
    assert relative_error(solver(m, seen[6]["x"], grid[6:]), whole) > relative_error(resumed, whole)


def test_pndm_needs_no_runge_kutta_after_a_history() -> None:
    g, grid = gaussian(), karras_sigmas(12)
    x, history = 80 * randn(2, *g.event_shape), list[tuple[float, Tensor, Tensor]]()
    for entries, level in enumerate((200.0, 160.0, 120.0, 100.0)):
        with count_nfe(g) as nfe:
            pndm(g, x, grid, history=history)
        assert nfe() == 12 + 3 * (3 - entries)
        state = g.flow(x, 80.0, level)
        history.append((level, state, g(state, level)))
    with count_nfe(g) as nfe:
        pndm(g, x, grid, history=history)
    assert nfe() == 12


def test_history_in_another_dtype() -> None:
    g, grid = gaussian(), log_snr_sigmas(6, LOW, HIGH)
    (_, x, _), *_ = trajectory("gaussian", (HIGH,))
    history = trajectory("gaussian", levels_above(grid, 2))
    narrow = [(sigma, state.float(), denoised.float()) for sigma, state, denoised in history]
    wide = [(sigma, state.double(), denoised.double()) for sigma, state, denoised in narrow]
    expected = deis(g, x, grid, history=history)
    outs = [deis(g.float(), x.float(), grid, history=given, dtype=torch.float64) for given in (narrow, wide)]
    assert outs[0].dtype == torch.float64
    assert outs[0].equal(outs[1]), "noise is computed in the dtype of the state"
    assert 0 < relative_error(outs[0], expected) < 1e-6


@pytest.mark.parametrize("solver", [dpmpp_2m, dpmpp_3m, unipc, deis, ipndm, pndm])
def test_impossible_histories(solver: Function) -> None:
    g, grid = gaussian(), karras_sigmas(5)
    x = randn(2, *g.event_shape)
    cases: list[tuple[list[float], Tensor, str]] = [
        ([80.0], x, r"decrease to above 80, got \[80.0\]"),
        ([100.0, 120.0], x, r"decrease to above 80, got \[100.0, 120.0\]"),
        ([float("nan")], x, "expected a history of finite levels"),
        ([float("inf")], x, "expected a history of finite levels"),
        ([100.0], x[:1], r"tensors of shape \(2, 1, 2, 3\), got \[\(1, 1, 2, 3\)\]"),
    ]
    for levels, tensor, message in cases:
        with count_nfe(g) as nfe, pytest.raises(ValueError, match=message):
            solver(g, x, grid, history=[(level, tensor, tensor) for level in levels])
        assert nfe() == 0


# The last steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    ("solver", "order", "rule", "noise"),
    [
        (partial(dpmpp_3m, variant="exact"), 3, weights.exponential, False),
        (dpmpp_3m, 3, weights.half_curvature, False),
        (partial(deis, order=3), 3, weights.log_adams, True),
        (partial(deis, order=4, variant="tab"), 4, weights.adams, True),
    ],
)
def test_lower_order_at_the_end(
    solver: Function, order: int, rule: weights.Weights, noise: bool, lower: bool
) -> None:
    m, grid = mixture(), karras_sigmas(7)
    seen: list[dict[str, Any]] = []
    solver(m, 80 * randn(2, *m.event_shape), grid, callback=seen.append, lower_order_final=lower)
    for left in (2, 3, 4):  # steps that are left, that to 0 among them
        known = seen[7 - left :: -1][: min(order, left) if lower else order]
        step, sigma, sigma_next = known[0], known[0]["sigma"], float(grid[8 - left])
        expected = step["x"] if noise else sigma_next / sigma * step["x"]
        levels = [past["sigma"] for past in known]
        used = weights.simplified("bh2") if not noise and len(known) == 2 else rule
        for weight, past in zip(used(sigma, sigma_next, levels), known, strict=True):
            output = (past["x"] - past["denoised"]) / past["sigma"] if noise else past["denoised"]
            expected = expected + weight * output
        assert relative_error(seen[8 - left]["x"], expected) < 1e-12, f"{left} steps left"


# Evaluations --------------------------------------------------------------------------------------

NFE: dict[str, Callable[[int], int]] = {
    "euler": lambda n: n,
    "ddim": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "edm_stochastic": lambda n: 2 * n - 1,
    "dpmpp_2s": lambda n: 2 * n - 1,
    "dpmpp_2m": lambda n: n,
    "dpmpp_3m": lambda n: n,
    "unipc": lambda n: n,
    "pndm": lambda n: n + 9 if n > 3 else 4 * n - 3,
    "ipndm": lambda n: n,
    "deis": lambda n: n,
}


def test_every_solver_is_in_the_registry() -> None:
    assert set(SOLVERS) == {*NFE, "dop853", "dpm_v3"}


@pytest.mark.parametrize("name", NFE)
def test_evaluations(name: str) -> None:
    g = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
    for n in (1, 2, 3, 4, 5, 9):
        with count_nfe(g) as nfe:
            out = SOLVERS[name](g, 80 * torch.ones(1, 1, 2, 2), karras_sigmas(n))
        assert nfe() == NFE[name](n), f"{n} steps"
        assert out.isfinite().all()
