"""Singlestep solvers of the probability-flow ODE, as plain functions.

In units where time is the noise level, the ODE is (Eq. 2 of arXiv 2412.09726 with sigma_t = t)

    dx/dsigma = -sigma s(x, sigma) = (x - D(x, sigma)) / sigma.

For a denoised that does not change, its solution is D + (sigma'/sigma) (x - D): Euler's step, and DDIM's.
How solvers are called, and what they do in the step to 0: `gaussnet.samplers.stepping`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.stepping import Callback, report, start


@torch.no_grad()
def euler(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Euler's method, which is DDIM in these units: order 1, one evaluation a step, NFE n for n steps.

    Reference: Song et al. 2020, arXiv 2010.02502; Karras et al. 2022, arXiv 2206.00364.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(euler(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exactly: 1
        [0.71, 0.853, 0.926]
    """
    levels = check_sigmas(sigmas)
    x, denoise = start(denoiser, x, class_labels, dtype)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        report(callback, x, i, sigma, denoised)
        x = denoised + (sigma_next / sigma) * (x - denoised)
    return x


ddim = euler


@torch.no_grad()
def heun(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Heun's method as in EDM: order 2, two evaluations a step but for the last, NFE 2n - 1 for n steps.

    Reference: Karras et al. 2022, arXiv 2206.00364, Algorithm 1.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(heun(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exactly: 1
        [1.26, 1.05, 1.011]
    """
    return edm_stochastic(
        denoiser, x, sigmas, class_labels=class_labels, callback=callback, dtype=dtype, S_churn=0
    )


@torch.no_grad()
def edm_stochastic(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    S_churn: float = 40.0,
    S_min: float = 0.05,
    S_max: float = 50.0,
    S_noise: float = 1.003,
) -> Tensor:
    """EDM's stochastic sampler: every step first adds noise, then removes it and more by Heun's method.

    Order 2 in the part that is an ODE, two evaluations a step but for the last, NFE 2n - 1 for n steps.
    Without churn it is `heun`. The defaults are those of EDM for ImageNet-64. Where the denoiser has
    `round_sigma`, the raised levels are rounded by it.

    Reference: Karras et al. 2022, arXiv 2206.00364, Algorithm 2.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step; its sigma_hat is the raised level, its x the state there.
        generator: draws the noise, on its own device.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        S_churn: amount of noise: every level is raised by the factor 1 + min(S_churn / n, sqrt(2) - 1).
        S_min: lowest level that is raised.
        S_max: highest level that is raised.
        S_noise: standard deviation of the noise added, a little above 1 against what denoisers overdo.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, or a constant is negative.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, sigmas = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), karras_sigmas(18)
        >>> generator, x = torch.Generator().manual_seed(0), torch.full((1000, 1), 80.0)
        >>> many = edm_stochastic(gaussian, x, sigmas, generator=generator)  # of one state
        >>> round(many.std().item(), 1), round(heun(gaussian, x, sigmas).std().item(), 1)
        (1.1, 0.0)
    """
    levels = check_sigmas(sigmas)
    if not all(constant >= 0 for constant in (S_churn, S_min, S_max, S_noise)):
        raise ValueError(
            f"expected S_churn, S_min, S_max, S_noise >= 0, got {S_churn}, {S_min}, {S_max}, {S_noise}"
        )
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    raised = [(1 + gamma) * sigma for sigma in levels]
    round_sigma = getattr(denoiser, "round_sigma", None)
    if gamma > 0 and round_sigma is not None:
        raised = round_sigma(raised).tolist()
    x, denoise = start(denoiser, x, class_labels, dtype)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat = max(sigma, raised[i]) if gamma > 0 and S_min <= sigma <= S_max else sigma
        if sigma_hat > sigma:
            device = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
            x = x + (S_noise * math.sqrt(sigma_hat**2 - sigma**2)) * noise
        denoised = denoise(x, sigma_hat)
        report(callback, x, i, sigma, denoised, sigma_hat)
        if sigma_next == 0:
            return denoised
        slope = (x - denoised) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * slope
        slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
        x = x + ((sigma_next - sigma_hat) / 2) * (slope + slope_next)
    raise AssertionError("the grid ends in 0")


@torch.no_grad()
def dpmpp_2s(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DPM-Solver++(2S): order 2, two evaluations a step but for the last, NFE 2n - 1 for n steps.

    The second evaluation is half-way in log sigma, and stands for the whole step. The half-way level is not
    on the grid, as in k-diffusion; the published code, and diffusers, count it as a step of its own.

    Reference: Lu et al. 2022, arXiv 2211.01095, Algorithm 1 with r = 1/2.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(dpmpp_2s(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exact: 1
        [0.914, 0.977, 0.994]
    """
    levels = check_sigmas(sigmas)
    x, denoise = start(denoiser, x, class_labels, dtype)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        report(callback, x, i, sigma, denoised)
        if sigma_next == 0:
            return denoised
        sigma_mid = math.sqrt(sigma * sigma_next)
        halfway = denoise(denoised + (sigma_mid / sigma) * (x - denoised), sigma_mid)
        x = halfway + (sigma_next / sigma) * (x - halfway)
    raise AssertionError("the grid ends in 0")
