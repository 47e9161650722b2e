"""Teleport: one jump along an analytic trajectory in place of a sampler's first steps.

At high noise the probability-flow ODE of a trained model is that of the Gaussian with the data's moments, and
its solution is known (Eq. 15 of arXiv 2412.09726; Algorithm 1 there). Skipping i steps of Heun's method
saves 2 i network evaluations. The result is only another state and grid, so any solver can go on from it.

Two refinements turn skipping into speed. *Regrid*: spend `steps` steps on a new grid from the level of the
jump down, rather than what is left of the old one. *History*: the trajectory above that level is known, and a
multistep solver that gets it starts at full order.

What other denoisers than a Gaussian jump along stands in `gaussnet.samplers.flows`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from gaussnet.denoisers import Denoiser, GaussianDenoiser
from gaussnet.gate import Gate
from gaussnet.samplers.flows import flow_of
from gaussnet.samplers.schedules import check_sigmas, karras_sigmas
from gaussnet.samplers.stepping import History, evaluate

_ROUNDING = 1e-5  # a level of the grid that is as near is the one of the jump: such a step divides by nothing
RHO = 4.0  # of new grids: below a jump's level, EDM's 7 spends too many steps near 0


@overload
def teleport(
    gaussian: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    skip: int | None = None,
    sigma_skip: float | None = None,
    *,
    tol: float | None = None,
    gate: Gate | None = None,
    steps: int | None = None,
    rho: float = RHO,
    class_labels: Tensor | None = None,
    return_history: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def teleport(
    gaussian: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    skip: int | None = None,
    sigma_skip: float | None = None,
    *,
    tol: float | None = None,
    gate: Gate | None = None,
    steps: int | None = None,
    rho: float = RHO,
    class_labels: Tensor | None = None,
    return_history: Literal[True],
) -> tuple[Tensor, Tensor, History]: ...
@torch.no_grad()
def teleport(
    gaussian: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    skip: int | None = None,
    sigma_skip: float | None = None,
    *,
    tol: float | None = None,
    gate: Gate | None = None,
    steps: int | None = None,
    rho: float = RHO,
    class_labels: Tensor | None = None,
    return_history: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, History]:
    """Moves `x` along an analytic denoiser's trajectory, and drops the steps before.

    A Gaussian's jump costs two matrix products, which no network notices. Mixtures and local denoisers solve
    their ODE, 32 evaluations of theirs an octave, in float64: what that is in evaluations of the network,
    `gaussnet.samplers.teleport_cost` tells.

    Args:
        gaussian: fitted to the data of the model that goes on from here; or a mixture, local or guided
            denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        skip: number of steps to drop: the jump ends at sigmas[skip]. 0 <= skip < n.
        sigma_skip: or the level to jump to, which need not be on the grid; levels below it are kept, but for
            one within 1e-5 of it.
        tol: or the tolerance of the gate: the jump ends where it falls below.
        gate: of the data, for `tol`.
        steps: a new grid of this many levels from the one of the jump to the last one above 0, even in
            sigma^(1/rho), in place of what is left of the old one.
        rho: of the new grid. Over what is left of the range, EDM's 7 errs more, at 8 or 10 steps by a fifth
            on MNIST (benchmarks/teleport.md).
        class_labels: for denoisers with classes, integers (B,) or one-hot rows (B, classes).
        return_history: whether to return the trajectory just above the new first level, for multistep
            solvers.

    Returns:
        The state at the new first level, the grid from there on, and with `return_history` three of
        (sigma, x, denoised) above it, newest last, a step of the grid apart.

    Raises:
        ValueError: if not exactly one of skip, sigma_skip and tol is given, or it lies outside of the grid.

    Example:
        >>> from gaussnet import heun, karras_sigmas
        >>> gaussian = model = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), var=1.0)
        >>> x, sigmas = teleport(gaussian, torch.full((1, 1, 2, 2), 80.0), karras_sigmas(18), skip=5)
        >>> [round(sigma, 1) for sigma in sigmas.tolist()[:3]]  # 13 of the 18 steps are left
        [12.9, 8.4, 5.3]
        >>> images = heun(model, x, sigmas)
    """
    levels = check_sigmas(sigmas)
    target = _target(levels, skip, sigma_skip, tol, gate)
    rest = grid_from(sigmas, target, steps, rho)
    move = flow_of(gaussian, class_labels)
    moved = move(x, levels[0], target)
    if not return_history:
        return moved, rest
    history: list[tuple[float, Tensor, Tensor]] = []
    for level in _levels_above(levels if steps is None else rest.tolist(), target, rho):
        state = move(x, levels[0], level)
        history.append((level, state, evaluate(gaussian, state, level, class_labels)))
    return moved, rest, history


def warm_start(
    gaussian: GaussianDenoiser,
    count: int,
    sigmas: Tensor,
    sigma_skip: float,
    *,
    steps: int | None = None,
    rho: float = RHO,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The stochastic twin of `teleport`: states drawn at sigma_skip from N(mu, Sigma + sigma_skip^2 I).

    Args:
        gaussian: fitted to the data of the model that goes on from here.
        count: number of states.
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        sigma_skip: the level of the states, which need not be on the grid; levels below it are kept.
        steps: a new grid of this many levels from there down, as in `teleport`.
        rho: of the new grid.
        generator: draws the states, on the device of the Gaussian.

    Returns:
        States (count, *event_shape) in the dtype of the Gaussian, at least float32, and the grid from there.

    Raises:
        ValueError: if sigma_skip lies outside of the grid, or steps do not fit.

    Example:
        >>> from gaussnet import karras_sigmas
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), var=9.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, sigmas = warm_start(gaussian, 10_000, karras_sigmas(18), sigma_skip=4.0, generator=generator)
        >>> round(x.std().item(), 1), round(sigmas[0].item(), 1)  # sqrt(9 + 4^2)
        (5.0, 4.0)
    """
    rest = grid_from(sigmas, sigma_skip, steps, rho)
    return gaussian.sample(count, sigma_skip, generator), rest


def grid_from(sigmas: Tensor, sigma_skip: float, steps: int | None = None, rho: float = RHO) -> Tensor:
    """The grid that is left from a level on: arguments and errors as in `teleport`."""
    levels = check_sigmas(sigmas)
    target = _target(levels, None, sigma_skip, None, None)
    grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if steps is None:
        rest = torch.cat([grid.new_tensor([target]), grid[grid < target * (1 - _ROUNDING)]])
    else:
        last = levels[-2]
        if steps < 1 or (steps > 1 and last >= target):
            raise ValueError(f"expected steps >= 1 from {target:g} down to below it, got {steps} to {last:g}")
        rest = karras_sigmas(steps, last, target, rho) if steps > 1 else grid.new_tensor([target, 0.0])
    return rest.to(sigmas.device)


def afs(x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Analytical first step: Euler's, with the score of a unit Gaussian, D = x/(1 + sigma^2), for free.

    The rival of `teleport`. Reference: Dockhorn et al. 2022, arXiv 2210.05475, section 3.

    Args:
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).

    Returns:
        The state at sigmas[1], of the shape of x, and the grid from there on, (n,).

    Raises:
        ValueError: if the grid does not decrease to 0, or has a single step.

    Example:
        >>> from gaussnet import karras_sigmas
        >>> x, sigmas = afs(torch.tensor([[80.0]]), karras_sigmas(18))
        >>> round(x.item(), 1), round(sigmas[0].item(), 1)  # at the second level, without the model
        (57.6, 57.6)
    """
    levels = check_sigmas(sigmas)
    if len(levels) < 3:
        raise ValueError(f"expected a grid of two steps or more, got {levels}")
    sigma, sigma_next = levels[:2]
    denoised = x / (1 + sigma**2)
    return x + (sigma_next - sigma) * (x - denoised) / sigma, sigmas[1:]


def _target(
    levels: list[float], skip: int | None, sigma_skip: float | None, tol: float | None, gate: Gate | None
) -> float:
    """The level of the jump."""
    given = {"skip": skip, "sigma_skip": sigma_skip, "tol": tol}
    if sum(value is not None for value in given.values()) != 1:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"expected either skip, sigma_skip or tol, got {told}")
    if skip is not None:
        if not 0 <= skip < len(levels) - 1:
            raise ValueError(f"expected 0 <= skip < {len(levels) - 1}, the number of steps, got {skip}")
        return levels[skip]
    if sigma_skip is not None:
        if not 0 < sigma_skip <= levels[0]:
            raise ValueError(f"expected 0 < sigma_skip <= sigmas[0] = {levels[0]:g}, got {sigma_skip}")
        return sigma_skip
    assert tol is not None
    if gate is None:
        raise ValueError("expected the gate of the data with tol, such as Gate.fit(gaussian, data), got None")
    level = gate.closes(tol)
    if level >= levels[0]:
        least = float(gate(levels[0]))
        raise ValueError(
            f"expected a gate that falls below tol = {tol:g} by sigmas[0] = {levels[0]:g}, got {least:.3g} "
            "there: the Gaussian is not good enough at any level of the grid"
        )
    return max(level, levels[-2])


def _levels_above(grid: list[float], target: float, rho: float) -> list[float]:
    """Three levels above the target, from high to low, a step of the grid apart.

    Beyond the grid steps are even in sigma^(1/rho). A target between two levels has levels as far between
    those above: of the grid's own, the first could lie so near that what parts Gaussian and model, divided by
    next to nothing, becomes the trend of a solver's step.
    """
    first, second = (level ** (1 / rho) for level in (grid[0], grid[1] or grid[0] / 2))
    levels = [*((first + (first - second) * j) ** rho for j in (4, 3, 2, 1)), *grid]
    at = next(i for i, level in enumerate(levels) if level <= target)
    share = (target - levels[at]) / (levels[at - 1] - levels[at])
    return [levels[at - j] + share * (levels[at - j - 1] - levels[at - j]) for j in (3, 2, 1)]
