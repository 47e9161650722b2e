"""Clusters for Gaussian mixtures: mini-batch k-means, as in Sec. A.5 of arXiv 2412.09726.

And clusters of equal samples, which have no covariance but 0.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from gaussnet.covariance import Covariance

log: logging.Logger = logging.getLogger(__name__)


def kmeans_labels(data: Tensor, n_components: int, seed: int = 0, min_count: int = 2) -> Tensor:
    """Assigns samples to clusters by scikit-learn's MiniBatchKMeans (batch size 2048).

    A cluster of fewer than `min_count` samples has no covariance: it is dissolved, and its samples go to the
    nearest of the others.

    Args:
        data: (N, *event_shape); distances are taken in float32.
        n_components: clusters to look for, 1 <= n_components <= N.
        seed: random state of the clustering.
        min_count: smallest size of a cluster that is kept.

    Returns:
        Labels 0..K-1 of shape (N,), int64, K <= n_components; every label occurs.

    Raises:
        ValueError: if there are fewer samples than clusters, or n_components < 1.

    Example:
        >>> labels = kmeans_labels(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), n_components=2)
        >>> labels.equal(torch.tensor([0, 0, 1, 1])) or labels.equal(torch.tensor([1, 1, 0, 0]))
        True
    """
    from sklearn.cluster import MiniBatchKMeans

    if not 1 <= n_components <= len(data):
        raise ValueError(f"expected 1 <= n_components <= N = {len(data)}, got {n_components}")
    flat = data.detach().flatten(1).float().cpu().numpy()
    kmeans = MiniBatchKMeans(n_components, batch_size=2048, random_state=seed, n_init="auto").fit(flat)
    distances = kmeans.transform(flat)  # (N, K)
    labels = distances.argmin(1)
    while True:
        counts = np.bincount(labels, minlength=n_components)
        small = np.flatnonzero((counts > 0) & (counts < min_count))
        if not len(small) or (counts > 0).sum() == 1:
            break
        dissolved = small[counts[small].argmin()]
        log.info("dissolving cluster %d of %d sample(s)", dissolved, counts[dissolved])
        distances[:, (counts == 0) | (np.arange(n_components) == dissolved)] = np.inf
        moved = labels == dissolved
        labels[moved] = distances[moved].argmin(1)
    _, labels = np.unique(labels, return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64)).to(data.device)


def all_equal(members: Tensor) -> bool:
    """Whether samples are one point, N(y, 0), but for rounding: what `fit_covariance` refuses."""
    rows = members.double().flatten(1)
    mean = rows.mean(0)
    return float((rows - mean).square().sum(1).mean()) <= 1e-24 * float(mean.square().sum())


def point(mean: Tensor) -> Covariance:
    """The covariance of samples that are all equal."""
    return Covariance(mean.new_zeros(mean.numel(), 0), mean.new_zeros(0), tail=0.0)
