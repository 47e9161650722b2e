"""Eigensolvers: the principal axes of data, and the variance of left-out folds along those of the others.

With X the (N, D) samples about their mean, the eigenvectors of the covariance are found

    dense   from X^T X / N, (D, D), accumulated in one pass: any stream of batches, N >= D
    gram    from X X^T = V diag(N lam) V^T, (N, N), as U = X^T V / sqrt(N lam): arrays of N < D samples

The Gram matrix about any centre holds all that cross-validation needs. For the eigenvectors U = X_A^T V /
sqrt(n lam) of a set A of n samples, a left-out sample y has the coordinates

    U^T (y - mean_A) = (K_yA - mean_{i in A} K_iA) V / sqrt(n lam),        K the Gram matrix,

since the columns of V are orthogonal to 1. No (D, r) product is formed but the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gaussnet.fit.moments import Moments, merge_all

NEGLIGIBLE = 1e-13  # share of the total variance below which a Gram eigenvector is rounding


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


def dense_axes(moments: Moments) -> Axes:
    """All axes that N samples can have: r = min(N - 1, D)."""
    eigvals, eigvecs = torch.linalg.eigh(moments.covariance)
    rank = min(moments.count - 1, len(eigvals))
    return Axes(eigvals.flip(0).clamp_min(0)[:rank], eigvecs.flip(1)[:, :rank])


def dense_left_out(folds: list[Moments]) -> Iterator[LeftOut]:
    """Each fold against the others, from their moments."""
    for k, fold in enumerate(folds):
        rest = merge_all(other for j, other in enumerate(folds) if j != k)
        eigvecs = dense_axes(rest).eigvecs
        shift = fold.mean - rest.mean
        # Second moments of the fold about the mean of the rest: new data differ in their mean, too.
        second = fold.covariance + torch.outer(shift, shift)
        yield LeftOut(fold.count, ((second @ eigvecs) * eigvecs).sum(0), second.diagonal().sum())


def gram_axes(centred: Tensor) -> Axes:
    """The axes of samples about their mean, (N, D), float64; null directions are left out.

    Directions of almost no variance come out of the product with X^T without orthogonality: a QR
    factorisation restores it, and leaves the others as they are.
    """
    gram = centred @ centred.T
    eigvals, vectors = _gram_eigh(gram, float(gram.diagonal().mean()))
    scaled = centred.T @ (vectors / torch.sqrt(len(centred) * eigvals))
    q, r = torch.linalg.qr(scaled)
    return Axes(eigvals, q * r.diagonal().sign())


def gram_left_out(centred: Tensor, members: Tensor) -> Iterator[LeftOut]:
    """Each fold against the others, from the Gram matrix; `members` holds the fold of each sample."""
    gram = centred @ centred.T
    members = members.to(gram.device)
    for k in members.unique().tolist():
        out, rest = members == k, members != k
        inner = gram[rest][:, rest]
        column = inner.mean(0)
        centred_inner = inner - column - column[:, None] + column.mean()
        eigvals, vectors = _gram_eigh(centred_inner, float(gram.diagonal().mean()))
        cross = gram[out][:, rest]
        coordinates = (cross - column) @ (vectors / torch.sqrt(len(inner) * eigvals))
        distance2 = gram.diagonal()[out] - 2 * cross.mean(1) + column.mean()
        yield LeftOut(int(out.sum()), coordinates.square().mean(0), distance2.mean())


def as_samples(data: Tensor | np.ndarray) -> Tensor:
    """(N, *event_shape) as float64 rows.

    Raises:
        ValueError: naming the first sample that is not finite.
    """
    flat = torch.as_tensor(data).detach().double().flatten(1)
    finite = torch.isfinite(flat).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"expected finite data, got NaN or infinite values in sample {bad}")
    return flat


def _gram_eigh(gram: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues over N and eigenvectors of a centred Gram matrix, decreasing, without null directions."""
    eigvals, vectors = torch.linalg.eigh(gram)
    eigvals, vectors = eigvals.flip(0) / len(gram), vectors.flip(1)
    kept = min(int((eigvals > NEGLIGIBLE * variance).sum()), len(gram) - 1)
    return eigvals[:kept], vectors[:, :kept]
