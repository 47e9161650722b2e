"""Eigenvalues for new data, from those of a sample.

Sample eigenvectors overfit: the data vary more along the leading ones, and less along the last ones, than
new data do. A denoiser built on the sample eigenvalues under-estimates its own error, and with it the c_out
of a network preconditioned by it. With N samples of D dimensions, S their covariance with eigenvalues lam,
m = tr S / D their mean:

    cv           the variance of each left-out fold along the axes of the other folds, averaged, sorted out by
                 isotonic regression, and put on the axes of all the data (nonlinear shrinkage)
    ledoit-wolf  (1 - rho) S + rho m I, rho = min(1, (E|x|^4 - tr S^2) / (N (tr S^2 - D m^2)))
    oas          the same with rho = min(1, (tr S^2/D^2 + m^2) / ((N + 1) (tr S^2/D^2 - m^2/D)))
    remap        lam / (1 - df(lam)/N), df(s) = sum_j lam_j/(lam_j + s)
    none         lam

"remap" is a change of noise level, s'^2 = s^2 (1 - df(s'^2)/N): what regressing N samples on themselves hides
of the noise. lam/(lam + s'^2) is the filter of the larger eigenvalue lam s^2/s'^2, which depends on s; each
lam takes it where its own filter bends, at s'^2 = lam.

References:
    cv: Bartz, "Cross-validation based nonlinear shrinkage", 2016, arXiv 1611.00798; Lam, "Nonparametric
    eigenvalue-regularized precision or covariance matrix estimator", Ann. Stat. 2016.
    ledoit-wolf, oas, as in scikit-learn: Ledoit and Wolf, J. Multivariate Anal. 2004; Chen, Wiesel, Eldar and
    Hero 2010, arXiv 0907.4698.
    remap, the deterministic equivalent of ridge regression: Dobriban and Wager, Ann. Stat. 2018, arXiv
    1507.03003.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gaussnet.fit.solvers import Axes, LeftOut, Solved

SHRINKAGES = ("cv", "none", "remap", "ledoit-wolf", "oas")
LINEAR = ("ledoit-wolf", "oas")
FOLDS = 3
PLENTY = 100  # samples per dimension beyond which cross-validation moves eigenvalues by under 1%

log: logging.Logger = logging.getLogger(__name__)


def shrink(solved: Solved, shrinkage: str, grouped: bool = False) -> tuple[Axes, Tensor]:
    """Eigenvalues on the axes of the data, and the mean variance along each of the D - r other directions.

    `grouped` data, such as images and their mirror images, hold fewer samples than they seem to.

    Raises:
        ValueError: for an unknown shrinkage, or one that needs all axes, or samples, that are not at hand.
    """
    if shrinkage not in SHRINKAGES:
        raise ValueError(f"expected shrinkage to be one of {', '.join(SHRINKAGES)}, got {shrinkage!r}")
    if shrinkage == "cv" and _cross_validates(solved, grouped):
        eigvals, tail = cross_validated(list(solved.left_out()), *solved.axes.eigvecs.shape)
        return Axes(eigvals, solved.axes.eigvecs[:, : len(eigvals)]), tail
    eigvals = solved.axes.eigvals
    outside = max(solved.dim - len(eigvals), 1)
    tail = (solved.total - eigvals.sum()).clamp_min(0) / outside
    if shrinkage in LINEAR:
        rho = linear_share(solved, shrinkage)
        mean = solved.total / solved.dim
        eigvals, tail = (1 - rho) * eigvals + rho * mean, (1 - rho) * tail + rho * mean
    if shrinkage == "remap":
        eigvals, tail = remapped(eigvals, solved)
    tail = tail if len(eigvals) < solved.dim else torch.zeros_like(tail)
    return Axes(eigvals, solved.axes.eigvecs), tail


def linear_share(solved: Solved, shrinkage: str) -> Tensor:
    """rho, the share of the mean variance in linear shrinkage towards m I.

    Raises:
        ValueError: if it cannot be known: tr S^2 needs all axes, Ledoit and Wolf's rho the samples.
    """
    if not solved.complete:
        raise ValueError(
            f'shrinkage="{shrinkage}" needs all axes of the data, got the leading {len(solved.axes.eigvals)}'
        )
    square, mean = solved.axes.eigvals.square().sum(), solved.total / solved.dim
    if shrinkage == "oas":
        share = square / solved.dim**2
        excess = (solved.count + 1) * (share - mean**2 / solved.dim)
        return ((share + mean**2) / excess).clamp_max(1) if excess > 0 else torch.ones_like(mean)
    if solved.spread is None:
        raise ValueError('shrinkage="ledoit-wolf" needs an array of samples, got data that pass once')
    excess = solved.count * (square - solved.dim * mean**2)
    return ((solved.spread() - square) / excess).clamp(0, 1) if excess > 0 else torch.ones_like(mean)


def remapped(eigvals: Tensor, solved: Solved) -> tuple[Tensor, Tensor]:
    """The noise remap as a change of eigenvalues."""
    outside = solved.dim - len(eigvals)
    # Of the directions without an axis, N samples vary along so many; along the others, there is nothing.
    varying = max(min(solved.count - 1, solved.dim) - len(eigvals), 0)
    tail = eigvals.new_tensor([solved.rest / varying if varying else 0.0])
    counts = torch.cat([torch.ones_like(eigvals), tail.new_tensor([float(varying)])])
    every = torch.cat([eigvals, tail])

    def inflate(lam: Tensor) -> Tensor:
        shares = every / (every + lam[:, None]).clamp_min(torch.finfo(lam.dtype).tiny)  # (r, r + 1)
        # df is at most N - 1, the directions that N samples have about their mean.
        return lam / (1 - (shares * counts).sum(1) / solved.count)

    return inflate(eigvals), inflate(tail)[0] * varying / max(outside, 1)


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


def truncate(axes: Axes, tail: Tensor, rank: int | None) -> tuple[Axes, Tensor]:
    """Keeps the first `rank` axes; the new tail is the mean of all the variances left out."""
    dim, size = axes.eigvecs.shape
    if rank is None or rank >= size:
        return axes, tail
    dropped = axes.eigvals[rank:].sum() + (dim - size) * tail
    return Axes(axes.eigvals[:rank], axes.eigvecs[:, :rank]), dropped / (dim - rank)


def _cross_validates(solved: Solved, grouped: bool) -> bool:
    if solved.count >= PLENTY * solved.dim and not grouped:
        log.info("%d samples for %d dimensions: no need to cross-validate", solved.count, solved.dim)
        return False
    if solved.count < 2 * FOLDS or solved.folds < 2:
        log.warning(
            "%d samples in %d folds: too few to cross-validate, using sample eigenvalues",
            solved.count, solved.folds,
        )  # fmt: skip
        return False
    return True
