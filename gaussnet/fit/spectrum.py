"""From data to a covariance: eigenvalues, rank, tail, and their cross-validation.

Sample eigenvectors overfit: the data vary more along the leading ones, and less along the last ones, than
new data do. A denoiser built on them under-estimates its own error, and with it the c_out of a network
preconditioned by it. Cross-validated eigenvalues mend this: for each fold, take eigenvectors from the other
folds and measure the variance of the fold along them; average over the folds, sort out the noise by isotonic
regression, and put the result on the eigenvectors of all the data.

Reference: Bartz, "Cross-validation based nonlinear shrinkage", 2016, arXiv 1611.00798;
Lam, "Nonparametric eigenvalue-regularized precision or covariance matrix estimator", Ann. Stat. 2016.
The tail that minimises the error of score and denoiser at every noise level is the mean dropped eigenvalue.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.moments import Data, fit_moments, fold_members, merge_all
from gaussnet.fit.solvers import (
    Axes,
    LeftOut,
    as_samples,
    dense_axes,
    dense_left_out,
    gram_axes,
    gram_left_out,
)

SHRINKAGES = ("cv", "none")
SOLVERS = ("auto", "dense", "gram")
FOLDS = 3
PLENTY = 100  # samples per dimension beyond which cross-validation moves eigenvalues by under 1%

log = logging.getLogger(__name__)


def fit_covariance(
    data: Data,
    rank: int | None = None,
    shrinkage: str = "cv",
    solver: str = "auto",
    groups: Tensor | None = None,
) -> tuple[torch.Size, Tensor, Covariance]:
    """Fits mean and covariance.

    Args:
        data: (N, *event_shape), or an iterable of such batches.
        rank: eigenvectors to keep, 1 <= rank <= min(N - 1, D); the mean variance along the others becomes
            the tail. Default: all that the data determine.
        shrinkage: "cv" for cross-validated eigenvalues, "none" for those of the sample covariance (over N).
        solver: "dense" passes once over any data and costs D^3; "gram" needs an array and costs N^3. Default:
            by shape, "gram" for arrays of N < D samples.
        groups: an integer for each sample of an array: variants of one image share one, so that none is
            measured along axes that the others of its group have shaped.

    Returns:
        event_shape, mean (D,) and covariance, in the dtype of the data (at least float32).

    Raises:
        TypeError: if solver="gram" or groups get an iterable.
        ValueError: for fewer than two samples, non-finite or constant data, an unknown shrinkage or solver,
            or a rank out of range.
    """
    for name, value, known in (("shrinkage", shrinkage, SHRINKAGES), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
    array = isinstance(data, (Tensor, np.ndarray)) and data.ndim >= 2
    if solver == "gram" and not array:
        raise TypeError(f'solver="gram" needs a tensor or array of samples, got {type(data).__name__}')
    if solver == "gram" or (solver == "auto" and array and len(data) < np.prod(data.shape[1:])):  # pyright: ignore
        return _fit_gram(torch.as_tensor(data), rank, shrinkage, groups)
    return _fit_dense(data, rank, shrinkage, groups)


def _fit_dense(
    data: Data, rank: int | None, shrinkage: str, groups: Tensor | None
) -> tuple[torch.Size, Tensor, Covariance]:
    folds = fit_moments(data, FOLDS, groups)
    moments = merge_all(folds)
    _check(moments.count, moments.mean, moments.scatter.diagonal().sum(), rank)
    validates = _cross_validates(moments.count, moments.mean, shrinkage, len(folds))
    left_out = dense_left_out(folds) if validates else None
    covariance = _covariance(dense_axes(moments), left_out, rank)
    return moments.event_shape, moments.mean.to(moments.dtype), covariance.to(moments.dtype)


def _fit_gram(
    data: Tensor, rank: int | None, shrinkage: str, groups: Tensor | None
) -> tuple[torch.Size, Tensor, Covariance]:
    samples = as_samples(data)
    if not len(samples):
        raise ValueError("expected at least one sample, got none")
    mean = samples.mean(0)
    samples = samples - mean
    _check(len(samples), mean, samples.square().sum(), rank)
    members = fold_members(len(samples), FOLDS, groups)
    validates = _cross_validates(len(samples), mean, shrinkage, len(members.unique()))
    left_out = gram_left_out(samples, members) if validates else None
    covariance = _covariance(gram_axes(samples), left_out, rank)
    dtype = torch.promote_types(data.dtype, torch.float32)
    return data.shape[1:], mean.to(dtype), covariance.to(dtype)


def _check(count: int, mean: Tensor, scatter: Tensor, rank: int | None) -> None:
    """Refuses what no covariance can be fitted to; `scatter` is the summed squared distance to the mean."""
    if count < 2:
        raise ValueError(f"expected at least 2 samples to fit a covariance, got {count}")
    largest = min(count - 1, mean.numel())
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(
            f"expected 1 <= rank <= min(N - 1, D) = {largest} "
            f"for {count} samples of {mean.numel()} dimensions, got {rank}"
        )
    rounding = 1e-24 * count * float(mean.square().sum())  # what equal samples leave in float64
    if not float(scatter) > rounding:
        raise ValueError(f"expected data that vary, got {count} samples that are all equal")


def _cross_validates(count: int, mean: Tensor, shrinkage: str, folds: int) -> bool:
    if shrinkage == "cv" and count >= PLENTY * mean.numel():
        log.info("%d samples for %d dimensions: no need to cross-validate", count, mean.numel())
        return False
    if shrinkage == "cv" and (count < 2 * FOLDS or folds < 2):
        log.warning(
            "%d samples in %d folds: too few to cross-validate, using sample eigenvalues", count, folds
        )
        return False
    return shrinkage == "cv"


def _covariance(axes: Axes, left_out: Iterable[LeftOut] | None, rank: int | None) -> Covariance:
    """The covariance on these axes, with their own or cross-validated eigenvalues, cut to `rank`."""
    eigvals, eigvecs, tail = axes.eigvals, axes.eigvecs, axes.eigvals.new_zeros(())
    if left_out is not None:
        eigvals, tail = cross_validated(list(left_out), *eigvecs.shape)
        eigvecs = eigvecs[:, : len(eigvals)]
        if rank is not None and rank > len(eigvals):
            log.warning("rank %d is lowered to %d, all that %d folds determine", rank, len(eigvals), FOLDS)
    eigvals, eigvecs, tail = truncate(eigvals, eigvecs, tail, rank)
    return Covariance(eigvecs.contiguous(), eigvals, tail)


def truncate(
    eigvals: Tensor, eigvecs: Tensor, tail: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the first `rank` eigenvectors; the new tail is the mean of all the variances left out."""
    dim, size = eigvecs.shape
    if rank is None or rank >= size:
        return eigvals, eigvecs, tail
    dropped = eigvals[rank:].sum() + (dim - size) * tail
    return eigvals[:rank], eigvecs[:, :rank], dropped / (dim - rank)


def cross_validated(left_out: list[LeftOut], dim: int, size: int) -> tuple[Tensor, Tensor]:
    """Cross-validated eigenvalues (r,), decreasing, and the variance of each of the D - r other directions.

    r is the smallest rank that all but one fold determine, `size` at most.
    """
    from sklearn.isotonic import isotonic_regression

    rank = min(size, *(len(fold.variances) for fold in left_out))
    weights = left_out[0].variances.new_tensor([float(fold.count) for fold in left_out])
    weights = weights / weights.sum()
    measured = weights @ torch.stack([fold.variances[:rank] for fold in left_out])
    total = weights @ torch.stack([fold.total for fold in left_out])
    eigvals = measured
    if rank:
        monotone = isotonic_regression(measured.cpu().numpy(), increasing=False)
        eigvals = measured.new_tensor(monotone.copy())  # a copy: scikit-learn returns negative strides
    tail = (total - eigvals.sum()).clamp_min(0) / max(dim - rank, 1)
    return eigvals, tail if rank < dim else torch.zeros_like(tail)
