"""Grids of noise levels: decreasing, ending in 0."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gaussnet.denoisers import Denoiser, GuidedDenoiser
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.schedules import DiscreteSchedule


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The grid of EDM: n levels evenly spaced in sigma^(1/rho) (Eq. 40), then 0.

    Other codes call it polynomial. With rho = 1 it is even in sigma; for rho to infinity, `log_snr_sigmas`.

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
        ValueError: if n < 1, not 0 < sigma_min < sigma_max, or rho is not finite and positive.

    Example:
        >>> [round(sigma, 3) for sigma in karras_sigmas(4).tolist()]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """
    _check_ends(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"expected a finite rho > 0, got {rho}")
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64) ** (1 / rho)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return _with_ends(torch.lerp(ends[0], ends[1], ramp) ** rho, sigma_min, sigma_max)


def log_snr_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Levels evenly spaced in log sigma, and so in the log signal-to-noise ratio -2 log sigma, then 0.

    The steps in which exponential integrators are even. Reference: Lu et al. 2022, arXiv 2206.00927.

    Args:
        n: number of levels above 0, which is the number of steps.
        sigma_min: the last level above 0.
        sigma_max: the first level.

    Returns:
        float64 tensor of shape (n + 1,).

    Raises:
        ValueError: if n < 1 or not 0 < sigma_min < sigma_max.

    Example:
        >>> [round(sigma, 3) for sigma in log_snr_sigmas(3, 0.01, 100.0).tolist()]
        [100.0, 1.0, 0.01, 0.0]
    """
    _check_ends(n, sigma_min, sigma_max)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp()
    return _with_ends(levels, sigma_min, sigma_max)


def vp_sigmas(
    n: int,
    betas: Literal["linear", "scaled_linear"] | Tensor = "linear",
    spacing: Literal["leading", "trailing", "linspace"] = "leading",
    offset: int = 0,
) -> Tensor:
    """sigma_t / alpha_t at n of the steps of a discrete VP process, then 0.

    Of T steps t = 0 .. T - 1, "leading" takes multiples of T // n, as DDIM does, "trailing" those of T / n
    counted from the end, and "linspace" n from end to end.

    Reference: Lin et al. 2023, arXiv 2305.08891, Table 2.

    Args:
        n: number of levels above 0, which is the number of steps.
        betas: variances of the T steps; "linear" are DDPM's 1,000 from 1e-4 to 0.02 (arXiv 2006.11239), and
            "scaled_linear" Stable Diffusion's from 0.00085 to 0.012, whose roots are evenly spaced.
        spacing: which steps are taken.
        offset: added to the steps of "leading"; Stable Diffusion's is 1.

    Returns:
        float64 tensor of shape (n + 1,).

    Raises:
        ValueError: if the betas or the spacing are unknown, or the process has not n such steps.

    Example:
        >>> [round(sigma, 2) for sigma in vp_sigmas(4, "scaled_linear", "trailing").tolist()]
        [14.61, 4.08, 1.61, 0.69, 0.0]
    """
    schedule = DiscreteSchedule.from_betas(_betas(betas))
    count = len(schedule.log_levels)
    if spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f"expected spacing to be 'leading', 'trailing' or 'linspace', got {spacing!r}")
    if not 1 <= n <= count:
        raise ValueError(f"expected 1 <= n <= {count}, the steps of the process, got {n}")
    index = torch.arange(n, dtype=torch.float64)
    if spacing == "leading":
        steps = (n - 1 - index) * (count // n) + offset
    elif spacing == "trailing":
        # NumPy's, as diffusers has them: steps half-way between two fall on the same side.
        steps = torch.from_numpy(np.arange(count, 0, -count / n)[:n].round()) - 1
    else:
        steps = torch.from_numpy(np.linspace(0, count - 1, n).round()).flip(0) if n > 1 else index + count - 1
    if not 0 <= steps[-1] <= steps[0] < count:
        raise ValueError(
            f"expected steps from 0 to {count - 1}, got {steps.long().tolist()}: offset={offset}"
        )
    levels = schedule.log_levels[steps.long()].exp()
    return torch.cat([levels, levels.new_zeros(1)])


def rounded_sigmas(model: NetworkDenoiser, sigmas: Tensor) -> Tensor:
    """The levels nearest to a grid's that a model knows, each once: EDM's treatment of discrete models.

    Args:
        model: its `round_sigma` is asked.
        sigmas: decreasing levels that end in 0, shape (n + 1,).

    Returns:
        float64 levels (m + 1,) that end in 0; m < n where the grid is finer than the model's levels.

    Raises:
        ValueError: if the grid does not decrease to 0.

    Example:
        >>> from gaussnet import MLP, iDDPMPrecond
        >>> model = iDDPMPrecond(MLP(4, in_channels=1, out_channels=2, model_channels=8), M=10)  # ten levels
        >>> rounded = rounded_sigmas(model, karras_sigmas(50, 0.1, 10.0))
        >>> len(rounded), bool(torch.isin(rounded[:-1].float(), model.u).all())
        (10, True)
    """
    levels = model.round_sigma(torch.tensor(check_sigmas(sigmas), dtype=torch.float64))
    return torch.unique_consecutive(levels)


def model_sigmas(
    model: Denoiser, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """`karras_sigmas` within the levels that a model was made for, rounded to those that it knows.

    So EDM samples from its discrete models and from those of other ranges. Analytic denoisers take any level.

    Args:
        model: the denoiser to sample from; of a guided one, the conditional one is asked.
        n: number of levels above 0; fewer come back where the model knows fewer.
        sigma_min: the last level above 0, or the network's lowest if that is higher.
        sigma_max: the first level, or the network's highest if that is lower.
        rho: as of `karras_sigmas`.

    Returns:
        float64 tensor of shape (m + 1,), m <= n.

    Raises:
        ValueError: as of `karras_sigmas`.

    Example:
        >>> from gaussnet import MLP, VEPrecond
        >>> model = VEPrecond(MLP(4, in_channels=1, out_channels=1, model_channels=8))
        >>> [round(sigma, 3) for sigma in model_sigmas(model, 3).tolist()]
        [80.0, 4.046, 0.02, 0.0]
    """
    if isinstance(model, GuidedDenoiser):
        return model_sigmas(model.cond, n, sigma_min, sigma_max, rho)
    if not isinstance(model, NetworkDenoiser):
        return karras_sigmas(n, sigma_min, sigma_max, rho)
    low, high = max(sigma_min, model.sigma_min), min(sigma_max, model.sigma_max)
    return rounded_sigmas(model, karras_sigmas(n, low, high, rho))


def check_sigmas(sigmas: Tensor) -> list[float]:
    """The levels as floats.

    Raises:
        ValueError: if they are not a decreasing sequence of at least two that ends in 0.
    """
    table = torch.as_tensor(sigmas, dtype=torch.float64)
    levels: list[float] = table.tolist()
    if table.ndim != 1 or len(levels) < 2 or levels[-1] != 0:
        raise ValueError(f"expected sigmas to be at least two levels that end in 0, got {levels}")
    if any(not b < a < math.inf for a, b in pairwise(levels)):
        raise ValueError(f"expected finite, strictly decreasing sigmas, got {levels}")
    return levels


def _check_ends(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"expected n >= 1 steps, got {n}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


def _with_ends(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    levels[0] = sigma_max  # to the last bit, so that grids can be compared and joined
    if len(levels) > 1:
        levels[-1] = sigma_min
    return torch.cat([levels, levels.new_zeros(1)])


def _betas(betas: str | Tensor) -> Tensor:
    if isinstance(betas, Tensor):
        return betas
    if betas == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    if betas == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    raise ValueError(f"expected betas to be a tensor, 'linear' or 'scaled_linear', got {betas!r}")
