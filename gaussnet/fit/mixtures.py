"""Mixtures of Gaussians: clusters or classes, and expectation maximisation.

Components are clusters of mini-batch k-means (Sec. A.5 of arXiv 2412.09726), or classes; each is fitted as a
Gaussian of its own. Expectation maximisation then refines clusters as a mixture of probabilistic principal
component analysers (Tipping and Bishop 1999): with responsibilities r_ik = p(k | x_i), weights are their
means, means and covariances their weighted moments, cut to `rank` axes and the mean dropped eigenvalue, which
is the exact maximum. Variances stay above a floor: of all covariances above it, the clamped one is the most
likely, so that the log-likelihood never falls and a component cannot collapse.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.clusters import kmeans_labels
from gaussnet.fit.moments import fit_class_moments, fold_members, inner, merge_all
from gaussnet.fit.selection import held_out
from gaussnet.fit.shrinkage import FOLDS, truncate
from gaussnet.fit.solvers import Axes, gram_axes
from gaussnet.fit.spectrum import check_options, fit_covariance, fit_moments_covariance, split_rank
from gaussnet.fit.streams import Data, as_tensor, batches, check_labels, check_mirror, check_order

FLOOR = 1e-6  # of the mean variance per dimension: the least variance in expectation maximisation
_ABSENT = 1e-12  # responsibility below which a sample does not count for a component
_ROWS = 4096

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixtureFit:
    """A fitted mixture.

    Attributes:
        weights: number of samples of each component, (K,).
        means: (K, *event_shape), in the dtype of the data, at least float32.
        covariances: K of them.
        classes: the class of each component, (K,); None for clusters.
        log_likelihood: mean log-likelihood per sample, before each step of expectation maximisation and
            after the last.

    Example:
        >>> data, labels = torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
        >>> fitted = fit_mixture(data, labels=labels, shrinkage="none")
        >>> fitted.classes, [covariance.dense().item() for covariance in fitted.covariances]
        (tensor([0, 1]), [1.0, 1.0])
    """

    weights: Tensor
    means: Tensor
    covariances: Sequence[Covariance]
    classes: Tensor | None = None
    log_likelihood: list[float] = field(default_factory=list)


def fit_mixture(
    data: Data,
    n_components: int | None = None,
    rank: int | float | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    shrinkage: str = "cv",
    *,
    groups: Tensor | None = None,
    tail: str = "mean",
    mirror: bool = False,
    select: str | None = None,
    em_steps: int = 0,
) -> MixtureFit:
    """Fits a mixture to clusters or classes.

    Args:
        data: (N, *event_shape), or an iterable of batches, which is read into memory for clusters. For
            classes, an iterable of (images, labels) batches is read once, batch by batch.
        n_components: number of k-means clusters; fewer come out where clusters have a single sample.
        rank: axes to keep for each component, at most, or the share of its variance to explain.
        seed: random state of the clustering.
        labels: integer classes (N,), in place of `n_components`: one component a class.
        shrinkage: of each component's eigenvalues, as in `fit_covariance`.
        groups: integers (N,): cross-validation keeps the samples of a group together.
        tail: "mean" or "zero", as in `fit_covariance`.
        mirror: fit to mirror images, too.
        select: "heldout" chooses rank and shrinkage of each component.
        em_steps: steps of expectation maximisation from the clusters; classes take none, whose components
            would leave them. With shrinkage="none" its components are the result; otherwise each is fitted
            again to the samples that it is most responsible for.

    Returns:
        Weights, means and covariances of the components.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if not exactly one of `n_components` and classes is given, they do not fit the data, a
            class has fewer than two samples, `em_steps` come with `labels`, a share with `select` or
            `em_steps`, for a DataLoader that shuffles, with groups or labels, or as in `fit_covariance`.

    Example:
        >>> data, labels = torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
        >>> fitted = fit_mixture(data, labels=labels, shrinkage="none")
        >>> fitted.weights, fitted.means.flatten()
        (tensor([2., 2.]), tensor([1., 6.]))
    """
    array = isinstance(data, (Tensor, np.ndarray))
    if (n_components is None) == (labels is None) and (array or n_components is not None):
        raise ValueError(
            "expected either n_components or labels, got " + ("both" if labels is not None else "none")
        )
    if rank is not None and rank <= 0:
        raise ValueError(f"expected rank >= 1 or in (0, 1), got {rank}")
    if em_steps < 0:
        raise ValueError(f"expected em_steps >= 0, got {em_steps}")
    if em_steps and labels is not None:
        raise ValueError(
            "em_steps moves samples between components, which then are no classes: expected n_components, "
            "got labels"
        )
    check_options(shrinkage=shrinkage, tail=tail, select=select)
    if split_rank(rank)[1] is not None and (em_steps or select):
        raise ValueError(f"expected an integer rank with {'em_steps' if em_steps else 'select'}, got {rank}")
    options: dict[str, Any] = {"shrinkage": shrinkage, "tail": tail}
    if not array and n_components is None and labels is None:
        if groups is not None or select is not None or em_steps:
            raise TypeError(
                f"groups, select and em_steps need an array of samples, got {type(data).__name__}"
            )
        return _fit_stream(data, rank, mirror, options)
    if groups is not None or labels is not None:
        check_order(data)
    samples = _in_memory(data)
    if samples.ndim < 2 or not len(samples):
        raise ValueError(f"expected data of shape (N, *event_shape) with N >= 1, got {tuple(samples.shape)}")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("expected finite data, got NaN or infinite values")
    samples = samples.to(torch.promote_types(samples.dtype, torch.float32))
    labels = None if labels is None else check_labels(labels, len(samples)).to(samples.device)
    if groups is not None:
        fold_members(len(samples), 1, groups)  # refuses groups that do not fit
        groups = torch.as_tensor(groups, device="cpu")
    if mirror:
        check_mirror(samples.shape[1:])
        groups = torch.arange(len(samples)) if groups is None else groups
        samples, groups = torch.cat([samples, samples.flip(-1)]), groups.repeat(2)
        labels = None if labels is None else labels.repeat(2)
    if labels is not None:
        names, counts = torch.unique(labels, return_counts=True)
        _check_classes(names.tolist(), counts.tolist())
    clusters = kmeans_labels(samples, n_components, seed) if n_components is not None else labels
    assert clusters is not None
    history: list[float] = []
    if em_steps:
        weights, means, parts, clusters, history = _maximise(samples, clusters, rank, em_steps)
        if shrinkage == "none" and select is None:
            weights = weights.to(samples.dtype)
            kept = weights > 0  # a component may lose all of its samples
            stacked = torch.stack(means).to(samples.dtype).reshape(-1, *samples.shape[1:])
            found = [_cut(parts[k], tail).to(samples.dtype) for k in kept.nonzero()[:, 0].tolist()]
            return MixtureFit(weights[kept], stacked[kept], found, log_likelihood=history)
    return _fit_each(samples, clusters, labels, groups, rank, {**options, "select": select}, history)


def _fit_each(
    samples: Tensor,
    clusters: Tensor,
    labels: Tensor | None,
    groups: Tensor | None,
    rank: int | float | None,
    options: dict[str, Any],
    history: list[float],
) -> MixtureFit:
    """A Gaussian for each cluster."""
    names, counts = torch.unique(clusters, return_counts=True)
    means: list[Tensor] = []
    covariances: list[Covariance] = []
    for k in names.tolist():
        mine = clusters == k
        members = samples[mine]
        if _all_equal(members):
            means.append(members[0])
            covariances.append(_point(members[0]))
            continue
        own = None if groups is None else groups[mine.cpu()]
        chosen = {**options}
        if chosen["select"] and (len(members) < 4 * FOLDS or held_out(len(members), own) is None):
            log.info("too few samples or groups to hold some of component %d out: %d", k, len(members))
            chosen["select"] = None
        fitted = fit_covariance(
            members, _allowed(rank, len(members), members[0].numel()), groups=own, **chosen
        )
        means.append(fitted.mean)
        covariances.append(fitted.covariance)
    stacked = torch.stack(means)
    return MixtureFit(
        counts.to(stacked.dtype), stacked, covariances, names if labels is not None else None, history
    )


def _fit_stream(data: Data, rank: int | float | None, mirror: bool, options: dict[str, Any]) -> MixtureFit:
    """A Gaussian for each class of a stream of (images, labels)."""
    folds = FOLDS if options["shrinkage"] == "cv" else 1
    found = fit_class_moments(data, folds=folds, mirror=mirror)
    whole = [merge_all(parts) for parts in found.values()]
    counts = [moments.count for moments in whole]
    _check_classes(list(found), counts)
    weights, centres = torch.tensor(counts).to(whole[0].mean), torch.stack([m.mean for m in whole])
    within = torch.stack([m.covariance.diagonal().sum() for m in whole])
    between = (centres - weights @ centres / weights.sum()).square().sum(1)
    rounding = 1e-13 * weights @ (within + between) / weights.sum()  # what equal samples of a class leave
    fits: list[tuple[Tensor, Covariance]] = []
    for moments, parts, variance in zip(whole, found.values(), within, strict=True):
        if variance <= rounding:
            mean = moments.mean.to(moments.dtype).reshape(moments.event_shape)
            fits.append((mean, _point(mean)))
        else:
            allowed = _allowed(rank, moments.count, len(moments.mean))
            fitted = fit_moments_covariance(parts, allowed, grouped=mirror, **options)
            fits.append((fitted.mean, fitted.covariance))
    means = torch.stack([mean for mean, _ in fits])
    classes = torch.tensor(list(found), device=means.device)
    return MixtureFit(weights.to(means.dtype), means, [covariance for _, covariance in fits], classes)


def _check_classes(classes: list[int], counts: list[int]) -> None:
    single = [k for k, count in zip(classes, counts, strict=True) if count < 2]
    if single:
        raise ValueError(f"expected at least 2 samples of each class, got one of {single}")


def _allowed(rank: int | float | None, count: int, dim: int) -> int | float | None:
    size, share = split_rank(rank)
    return share if size is None else min(int(size), count - 1, dim)


def _in_memory(data: Data) -> Tensor:
    if isinstance(data, (Tensor, np.ndarray)):
        return as_tensor(data)
    parts = [batch for batch, _ in batches(data) if len(batch)]
    if not parts:
        raise ValueError("expected at least one sample, got none")
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"expected samples of one shape, got {' and '.join(map(str, sorted(shapes)))}")
    return torch.cat(parts)


def _all_equal(members: Tensor) -> bool:
    """Whether samples are one point, N(y, 0), but for rounding: what `fit_covariance` refuses."""
    rows = members.double().flatten(1)
    mean = rows.mean(0)
    return float((rows - mean).square().sum(1).mean()) <= 1e-24 * float(mean.square().sum())


def _point(mean: Tensor) -> Covariance:
    return Covariance(mean.new_zeros(mean.numel(), 0), mean.new_zeros(0), tail=0.0)


def _cut(covariance: Covariance, tail: str) -> Covariance:
    return covariance if tail == "mean" else Covariance(covariance.eigvecs, covariance.eigvals)


# Expectation maximisation -------------------------------------------------------------------------


def _maximise(
    samples: Tensor, clusters: Tensor, rank: int | float | None, steps: int
) -> tuple[Tensor, list[Tensor], list[Covariance], Tensor, list[float]]:
    """Weights (counts), means (D,), covariances, the likeliest cluster of each sample, log-likelihoods."""
    flat = samples.double().flatten(1)
    floor = FLOOR * float(flat.var(0, correction=0).mean())
    if _all_equal(flat):
        raise ValueError(f"expected data that vary, got {len(flat)} samples that are all equal")
    names, index = torch.unique(clusters, return_inverse=True)
    responsibilities = torch.nn.functional.one_hot(index, len(names)).double()
    dim = flat.shape[1]
    ranks = [min(int(rank or dim), max(int(count) - 1, 1), dim) for count in responsibilities.sum(0)]
    means = [flat[0]] * len(names)
    parts = [_point(flat[0])] * len(names)
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
