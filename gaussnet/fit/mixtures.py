"""Mixtures of Gaussians: clusters or classes, and expectation maximisation.

Components are clusters of mini-batch k-means (Sec. A.5 of arXiv 2412.09726), or classes; each is fitted as a
Gaussian of its own, to which `pooling` adds what all have in common; `maximisation` refines clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.clusters import all_equal, kmeans_labels, point
from gaussnet.fit.maximisation import maximise
from gaussnet.fit.moments import Moments, fit_class_moments, fold_members, merge_all
from gaussnet.fit.pooling import check_prior, pool
from gaussnet.fit.selection import held_out
from gaussnet.fit.shrinkage import FOLDS
from gaussnet.fit.spectrum import Fit, check_options, fit_covariance, fit_moments_covariance, split_rank
from gaussnet.fit.streams import Data, as_tensor, batches, check_labels, check_mirror, check_order

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
    prior: float = 0.0,
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
        prior: so many samples of the covariance that all components have in common, that about their own
            means, are added to the covariance of each (`gaussnet.fit.pooling`).

    Returns:
        Weights, means and covariances of the components.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if not exactly one of `n_components` and classes is given, they do not fit the data, a
            class has fewer than two samples, `em_steps` come with `labels` or a prior, a share with `select`
            or `em_steps`, for a prior that is no number >= 0, for a DataLoader that shuffles, with groups or
            labels, or as in `fit_covariance`.

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
    check_prior(prior)
    if em_steps and prior:
        raise ValueError(f"em_steps finds the likeliest covariances: expected prior=0 with them, got {prior}")
    if split_rank(rank)[1] is not None and (em_steps or select):
        raise ValueError(f"expected an integer rank with {'em_steps' if em_steps else 'select'}, got {rank}")
    options: dict[str, Any] = {"shrinkage": shrinkage, "tail": tail}
    if not array and n_components is None and labels is None:
        if groups is not None or select is not None or em_steps:
            raise TypeError(
                f"groups, select and em_steps need an array of samples, got {type(data).__name__}"
            )
        return _fit_stream(data, rank, mirror, options, prior)
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
        weights, means, parts, clusters, history = maximise(samples, clusters, rank, em_steps)
        if shrinkage == "none" and select is None:
            weights = weights.to(samples.dtype)
            kept = weights > 0  # a component may lose all of its samples
            stacked = torch.stack(means).to(samples.dtype).reshape(-1, *samples.shape[1:])
            found = [_cut(parts[k], tail).to(samples.dtype) for k in kept.nonzero()[:, 0].tolist()]
            return MixtureFit(weights[kept], stacked[kept], found, log_likelihood=history)
    options["select"] = select
    fitted = _fit_each(samples, clusters, labels, groups, rank, options, history)
    if prior:
        index = torch.unique(clusters, return_inverse=True)[1]
        about_own = samples - fitted.means.to(samples)[index]
        if not all_equal(about_own):
            within = _fit_members("all components", about_own, groups, rank, options).covariance
            return _pooled(fitted, within, prior, rank, tail)
    return fitted


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
        if all_equal(members):
            means.append(members[0])
            covariances.append(point(members[0]))
            continue
        own = None if groups is None else groups[mine.cpu()]
        fitted = _fit_members(f"component {k}", members, own, rank, options)
        means.append(fitted.mean)
        covariances.append(fitted.covariance)
    stacked = torch.stack(means)
    return MixtureFit(
        counts.to(stacked.dtype), stacked, covariances, names if labels is not None else None, history
    )


def _fit_members(
    name: str, members: Tensor, groups: Tensor | None, rank: int | float | None, options: dict[str, Any]
) -> Fit:
    if options["select"] and (len(members) < 4 * FOLDS or held_out(len(members), groups) is None):
        log.info("too few samples or groups to hold some of %s out: %d", name, len(members))
        options = {**options, "select": None}
    return fit_covariance(members, _allowed(rank, len(members), members[0].numel()), groups=groups, **options)


def _pooled(
    fitted: MixtureFit, within: Covariance, prior: float, rank: int | float | None, tail: str
) -> MixtureFit:
    pooled = pool(fitted.covariances, fitted.weights.tolist(), within, prior, rank, tail)
    return replace(fitted, covariances=pooled)


def _fit_stream(
    data: Data, rank: int | float | None, mirror: bool, options: dict[str, Any], prior: float
) -> MixtureFit:
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
            fits.append((mean, point(mean)))
        else:
            allowed = _allowed(rank, moments.count, len(moments.mean))
            fitted = fit_moments_covariance(parts, allowed, grouped=mirror, **options)
            fits.append((fitted.mean, fitted.covariance))
    means = torch.stack([mean for mean, _ in fits])
    classes = torch.tensor(list(found), device=means.device)
    fitted = MixtureFit(weights.to(means.dtype), means, [covariance for _, covariance in fits], classes)
    if not prior or bool((within <= rounding).all()):
        return fitted
    allowed = _allowed(rank, sum(counts), len(whole[0].mean))
    common = fit_moments_covariance(_about_own(found, whole), allowed, grouped=mirror, **options)
    return _pooled(fitted, common.covariance, prior, rank, options["tail"])


def _about_own(found: dict[int, list[Moments]], whole: list[Moments]) -> list[Moments]:
    """The moments of the folds of all classes together, each class about its own mean."""
    folds: dict[int, list[Moments]] = {}
    for parts, own in zip(found.values(), whole, strict=True):
        for fold, part in enumerate(parts):
            folds.setdefault(fold, []).append(replace(part, mean=part.mean - own.mean))
    return [merge_all(parts) for parts in folds.values()]


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


def _cut(covariance: Covariance, tail: str) -> Covariance:
    return covariance if tail == "mean" else Covariance(covariance.eigvecs, covariance.eigvals)
