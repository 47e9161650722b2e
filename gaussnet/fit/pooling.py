"""Covariances of classes or clusters that borrow from what all of them have in common.

A class has fewer samples than all of them together, and where there are not many more than dimensions, its
own covariance overfits. But classes vary in much the same way about their own means. With S_k the covariance
of the n_k samples of component k, and W that of all samples about the means of their own components,

    Sigma_k = (n_k S_k + nu W)/(n_k + nu).

It is the posterior mean of a covariance with an inverse Wishart prior about W that counts as much as nu
samples: regularised discriminant analysis (Friedman 1989, J. Am. Stat. Assoc.). nu = 0 leaves each class its
own, and a large nu gives all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gaussnet.covariance import Covariance
from gaussnet.fit.shrinkage import truncate
from gaussnet.fit.solvers import Axes
from gaussnet.fit.spectrum import explaining, split_rank
from gaussnet.numerics import wide_dtype


def pool(
    covariances: Sequence[Covariance],
    counts: Sequence[float],
    within: Covariance,
    prior: float,
    rank: int | float | None = None,
    tail: str = "mean",
) -> list[Covariance]:
    """The covariance of each component, with as much of the common one as it needs.

    Args:
        covariances: S_k of each component.
        counts: n_k, its number of samples.
        within: W.
        prior: nu, the number of samples that W counts as, >= 0.
        rank: eigenvectors to keep, at most, or the share of the variance that they explain.
        tail: variance along the axes that are left out: their "mean", or "zero".

    Returns:
        Sigma_k of each. Its axes are all those that S_k or W has, but for the rank.

    Raises:
        ValueError: if the prior is negative or not finite, or a share is not in (0, 1).

    Example:
        >>> within = Covariance(torch.eye(2), torch.ones(2))
        >>> own = Covariance(torch.eye(2), torch.tensor([4.0, 0.0]))
        >>> pool([own], [3], within, prior=1.0)[0].dense()
        tensor([[3.2500, 0.0000],
                [0.0000, 0.2500]])
    """
    check_prior(prior)
    size, share = split_rank(rank)
    pooled: list[Covariance] = []
    for own, count in zip(covariances, counts, strict=True):
        weight = prior / (count + prior) if prior else 0.0
        mixed = _mix(own, within, weight)
        axes = Axes(mixed.eigvals, mixed.eigvecs)
        outside = (mixed.dim - mixed.rank) * mixed.tail
        kept = size if share is None else explaining(mixed.eigvals, outside, share)
        axes, dropped = truncate(axes, mixed.tail, kept)
        dropped = dropped if tail == "mean" else torch.zeros_like(dropped)
        pooled.append(Covariance(axes.eigvecs.contiguous(), axes.eigvals, dropped).to(own.eigvals.dtype))
    return pooled


def check_prior(prior: float) -> None:
    """Refuses a prior that is no number of samples.

    Raises:
        ValueError: if it is negative or not finite.
    """
    if not 0 <= prior < float("inf"):
        raise ValueError(f"expected a finite prior >= 0, a number of samples, got {prior}")


def _mix(a: Covariance, b: Covariance, weight: float) -> Covariance:
    """(1 - weight) a + weight b, exactly: outside of the axes of both it is isotropic, as they are."""
    if weight == 0:
        return a
    wide = wide_dtype(a.eigvals.device)
    a, b = (Covariance(c.eigvecs.to(wide), c.eigvals.to(wide), c.tail.to(wide)) for c in (a, b))
    if a.rank + b.rank < a.dim:
        basis = torch.linalg.qr(torch.cat([a.eigvecs, b.eigvecs], 1)).Q  # (D, q)
    else:
        basis = torch.eye(a.dim, dtype=wide, device=a.eigvals.device)
    image = (1 - weight) * a.apply(_same, basis.mT) + weight * b.apply(_same, basis.mT)  # (q, D)
    matrix = image @ basis
    eigvals, turned = torch.linalg.eigh((matrix + matrix.mT) / 2)
    outside = (1 - weight) * a.tail + weight * b.tail
    return Covariance((basis @ turned).flip(1), eigvals.flip(0).clamp_min(0), outside)


def _same(lam: torch.Tensor) -> torch.Tensor:
    return lam
