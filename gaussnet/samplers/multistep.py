"""What the multistep solvers share: one evaluation a step, and steps that are linear in remembered outputs.

`history` holds what is known before the first step: (sigma, x, denoised) at levels above sigmas[0], from high
to low, newest last. With order - 1 of them a solver starts at full order; without, it works its way up from
order 1. A Gaussian gives them in closed form where its flow is the trajectory:

    x_j = gaussian.flow(x, sigmas[0], sigma_j),        denoised_j = gaussian(x_j, sigma_j).

Levels a step of the grid apart serve best. Weights are numbers of the grid alone, computed on the host in
float64, so that a step costs no synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.stepping import Callback, Denoise, History, report, start
from gaussnet.samplers.weights import Weights


def multistep(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    rule: Weights,
    order: int,
    history: History,
    dtype: torch.dtype | None,
    class_labels: Tensor | None,
    callback: Callback | None,
    *,
    noise: bool = False,
    corrected: bool = False,
    lower_order_final: bool = False,
    runge_kutta: bool = False,
) -> Tensor:
    """Steps with the outputs of up to `order` levels, of the data or of the noise."""
    levels = check_sigmas(sigmas)
    past = known_outputs(history, x, levels[0], noise, dtype)[:order]
    x, denoise = start(denoiser, x, class_labels, dtype)
    before = x
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        report(callback, x, i, sigma, denoised)
        if sigma_next == 0:
            return denoised
        output = (x - denoised) / sigma if noise else denoised
        if corrected and i > 0:  # once more from the level before, now with the output at this one
            x = _advance(before, levels[i - 1], sigma, [(sigma, output), *past], rule, noise)
        before = x
        if runge_kutta and len(past) < order - 1:
            x = _runge_kutta(denoise, x, output, sigma, sigma_next)
            past = [(sigma, output), *past]
            continue
        past = [(sigma, output), *past][:order]
        used = past[: len(levels) - 1 - i] if lower_order_final else past
        x = _advance(x, sigma, sigma_next, used, rule, noise)
    raise AssertionError("the grid ends in 0")


def _advance(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    outputs: Sequence[tuple[float, Tensor]],
    rule: Weights,
    noise: bool,
) -> Tensor:
    """The step from sigma to sigma_next."""
    x = x if noise else (sigma_next / sigma) * x
    for weight, (_, output) in zip(
        rule(sigma, sigma_next, [level for level, _ in outputs]), outputs, strict=True
    ):
        x = torch.add(x, output, alpha=weight)
    return x


def _runge_kutta(denoise: Denoise, x: Tensor, slope: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The classical step of order 4, from the slope at its start."""
    middle, step = (sigma + sigma_next) / 2, sigma_next - sigma

    def at(level: float, slope: Tensor) -> Tensor:
        ahead = x + (level - sigma) * slope
        return (ahead - denoise(ahead, level)) / level

    second = at(middle, slope)
    third = at(middle, second)
    fourth = at(sigma_next, third)
    return x + (step / 6) * (slope + 2 * (second + third) + fourth)


def known_outputs(
    history: History, x: Tensor, sigma: float, noise: bool, dtype: torch.dtype | None
) -> list[tuple[float, Tensor]]:
    """What the history says, newest first.

    Raises:
        ValueError: if its levels do not decrease towards sigma, or its tensors are not of the shape of x.
    """
    levels = [float(level) for level, _, _ in history]
    if not all(upper > lower for upper, lower in pairwise([math.inf, *levels, sigma])):
        raise ValueError(
            f"expected a history of finite levels that decrease to above {sigma:g}, got {levels}"
        )
    shapes = {tuple(tensor.shape) for _, *tensors in history for tensor in tensors}
    if shapes - {tuple(x.shape)}:
        raise ValueError(f"expected a history of tensors of shape {tuple(x.shape)}, got {sorted(shapes)}")
    outputs: list[tuple[float, Tensor]] = []
    for level, (_, state, denoised) in zip(levels, history, strict=True):
        state, denoised = (tensor if dtype is None else tensor.to(dtype) for tensor in (state, denoised))
        outputs.insert(0, (level, (state - denoised) / level if noise else denoised))
    return outputs


def check_order(order: int, most: int) -> None:
    """Raises a ValueError if the order is not one from 1 to `most`."""
    if order not in range(1, most + 1):
        raise ValueError(f"expected an order from 1 to {most}, got {order}")


def check_among(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises a ValueError if the value is not among the known ones."""
    if value not in known:
        raise ValueError(f"expected {name} to be {' or '.join(map(repr, known))}, got {value!r}")
