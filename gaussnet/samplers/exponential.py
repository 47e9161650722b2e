"""Multistep solvers in the data, as plain functions: exponential integrators.

In lambda = -log sigma the ODE is dx/dlambda = D - x. Its linear part is solved exactly; D is interpolated
through levels that were passed already (`gaussnet.samplers.weights`):

    x' = (sigma'/sigma) x + sum_j w_j D(x_j, sigma_j).

How solvers are called, and what they do in the step to 0: `gaussnet.samplers.stepping`; on their history:
`gaussnet.samplers.multistep`, of which they use sigma and denoised.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gaussnet.samplers import weights
from gaussnet.samplers.multistep import check_among, check_order, multistep
from gaussnet.samplers.stepping import Callback, History


@torch.no_grad()
def dpmpp_2m(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DPM-Solver++(2M): order 2 in the data, one evaluation a step, NFE n for n steps.

    Without history the first step is of order 1, an error of O(h^2).

    Reference: Lu et al. 2022, arXiv 2211.01095, Algorithm 2.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, or the history does not lead down to it.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(dpmpp_2m(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exact: 1
        [1.128, 1.054, 1.012]
    """
    return multistep(
        denoiser, x, sigmas, weights.simplified("bh2"), 2, history, dtype, class_labels, callback
    )


@torch.no_grad()
def dpmpp_3m(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
    variant: Literal["published", "exact"] = "published",
    lower_order_final: bool = True,
) -> Tensor:
    """DPM-Solver++(3M): order 3, or 2 as published, one evaluation a step, NFE n for n steps.

    The authors' code, and after it diffusers and k-diffusion, takes half of the second derivative: the order
    is 2. Extrapolating less, it errs less than the exact weights with up to some 30 steps of `karras_sigmas`,
    and more with many, or on even steps in log sigma. Without history the first step is of order 1, an error
    of O(h^2) that remains.

    Reference: Lu et al. 2022, arXiv 2211.01095.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        variant: "published", of order 2, or "exact", of order 3.
        lower_order_final: the step before the last is of order 2, as in those codes when steps are few.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, the history does not lead down to it, or the
            variant is unknown.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(dpmpp_3m(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exact: 1
        [1.463, 1.001, 1.001]
    """
    check_among("variant", variant, ("published", "exact"))
    rule = weights.half_curvature if variant == "published" else weights.simplified("bh2")
    return multistep(
        denoiser,
        x,
        sigmas,
        rule,
        3,
        history,
        dtype,
        class_labels,
        callback,
        lower_order_final=lower_order_final,
    )


@torch.no_grad()
def unipc(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Tensor:
    """UniPC: a predictor of order p in the data, and a corrector that makes it p + 1; NFE n for n steps.

    The evaluation at a level serves the corrector of the step to it as well as the next predictor, so that
    the corrector is free. It corrects the state that goes on, not the one that was evaluated. The variants
    differ only in the predictor of order 2 and the corrector of order 1: the rest is exact for polynomials.

    Without history the first step is of order 2 (p = 1 with its corrector), an error of O(h^3) that remains.

    Reference: Zhao et al. 2023, arXiv 2302.04867.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step, with the predicted state.
        history: (sigma, x, denoised) above sigmas[0], newest last; the newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        order: p of the predictor, 1 to 3; 2 is diffusers' default, and safer with 10 steps or fewer.
        variant: B(h) = h ("bh1") or exp(h) - 1 ("bh2"; h is negative in the data).
        lower_order_final: the last steps are of order min(p, number of steps left), as in the authors' code.

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, or the history does not lead down to it,
            or order or variant are unknown.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> [round(unipc(gaussian, x, karras_sigmas(n, 0.01)).item(), 3) for n in (8, 16, 32)]  # exactly: 1
        [1.162, 1.042, 1.004]
    """
    check_order(order, 3)
    check_among("variant", variant, ("bh1", "bh2"))
    rule = weights.simplified(variant)
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
        lower_order_final=lower_order_final,
        corrected=True,
    )
