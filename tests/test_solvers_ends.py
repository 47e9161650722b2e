"""Where grids end: at 0, nowhere else; and the state at the last level above it, against the exact flow."""

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from cases import gaussian, randn, relative_error
from torch import Tensor

from gaussnet import count_nfe
from gaussnet.samplers import (
    SOLVERS,
    ModelStatistics,
    Solver,
    compute_ems,
    dpm_v3,
    edm_stochastic,
    karras_sigmas,
    log_snr_sigmas,
)

HIGH, LOW = 5.0, 0.1
EVEN = ("pndm", "ipndm")  # whose weights are those of equal steps


@cache
def statistics() -> ModelStatistics:
    g = gaussian()
    data, generator = (
        g.sample(256, generator=torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(2),
    )
    return compute_ems(g, data, log_snr_sigmas(60, LOW, HIGH), n=256, generator=generator)


def solver_of(name: str) -> Solver:
    """The solver, without noise and with what it needs."""
    if name == "edm_stochastic":
        return partial(edm_stochastic, S_churn=0.0)
    return partial(dpm_v3, statistics=statistics()) if name == "dpm_v3" else SOLVERS[name]


def state_at_low(name: str, x: Tensor, steps: int) -> Tensor:
    """Where so many steps lead to; the grid goes on to 0, as it must."""
    seen: list[dict[str, Any]] = []
    grid = karras_sigmas(steps + 1, LOW, HIGH, rho=1 if name in EVEN else 7)
    solver_of(name)(gaussian(), x, grid, callback=seen.append)
    assert [step["sigma"] for step in seen] == grid[:-1].tolist()
    return seen[-1]["x"]


# At 128 steps: the least order that shows, and the error.
REACHED = {
    "euler": (1, 5e-3),
    "ddim": (1, 5e-3),
    "heun": (2, 1e-4),
    "edm_stochastic": (2, 1e-4),
    "dpmpp_2s": (2, 1e-4),
    "dpmpp_2m": (2, 1e-4),
    "dpmpp_3m": (2, 1e-5),
    "unipc": (3, 1e-5),
    "pndm": (3, 1e-4),
    "ipndm": (3, 1e-4),
    "deis": (2, 1e-4),
    "dpm_v3": (2, 1e-5),
    "dop853": (0, 1e-6),  # its steps are its own
}
solvers = pytest.mark.parametrize("name", SOLVERS)


@solvers
def test_the_last_level_above_0_is_reached_by_the_flow(name: str) -> None:
    g = gaussian()
    x = g.mean + HIGH * randn(16, *g.event_shape, seed=3)
    exact = g.flow(x, HIGH, LOW)
    coarse, fine = (relative_error(state_at_low(name, x, steps), exact) for steps in (64, 128))
    order, bound = REACHED[name]
    assert math.log2(coarse / fine) > order - 0.2, f"{coarse}, {fine}"
    assert fine < bound


@solvers
def test_the_step_to_0_is_the_denoised_there(name: str) -> None:
    g, seen = gaussian(), list[dict[str, Any]]()
    x = g.mean + HIGH * randn(4, *g.event_shape, seed=3)
    out = solver_of(name)(g, x, karras_sigmas(6, LOW, HIGH), callback=seen.append)
    assert seen[-1]["sigma"] == LOW
    assert out.equal(seen[-1]["denoised"])
    assert out.equal(g(seen[-1]["x"], torch.full((4,), LOW, dtype=torch.float64)))


@solvers
def test_grids_that_end_above_0_are_refused(name: str) -> None:
    g, grid = gaussian(), karras_sigmas(6, LOW, HIGH)[:-1]
    message = r"expected sigmas to be at least two levels that end in 0, got \[5\.0, .*, 0\.1\]"
    with count_nfe(g) as nfe, pytest.raises(ValueError, match=message):
        solver_of(name)(g, HIGH * randn(1, *g.event_shape), grid)
    assert nfe() == 0, "an error costs no evaluation"
