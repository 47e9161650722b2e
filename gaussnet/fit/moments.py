"""Streamed mean and covariance in float64.

Batches are accumulated about a pilot mean m0 (the first batch's), so that no digits are lost to a large
mean: with d = x - m0, S1 = sum d and S2 = sum d d^T,

    mean = m0 + S1 / N,     scatter = S2 - S1 S1^T / N.

Two sets of moments merge exactly (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

Data = Tensor | np.ndarray | Iterable[Tensor]

_CHUNK = 4096  # samples converted to float64 at a time


@dataclass(frozen=True)
class Moments:
    """First and second moments of `count` samples.

    Attributes:
        count: N.
        mean: (D,), float64.
        scatter: sum of (x - mean)(x - mean)^T, (D, D), float64.
        event_shape: shape of one sample; D is its product.
        dtype: dtype of the data, at least float32.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    event_shape: torch.Size
    dtype: torch.dtype

    @property
    def covariance(self) -> Tensor:
        """The covariance of the samples (over N: that of their empirical distribution)."""
        return self.scatter / self.count

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            scatter=self.scatter
            + other.scatter
            + torch.outer(delta, delta) * (self.count * other.count / count),
            event_shape=self.event_shape,
            dtype=torch.promote_types(self.dtype, other.dtype),
        )


def merge_all(moments: Iterable[Moments]) -> Moments:
    """The moments of all the sets together."""
    return reduce(Moments.merge, moments)


def fold_members(count: int, folds: int, groups: Tensor | None = None) -> Tensor:
    """The fold of each of `count` samples, (N,): i % folds, or that of its group, in their order.

    Raises:
        ValueError: if `groups` is not one integer for each sample.
    """
    if groups is None:
        return torch.arange(count) % folds
    groups = torch.as_tensor(groups, device="cpu")
    if groups.shape != (count,) or groups.is_floating_point():
        raise ValueError(
            f"expected groups to be {count} integers, one a sample, "
            f"got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    _, index = torch.unique(groups, return_inverse=True)
    return index % folds


def fit_moments(data: Data, folds: int = 1, groups: Tensor | None = None) -> list[Moments]:
    """Accumulates the moments of `data` in one pass.

    Args:
        data: (N, *event_shape), a tensor or array, or an iterable of such batches.
        folds: sample i of the stream goes to fold i % folds.
        groups: or, for arrays, an integer for each sample: those of one group go to one fold.

    Returns:
        The moments of each fold that got a sample; `merge_all` makes them one.

    Raises:
        TypeError: if a batch is neither a tensor nor an array, or there are groups for an iterable.
        ValueError: if there is no sample, the shapes differ, or a value is not finite.
    """
    sums: list[_Sums] | None = None
    seen = 0
    members = None
    if groups is not None:
        if not isinstance(data, (Tensor, np.ndarray)):
            raise TypeError(f"groups need a tensor or array of samples, got {type(data).__name__}")
        members = fold_members(len(data), folds, groups)
    for batch in _batches(data):
        if sums is None:
            pilot = batch.double().flatten(1).mean(0)
            sums = [_Sums(pilot, batch.shape[1:]) for _ in range(folds)]
        if batch.shape[1:] != sums[0].event_shape:
            shapes = f"{tuple(sums[0].event_shape)} and {tuple(batch.shape[1:])}"
            raise ValueError(f"expected samples of one shape, got {shapes}")
        flat = batch.double().flatten(1)
        if not bool(torch.isfinite(flat).all()):
            bad = (~torch.isfinite(flat)).any(1).nonzero()[0].item()
            raise ValueError(f"expected finite data, got NaN or infinite values in sample {seen + bad}")
        for k, fold in enumerate(sums):
            mine = slice((k - seen) % folds, None, folds)
            fold.add(flat[mine if members is None else members[seen : seen + len(flat)] == k], batch.dtype)
        seen += len(flat)
    if sums is None:
        raise ValueError("expected at least one sample, got none")
    return [fold.moments() for fold in sums if fold.count > 0]


class _Sums:
    """Running sums about a pilot mean."""

    def __init__(self, pilot: Tensor, event_shape: torch.Size) -> None:
        self.pilot = pilot
        self.event_shape = event_shape
        self.count = 0
        self.dtype = torch.float32
        self.first = torch.zeros_like(pilot)
        self.second = pilot.new_zeros(pilot.numel(), pilot.numel())

    def add(self, flat: Tensor, dtype: torch.dtype) -> None:
        centred = flat - self.pilot
        self.count += len(flat)
        self.first += centred.sum(0)
        self.second.addmm_(centred.T, centred)
        if dtype.is_floating_point:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def moments(self) -> Moments:
        shift = self.first / self.count
        scatter = self.second - self.count * torch.outer(shift, shift)
        return Moments(self.count, self.pilot + shift, scatter, self.event_shape, self.dtype)


def _batches(data: Data) -> Iterator[Tensor]:
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim < 2:
            raise ValueError(f"expected data of shape (N, *event_shape), got {tuple(data.shape)}")
        for start in range(0, len(data), _CHUNK):
            yield torch.as_tensor(data[start : start + _CHUNK]).detach()
        return
    for batch in data:
        if not isinstance(batch, (Tensor, np.ndarray)):
            raise TypeError(f"expected batches to be tensors or arrays, got {type(batch).__name__}")
        yield from _batches(batch)
