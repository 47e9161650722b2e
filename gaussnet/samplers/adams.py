"""Multistep solvers in the noise, as plain functions: Adams-Bashforth methods.

The slope of the ODE is the noise, dx/dsigma = e with e = (x - D) / sigma. It is interpolated through levels
that were passed already (`gaussnet.samplers.weights`):

    x' = x + sum_j w_j e(x_j, sigma_j).

How solvers are called, and what they do in the step to 0: `gaussnet.samplers.stepping`; on their history:
`gaussnet.samplers.multistep`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gaussnet.samplers import weights
from gaussnet.samplers.multistep import check_among, check_order, multistep
from gaussnet.samplers.stepping import Callback, History


@torch.no_grad()
def deis(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
    order: int = 3,
    variant: Literal["log_rho", "tab"] = "log_rho",
    lower_order_final: bool = False,
) -> Tensor:
    """DEIS, Adams-Bashforth on the grid as it is: order 1 to 4, one evaluation a step, NFE n for n steps.

    The noise is a polynomial in log sigma, as in diffusers, or one in sigma, the time of these units: tAB and
    rhoAB of the reference, and `sample_lms` of k-diffusion. From 80 down, with few steps, the former errs
    several times less. Without history the first step is of order 1, an error of O(h^2) that remains.

    Reference: Zhang and Chen 2022, arXiv 2204.13902.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        order: number of outputs that make a step, 1 to 4.
        variant: "log_rho" or "tab".
        lower_order_final: the last steps are of order min(order, number of steps left), as in diffusers when
            steps are few.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, the history does not lead down to it, or order or
            variant are unknown.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(deis(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exactly: 1
        [0.987, 1.003, 1.001]
    """
    check_order(order, 4)
    check_among("variant", variant, ("log_rho", "tab"))
    rule = weights.adams if variant == "tab" else weights.log_adams
    return multistep(
        denoiser,
        x,
        sigmas,
        rule,
        order,
        history,
        dtype,
        class_labels,
        callback,
        noise=True,
        lower_order_final=lower_order_final,
    )


@torch.no_grad()
def ipndm(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
    order: int = 4,
) -> Tensor:
    """iPNDM: Adams-Bashforth's weights of equal steps on any grid, one evaluation a step, NFE n for n steps.

    Of its order, 1 to 4, where the grid is even in sigma; on Karras' and other smooth grids of order 2 at
    most (`deis` has the weights of the grid), yet with few steps often the better. Starts at order 1.

    Reference: Zhang and Chen 2022, arXiv 2204.13902, after PNDM, arXiv 2202.09778.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        order: number of outputs that make a step, 1 to 4.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, or the history does not lead down to it,
            or the order is unknown.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(ipndm(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exactly: 1
        [1.065, 1.019, 1.004]
    """
    check_order(order, 4)
    return multistep(
        denoiser, x, sigmas, weights.even_adams, order, history, dtype, class_labels, callback, noise=True
    )


@torch.no_grad()
def pndm(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """F-PNDM: `ipndm` of order 4 after three Runge-Kutta steps, NFE n + 9 for n > 3 steps, else 4n - 3.

    Every Runge-Kutta step costs four evaluations; each entry of the history, up to three, replaces one.
    Half-way between two levels is their mean, as PNDM's is in time. On orders and grids see `ipndm`.

    Reference: Liu et al. 2022, arXiv 2202.09778.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest three are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, or the history does not lead down to it.

    Example:
        >>> from gaussnet import GaussianDenoiser, count_nfe, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> with count_nfe(gaussian) as nfe:
        ...     sample = pndm(gaussian, x, karras_sigmas(20))
        >>> round(sample.item(), 3), nfe()  # exactly: 1
        (1.013, 29)
    """
    return multistep(
        denoiser,
        x,
        sigmas,
        weights.even_adams,
        4,
        history,
        dtype,
        class_labels,
        callback,
        noise=True,
        runge_kutta=True,
    )
