"""Solvers of the probability-flow ODE, as plain functions.

In units where time is the noise level, the ODE is (Eq. 2 of arXiv 2412.09726 with sigma_t = t)

    dx/dsigma = -sigma s(x, sigma) = (x - D(x, sigma)) / sigma.

Every solver is called as `solver(denoiser, x, sigmas, *, class_labels=None, callback=None)`: x is the state
at sigmas[0], the grid decreases and ends in 0, and the state at 0 is returned. This is the convention of
k-diffusion: its samplers and these can be exchanged. Denoisers get one sigma per sample. `callback` receives
a dict per step: x, i, sigma, sigma_hat (the level of x), denoised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.samplers.schedules import check_sigmas

Callback = Callable[[dict[str, Any]], None]


@torch.no_grad()
def euler(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, which is DDIM in these units: order 1, one evaluation a step.

    Reference: Song et al. 2020, arXiv 2010.02502; Karras et al. 2022, arXiv 2206.00364.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser.
        callback: called once a step.

    Returns:
        The state at 0, of the shape of x.

    Raises:
        ValueError: if the grid does not decrease to 0.
    """
    levels = check_sigmas(sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = _denoise(denoiser, x, sigma, class_labels)
        _report(callback, x, i, sigma, denoised)
        x = x + (sigma_next - sigma) * ((x - denoised) / sigma)
    return x


@torch.no_grad()
def heun(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method as in EDM: order 2, two evaluations a step but for the last, 2n - 1 for n steps.

    Reference: Karras et al. 2022, arXiv 2206.00364, Algorithm 1. Arguments, result and errors as in `euler`.
    """
    levels = check_sigmas(sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = _denoise(denoiser, x, sigma, class_labels)
        _report(callback, x, i, sigma, denoised)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - _denoise(denoiser, x_next, sigma_next, class_labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


@contextmanager
def count_nfe(denoiser: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the evaluations of a denoiser; of one that holds a network, those of the network.

    A model whose gate is closed therefore counts for nothing.

    Example:
        >>> from gaussnet import GaussianDenoiser, heun, karras_sigmas
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
        >>> with count_nfe(gaussian) as nfe:
        ...     x = heun(gaussian, 80 * torch.randn(1, 1, 2, 2), karras_sigmas(18))
        >>> nfe()
        35
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    counted = denoiser.model if isinstance(denoiser, NetworkDenoiser) else denoiser
    handle = counted.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        handle.remove()


def _denoise(denoiser: nn.Module, x: Tensor, sigma: float, class_labels: Tensor | None) -> Tensor:
    level = torch.full(x.shape[:1], sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return denoiser(x, level) if class_labels is None else denoiser(x, level, class_labels=class_labels)


def _report(callback: Callback | None, x: Tensor, i: int, sigma: float, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
