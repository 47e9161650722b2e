"""Eigensolvers: the principal axes of data, and the variance of left-out folds along those of the others.

With X the (N, D) samples about their mean, the eigenvectors of the covariance are found

    dense   from X^T X / N, (D, D), accumulated in one pass: any stream of batches, N >= D
    gram    from X X^T = V diag(N lam) V^T, (N, N), as U = X^T V / sqrt(N lam): arrays of N < D samples
    krylov  a number of leading ones, iteratively, without any square matrix: large arrays (krylov.py)

The Gram matrix about any centre holds all that cross-validation needs. For the eigenvectors U = X_A^T V /
sqrt(n lam) of a set A of n samples, a left-out sample y has the coordinates

    U^T (y - mean_A) = (K_yA - mean_{i in A} K_iA) V / sqrt(n lam),        K the Gram matrix,

since the columns of V are orthogonal to 1. No (D, r) product is formed but the last one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gaussnet.fit.krylov import NEGLIGIBLE, Rows, krylov_axes
from gaussnet.fit.moments import Moments, fit_moments, fold_members, inner, merge_all
from gaussnet.fit.streams import Data, as_tensor, batches, check_finite, check_mirror

SOLVERS = ("auto", "dense", "gram", "krylov")
_LARGE = 2500  # min(N, D) from which a few axes are cheaper to find by iteration
_FEW = 8  # and the smallest ratio of it to their number
_HUGE = 12_288  # min(N, D) from which a square matrix costs gigabytes and many minutes
_TOLERANCE = 0.03  # residual of iterated axes: the last few may still turn, at no cost in variance

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axes:
    """Principal axes of a set of samples.

    Attributes:
        eigvals: decreasing, (r,), of the covariance over N.
        eigvecs: (D, r).
    """

    eigvals: Tensor
    eigvecs: Tensor


@dataclass(frozen=True)
class LeftOut:
    """What a fold varies by along the axes of the other folds, about their mean.

    Attributes:
        count: samples of the fold.
        variances: mean square along each axis, (r,).
        total: mean squared distance, 0-d.
    """

    count: int
    variances: Tensor
    total: Tensor


@dataclass(frozen=True)
class Solved:
    """Mean and axes of data, and what shrinkage needs to know of them. All in float64.

    Attributes:
        count: N.
        mean: (D,).
        axes: all that the data determine, or the leading ones.
        total: mean squared distance to the mean, the trace of the covariance.
        spread: measures the mean fourth power of that distance; None where the data have passed by.
        folds: number of folds that have samples.
        left_out: measures each fold along the axes of the others, which costs a fit for each.
        event_shape: shape of a sample.
        dtype: dtype of the data, at least float32.
    """

    count: int
    mean: Tensor
    axes: Axes
    total: Tensor
    spread: Callable[[], Tensor] | None
    folds: int
    left_out: Callable[[], Iterator[LeftOut]]
    event_shape: torch.Size
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """D."""
        return self.mean.numel()

    @property
    def complete(self) -> bool:
        """Whether the data vary along the axes only."""
        return len(self.axes.eigvals) >= self.dim or self.rest <= 1e-9 * float(self.total)

    @property
    def rest(self) -> float:
        """The variance that the axes leave out."""
        return max(0.0, float(self.total - self.axes.eigvals.sum()))


def solve(
    data: Data,
    solver: str,
    rank: int | None,
    folds: int,
    groups: Tensor | None,
    mirror: bool = False,
    all_processes: bool = False,
) -> Solved:
    """Finds mean and axes.

    Args:
        data: (N, *event_shape), or an iterable of batches.
        solver: "dense", "gram" or "krylov"; "auto" for the cheapest.
        rank: leading axes that are needed; None for all.
        folds: number of folds to cross-validate with.
        groups: integers (N,): the samples of one group share a fold.
        mirror: count mirror images, too.
        all_processes: as in `fit_moments`.

    Raises:
        TypeError: if another solver than "dense" gets an iterable, or one process's share of the data.
        ValueError: for a rank out of range, fewer than two samples, or data that are not
            finite, constant, or without an axis of samples.
    """
    array = isinstance(data, (Tensor, np.ndarray))
    if array and data.ndim < 2:
        raise ValueError(f"expected data of shape (N, *event_shape), got {tuple(data.shape)}")
    if solver == "auto":
        solver = _choose(data, rank, mirror) if array and not all_processes else "dense"
    if solver == "dense":
        parts = fit_moments(data, folds, groups, mirror=mirror, all_processes=all_processes)
        return solve_moments(parts, rank, data if array and not all_processes else None)
    if not array or all_processes:
        got = "one process's share of them" if array else type(data).__name__
        raise TypeError(f'solver="{solver}" needs a tensor or array of all samples, got {got}')
    members = fold_members(len(data), folds, groups)
    if mirror:
        check_mirror(tuple(data.shape[1:]))
    if solver == "krylov":
        return _solve_krylov(data, members, rank, mirror)
    samples = as_tensor(data)
    if mirror:
        samples, members = torch.cat([samples, samples.flip(-1)]), members.repeat(2)
    return _solve_gram(samples, members, rank)


def check_fit(count: int, mean: Tensor, total: Tensor, rank: int | None) -> None:
    """Refuses what no covariance can be fitted to; `total` is the mean squared distance to the mean.

    Raises:
        ValueError: as it says.
    """
    if count < 2:
        raise ValueError(f"expected at least 2 samples to fit a covariance, got {count}")
    largest = min(count - 1, mean.numel())
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(
            f"expected 1 <= rank <= min(N - 1, D) = {largest} "
            f"for {count} samples of {mean.numel()} dimensions, got {rank}"
        )
    if not math.isfinite(float(total)):
        raise ValueError(
            f"expected data whose squares are finite in float64, got a variance of {float(total)}"
        )
    rounding = 1e-24 * float(mean.square().sum())  # what equal samples leave in float64
    if not float(total) > rounding:
        raise ValueError(f"expected data that vary, got {count} samples that are all equal")


def _choose(data: Tensor | np.ndarray, rank: int | None, mirror: bool) -> str:
    count, dim = len(data) * (1 + mirror), int(np.prod(data.shape[1:]))
    small = min(count, dim)
    few = small / (_FEW if small < _HUGE else _FEW / 2)
    if rank is not None and small > _LARGE and rank < few:
        return "krylov"
    if small >= _HUGE:
        log.warning(
            "%d samples of %d dimensions need a square matrix of %.1f GB and long: ask for a rank below %d",
            count, dim, 8e-9 * small**2, few,
        )  # fmt: skip
    return "gram" if count < dim else "dense"


# Dense --------------------------------------------------------------------------------------------


def solve_moments(folds: list[Moments], rank: int | None, data: Data | None = None) -> Solved:
    """From the moments of folds; `data`, if they are at hand, are where they came from."""
    moments = merge_all(folds)
    total = moments.covariance.diagonal().sum()
    check_fit(moments.count, moments.mean, total, rank)
    return Solved(
        count=moments.count,
        mean=moments.mean,
        axes=dense_axes(moments),
        total=total,
        spread=None if data is None else lambda: _spread(data, moments.mean),
        folds=len(folds),
        left_out=lambda: dense_left_out(folds),
        event_shape=moments.event_shape,
        dtype=moments.dtype,
    )


def _spread(data: Data, mean: Tensor) -> Tensor:
    distance2 = [(batch.double().flatten(1) - mean).square().sum(1) for batch, _ in batches(data)]
    return torch.cat(distance2).square().mean()


def dense_axes(moments: Moments) -> Axes:
    """All axes that N samples can have: r = min(N - 1, D)."""
    eigvals, eigvecs = torch.linalg.eigh(moments.covariance)
    rank = min(moments.count - 1, len(eigvals))
    return Axes(eigvals.flip(0).clamp_min(0)[:rank], eigvecs.flip(1)[:, :rank])


def dense_left_out(folds: list[Moments]) -> Iterator[LeftOut]:
    """Each fold against the others, from their moments."""
    for k, fold in enumerate(folds):
        rest = merge_all(other for j, other in enumerate(folds) if j != k)
        axes = dense_axes(rest)
        eigvecs = axes.eigvecs
        shift = fold.mean - rest.mean
        # Second moments of the fold about the mean of the rest: new data differ in their mean, too.
        second = fold.covariance + torch.outer(shift, shift)
        variances = ((second @ eigvecs) * eigvecs).sum(0).clamp_min(0)  # rounding can leave less than 0
        null = axes.eigvals <= NEGLIGIBLE * axes.eigvals.sum()
        # Any axes span what has no variance: only the sum of what a fold has there is known.
        if bool(null.any()):
            variances[null] = variances[null].mean()
        yield LeftOut(fold.count, variances, second.diagonal().sum())


# Gram ---------------------------------------------------------------------------------------------


def _solve_gram(data: Tensor, members: Tensor, rank: int | None) -> Solved:
    samples = as_samples(data)
    mean = samples.mean(0)
    samples = samples - mean
    distance2 = samples.square().sum(1)
    check_fit(len(samples), mean, distance2.mean(), rank)
    gram = inner(samples.mT)
    return Solved(
        count=len(samples),
        mean=mean,
        axes=gram_axes(samples, gram),
        total=distance2.mean(),
        spread=lambda: distance2.square().mean(),
        folds=len(members.unique()),
        left_out=lambda: gram_left_out(gram, members),
        event_shape=data.shape[1:],
        dtype=torch.promote_types(data.dtype, torch.float32),
    )


def gram_axes(centred: Tensor, gram: Tensor | None = None) -> Axes:
    """The axes of samples about their mean, (N, D), float64; null directions are left out.

    Directions of almost no variance come out of the product with X^T without orthogonality: a QR
    factorisation restores it, and leaves the others as they are.
    """
    gram = inner(centred.mT) if gram is None else gram
    eigvals, vectors = _gram_eigh(gram, float(gram.diagonal().mean()))
    scaled = centred.T @ (vectors / torch.sqrt(len(centred) * eigvals))
    q, r = torch.linalg.qr(scaled)
    return Axes(eigvals, q * r.diagonal().sign())


def gram_left_out(gram: Tensor, members: Tensor) -> Iterator[LeftOut]:
    """Each fold against the others, from the Gram matrix; `members` holds the fold of each sample."""
    members = members.to(gram.device)
    for k in members.unique().tolist():
        out, rest = members == k, members != k
        kept = gram[rest][:, rest]
        column = kept.mean(0)
        centred_gram = kept - column - column[:, None] + column.mean()
        eigvals, vectors = _gram_eigh(centred_gram, float(gram.diagonal().mean()))
        cross = gram[out][:, rest]
        coordinates = (cross - column) @ (vectors / torch.sqrt(len(kept) * eigvals))
        distance2 = gram.diagonal()[out] - 2 * cross.mean(1) + column.mean()
        yield LeftOut(int(out.sum()), coordinates.square().mean(0), distance2.mean())


def as_samples(data: Tensor | np.ndarray) -> Tensor:
    """(N, *event_shape) as float64 rows.

    Raises:
        ValueError: naming the first sample that is not finite.
    """
    flat = as_tensor(data).double().flatten(1)
    check_finite(flat)
    return flat


def _gram_eigh(gram: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues over N and eigenvectors of a centred Gram matrix, decreasing, without null directions."""
    eigvals, vectors = torch.linalg.eigh(gram)
    eigvals, vectors = eigvals.flip(0) / len(gram), vectors.flip(1)
    kept = min(int((eigvals > NEGLIGIBLE * variance).sum()), len(gram) - 1)
    return eigvals[:kept], vectors[:, :kept]


# Krylov -------------------------------------------------------------------------------------------


def _solve_krylov(data: Tensor | np.ndarray, members: Tensor, rank: int | None, mirror: bool) -> Solved:
    if rank is None:
        raise ValueError('solver="krylov" finds a number of leading axes: expected a rank, got None')
    rows = Rows(data, mirror=mirror)
    total, spread = rows.total / len(rows), rows.spread
    check_fit(len(rows), rows.mean, total, rank)
    return Solved(
        count=len(rows),
        mean=rows.mean,
        axes=Axes(*krylov_axes(rows, rank, _TOLERANCE)),
        total=total,
        spread=lambda: spread,  # not of `rows`, which take memory
        folds=len(members.unique()),
        left_out=lambda: krylov_left_out(data, members, rank, mirror),
        event_shape=torch.Size(data.shape[1:]),
        dtype=rows.dtype,
    )


def krylov_left_out(
    data: Tensor | np.ndarray, members: Tensor, rank: int, mirror: bool = False
) -> Iterator[LeftOut]:
    """Each fold against the others, along `rank` axes."""
    for k in members.unique().tolist():
        out, rest = (members == k).nonzero()[:, 0], (members != k).nonzero()[:, 0]
        others = Rows(data, rest, mirror=mirror)
        mean, (_, eigvecs) = others.mean, krylov_axes(others, min(rank, len(others) - 1), _TOLERANCE)
        del others  # before the next rows take as much memory
        fold = Rows(data, out, mean, mirror)
        coordinates = fold.project(eigvecs).double()
        yield LeftOut(len(fold), coordinates.square().mean(0), fold.total / len(fold))
