"""Streamed mean and covariance in float64.

Batches are accumulated about a pilot mean m0 (the first batch's), so that no digits are lost to a large
mean: with d = x - m0, S1 = sum d and S2 = sum d d^T,

    mean = m0 + S1 / N,     scatter = S2 - S1 S1^T / N.

Two sets of moments merge exactly (Chan, Golub and LeVeque 1983), be they of folds, classes or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from gaussnet.fit import levels
from gaussnet.fit.streams import (
    Data,
    batches,
    check_finite,
    check_groups,
    check_labels,
    check_mirror,
    check_order,
    check_shape,
    process_rank,
    process_sum,
)
from gaussnet.numerics import full_precision

_BLOCK = 128  # columns of a block of a symmetric product


@dataclass(frozen=True)
class Moments:
    """First and second moments of `count` samples.

    Attributes:
        count: N.
        mean: (D,), float64.
        scatter: sum of (x - mean)(x - mean)^T, (D, D), float64.
        event_shape: shape of one sample; D is its product.
        dtype: dtype of the data, at least float32.

    Example:
        >>> moments = fit_moments(torch.tensor([[0.0], [2.0]]))[0]
        >>> moments.count, moments.mean, moments.covariance
        (2, tensor([1.], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """

    count: int
    mean: Tensor
    scatter: Tensor
    event_shape: torch.Size
    dtype: torch.dtype

    @property
    def covariance(self) -> Tensor:
        """The covariance of the samples (over N: that of their empirical distribution), (D, D), float64."""
        return self.scatter / self.count

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together.

        Raises:
            ValueError: if their samples differ in shape.
        """
        if self.event_shape != other.event_shape:
            raise ValueError(
                f"expected samples of one shape, got {tuple(self.event_shape)} and {tuple(other.event_shape)}"
            )
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

    def mirrored(self) -> Moments:
        """The moments of the samples together with their mirror images, flipped along the last axis.

        Raises:
            ValueError: if samples are not images, but vectors.
        """
        check_mirror(self.event_shape)
        index = torch.arange(self.event_shape.numel()).reshape(self.event_shape).flip(-1).flatten()
        index = index.to(self.mean.device)
        return self.merge(replace(self, mean=self.mean[index], scatter=self.scatter[index][:, index]))

    def all_reduce(self) -> Moments:
        """The moments of the samples of all processes of `torch.distributed`, the same on each of them."""
        sums = process_sum(torch.cat([self.mean.new_tensor([float(self.count)]), self.count * self.mean]))
        mean = sums[1:] / sums[0]
        delta = self.mean - mean
        scatter = process_sum(self.scatter + self.count * torch.outer(delta, delta))
        return replace(self, count=round(float(sums[0])), mean=mean, scatter=scatter)


def merge_all(moments: Iterable[Moments]) -> Moments:
    """The moments of all the sets together.

    Args:
        moments: of sets of samples that have no sample in common.

    Returns:
        Those of their union: count, mean and scatter are exact but for rounding.

    Raises:
        TypeError: if there is none.
        ValueError: if the samples differ in shape.

    Example:
        >>> folds = fit_moments(torch.tensor([[0.0], [2.0], [4.0]]), folds=2)
        >>> [fold.count for fold in folds], merge_all(folds).mean
        ([2, 1], tensor([2.], dtype=torch.float64))
    """
    return reduce(Moments.merge, moments)


def fold_members(count: int, folds: int, groups: Tensor | None = None, all_processes: bool = False) -> Tensor:
    """The fold of each of `count` samples, (N,): i % folds, or that of its group, in their order.

    With `all_processes`, that order is one of the groups of all processes.

    Raises:
        ValueError: if `groups` is not one integer for each sample.
    """
    if groups is None:
        return torch.arange(count) % folds
    groups = torch.as_tensor(groups, device="cpu").contiguous()  # such as every second one of all
    if groups.shape != (count,) or groups.is_floating_point():
        raise ValueError(
            f"expected groups to be {count} integers, one a sample, "
            f"got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    known, index = torch.unique(groups, return_inverse=True)
    if all_processes:
        shares = [known] * distributed.get_world_size()
        distributed.all_gather_object(shares, known)
        index = torch.searchsorted(torch.cat(shares).unique(), groups)
    return index % folds


def fit_moments(
    data: Data,
    folds: int = 1,
    groups: Tensor | None = None,
    *,
    mirror: bool = False,
    all_processes: bool = False,
) -> list[Moments]:
    """Accumulates the moments of `data` in one pass.

    Args:
        data: (N, *event_shape), or an iterable of batches; see `Data`.
        folds: sample i of the stream goes to fold i % folds.
        groups: or an integer for each sample, (N,), in the order in which an iterable gives them: those of
            one group go to one fold.
        mirror: count each sample's mirror image, too.
        all_processes: sum over the processes of `torch.distributed`, of which each has its own share of the
            data, at least one sample. Where process r of R has the samples r, r + R, ..., the folds are
            those of one process.

    Returns:
        The moments of each fold that got a sample; `merge_all` makes them one.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if there is no sample, the shapes differ, a value is not finite, vectors are to be
            mirrored, or groups are not one integer a sample, or for a DataLoader that shuffles.
        RuntimeError: if `all_processes` is asked for where `torch.distributed` is not initialised.

    Example:
        >>> stream = iter([torch.zeros(1, 2), torch.ones(3, 2)])  # batches of any size, read once
        >>> moments = merge_all(fit_moments(stream))
        >>> moments.count, moments.mean
        (4, tensor([0.7500, 0.7500], dtype=torch.float64))
    """
    _check_folds(folds)
    rank, world = process_rank() if all_processes else (0, 1)
    members = None
    if groups is not None:
        check_order(data)
        # Of a stream, the end tells whether they are one a sample.
        own = data if isinstance(data, (Tensor, np.ndarray)) else torch.as_tensor(groups).flatten()
        members = fold_members(len(own), folds, groups, all_processes)

    def fold_of(start: int, batch: Tensor, labels: Any) -> Tensor:
        if mirror:
            check_mirror(batch.shape[1:])  # before a long pass, rather than after it
        if members is not None:
            check_groups(len(members), start + len(batch), ended=False)
            return members[start : start + len(batch)]
        return (rank + world * torch.arange(start, start + len(batch))) % folds

    sums = _accumulate(data, fold_of)
    if members is not None:
        check_groups(len(members), sum(part.count for part in sums.values()))
    found = [sums[k].moments() for k in sorted(sums)]
    if all_processes:
        # Every process must take part for every fold, with a share of nothing where it has no sample of it.
        zero = torch.zeros_like
        nothing = replace(found[0], count=0, mean=zero(found[0].mean), scatter=zero(found[0].scatter))
        found = [(sums[k].moments() if k in sums else nothing).all_reduce() for k in range(folds)]
        found = [moments for moments in found if moments.count]
    return [moments.mirrored() for moments in found] if mirror else found


def fit_class_moments(
    data: Data, labels: Tensor | None = None, folds: int = 1, *, mirror: bool = False
) -> dict[int, list[Moments]]:
    """Accumulates the moments of each class in one pass; of all together by `merge_all` over the classes.

    Args:
        data: an array with `labels`, or an iterable of (images, labels, ...) batches.
        labels: integer classes (N,) of an array.
        folds: the i-th sample of a class goes to fold i % folds.
        mirror: count each sample's mirror image, too.

    Returns:
        Class -> the moments of its folds, the classes in increasing order. A class takes folds x D^2 numbers.

    Raises:
        TypeError: if the labels of an array are missing, or a batch has none.
        ValueError: if the labels do not fit, or as in `fit_moments`.

    Example:
        >>> found = fit_class_moments(torch.tensor([[0.0], [2.0], [5.0]]), labels=torch.tensor([3, 3, 7]))
        >>> {k: merge_all(folds).mean.item() for k, folds in found.items()}
        {3: 1.0, 7: 5.0}
    """
    _check_folds(folds)
    array = isinstance(data, (Tensor, np.ndarray))
    if array == (labels is None):
        raise TypeError(f"expected {'labels for' if array else 'no labels beside'} a {type(data).__name__}")
    if labels is not None:
        labels = check_labels(labels, len(data))  # pyright: ignore[reportArgumentType]
    seen: dict[int, int] = {}

    def bin_of(start: int, batch: Tensor, batch_labels: Any) -> Tensor:
        if mirror:
            check_mirror(batch.shape[1:])
        if labels is not None:
            batch_labels = labels[start : start + len(batch)]
        classes = check_labels(batch_labels, len(batch)).cpu()
        index = torch.zeros_like(classes)
        for k in classes.unique().tolist():
            mine = classes == k
            index[mine] = seen.get(k, 0) + torch.arange(int(mine.sum()))
            seen[k] = seen.get(k, 0) + int(mine.sum())
        return classes * folds + index % folds

    found: dict[int, list[Moments]] = {}
    for key, sums in sorted(_accumulate(data, bin_of).items()):
        moments = sums.moments()
        found.setdefault(key // folds, []).append(moments.mirrored() if mirror else moments)
    return found


def inner(x: Tensor) -> Tensor:
    """x^T x for rows (n, D): symmetric, so that little more than half of it is computed."""
    dim = x.shape[1]
    out = x.new_empty(dim, dim)
    width = max(_BLOCK, -(-dim // 4))
    with full_precision(x.device.type):
        for start in range(0, dim, width):
            stop = min(start + width, dim)
            torch.mm(x[:, start:stop].mT, x[:, start:], out=out[start:stop, start:])
            out[stop:, start:stop] = out[start:stop, stop:].mT
    return out


def _check_folds(folds: int) -> None:
    if folds < 1:
        raise ValueError(f"expected folds >= 1, got {folds}")


def _accumulate(data: Data, bin_of: Callable[[int, Tensor, Any], Tensor]) -> dict[int, _Sums]:
    """Sums of each bin; `bin_of` gets the first sample's index, a batch and its labels."""
    sums: dict[int, _Sums] = {}
    pilot, event_shape, centred, exact, seen = None, None, None, False, 0
    for batch, labels in batches(data):
        if not len(batch):
            continue
        event_shape = event_shape or batch.shape[1:]
        check_shape(batch, event_shape)
        flat = batch.flatten(1)
        bins = bin_of(seen, batch, labels)
        for start in range(0, len(flat), levels.ROWS):
            part, part_bins = flat[start : start + levels.ROWS], bins[start : start + levels.ROWS]
            rows = levels.as_levels(part) if pilot is None or exact else None
            if pilot is None:
                exact = rows is not None
                pilot = (
                    torch.full_like(part[0], levels.ZERO, dtype=torch.float64)
                    if exact
                    else flat.double().mean(0)
                )
            if rows is None:
                if centred is None or len(centred) < len(part):
                    centred = torch.empty(part.shape, dtype=torch.float64, device=part.device)
                rows = torch.sub(part, pilot, out=centred[: len(part)])  # memory used again costs no time
                if not bool(torch.isfinite(rows.sum())):
                    check_finite(flat, seen)  # of the whole batch: the pilot has seen all of it
                rows = rows.div_(levels.STEP) if exact else rows
            for k in part_bins.unique().tolist():
                if k not in sums:
                    sums[k] = _Sums(pilot, levels.STEP if exact else 1.0, event_shape)
                mine = part_bins == k
                sums[k].add(rows if bool(mine.all()) else rows[mine.to(rows.device)], batch.dtype)
        seen += len(batch)
    if not sums:
        raise ValueError("expected at least one sample, got none")
    return sums


class _Sums:
    """Running sums of (x - pilot) / unit: of integers, if x are levels, so that equal ones cancel exactly."""

    def __init__(self, pilot: Tensor, unit: float, event_shape: torch.Size) -> None:
        self.pilot = pilot
        self.unit = unit
        self.event_shape = event_shape
        self.count = 0
        self.dtype = torch.float32
        self.first = torch.zeros_like(pilot)
        self.second = pilot.new_zeros(pilot.numel(), pilot.numel())

    def add(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second += inner(rows)
        if dtype.is_floating_point:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def moments(self) -> Moments:
        mean = self.pilot + self.unit * self.first / self.count
        second = (self.second + self.second.mT).div_(2)  # not every BLAS rounds both halves alike
        scatter = second.sub_(torch.outer(self.first, self.first).div_(self.count)).mul_(self.unit**2)
        return Moments(self.count, mean, scatter, self.event_shape, self.dtype)
