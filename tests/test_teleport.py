"""Teleport: the closed-form jump to a later step of the grid."""

import math
from typing import Any

import pytest
import torch
from cases import COVARIANCES, DTYPES, denoiser, gaussian, randn, relative_error

from gaussnet import heun, karras_sigmas, teleport

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
        ({}, "either skip or sigma_skip, got skip=None and sigma_skip=None"),
        ({"skip": 1, "sigma_skip": 2.0}, "either skip or sigma_skip, got skip=1 and sigma_skip=2.0"),
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
