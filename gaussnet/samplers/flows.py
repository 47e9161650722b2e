"""What a jump goes along: the trajectories of the probability-flow ODE of analytic denoisers.

    dx/dlog s = x - D(x, s)

has a closed solution for a Gaussian (Eq. 15 of arXiv 2412.09726), and therefore for a mixture with one
component a class whose classes are given. Of guidance between Gaussians of low rank it is a linear ODE in a
few dimensions (`gaussnet.samplers.guided_flow`). Other mixtures, local and guided denoisers are cheap: for
them it is solved by the classical Runge-Kutta method in log s.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.denoisers import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser, GuidedDenoiser
from gaussnet.denoisers.base import class_index
from gaussnet.numerics import result_dtype
from gaussnet.samplers.guided_flow import Flow, few_dimensions, guided_flow
from gaussnet.samplers.stepping import evaluate

_STEPS_PER_OCTAVE = 8  # of the Runge-Kutta method


def flow_of(denoiser: Denoiser, class_labels: Tensor | None = None) -> Flow:
    """The trajectory of a denoiser's probability-flow ODE: (x, sigma_from, sigma_to) to the state there.

    In closed form for a Gaussian and for one Gaussian a class. Of guidance from such to an unconditional
    Gaussian, both of low rank, by `guided_flow`: a linear ODE that is solved once for all samples. Else by
    the classical Runge-Kutta method in log sigma, 32 evaluations an octave.

    Args:
        denoiser: any denoiser; a Gaussian, a mixture and guidance between Gaussians are known.
        class_labels: of the samples that will be moved, integers (B,) or one-hot rows (B, classes).

    Returns:
        A function of a state (B, *event_shape), its level and one to reach, both > 0: the state there, in the
        dtype of the one that is moved, but at least float32.

    Raises:
        ValueError: from that function, if a shape, class or level does not fit.

    Example:
        >>> from gaussnet import DeltaDenoiser
        >>> flow = flow_of(DeltaDenoiser(torch.tensor([[-1.0], [1.0]])))
        >>> flow(torch.tensor([[0.3], [-0.3]]), 1.0, 0.01).T.round(decimals=2)
        tensor([[ 0.9900, -0.9900]])
    """
    if isinstance(denoiser, GaussianDenoiser):
        return denoiser.flow
    cond = denoiser
    if isinstance(denoiser, GuidedDenoiser) and isinstance(denoiser.uncond, GaussianDenoiser):
        cond = denoiser.cond
        if isinstance(cond, GaussianDenoiser) and few_dimensions(cond, denoiser.uncond):
            return guided_flow(cond, denoiser.uncond, denoiser.w)
    if isinstance(cond, GaussianMixtureDenoiser) and class_labels is not None:
        known = cond.component_labels
        if known is not None and len(known.unique()) == len(known):
            return _flow_by_class(denoiser, cond, known, class_labels)

    def move(x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        return runge_kutta(denoiser, x, sigma_from, sigma_to, class_labels)

    return move


def runge_kutta(
    denoiser: Denoiser,
    x: Tensor,
    sigma_from: float,
    sigma_to: float,
    class_labels: Tensor | None = None,
    steps: int | None = None,
) -> Tensor:
    """The classical method of order 4 for dx/dlog sigma = x - D(x, sigma), in float64.

    Args:
        denoiser: any denoiser.
        x: state at sigma_from, (B, *event_shape).
        sigma_from: its level.
        sigma_to: the level to reach, > 0, above or below.
        class_labels: for denoisers with classes, integers (B,) or one-hot rows (B, classes).
        steps: of equal size in log sigma; default: eight an octave.

    Returns:
        The state at sigma_to, of the shape of x, in its dtype, but at least float32.

    Raises:
        ValueError: if a level is not positive, or steps < 1.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> x = torch.tensor([[80.0]])
        >>> torch.allclose(runge_kutta(gaussian, x, 80.0, 0.1), gaussian.flow(x, 80.0, 0.1))
        True
    """
    if not (0 < sigma_from < math.inf and 0 < sigma_to < math.inf):
        raise ValueError(f"expected finite levels > 0, got {sigma_from} and {sigma_to}")
    octaves = abs(math.log2(sigma_to / sigma_from))
    steps = math.ceil(octaves * _STEPS_PER_OCTAVE) if steps is None else steps
    if steps < (octaves > 0):
        raise ValueError(f"expected steps >= 1, got {steps}")
    step = math.log(sigma_to / sigma_from) / max(steps, 1)
    state = x.double()

    def slope(state: Tensor, log_sigma: float) -> Tensor:
        return state - evaluate(denoiser, state, math.exp(log_sigma), class_labels)

    for i in range(steps):
        start = math.log(sigma_from) + i * step
        first = slope(state, start)
        second = slope(state + step / 2 * first, start + step / 2)
        third = slope(state + step / 2 * second, start + step / 2)
        fourth = slope(state + step * third, start + step)
        state = state + step / 6 * (first + 2 * (second + third) + fourth)
    return state.to(result_dtype(x))


def _flow_by_class(
    denoiser: Denoiser, mixture: GaussianMixtureDenoiser, known: Tensor, class_labels: Tensor
) -> Flow:
    """Of a mixture with one Gaussian a class, or of guidance to it: each sample by the flow of its own."""

    @cache
    def flow_of_class(label: int) -> Flow:
        k = int((known == label).nonzero())
        rank = int(mixture.ranks[k])
        eigvecs, eigvals = mixture.eigvecs[k, :rank].mT, mixture.eigvals[k, :rank]
        one = GaussianDenoiser(mixture.means[k], Covariance(eigvecs, eigvals, mixture.tails[k]))
        if isinstance(denoiser, GuidedDenoiser):
            return flow_of(GuidedDenoiser(one, denoiser.uncond, denoiser.w))
        return one.flow

    def move(x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        index = class_index(class_labels, tuple(x.shape[:1]), known)
        moved = torch.empty_like(x, dtype=result_dtype(x))
        for label in index.unique().tolist():
            mine = index == label
            if label < 0:  # of no class: the whole mixture
                moved[mine] = runge_kutta(denoiser, x[mine], sigma_from, sigma_to)
            else:
                moved[mine] = flow_of_class(label)(x[mine], sigma_from, sigma_to).to(moved.dtype)
        return moved

    return move
