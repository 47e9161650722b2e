"""How far to teleport, and what it costs, measured on a model.

How far is the lowest level down to which the Gaussian can stand in for the model.

Two measures, each at the levels of a grid, on the trajectories that the Gaussian makes of the given states:

    "denoiser"    E||D(x, s) - D_gauss(x, s)||^2 / (D e(s)^2), the part of the Gaussian's error e(s)^2
                  that the model removes, at the states where teleport would arrive
    "trajectory"  the root mean squared difference per pixel of samples with and without the jump
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser, GaussianDenoiser
from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.solvers import heun
from gaussnet.samplers.stepping import Solver, count_nfe, evaluate
from gaussnet.samplers.teleport import teleport

Measure = Literal["denoiser", "trajectory"]


class SkipRow(NamedTuple):
    """One level: the steps before it, the deviation that a jump to it costs, the evaluations it saves."""

    skip: int
    sigma: float
    deviation: float
    saved: int


class Skip(NamedTuple):
    """The chosen level, the steps of the grid before it, and what every level that was tried would cost.

    Attributes:
        sigma_skip: the chosen level, one of the grid.
        skip: number of steps of the grid before it.
        rows: of every level that was tried, highest first: its skip and sigma, the deviation that a jump
            there costs, and the evaluations that it saves.

    Example:
        >>> choice = Skip(2.0, 3, [SkipRow(skip=3, sigma=2.0, deviation=0.01, saved=6)])
        >>> print(table(choice.rows))
        | skip | sigma | deviation | evaluations saved |
        |---|---|---|---|
        | 3 | 2 | 0.01 | 6 |
    """

    sigma_skip: float
    skip: int
    rows: list[SkipRow]


@torch.no_grad()
def find_sigma_skip(
    model: nn.Module,
    gaussian: GaussianDenoiser,
    x: Tensor,
    sigmas: Tensor,
    tol: float,
    *,
    measure: Measure = "denoiser",
    solver: Solver = heun,
    class_labels: Tensor | None = None,
) -> Skip:
    """The furthest step of a grid that teleport may jump to, for a model and a tolerance.

    Args:
        model: the denoiser that goes on from there.
        gaussian: fitted to its data.
        x: a few states at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        tol: bound of the deviation: of the share of e(s)^2, or of the RMS per pixel.
        measure: "denoiser" takes an evaluation a level, "trajectory" a sampling run a level.
        solver: of the trajectories, and for counting what is saved.
        class_labels: handed to the model, integers (B,) or one-hot rows (B, classes).

    Returns:
        The choice: all levels above it deviate by at most `tol`. Levels are tried until one deviates by more.

    Raises:
        ValueError: if the jump to the first level below sigmas[0] already deviates by more, with how much; or
            the grid has one step, or the measure is unknown.

    Example:
        >>> from gaussnet import DeltaDenoiser, karras_sigmas
        >>> data = torch.tensor([[-1.0], [1.0]])  # far away, two points look like their Gaussian
        >>> gaussian = GaussianDenoiser.fit(data, shrinkage="none")
        >>> x = 80 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        >>> choice = find_sigma_skip(DeltaDenoiser(data), gaussian, x, karras_sigmas(18), tol=0.1)
        >>> choice.skip, round(choice.sigma_skip, 2), choice.rows[-2].saved
        (9, 1.92, 18)
    """
    levels = check_sigmas(sigmas)
    if measure not in ("denoiser", "trajectory"):
        raise ValueError(f"expected measure to be denoiser or trajectory, got {measure!r}")
    if len(levels) < 3:
        raise ValueError(f"expected a grid of two steps or more, got {len(levels) - 1}: {list(levels)}")
    unskipped = solver(model, x, sigmas, class_labels=class_labels) if measure == "trajectory" else x
    whole = _evaluations(solver, gaussian, x, sigmas)
    rows: list[SkipRow] = []
    for skip in range(1, len(levels) - 1):
        moved, rest = teleport(gaussian, x, sigmas, skip=skip)
        if measure == "trajectory":
            ours = solver(model, moved, rest, class_labels=class_labels)
            deviation = float((ours - unskipped).double().square().mean().sqrt())
        else:
            denoised = evaluate(model, moved, levels[skip], class_labels)
            difference = (denoised - gaussian(moved, levels[skip])).double().square().mean()
            deviation = float(difference / gaussian.bayes_error(levels[skip]))
        saved = whole - _evaluations(solver, gaussian, moved, rest)
        rows.append(SkipRow(skip, levels[skip], deviation, saved))
        if not deviation <= tol:  # NaN, too
            break
    good = [row for row in rows if row.deviation <= tol]
    if not good:
        raise ValueError(
            f"expected a deviation <= {tol:g} at the first level, sigma = {levels[1]:g}, "
            f"got {rows[0].deviation:.3g}: the Gaussian stands in for this model nowhere on the grid"
        )
    return Skip(good[-1].sigma, good[-1].skip, rows)


class TeleportCost(NamedTuple):
    """What a jump takes: in evaluations of the model, and both in seconds.

    Attributes:
        evaluations: seconds of a jump over those of an evaluation, the median over turns.
        jump_seconds: of a jump of the batch, the median.
        evaluation_seconds: of an evaluation of the model on the batch, the median.

    Example:
        >>> cost = TeleportCost(evaluations=0.25, jump_seconds=0.01, evaluation_seconds=0.04)
        >>> 25 + cost.evaluations  # 13 steps of Heun's method after the jump
        25.25
    """

    evaluations: float
    jump_seconds: float
    evaluation_seconds: float


@torch.no_grad()
def teleport_cost(
    analytic: Denoiser,
    model: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    sigma_skip: float,
    *,
    class_labels: Tensor | None = None,
    repeats: int = 5,
) -> TeleportCost:
    """The time of a jump, in evaluations of the model on the same batch.

    A fair count of evaluations of a sampler that begins with the jump has these added. Both are timed in
    turns within this process, and the result is the median of the ratios; both ran once before.

    Args:
        analytic: what teleport takes, such as a Gaussian or a mixture.
        model: the denoiser that goes on from there.
        x: states at sigmas[0], (B, *event_shape): costs depend on the size of the batch.
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        sigma_skip: the level of the jump, where the model is evaluated, too.
        class_labels: handed to both, integers (B,) or one-hot rows (B, classes).
        repeats: number of turns.

    Returns:
        The costs; the seconds are medians.

    Raises:
        ValueError: if repeats < 1, or as in `teleport`.

    Example:
        >>> from gaussnet import karras_sigmas
        >>> gaussian = model = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
        >>> x = 80 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> cost = teleport_cost(gaussian, model, x, karras_sigmas(18), 12.9)
        >>> cost.evaluations > 0 and cost.jump_seconds > 0
        True
    """
    if repeats < 1:
        raise ValueError(f"expected repeats >= 1, got {repeats}")
    moved, _ = teleport(analytic, x, sigmas, sigma_skip=sigma_skip, class_labels=class_labels)

    def jump() -> None:
        teleport(analytic, x, sigmas, sigma_skip=sigma_skip, class_labels=class_labels)

    def evaluation() -> None:
        evaluate(model, moved, sigma_skip, class_labels)

    evaluation()
    pairs = [(_seconds(jump, x.device), _seconds(evaluation, x.device)) for _ in range(repeats)]
    jumps, evaluations = zip(*pairs, strict=True)
    return TeleportCost(
        statistics.median(a / b for a, b in pairs), statistics.median(jumps), statistics.median(evaluations)
    )


def table(rows: Sequence[SkipRow]) -> str:
    """The rows in Markdown."""
    lines = [f"| {row.skip} | {row.sigma:.4g} | {row.deviation:.3g} | {row.saved} |" for row in rows]
    return "\n".join(["| skip | sigma | deviation | evaluations saved |", "|---|---|---|---|", *lines])


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """The time of a call, with the work that it leaves to an accelerator."""
    begin = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def _evaluations(solver: Solver, gaussian: GaussianDenoiser, x: Tensor, sigmas: Tensor) -> int:
    """What a solver takes on a grid, counted on an analytic denoiser and one state."""
    with count_nfe(gaussian) as nfe:
        solver(gaussian, x[:1], sigmas)
    return nfe()
