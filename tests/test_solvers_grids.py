"""Grids of noise levels: closed forms, a model's own levels, and the optimised grid by brute force."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import denoiser, gaussian, randn, relative_error
from torch import Tensor

from gaussnet import GaussianDenoiser, GuidedDenoiser, count_nfe, karras_sigmas
from gaussnet.samplers import (
    dop853,
    dpmpp_2m,
    euler,
    heun,
    ipndm,
    log_snr_sigmas,
    model_sigmas,
    optimised_sigmas,
    rounded_sigmas,
    vp_sigmas,
)
from gaussnet.samplers.optimised import cheapest_path, jump_costs
from gaussnet.samplers.schedules import check_sigmas
from gaussnet.schedules import DiscreteSchedule

# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "low", "high"), [(18, 0.002, 80.0), (2, 0.1, 3.0)])
def test_log_snr_is_even_in_log_sigma(n: int, low: float, high: float) -> None:
    levels = log_snr_sigmas(n, low, high)
    assert (levels.shape, levels.dtype) == ((n + 1,), torch.float64)
    assert (float(levels[0]), float(levels[n - 1]), float(levels[n])) == (high, low, 0.0)
    ratios = levels[1:-1] / levels[:-2]
    torch.testing.assert_close(ratios, torch.full_like(ratios, (low / high) ** (1 / (n - 1))))
    assert relative_error(karras_sigmas(n, low, high, rho=1e6), levels) < 1e-4, "the limit of Karras' grid"


@pytest.mark.parametrize("rho", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_rho(rho: float) -> None:
    with pytest.raises(ValueError, match=f"expected a finite rho > 0, got {rho}"):
        karras_sigmas(5, rho=rho)


def test_one_step_grids() -> None:
    assert log_snr_sigmas(1).tolist() == [80.0, 0.0]
    assert vp_sigmas(1, spacing="trailing").shape == (2,)


STEPS = {  # of ten betas, in four steps
    ("leading", 0): [6, 4, 2, 0],
    ("leading", 1): [7, 5, 3, 1],
    ("trailing", 0): [9, 7, 4, 1],  # 10 - 2.5 k = 10, 7.5, 5, 2.5, rounded to even, less 1
    ("linspace", 0): [9, 6, 3, 0],
}


@pytest.mark.parametrize(("spacing", "offset"), STEPS)
def test_vp_levels_by_hand(spacing: Any, offset: int) -> None:
    betas = torch.linspace(0.1, 0.4, 10, dtype=torch.float64)
    alphas_cumprod = (1 - betas).cumprod(0)[STEPS[spacing, offset]]
    levels = vp_sigmas(4, betas, spacing, offset)
    torch.testing.assert_close(levels[:-1], ((1 - alphas_cumprod) / alphas_cumprod).sqrt())
    assert levels[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_vp_steps_are_those_of_diffusers(spacing: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = DiscreteSchedule.from_betas(betas)
    for n in (2, 15, 27, 31, 47, 61, 103, 144, 199, 208, 304, 999, 1000):  # of some, steps are half-way
        scheduler.set_timesteps(n)
        steps = schedule.time(vp_sigmas(n, spacing=spacing)[:-1]).round().long()
        assert steps.tolist() == scheduler.timesteps.tolist()[:n], n  # of 61, trailing, diffusers has -1, too
    assert float(vp_sigmas(1, spacing="linspace")[0]) == float(vp_sigmas(1, spacing="trailing")[0])


def test_vp_betas_by_name() -> None:
    # Known ends: 157.4 for DDPM, 14.61 and 0.0292 for Stable Diffusion.
    assert float(vp_sigmas(10, "linear", "trailing")[0]) == pytest.approx(157.4, abs=0.05)
    levels = vp_sigmas(10, "scaled_linear", "linspace")
    assert float(levels[0]) == pytest.approx(14.6146, abs=1e-3)
    assert float(levels[9]) == pytest.approx(0.0292, abs=1e-4)
    named = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    }
    for name, betas in named.items():
        alphas_cumprod = np.cumprod(1 - betas)
        expected = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)[::-1]
        np.testing.assert_allclose(vp_sigmas(1000, name)[:-1].numpy(), expected, rtol=1e-9, err_msg=name)  # pyright: ignore[reportArgumentType]


def test_vp_levels_are_those_of_the_schedule() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = DiscreteSchedule.from_betas(betas)
    times = schedule.time(vp_sigmas(50)[:-1])
    torch.testing.assert_close(times, torch.arange(980, -1, -20).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, r"1 <= n <= 1000, the steps of the process, got 0"),
        ({"n": 1001}, r"1 <= n <= 1000, the steps of the process, got 1001"),
        ({"n": 10, "spacing": "even"}, "'leading', 'trailing' or 'linspace', got 'even'"),
        ({"n": 10, "betas": "cosine"}, r"a tensor, 'linear' or 'scaled_linear', got 'cosine'"),
        ({"n": 1000, "offset": 1}, r"steps from 0 to 999, got \[1000, .*: offset=1"),
        ({"n": 10, "offset": -1}, r"steps from 0 to 999, got .*: offset=-1"),
        ({"n": 2, "betas": torch.tensor([0.5, 1.5])}, "expected alphas_cumprod to decrease"),
    ],
    ids=str,
)
def test_impossible_vp_grids(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vp_sigmas(**arguments)


@pytest.mark.parametrize(
    ("n", "low", "high"), [(0, 0.1, 1.0), (3, 0.0, 1.0), (3, 2.0, 1.0), (3, 1.0, math.inf)]
)
def test_impossible_log_snr_grids(n: int, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"expected n >= 1|expected 0 < sigma_min < sigma_max"):
        log_snr_sigmas(n, low, high)


# A model's own levels -----------------------------------------------------------------------------


def test_rounded_levels_are_the_models() -> None:
    model = denoiser("iddpm")
    grid = karras_sigmas(18, 0.01, 80.0)
    levels = rounded_sigmas(model, grid)
    table = model.u[: model.M].double()
    nearest = table[(grid[:-1, None] - table).abs().argmin(1)]
    torch.testing.assert_close(levels[:-1], nearest)
    assert (levels.dtype, float(levels[-1])) == (torch.float64, 0.0)


def test_rounded_levels_come_once() -> None:
    model = denoiser("iddpm")
    levels = rounded_sigmas(model, karras_sigmas(200, 0.01, 80.0))
    assert len(levels) < 201
    assert check_sigmas(levels) == levels.tolist()


@pytest.mark.parametrize("name", ["ve", "iddpm", "edm", "gaussian-full"])
def test_the_grid_of_a_model_lies_within_its_range(name: str) -> None:
    model: Any = denoiser(name)
    levels = model_sigmas(model, 7, 1e-3, 1e3)
    low, high = getattr(model, "sigma_min", 1e-3), getattr(model, "sigma_max", 1e3)
    grid = karras_sigmas(7, max(1e-3, low), min(1e3, high))
    assert levels.equal(rounded_sigmas(model, grid) if name == "iddpm" else grid)
    assert (name == "ve") == (float(levels[-2]) == 0.02)
    assert model_sigmas(GuidedDenoiser(model, model, 2.0), 7, 1e-3, 1e3).equal(levels)


def test_a_model_of_all_levels_leaves_the_grid() -> None:
    grid = karras_sigmas(18)
    assert rounded_sigmas(denoiser("edm"), grid).equal(grid)


# Optimised ----------------------------------------------------------------------------------------


def total(cost: np.ndarray, path: tuple[int, ...], gamma: float) -> float:
    return sum(gamma**k * cost[jump] for k, jump in enumerate(itertools.pairwise(path)))


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_path_is_the_cheapest_of_all(steps: int, gamma: float) -> None:
    cost = randn(8, 8, seed=steps).abs().numpy()
    cost[np.tril_indices(8)] = np.inf
    paths = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), steps - 1)]
    assert tuple(cheapest_path(cost, steps, gamma)) == min(paths, key=lambda path: total(cost, path, gamma))


def test_costs_are_those_of_single_jumps() -> None:
    m, grid = denoiser("mixture-kmeans"), karras_sigmas(6)
    x, seen = 80 * randn(3, 1, 8, 8), list[dict[str, Any]]()
    end = heun(m, x, grid, callback=seen.append)
    states = [*(step["x"] for step in seen), end]
    cost = jump_costs(grid.tolist(), torch.stack(states), [step["denoised"] for step in seen])
    for i, j in itertools.product(range(7), repeat=2):
        if j <= i:
            assert math.isinf(cost[i, j])
            continue
        jump = states[i] + (grid[j] - grid[i]) * (states[i] - m(states[i], float(grid[i]))) / grid[i]
        expected = torch.stack([row.norm() for row in jump - states[j]]).mean()
        assert cost[i, j] == pytest.approx(float(expected), rel=1e-9), f"{i} to {j}"


def test_optimised_grid_is_part_of_the_fine_one() -> None:
    g, fine = gaussian(), karras_sigmas(20)
    x = 80 * randn(4, *g.event_shape)
    for steps in (1, 3, 20):
        with count_nfe(g) as nfe:
            grid = optimised_sigmas(g, x, steps, fine)
        assert nfe() == 39
        assert check_sigmas(grid) == sorted(set(grid.tolist()) & set(fine.tolist()), reverse=True)
        assert (len(grid), float(grid[0])) == (steps + 1, 80.0)
    assert grid.equal(fine)


@pytest.mark.parametrize("solver", [euler, dpmpp_2m, ipndm])
def test_it_serves_other_trajectories_better_than_the_standard_grid(solver: Any) -> None:
    m = denoiser("mixture-kmeans")
    measured, unseen = 80 * randn(16, 1, 8, 8, seed=1), 80 * randn(32, 1, 8, 8, seed=2)
    exact = dop853(m, unseen, karras_sigmas(2), rtol=1e-7, atol=1e-7)
    for steps in (8, 12):
        grid = optimised_sigmas(m, measured, steps, karras_sigmas(60))

        def error(grid: Tensor) -> float:
            return relative_error(solver(m, unseen, grid), exact)

        assert error(grid) < 0.6 * error(karras_sigmas(steps)), f"{steps} steps"


def test_labels_reach_the_denoiser() -> None:
    m = denoiser("mixture-classes")
    x, fine = 80 * randn(8, 1, 8, 8), karras_sigmas(30)
    grids = [
        optimised_sigmas(m, x, 5, fine, class_labels=torch.full((8,), label)).tolist() for label in (0, 1)
    ]
    assert grids[0] != grids[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "1 <= steps <= 5, the steps of the fine grid, got 0"),
        ({"steps": 6}, "1 <= steps <= 5, the steps of the fine grid, got 6"),
        ({"steps": 2, "gamma": 0.0}, "gamma > 0, got 0.0"),
        ({"steps": 2, "fine": torch.tensor([1.0, 2.0])}, "end in 0"),
    ],
    ids=str,
)
def test_impossible_optimisations(arguments: dict[str, Any], message: str) -> None:
    g = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
    with count_nfe(g) as nfe, pytest.raises(ValueError, match=message):
        optimised_sigmas(g, torch.zeros(1, 1, 2, 2), **{"fine": karras_sigmas(5), **arguments})
    assert nfe() == 0
