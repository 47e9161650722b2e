"""Rank and shrinkage chosen by the denoising error on held-out samples.

For axes U, eigenvalues lam and filter f = lam/(lam + s^2), the mean squared error on samples whose mean
square along axis i is v_i is known without drawing any noise,

    D err(s)^2 = sum_i [(1 - f_i)^2 v_i + f_i^2 s^2] + (1 - f_t)^2 (v - sum_i v_i) + f_t^2 s^2 (D - r),

v their total and f_t the filter of the tail. Candidates share the axes of the other samples, found once; the
one with the least mean logarithm of the error over a grid of noise levels is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gaussnet.fit.moments import fold_members
from gaussnet.fit.shrinkage import FOLDS, LINEAR, SHRINKAGES, shrink, truncate
from gaussnet.fit.solvers import Axes, Solved, as_samples, solve
from gaussnet.fit.streams import as_tensor, batches, check_finite

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_HELD_OUT = 5  # one sample, or group, in so many


@dataclass(frozen=True)
class Selection:
    """A choice of rank and shrinkage, and the table that it rests on.

    Attributes:
        rank: the chosen number of axes; None for all.
        shrinkage: the chosen one.
        sigmas: noise levels of the table.
        errors: (rank or None, shrinkage) -> mean squared error per dimension at each level.

    Example:
        >>> print(Selection(4, "cv", (1.0,), {(4, "cv"): [0.5], (None, "cv"): [0.6]}).table())
        | rank | shrinkage | 1 |
        |---|---|---|
        | 4 * | cv | 0.50000 |
        | all | cv | 0.60000 |
    """

    rank: int | None
    shrinkage: str
    sigmas: tuple[float, ...]
    errors: dict[tuple[int | None, str], list[float]]

    def table(self) -> str:
        """The table in Markdown, the chosen row marked by an asterisk."""
        rows = ["| rank | shrinkage | " + " | ".join(f"{s:g}" for s in self.sigmas) + " |"]
        rows.append("|---" * (len(self.sigmas) + 2) + "|")
        for (rank, shrinkage), errors in self.errors.items():
            chosen = " *" if (rank, shrinkage) == (self.rank, self.shrinkage) else ""
            cells = " | ".join(f"{error:.5f}" for error in errors)
            rows.append(f"| {'all' if rank is None else rank}{chosen} | {shrinkage} | {cells} |")
        return "\n".join(rows)


def select_heldout(
    data: Tensor | np.ndarray,
    groups: Tensor | None = None,
    rank: int | None = None,
    mirror: bool = False,
    sigmas: tuple[float, ...] = SIGMAS,
    tail: str = "mean",
) -> Selection:
    """Chooses rank and shrinkage.

    Args:
        data: (N, *event_shape).
        groups: integers (N,): the samples of one group are held out together.
        rank: the only rank to consider; default: all axes, and powers of 4 below.
        mirror: fit to mirror images, too.
        sigmas: noise levels to judge by, in units of the data.
        tail: "mean" or "zero", as in `fit_covariance`.

    Returns:
        The candidate of least error in the mean of logarithms, with the errors of all.

    Raises:
        ValueError: if there are too few samples, or as `fit_covariance` does.

    Example:
        >>> data = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
        >>> data[:, :4] *= 10  # four axes matter
        >>> choice = select_heldout(data)
        >>> choice.rank, choice.shrinkage
        (4, 'cv')
    """
    out = held_out(len(data), groups)
    if out is None:
        raise ValueError(
            f'select="heldout" needs samples or groups to hold out and at least {2 * FOLDS} other samples, '
            f"got {len(data)} samples" + ("" if groups is None else " in few groups")
        )
    seen = 0
    for batch, _ in batches(data):  # before a share of them is called by its own numbers
        check_finite(batch, seen)
        seen += len(batch)
    rest = ~out
    kept_groups = None if groups is None else torch.as_tensor(groups, device="cpu")[rest]
    most = int(rest.sum()) - 1  # a rank that only all the samples have is cut to this
    solved = solve(_rows(data, rest), "auto", rank and min(rank, most), FOLDS, kept_groups, mirror)
    held = as_samples(_rows(data, out)).to(solved.mean.device) - solved.mean
    variances = (held @ solved.axes.eigvecs).square().mean(0)
    total = held.square().sum(1).mean()

    size = len(solved.axes.eigvals)
    powers = (4**k for k in range(1, size.bit_length()))
    ranks = [rank] if rank else [None, *(power for power in powers if power < size)]
    errors: dict[tuple[int | None, str], list[float]] = {}
    for shrinkage in _possible(solved):
        axes, outside = shrink(solved, shrinkage, groups is not None or mirror)
        for candidate in ranks:
            kept, dropped = truncate(axes, outside, candidate)
            dropped = dropped if tail == "mean" else torch.zeros_like(dropped)
            errors[candidate, shrinkage] = heldout_error(kept, dropped, variances, total, sigmas)
    best = min(errors, key=lambda key: sum(math.log(error) for error in errors[key]))
    return Selection(*best, sigmas, errors)


def held_out(count: int, groups: Tensor | None = None) -> Tensor | None:
    """Which of `count` samples to hold out, (N,); None if that leaves too few on either side."""
    out = fold_members(count, _HELD_OUT, groups) == 0
    return out if 0 < int(out.sum()) <= count - 2 * FOLDS else None


def heldout_error(
    axes: Axes, tail: Tensor, variances: Tensor, total: Tensor, sigmas: tuple[float, ...]
) -> list[float]:
    """Mean squared denoising error per dimension at each noise level.

    Args:
        axes: of the denoiser, r of them.
        tail: its variance along the others.
        variances: mean square of the samples about its mean, along its axes and perhaps more.
        total: their mean squared distance.
        sigmas: noise levels.
    """
    dim, size = axes.eigvecs.shape
    along, rest = variances[:size], (total - variances[:size].sum()).clamp_min(0)
    errors: list[float] = []
    for sigma in sigmas:
        f, f_tail = axes.eigvals / (axes.eigvals + sigma**2), tail / (tail + sigma**2)
        inside = ((1 - f) ** 2 * along + f**2 * sigma**2).sum()
        outside = (1 - f_tail) ** 2 * rest + f_tail**2 * sigma**2 * (dim - size)
        errors.append(float((inside + outside) / dim))
    return errors


def _rows(data: Tensor | np.ndarray, index: Tensor) -> Tensor:
    return as_tensor(data[index.numpy()] if isinstance(data, np.ndarray) else data[index])


def _possible(solved: Solved) -> list[str]:
    """Shrinkages for which all is at hand."""
    return [name for name in SHRINKAGES if solved.complete or name not in LINEAR]
