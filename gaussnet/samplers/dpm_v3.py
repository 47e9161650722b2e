"""DPM-Solver-v3: an exponential integrator with statistics of the model in its coefficients.

A step interpolates g of `gaussnet.samplers.model_statistics`, what the statistics leave unexplained of the
model, by a polynomial in lambda = -log sigma through levels that were passed already. Whatever the statistics
are, solutions converge to those of the ODE, at the order of the solver.

The method is that of the authors' code, with their options under other names:

    p_pseudo = pseudo,    use_corrector = corrector != "none",    c_pseudo = corrector == "pseudo".

Given the same statistics, both give the same states. Ours differs around the method: coefficients are
integrals of a spline rather than sums over the table, so that any grid will do, not only levels of the table,
and a coarse table; and the last step goes to 0, on the denoised, where theirs ends at the last level above.
Their examples take order 3 with a pseudo predictor for 5 steps, and the corrector "same" for 5 and 6 steps,
none for more (CIFAR-10, unconditional); and the corrector "pseudo" (guided).

Reference: Zheng et al. 2023, arXiv 2310.13268. How solvers are called, and what they do in the step to 0:
`gaussnet.samplers.stepping`; on their history: `gaussnet.samplers.multistep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from gaussnet.samplers.model_statistics import ModelStatistics, as_factor
from gaussnet.samplers.multistep import check_among, check_order, known_outputs
from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.stepping import Callback, History, report, start


@torch.no_grad()
def dpm_v3(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    statistics: ModelStatistics | None = None,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    history: History = (),
    dtype: torch.dtype | None = None,
    order: int = 2,
    corrector: Literal["none", "same", "pseudo"] = "same",
    pseudo: bool = False,
    lower_order_final: bool = True,
) -> Tensor:
    """DPM-Solver-v3: order p in what the statistics leave of the model; NFE n for n steps.

    The corrector uses the evaluation at a level once more in the step to it, as in `unipc`, and costs none.
    It corrects the state that goes on, not the one that was evaluated. The coefficients are computed on the
    host in each step, for one event. Without history the first step is of order 1.

    Reference: Zheng et al. 2023, arXiv 2310.13268.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        statistics: of this denoiser, from `compute_ems`; they must span the levels above 0.
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called once a step, with the predicted state.
        history: (sigma, x, denoised) above sigmas[0], newest last; within the levels of the statistics, too.
            The newest order - 1 are used.
        dtype: of the state, float64 for EDM's precision; default: that of x. The denoiser gets that of x.
        order: p of the predictor, 1 to 3; 2 is the safer with few steps.
        corrector: "same" corrects with the output at the end of the step in place of the oldest one, of order
            p, and leaves steps of order 1; "pseudo" with one output more, by `pseudo`'s rule, of order 2;
            "none" does not.
        pseudo: derivatives of g are divided differences without the terms of higher order that make them
            those of the polynomial: of order 2 at most, where p = 3 is unstable with very few steps.
        lower_order_final: the last steps are of order min(p, number of steps left).

    Returns:
        The state at 0, of the shape of x, in the dtype of the state.

    Raises:
        ValueError: if the grid does not decrease to 0, the history does not lead down to it, there are no
            statistics, they do not span the levels or fit the shape of x, or order or corrector are unknown.

    Example:
        >>> from gaussnet import GaussianDenoiser, compute_ems, log_snr_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> data = torch.randn(256, 1, generator=torch.Generator().manual_seed(0))
        >>> statistics = compute_ems(gaussian, data, log_snr_sigmas(30), n=256)
        >>> round(dpm_v3(gaussian, x, log_snr_sigmas(5), statistics=statistics).item(), 2)  # exactly: 1
        1.0
    """
    levels = check_sigmas(sigmas)
    check_order(order, 3)
    check_among("corrector", corrector, ("none", "same", "pseudo"))
    if statistics is None:
        raise ValueError(
            "expected statistics of the denoiser: compute them once, with compute_ems, and save them"
        )
    event_shape = statistics.l.shape[1:]
    if len(event_shape) != x.ndim - 1 or any(
        a not in (1, b) for a, b in zip(event_shape, x.shape[1:], strict=True)
    ):
        raise ValueError(
            f"expected x of shape (B, {tuple(event_shape)}), as the statistics, got {tuple(x.shape)}"
        )
    known = known_outputs(history, x, levels[0], False, dtype)
    statistics.check_levels([*(level for level, _ in known), *levels[:-1]])
    past = [
        (level, statistics.residual(state.to(denoised), denoised, level))
        for (level, denoised), (_, state, _) in zip(known, reversed(history), strict=True)
    ]
    x, denoise = start(denoiser, x, class_labels, dtype)
    before, used = x, past
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        report(callback, x, i, sigma, denoised)
        if sigma_next == 0:
            return denoised
        output = statistics.residual(x, denoised, sigma)
        if corrector != "none" and i > 0:  # the step to this level again, now with the output at it
            nodes = [used[0], (sigma, output), *used[1:]][: len(used) + (corrector == "pseudo")]
            if len(nodes) > 1:  # else it would predict again
                x = _advance(statistics, before, levels[i - 1], sigma, nodes, corrector == "pseudo")
        before = x
        past = [(sigma, output), *past][:order]
        used = past[: len(levels) - 1 - i] if lower_order_final else past
        x = _advance(statistics, x, sigma, sigma_next, used, pseudo)
    raise AssertionError("the grid ends in 0")


def _advance(
    statistics: ModelStatistics,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    outputs: Sequence[tuple[float, Tensor]],
    pseudo: bool,
) -> Tensor:
    """The step from sigma to sigma_next."""
    levels = [level for level, _ in outputs]
    factor, factors, constant = statistics.step(sigma, sigma_next, levels, pseudo)
    x = torch.addcmul(as_factor(constant, x), as_factor(factor, x), x)
    for weight, (_, output) in zip(factors, outputs, strict=True):
        x = torch.addcmul(x, as_factor(weight, x), output)
    return x
