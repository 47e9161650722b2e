"""Expectation maximisation of a mixture of Gaussians.

It refines clusters as a mixture of probabilistic principal component analysers (Tipping and Bishop 1999):
with responsibilities r_ik = p(k | x_i), weights are their means, means and covariances their weighted
moments, cut to `rank` axes and the mean dropped eigenvalue, which is the exact maximum. Variances stay above
a floor: of all covariances above it, the clamped one is the most likely, so that the log-likelihood never
falls and a component cannot collapse.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.clusters import all_equal, point
from gaussnet.fit.moments import inner
from gaussnet.fit.shrinkage import truncate
from gaussnet.fit.solvers import Axes, gram_axes

FLOOR = 1e-6  # of the mean variance per dimension: the least variance
_ABSENT = 1e-12  # responsibility below which a sample does not count for a component
_ROWS = 4096

log: logging.Logger = logging.getLogger(__name__)


def maximise(
    samples: Tensor, clusters: Tensor, rank: int | float | None, steps: int
) -> tuple[Tensor, list[Tensor], list[Covariance], Tensor, list[float]]:
    """Weights (counts), means (D,), covariances, the likeliest cluster of each sample, log-likelihoods."""
    flat = samples.double().flatten(1)
    floor = FLOOR * float(flat.var(0, correction=0).mean())
    if all_equal(flat):
        raise ValueError(f"expected data that vary, got {len(flat)} samples that are all equal")
    names, index = torch.unique(clusters, return_inverse=True)
    responsibilities = torch.nn.functional.one_hot(index, len(names)).double()
    dim = flat.shape[1]
    ranks = [min(int(rank or dim), max(int(count) - 1, 1), dim) for count in responsibilities.sum(0)]
    means = [flat[0]] * len(names)
    parts = [point(flat[0])] * len(names)
    history: list[float] = []
    for step in range(steps + 1):
        for k, size in enumerate(ranks):
            if float(responsibilities[:, k].sum()) >= 1:  # less than a sample cannot move a component
                means[k], parts[k] = _maximum(flat, responsibilities[:, k], size, floor)
        shares = responsibilities.mean(0)
        log_joint = torch.log(shares) + torch.stack(
            [_log_prob(flat, mean, part) for mean, part in zip(means, parts, strict=True)], 1
        )
        history.append(float(torch.logsumexp(log_joint, 1).mean()))
        log.info("expectation maximisation, step %d: log-likelihood %.6g per sample", step, history[-1])
        responsibilities = torch.softmax(log_joint, 1)
    return shares * len(flat), means, parts, names[_likeliest(log_joint)], history  # pyright: ignore[reportPossiblyUnboundVariable, reportReturnType]


def _likeliest(log_joint: Tensor) -> Tensor:
    """The likeliest component of each sample, of those that are the likeliest of more than one."""
    log_joint = log_joint.clone()
    while True:
        index = log_joint.argmax(1)
        single = (torch.bincount(index) == 1).nonzero()[:, 0]
        if not len(single):
            return index
        log_joint[:, single[0]] = -math.inf


def _maximum(flat: Tensor, weights: Tensor, rank: int, floor: float) -> tuple[Tensor, Covariance]:
    """The likeliest mean and covariance for weighted samples, with variances of at least `floor`."""
    present = weights > _ABSENT
    rows, weights = flat[present], weights[present]
    total = weights.sum()
    mean = weights @ rows / total
    scaled = (rows - mean) * torch.sqrt(weights / total)[:, None]
    dim = flat.shape[1]
    if len(rows) < dim:
        axes = gram_axes(scaled * len(rows) ** 0.5)  # whose covariance is over the number of rows
    else:
        eigvals, eigvecs = torch.linalg.eigh(inner(scaled))
        axes = Axes(eigvals.flip(0).clamp_min(0), eigvecs.flip(1))
    axes, tail = truncate(axes, total.new_zeros(()), rank)  # all axes: nothing varies outside of them
    return mean, Covariance(axes.eigvecs.contiguous(), axes.eigvals.clamp_min(floor), tail.clamp_min(floor))


def _log_prob(flat: Tensor, mean: Tensor, covariance: Covariance) -> Tensor:
    """Log N(x; mean, covariance) of each row, (N,)."""
    outside = covariance.dim - covariance.rank
    found: list[Tensor] = []
    for rows in flat.split(_ROWS):
        u = rows - mean
        c = covariance.to_basis(u)
        mahalanobis = (c.square() / covariance.eigvals).sum(1)
        if outside:  # the vectors outside, for a difference of squares loses what little is there
            mahalanobis = mahalanobis + (u - covariance.from_basis(c)).square().sum(1) / covariance.tail
        found.append(mahalanobis)
    constant = covariance.logdet(0.0) + covariance.dim * math.log(2 * math.pi)
    return -0.5 * (torch.cat(found) + constant)
