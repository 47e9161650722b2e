"""How many components does a mixture need, and of which rank, to explain a model's score?

A mixture of K Gaussians is fitted once, at full rank; its truncation keeps the first R axes of each component
(arXiv 2412.09726, Sec. 4.4 and A.5),

    Sigma_k -> U_R diag(lam_1 .. lam_R) U_R^T + tail (I - U_R U_R^T),

with the mean of the variances left out as the tail, which is the best choice at every noise level, or with
zero, which is the paper's. Axes with lam << sigma^2 cannot be seen at a noise level (Eq. 12): the rank that a
level needs grows as the noise falls, and components can stand in for axes (Fig. 9, 10 there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.covariance import Covariance
from gaussnet.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.fit.shrinkage import truncate
from gaussnet.fit.solvers import Axes
from gaussnet.fit.spectrum import check_options
from gaussnet.probes.scores import PAPER_SIGMAS, ScoreProbe

FULL = "full"
Rank = int | str  # number of axes, or FULL
Gaussians = GaussianDenoiser | GaussianMixtureDenoiser


def truncated(denoiser: Gaussians, rank: Rank, tail: str = "mean") -> Gaussians:
    """A Gaussian or mixture with only the first axes of each covariance.

    Args:
        denoiser: fitted at full rank, or at any that is larger.
        rank: axes to keep of each component, at most; "full" keeps the denoiser as it is.
        tail: variance along the axes left out: their "mean", or "zero".

    Returns:
        A denoiser of the same kind; the given one for "full".

    Raises:
        ValueError: for a rank < 1, or an unknown tail.

    Example:
        >>> covariance = Covariance(torch.eye(3), torch.tensor([4.0, 1.0, 2.0]))
        >>> cut = truncated(GaussianDenoiser(torch.zeros(3), covariance), rank=1)
        >>> cut.covariance.eigvals, cut.covariance.tail
        (tensor([4.]), tensor(1.5000))
    """
    check_options(tail=tail)
    if rank == FULL:
        return denoiser
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"expected rank >= 1 or {FULL!r}, got {rank!r}")
    if isinstance(denoiser, GaussianDenoiser):
        return GaussianDenoiser(denoiser.mean, _cut(denoiser.covariance, rank, tail))
    components = zip(denoiser.eigvecs, denoiser.eigvals, denoiser.tails, denoiser.ranks.tolist(), strict=True)
    covariances = [
        _cut(Covariance(eigvecs[:size].mT, eigvals[:size], own_tail), rank, tail)
        for eigvecs, eigvals, own_tail, size in components
    ]
    return GaussianMixtureDenoiser(denoiser.weights, denoiser.means, covariances, denoiser.component_labels)


def modes_and_ranks(
    model: nn.Module,
    mixture: Gaussians,
    ranks: Sequence[Rank],
    clean: Tensor,
    sigmas: Sequence[float] = PAPER_SIGMAS,
    generator: torch.Generator | None = None,
    *,
    tail: str = "mean",
    kind: str = "noised",
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """The share of a model's score (Eq. 28) that a mixture leaves unexplained, at each of its ranks.

    Args:
        model: the denoiser to explain.
        mixture: a mixture at full rank, or a Gaussian, which has one component.
        ranks: axes of each component, or "full".
        clean: samples to take queries from, (Q, *event_shape).
        sigmas: noise levels.
        generator: draws the noise: one draw for all levels and ranks.
        tail: as in `truncated`.
        kind: of queries, "noised" or "noise", as in `ScoreProbe`.
        batch_size: queries in one evaluation; default: all.

    Returns:
        Rows with components (how many there are), rank (as asked for), axes (of the largest component: fewer
        than the rank where components have fewer), sigma, queries (their kind), mean and std over queries,
        and count, their number.

    Raises:
        ValueError: as in `truncated` and `ScoreProbe`.

    Example:
        >>> covariance = Covariance(torch.eye(3), torch.tensor([4.0, 1.0, 0.25]))
        >>> model, generator = GaussianDenoiser(torch.zeros(3), covariance), torch.Generator().manual_seed(0)
        >>> clean = torch.randn(64, 3, generator=generator)
        >>> rows = modes_and_ranks(model, model, [1, 2, "full"], clean, [1.0], generator)
        >>> [(row["axes"], row["mean"] < 1e-9) for row in rows]  # a tail of one axis is that axis
        [(1, False), (2, True), (3, True)]
    """
    # The model stands as the reference: its scores are computed once, and kept for all ranks.
    probe = ScoreProbe({"model": model}, clean, sigmas, generator, kinds=(kind,), batch_size=batch_size)
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        cut = truncated(mixture, rank, tail)
        sizes = [cut.covariance.rank] if isinstance(cut, GaussianDenoiser) else cut.ranks.tolist()
        rows += [
            {
                "components": len(sizes),
                "rank": rank,
                "axes": max(sizes),
                "sigma": row["sigma"],
                "queries": kind,
                "mean": row["mean_reverse"],
                "std": row["std_reverse"],
                "count": row["count"],
            }
            for row in probe(cut)
            if row["quantity"] == "score"
        ]
    return rows


def minimal_ranks(rows: Sequence[Mapping[str, Any]], tol: float = 0.1) -> list[dict[str, Any]]:
    """The smallest rank that does about as well as full rank, for each level and number of modes (Fig. 10B).

    Args:
        rows: with modes (how many were asked for), rank, axes, sigma, mean; full rank among them.
        tol: the unexplained share may be (1 + tol) times that of full rank.

    Returns:
        Rows with sigma, modes, rank, axes, and mean, the unexplained share there.

    Raises:
        ValueError: if full rank was not measured, or its share is NaN.

    Example:
        >>> course = ((4, 4, 0.3), (16, 16, 0.105), ("full", 64, 0.1))
        >>> names = ("modes", "sigma", "rank", "axes", "mean")
        >>> rows = [dict(zip(names, (1, 2.0, *point))) for point in course]
        >>> minimal_ranks(rows)
        [{'sigma': 2.0, 'modes': 1, 'rank': 16, 'axes': 16, 'mean': 0.105}]
    """
    found: list[dict[str, Any]] = []
    for sigma, modes in dict.fromkeys((row["sigma"], row["modes"]) for row in rows):
        own = _by_axes(row for row in rows if (row["sigma"], row["modes"]) == (sigma, modes))
        if own[-1]["rank"] != FULL:
            raise ValueError(f"expected rows of full rank, got none for {modes} modes at sigma = {sigma:g}")
        if math.isnan(own[-1]["mean"]):
            raise ValueError(
                f"expected shares that are numbers, got nan for {modes} modes at sigma = {sigma:g}"
            )
        least = next(row for row in own if row["mean"] <= (1 + tol) * own[-1]["mean"])
        found.append({name: least[name] for name in ("sigma", "modes", "rank", "axes", "mean")})
    return found


def equal_error(rows: Sequence[Mapping[str, Any]], sigma: float, share: float) -> list[dict[str, Any]]:
    """The contour of an unexplained share over modes and axes (Fig. 10C): what each number of modes needs.

    Between two ranks the logarithm of the share is linear in that of the axes.

    Args:
        rows: as in `minimal_ranks`.
        sigma: the noise level, one of theirs.
        share: the unexplained share of the contour.

    Returns:
        Rows with modes, in increasing order, and axes, the fewest that reach the share; the fewest measured
        where those are enough. Numbers of modes that do not reach it are left out.

    Example:
        >>> course = ((4, 4, 0.3), (16, 16, 0.105), ("full", 64, 0.1))
        >>> names = ("modes", "sigma", "rank", "axes", "mean")
        >>> rows = [dict(zip(names, (1, 2.0, *point))) for point in course]
        >>> [(row["modes"], round(row["axes"], 1)) for row in equal_error(rows, sigma=2.0, share=0.2)]
        [(1, 6.8)]
    """
    found: list[dict[str, Any]] = []
    for modes in sorted({row["modes"] for row in rows if row["sigma"] == sigma}):
        points = [
            (row["axes"], row["mean"])
            for row in _by_axes(row for row in rows if (row["sigma"], row["modes"]) == (sigma, modes))
        ]
        if points[0][1] <= share:
            found.append({"modes": modes, "axes": float(points[0][0])})
            continue
        for (low, above), (high, below) in pairwise(points):
            if below <= share < above:
                part = np.log(above / share) / np.log(above / below) if below > 0 else 1.0
                found.append({"modes": modes, "axes": float(low * (high / low) ** part)})
                break
    return found


def _cut(covariance: Covariance, rank: int, tail: str) -> Covariance:
    order = covariance.eigvals.argsort(descending=True, stable=True)
    axes = Axes(covariance.eigvals[order], covariance.eigvecs[:, order])
    kept, dropped = truncate(axes, covariance.tail, rank)
    return Covariance(kept.eigvecs, kept.eigvals, dropped if tail == "mean" else 0.0)


def _by_axes(rows: Any) -> list[Mapping[str, Any]]:
    """Rows from few to many axes, full rank last."""
    return sorted(rows, key=lambda row: (row["rank"] == FULL, row["axes"], row["rank"]))
