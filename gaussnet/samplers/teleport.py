"""Teleport: one closed-form jump in place of a sampler's first steps.

At high noise the probability-flow ODE of a trained model is that of the Gaussian with the data's moments, and
its solution is known (Eq. 15 of arXiv 2412.09726; Algorithm 1 there). Skipping i steps of Heun's method
saves 2 i network evaluations. The result is only another state and grid, so any solver can go on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.samplers.schedules import check_sigmas


@torch.no_grad()
def teleport(
    gaussian: GaussianDenoiser,
    x: Tensor,
    sigmas: Tensor,
    skip: int | None = None,
    sigma_skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves `x` along the Gaussian's flow, and drops the steps before.

    Args:
        gaussian: fitted to the data of the model that goes on from here.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        skip: number of steps to drop: the jump ends at sigmas[skip]. 0 <= skip < n.
        sigma_skip: or the level to jump to, which need not be on the grid; levels below it are kept.

    Returns:
        The state at the new first level, and the grid from there on.

    Raises:
        ValueError: if not exactly one of skip and sigma_skip is given, or it lies outside of the grid.

    Example:
        >>> from gaussnet import heun, karras_sigmas
        >>> gaussian = model = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), var=1.0)
        >>> x, sigmas = teleport(gaussian, torch.full((1, 1, 2, 2), 80.0), karras_sigmas(18), skip=5)
        >>> [round(sigma, 1) for sigma in sigmas.tolist()[:3]]  # 13 of the 18 steps are left
        [12.9, 8.4, 5.3]
        >>> images = heun(model, x, sigmas)
    """
    levels = check_sigmas(sigmas)
    if (skip is None) == (sigma_skip is None):
        raise ValueError(f"expected either skip or sigma_skip, got skip={skip} and sigma_skip={sigma_skip}")
    grid = torch.as_tensor(sigmas, dtype=torch.float64)
    if skip is not None:
        if not 0 <= skip < len(levels) - 1:
            raise ValueError(f"expected 0 <= skip < {len(levels) - 1}, the number of steps, got {skip}")
        rest = grid[skip:]
    else:
        assert sigma_skip is not None
        if not 0 < sigma_skip <= levels[0]:
            raise ValueError(f"expected 0 < sigma_skip <= sigmas[0] = {levels[0]:g}, got {sigma_skip}")
        rest = torch.cat([grid.new_tensor([sigma_skip]), grid[grid < sigma_skip]])
    return gaussian.flow(x, levels[0], float(rest[0])), rest
