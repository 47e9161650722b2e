"""Grids of noise levels: decreasing, ending in 0."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The grid of EDM: n levels evenly spaced in sigma^(1/rho) (Eq. 40), then 0.

        sigma_i = (sigma_max^(1/rho) + i/(n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Reference: Karras et al. 2022, arXiv 2206.00364, Eq. 5.

    Args:
        n: number of levels above 0, which is the number of steps.
        sigma_min: the last level above 0.
        sigma_max: the first level.
        rho: larger values put more of the levels at low noise.

    Returns:
        float64 tensor of shape (n + 1,).

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max, or rho <= 0.

    Example:
        >>> [round(sigma, 3) for sigma in karras_sigmas(4).tolist()]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """
    if n < 1:
        raise ValueError(f"expected n >= 1 steps, got {n}")
    if not 0 < sigma_min < sigma_max < float("inf"):
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"expected rho > 0, got {rho}")
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64) ** (1 / rho)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    levels = torch.lerp(ends[0], ends[1], ramp) ** rho
    levels[0] = sigma_max  # to the last bit, so that grids can be compared and joined
    if n > 1:
        levels[-1] = sigma_min
    return torch.cat([levels, levels.new_zeros(1)])


def check_sigmas(sigmas: Tensor) -> list[float]:
    """The levels as floats.

    Raises:
        ValueError: if they are not a decreasing sequence of at least two that ends in 0.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if not isinstance(levels, list) or len(levels) < 2 or levels[-1] != 0:
        raise ValueError(f"expected sigmas to be at least two levels that end in 0, got {levels}")
    if any(not b < a < float("inf") for a, b in pairwise(levels)):
        raise ValueError(f"expected finite, strictly decreasing sigmas, got {levels}")
    return levels
