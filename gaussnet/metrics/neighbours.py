r"""Metrics of nearest neighbours: improved precision and recall, and memorisation.

The manifold of a set is the union of balls about all its samples, each of which reaches to its k-th neighbour
in the set. Precision is the share of generated samples within the manifold of the real ones, recall the share
of real samples within that of the generated ones. A sample is memorised if its nearest training image is
closer than a third of the distance to the second nearest.

References: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, 2019,
arXiv 1904.06991; Gu et al., On Memorization in Diffusion Models, 2023, arXiv 2310.02664, for the third.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gaussnet.fit import Data
from gaussnet.fit.streams import batches
from gaussnet.metrics.samples import check_finite, collect, collect_features

_ENTRIES = 2**24  # of a block of a distance matrix: 128 MB
_CANDIDATES = 4  # neighbours in a batch whose distances are computed again, without cancellation


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: precision measures fidelity, recall diversity.

    Attributes:
        precision: share of the generated samples within the manifold of the real ones.
        recall: share of the real samples within that of the generated ones.

    Example:
        >>> precision, recall = PrecisionRecall(precision=1.0, recall=0.6)
        >>> round(2 * precision * recall / (precision + recall), 2)  # one number of both, F1
        0.75
    """

    precision: float
    recall: float


class Memorisation(NamedTuple):
    """How near samples are to training images.

    Attributes:
        share: of the samples that are memorised.
        nearest: Euclidean distance to the nearest training image, (N,), float64.
        second: distance to the second nearest, (N,).
        where: index of the nearest training image, (N,).

    Example:
        >>> found = memorisation(torch.tensor([[0.1]]), torch.tensor([[0.0], [1.0]]))
        >>> (found.nearest / found.second).round(decimals=3)  # less than 1/3: memorised
        tensor([0.1110], dtype=torch.float64)
    """

    share: float
    nearest: Tensor
    second: Tensor
    where: Tensor


def precision_recall(real: Data, generated: Data, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of generated samples.

    Both grow with the number of samples, so that only values of equal numbers compare.

    Args:
        real: features (N, F) of the data, or an iterable of batches; all are kept in memory.
        generated: features (M, F) of the samples.
        k: neighbour that the balls reach to, 1 <= k < N, M.

    Returns:
        Both shares.

    Raises:
        TypeError: if the features are not tensors or arrays.
        ValueError: if they differ in length, or there are not more than k of each.

    Example:
        >>> real = torch.arange(10.0)[:, None]
        >>> precision_recall(real, real[:5] + 0.1, k=1)  # the upper half of the data is not generated
        PrecisionRecall(precision=1.0, recall=0.6)
    """
    x = collect_features(real)
    y = collect_features(generated, like=x).to(x.device)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(f"expected 1 <= k < min(N, M) = {min(len(x), len(y))}, got {k}")
    centre = x.double().mean(0)  # fewer digits of the distances cancel
    x, y = x.double() - centre, y.double() - centre
    return PrecisionRecall(precision=_covered(y, x, k), recall=_covered(x, y, k))


def memorisation(samples: Data, training: Data, *, ratio: float = 1 / 3) -> Memorisation:
    """The share of samples that repeat a training image, and their distances to the training images.

    A training image that occurs twice is as near as itself: its copies do not count as memorised.

    Args:
        samples: (N, *event_shape), or an iterable of batches; all are kept in memory. Images or features.
        training: (M, *event_shape), M >= 2, or an iterable of batches, read once.
        ratio: below this share of the second distance, the nearest image counts as repeated.

    Returns:
        The share, and distances and indices for each sample, on the device of the samples.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if the shapes differ, a number is not finite, ratio is not in (0, 1], or there are fewer
            than two training images.

    Example:
        >>> training = torch.tensor([[0.0], [1.0], [5.0]])
        >>> found = memorisation(torch.tensor([[0.01], [0.6]]), training)
        >>> found.share, found.where
        (0.5, tensor([0, 1]))
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"expected 0 < ratio <= 1, got {ratio}")
    collected = collect(samples)
    event_shape, x = collected.shape[1:], collected.flatten(1).double()
    centre = x.mean(0)
    best = x.new_full((len(x), 2), torch.inf)
    index = torch.full((len(x), 2), -1, device=x.device)
    seen = 0
    for batch, _ in batches(training):
        if batch.shape[1:] != event_shape:
            raise ValueError(
                f"expected training images of shape {tuple(event_shape)}, got {tuple(batch.shape[1:])}"
            )
        check_finite(batch, seen)
        y = batch.flatten(1).to(x)
        for rows in _blocks(len(x), len(y)) if len(y) else ():
            near, which = _nearest(x[rows], y, centre)
            distances = torch.cat([best[rows], near], 1)
            indices = torch.cat([index[rows], which + seen], 1)
            best[rows], order = distances.topk(2, largest=False)
            index[rows] = indices.gather(1, order)
        seen += len(y)
    if seen < 2:
        raise ValueError(f"expected at least two training images, got {seen}")
    nearest, second = best.unbind(1)
    share = float((nearest < ratio * second).double().mean())
    return Memorisation(share, nearest, second, index[:, 0])


def _nearest(x: Tensor, y: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n, c) to the c nearest of y, found by a product but measured by differences, and indices."""
    count = min(_CANDIDATES, len(y))
    which = _distances(x - centre, y - centre).topk(count, largest=False).indices
    near = torch.stack([(x - y[which[:, i]]).norm(dim=1) for i in range(count)], 1)
    return near, which


def _covered(x: Tensor, y: Tensor, k: int) -> float:
    """The share of x that lies within the balls about y."""
    radii = torch.cat(
        [_distances(y[rows], y).kthvalue(k + 1, dim=1).values for rows in _blocks(len(y), len(y))]
    )  # the nearest is the sample itself
    # Of a product: copies are not at distance 0, but at what it rounds to.
    radii = (radii.square() + 64 * torch.finfo(y.dtype).eps * y.square().sum(1).max()).sqrt()
    inside = sum(int((_distances(x[rows], y) <= radii).any(1).sum()) for rows in _blocks(len(x), len(y)))
    return inside / len(x)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (n, m), by a matrix product."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _ENTRIES // max(1, columns))
    return (slice(start, start + size) for start in range(0, rows, size))
