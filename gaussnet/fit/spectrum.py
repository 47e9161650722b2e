"""From moments to a covariance: eigenvalues, rank, tail, and their cross-validation.

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

import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.moments import Data, Moments, fit_moments, merge_all

SHRINKAGES = ("cv", "none")
FOLDS = 3
PLENTY = 100  # samples per dimension beyond which cross-validation moves eigenvalues by under 1%

log = logging.getLogger(__name__)


def fit_covariance(
    data: Data, rank: int | None = None, shrinkage: str = "cv"
) -> tuple[torch.Size, Tensor, Covariance]:
    """Fits mean and covariance in one pass over the data.

    Args:
        data: (N, *event_shape), or an iterable of such batches.
        rank: eigenvectors to keep, 1 <= rank <= min(N - 1, D); the mean variance along the others becomes
            the tail. Default: all that the data determine.
        shrinkage: "cv" for cross-validated eigenvalues, "none" for those of the sample covariance (over N).

    Returns:
        event_shape, mean (D,) and covariance, in the dtype of the data (at least float32).

    Raises:
        ValueError: for fewer than two samples, non-finite or constant data, an unknown shrinkage, or a rank
            out of range.
    """
    if shrinkage not in SHRINKAGES:
        raise ValueError(f"expected shrinkage to be one of {', '.join(SHRINKAGES)}, got {shrinkage!r}")
    folds = fit_moments(data, folds=FOLDS)
    moments = merge_all(folds)
    count, dim = moments.count, moments.mean.numel()
    if count < 2:
        raise ValueError(f"expected at least 2 samples to fit a covariance, got {count}")
    if rank is not None and not 1 <= rank <= min(count - 1, dim):
        raise ValueError(
            f"expected 1 <= rank <= min(N - 1, D) = {min(count - 1, dim)} "
            f"for {count} samples of {dim} dimensions, got {rank}"
        )
    rounding = 1e-24 * count * float(moments.mean.square().sum())  # what equal samples leave in float64
    if not float(moments.scatter.diagonal().sum()) > rounding:
        raise ValueError(f"expected data that vary, got {count} samples that are all equal")

    eigvals, eigvecs, tail = eigh(moments)
    if shrinkage == "cv" and count >= PLENTY * dim:
        log.info("%d samples for %d dimensions: sample eigenvalues need no cross-validation", count, dim)
    elif shrinkage == "cv" and count < 2 * FOLDS:
        log.warning("%d samples are too few for cross-validation: using sample eigenvalues", count)
    elif shrinkage == "cv":
        eigvals, tail = cross_validated(folds)
        eigvecs = eigvecs[:, : len(eigvals)]
        if rank is not None and rank > len(eigvals):
            log.warning("rank %d is lowered to %d, all that %d folds determine", rank, len(eigvals), FOLDS)
    eigvals, eigvecs, tail = truncate(eigvals, eigvecs, tail, rank)
    covariance = Covariance(eigvecs.contiguous(), eigvals, tail).to(moments.dtype)
    return moments.event_shape, moments.mean.to(moments.dtype), covariance


def eigh(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (r,) in decreasing order, eigenvectors (D, r), and the mean eigenvalue of the rest.

    r = min(N - 1, D): the rank that N samples can have.
    """
    eigvals, eigvecs = torch.linalg.eigh(moments.covariance)
    eigvals, eigvecs = eigvals.flip(0).clamp_min(0), eigvecs.flip(1)
    return truncate(eigvals, eigvecs, eigvals.new_zeros(()), min(moments.count - 1, len(eigvals)))


def truncate(
    eigvals: Tensor, eigvecs: Tensor, tail: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the first `rank` eigenvectors; the new tail is the mean of all the variances left out."""
    dim, size = eigvecs.shape
    if rank is None or rank >= size:
        return eigvals, eigvecs, tail
    dropped = eigvals[rank:].sum() + (dim - size) * tail
    return eigvals[:rank], eigvecs[:, :rank], dropped / (dim - rank)


def cross_validated(folds: list[Moments]) -> tuple[Tensor, Tensor]:
    """Cross-validated eigenvalues (r,), decreasing, and the variance of each of the D - r other directions.

    r is the smallest rank that all but one fold determine.
    """
    from sklearn.isotonic import isotonic_regression

    spectra: list[Tensor] = []
    totals: list[Tensor] = []
    for k, left_out in enumerate(folds):
        rest = merge_all(fold for j, fold in enumerate(folds) if j != k)
        _, eigvecs, _ = eigh(rest)
        shift = left_out.mean - rest.mean
        # Second moments of the fold about the mean of the rest: new data differ in their mean, too.
        second = left_out.covariance + torch.outer(shift, shift)
        spectra.append(((second @ eigvecs) * eigvecs).sum(0))  # diag(U^T C U)
        totals.append(second.diagonal().sum())
    rank = min(map(len, spectra))
    weights = torch.tensor([float(fold.count) for fold in folds], dtype=torch.float64)
    weights = (weights / weights.sum()).to(spectra[0].device)
    variances = torch.stack([spectrum[:rank] for spectrum in spectra])
    measured = weights @ variances
    total = weights @ torch.stack(totals)
    monotone = isotonic_regression(measured.cpu().numpy(), increasing=False)
    eigvals = measured.new_tensor(
        monotone.copy()
    )  # a copy: scikit-learn returns a view with negative strides
    dim = folds[0].mean.numel()
    tail = (total - eigvals.sum()).clamp_min(0) / max(dim - rank, 1)
    return eigvals, tail if rank < dim else torch.zeros_like(tail)
