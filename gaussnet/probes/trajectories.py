"""Comparing denoisers along the probability-flow ODE: their trajectories and samples from the same noise.

    dx/dlog sigma = x - D(x, sigma)                          (Eq. 2 of arXiv 2412.09726, with sigma_t = t)

A model is sampled by a solver on a grid. The trajectory of an analytic denoiser is exact: in closed form for
a Gaussian (Eq. 15, and Eq. 16 for the denoised along it), else by the classical Runge-Kutta method in
float64, which scipy's adaptive DOP853 can check. Both take the step to 0 as every solver does: they end on
the denoised of the last level above it.

Deviations are mean squared errors per pixel, ||a - b||^2 / D, for each initial state (Fig. 7, 15, 17).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser
from gaussnet.numerics import wide_dtype
from gaussnet.samplers import Solver, dop853, flow_of, heun
from gaussnet.samplers.schedules import check_sigmas

STATES = ("state", "denoised")
DIVERGED = 0.01  # mean squared error per pixel: the paper's bound


class Trajectory(NamedTuple):
    """A sampling run of n steps.

    Attributes:
        levels: the n levels above 0, and 0, float64, (n + 1,).
        x: states at all levels, (n + 1, B, *event_shape); the last is the sample.
        denoised: D(x, sigma) at the levels above 0, (n, B, *event_shape).

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> path = exact_trajectory(gaussian, x, karras_sigmas(18))
        >>> torch.equal(path.x[-1], path.denoised[-1])
        True
    """

    levels: Tensor
    x: Tensor
    denoised: Tensor


@torch.no_grad()
def solver_trajectory(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    solver: Solver = heun,
    class_labels: Tensor | None = None,
) -> Trajectory:
    """The trajectory of a denoiser by a solver, its state kept in float64 as EDM's sampler does.

    Args:
        denoiser: any denoiser; it gets the state in the dtype of x.
        x: states at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        solver: calls back once at each level above 0.
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).

    Returns:
        Levels, states and what was denoised; float64 but for the latter, which is as the denoiser gave it.

    Raises:
        ValueError: if the grid does not decrease to 0, or the solver calls back at other levels.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> path = solver_trajectory(gaussian, x, karras_sigmas(18))
        >>> path.levels.shape, path.x.shape, path.denoised.shape
        (torch.Size([19]), torch.Size([19, 1, 1]), torch.Size([18, 1, 1]))
    """
    levels = check_sigmas(sigmas)
    states: list[Tensor] = []
    answers: list[Tensor] = []

    def keep(step: dict[str, Any]) -> None:
        states.append(step["x"])
        answers.append(step["denoised"])

    sample = solver(denoiser, x, sigmas, class_labels=class_labels, callback=keep, dtype=wide_dtype(x.device))
    if len(states) != len(levels) - 1:
        raise ValueError(
            f"expected a solver that calls back at each of {len(levels) - 1} levels, got {len(states)} calls"
        )
    grid = torch.tensor(levels, dtype=torch.float64)
    return Trajectory(grid, torch.stack([*states, sample]), torch.stack(answers))


@torch.no_grad()
def exact_trajectory(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, class_labels: Tensor | None = None
) -> Trajectory:
    """The trajectory of an analytic denoiser: `flow_of` from level to level, in float64.

    Args:
        denoiser: analytic.
        x: states at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).

    Returns:
        Levels, states and what was denoised, float64.

    Raises:
        ValueError: if the grid does not decrease to 0, or as the denoiser.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> path = exact_trajectory(gaussian, x, karras_sigmas(18))
        >>> torch.allclose(path.x[5], gaussian.flow(x.double(), 80.0, path.levels[5]))
        True
    """
    levels = check_sigmas(sigmas)
    move = flow_of(denoiser, class_labels)  # Eq. 15, or Runge-Kutta
    states = [x.double()]
    for i in range(len(levels) - 2):
        states.append(move(states[-1], levels[i], levels[i + 1]))
    answers = [
        _denoise(denoiser, state, level, class_labels)  # of a Gaussian: Eq. 16
        for state, level in zip(states, levels, strict=False)
    ]
    grid = torch.tensor(levels, dtype=torch.float64)
    return Trajectory(grid, torch.stack([*states, answers[-1]]), torch.stack(answers))


@torch.no_grad()
def exact_sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """The end of `exact_trajectory`, in one go.

    Args:
        denoiser: analytic.
        x: states at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).

    Returns:
        Tensor (B, *event_shape), float64.

    Raises:
        ValueError: if the grid does not decrease to 0, or as the denoiser.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> whole = exact_trajectory(gaussian, x, karras_sigmas(18))
        >>> torch.allclose(exact_sample(gaussian, x, karras_sigmas(18)), whole.x[-1])
        True
    """
    levels = check_sigmas(sigmas)
    state = flow_of(denoiser, class_labels)(x.double(), levels[0], levels[-2])
    return _denoise(denoiser, state, levels[-2], class_labels)


def deviations(trajectory: Trajectory, reference: Trajectory) -> dict[str, Tensor]:
    """Mean squared errors per pixel between two trajectories on one grid.

    Args:
        trajectory: of n steps and B states.
        reference: another one from the same states.

    Returns:
        "state" (n + 1, B) and "denoised" (n, B), float64.

    Raises:
        ValueError: if grids or shapes differ.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> exact = exact_trajectory(gaussian, x, karras_sigmas(18))
        >>> found = deviations(solver_trajectory(gaussian, x, karras_sigmas(18)), exact)
        >>> found["state"].shape, found["state"][0].item(), found["state"][-1].item() < 0.01
        (torch.Size([19, 1]), 0.0, True)
    """
    if not torch.equal(trajectory.levels, reference.levels):
        grids = f"{trajectory.levels.tolist()} and {reference.levels.tolist()}"
        raise ValueError(f"expected trajectories on one grid, got {grids}")
    if trajectory.x.shape != reference.x.shape:
        shapes = f"{tuple(trajectory.x.shape)} and {tuple(reference.x.shape)}"
        raise ValueError(f"expected trajectories of one shape, got {shapes}")
    return {
        "state": _squared_error(trajectory.x, reference.x),
        "denoised": _squared_error(trajectory.denoised, reference.denoised),
    }


def deviation_rows(sigmas: Sequence[float], found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What was measured, a row for each quantity and step.

    Args:
        sigmas: of the trajectories.
        found: of `deviations`; those of several batches are concatenated along the last axis.

    Returns:
        Rows with step, sigma, quantity ("state" or "denoised"), mean, and the quartiles q25 and q75, over
        initial states, and count, their number.
    """
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for quantity, errors in found.items():
        errors = errors.cpu().double()
        bands = errors.quantile(quartiles, -1).T.tolist()  # (steps, 2)
        rows += [
            {
                "step": step,
                "sigma": sigma,
                "quantity": quantity,
                "mean": mean,
                "q25": q25,
                "q75": q75,
                "count": errors.shape[-1],
            }
            for step, (sigma, mean, (q25, q75)) in enumerate(
                zip(sigmas, errors.mean(-1).tolist(), bands, strict=False)
            )
        ]
    return rows


def divergence(rows: Sequence[Mapping[str, Any]], bound: float = DIVERGED) -> tuple[int, float] | None:
    """The first step at which the mean of some rows exceeds a bound.

    Args:
        rows: of one quantity, with step, sigma and mean.
        bound: of the mean squared error per pixel.

    Returns:
        The step and its level; None if no mean exceeds the bound, as NaN does.

    Example:
        >>> rows = [{"step": 0, "sigma": 80.0, "mean": 0.0}, {"step": 1, "sigma": 40.0, "mean": 0.02}]
        >>> divergence(rows)
        (1, 40.0)
    """
    above = [(row["step"], row["sigma"]) for row in rows if not row["mean"] <= bound]
    return min(above, default=None)


def check_trajectory(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    class_labels: Tensor | None = None,
    *,
    tol: float = 1e-8,
) -> list[float]:
    """How far `exact_trajectory` is from scipy's DOP853: the largest difference of a pixel at each level.

    Args:
        denoiser: analytic.
        x: a few states at sigmas[0], (B, *event_shape): the adaptive steps are those of all of them together.
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        tol: of DOP853, relative and absolute.

    Returns:
        n + 1 numbers, in units of the data.

    Raises:
        ValueError: if the grid does not decrease to 0, or as the denoiser.
        RuntimeError: if DOP853 cannot meet the tolerance.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> max(check_trajectory(gaussian, x, karras_sigmas(5))) < 1e-5
        True
    """
    ours = exact_trajectory(denoiser, x, sigmas, class_labels)
    states: list[Tensor] = []
    last = dop853(
        denoiser,
        x.double(),
        sigmas,
        class_labels=class_labels,
        callback=lambda step: states.append(step["x"]),
        rtol=tol,
        atol=tol,
    )
    return (ours.x - torch.stack([*states, last])).abs().flatten(1).amax(1).tolist()


def _denoise(denoiser: Denoiser, x: Tensor, sigma: float, class_labels: Tensor | None) -> Tensor:
    level = torch.full(x.shape[:1], sigma, dtype=x.dtype, device=x.device)
    return denoiser(x, level, class_labels)


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the pixels of (a - b)^2: (levels, B, *event_shape) to (levels, B)."""
    return (a.double() - b.double()).square().flatten(2).mean(-1)
