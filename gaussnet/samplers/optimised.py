"""A grid for few steps, found by dynamic programming on a few trajectories of the denoiser.

On the trajectories x_i of a fine grid, jumping from level i to level j with the slope at i misses x_j by

    c_ij = mean over trajectories of ||x_i + (sigma_j - sigma_i) (x_i - D_i) / sigma_i - x_j||.

The grid of n steps with the least sum of these costs, later ones weighted by powers of gamma, solves

    V_1(i) = c_iN,        V_k(i) = min_j c_ij + gamma V_(k-1)(j).

Reference: Chen et al. 2024, arXiv 2405.11326 (GITS), whose final level is sigma_min; here it is 0, with the
step to 0 among the costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.solvers import heun
from gaussnet.samplers.stepping import Solver


@torch.no_grad()
def optimised_sigmas(
    denoiser: nn.Module,
    x: Tensor,
    steps: int,
    fine: Tensor,
    *,
    class_labels: Tensor | None = None,
    solver: Solver = heun,
    gamma: float = 1.0,
) -> Tensor:
    """Those levels of a fine grid that serve a denoiser best in few steps.

    It costs one run of the solver on the fine grid, whose states are kept. Measured for Euler's steps, the
    grid serves multistep solvers, too; Heun's method least.

    Reference: Chen et al. 2024, arXiv 2405.11326.

    Args:
        denoiser: any denoiser.
        x: start of a few trajectories, states at fine[0], (B, *event_shape).
        steps: number of steps of the grid.
        fine: decreasing levels that end in 0, shape (N + 1,), such as 60 of `karras_sigmas`.
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        solver: of the trajectories.
        gamma: later steps count more where it is above 1, as in the reference's code (1.15).

    Returns:
        float64 levels, shape (steps + 1,), a subset of `fine` that has its first and its last.

    Raises:
        ValueError: if the fine grid does not decrease to 0 or has fewer steps, or gamma <= 0.

    Example:
        >>> from gaussnet import GaussianDenoiser, euler, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> chosen = optimised_sigmas(gaussian, x, 5, karras_sigmas(60))
        >>> [round(euler(gaussian, x, grid).item(), 2) for grid in (karras_sigmas(5), chosen)]  # exactly: 1
        [0.49, 0.78]
    """
    levels = check_sigmas(fine)
    if not 1 <= steps < len(levels):
        raise ValueError(f"expected 1 <= steps <= {len(levels) - 1}, the steps of the fine grid, got {steps}")
    if not gamma > 0:
        raise ValueError(f"expected gamma > 0, got {gamma}")
    seen: list[dict[str, Any]] = []
    end = solver(denoiser, x, fine, class_labels=class_labels, callback=seen.append)
    cost = jump_costs(
        levels, torch.stack([*(step["x"] for step in seen), end]), [s["denoised"] for s in seen]
    )
    chosen = cheapest_path(cost, steps, gamma)
    return torch.tensor(levels, dtype=torch.float64)[chosen]


def jump_costs(levels: list[float], states: Tensor, denoised: list[Tensor]) -> np.ndarray:
    """c_ij of states (N + 1, B, *event_shape) and what was denoised at the first N; inf where j <= i."""
    cost = np.full((len(levels), len(levels)), np.inf)
    for i, (sigma, output) in enumerate(zip(levels, denoised, strict=False)):
        ratio = torch.tensor(levels[i + 1 :], dtype=states.dtype, device=states.device) / sigma
        jumps = output + ratio.reshape(-1, *(1,) * output.ndim) * (states[i] - output)
        misses = (jumps - states[i + 1 :]).flatten(2).norm(dim=2).mean(1)  # (N - i,)
        cost[i, i + 1 :] = misses.cpu().double().numpy()
    return cost


def cheapest_path(cost: np.ndarray, steps: int, gamma: float) -> list[int]:
    """The indices from 0 to the last in `steps` jumps with the least V_steps(0)."""
    value, choices = cost[:, -1], []
    for _ in range(steps - 1):
        total = cost + gamma * value  # (from, to)
        choices.append(total.argmin(1))
        value = total.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, len(cost) - 1]
