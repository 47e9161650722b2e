"""Data sets, their held-out split, and the order in which training sees them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gaussnet import ImageData, open_images
from gaussnet.data.arrays import MappedArray
from train.config import ConfigError, DataConfig
from train.writing import RunError

IN_MEMORY = 4 << 30  # bytes of float32 up to which a data set is fitted as one tensor


@dataclass(frozen=True)
class Data:
    """Images to train on, and those that training never sees. Stored values; `to_float` maps them."""

    train: ImageData
    heldout: ImageData
    n_classes: int = 0  # of a class-conditional model
    groups: Tensor | None = None  # (N,) of the images to train on: variants of one image share a number

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.event_shape
        return channels, height, width

    @cached_property
    def classes(self) -> Tensor:
        """The classes of the images to train on, in order; one, 0, without labels."""
        return (
            self.train.labels.unique()
            if self.n_classes and self.train.labels is not None
            else torch.zeros(1).long()
        )

    def one_hot(self, labels: Tensor) -> Tensor | None:
        """Rows (B, n_classes), float32, for a class-conditional model; else None."""
        if not self.n_classes:
            return None
        return torch.nn.functional.one_hot(labels, self.n_classes).float()


def load_data(config: DataConfig) -> Data:
    """Opens a data set and splits it at random, by a fixed seed; no group is on both sides.

    Raises:
        ConfigError: if it or its groups cannot be opened, it has no labels where they are asked for, or the
            split leaves a side empty.
    """
    scaling = config.scaling if isinstance(config.scaling, str | None) else tuple(config.scaling)
    options = {name: getattr(config, name) for name in ("layout", "mode", "resolution", "split", "root")}
    try:
        images = open_images(
            config.source, scaling=cast(Any, scaling), on_error=cast(Any, config.on_error), **options
        )
        images = images.padded(config.pad)
        if images.raw([0]).is_floating_point():  # of all, and now, rather than at step 10,000
            bad = (~images.usable()).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(f"{images.complaint(bad[0])}, one of {len(bad)} such images")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"data.source: {error}") from error
    if config.labels and images.labels is None:
        raise ConfigError(f"data.labels: expected a source with labels, got {images}")
    generator = generator_for(config.split_seed, "split")
    groups = None if config.groups is None else load_groups(config.groups, len(images))
    if groups is None:
        order = torch.randperm(len(images), generator=generator)
    else:
        names, place = groups.unique(return_inverse=True)
        order = torch.randperm(len(names), generator=generator)[place].argsort(stable=True)
    count = round(config.heldout if config.heldout >= 1 else len(images) * config.heldout)
    if groups is not None and 0 < count < len(images):  # up to the end of the last group that is begun
        count = 1 + int((groups[order] == groups[order[count - 1]]).nonzero().max())
    if not 0 < count < len(images):
        raise ConfigError(
            f"data.heldout: expected images on both sides, got {count} held out: {config.heldout} of "
            f"{len(images)}"
        )
    classes = int(images.labels.max()) + 1 if config.labels and images.labels is not None else 0
    train = order[count:]
    return Data(
        images.subset(train),
        images.subset(order[:count]),
        classes,
        None if groups is None else groups[train],
    )


def load_groups(path: str, count: int) -> Tensor:
    """Group numbers (count,) of all images.

    Raises:
        ConfigError: if the file does not hold them.
    """
    try:
        groups = MappedArray(Path(path)).array
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.groups: {error}") from error
    if groups.shape != (count,) or groups.dtype.kind not in "iu":
        got = f"{groups.dtype} of shape {groups.shape}"
        raise ConfigError(f"data.groups: expected {count} integers in {path}, one an image, got {got}")
    return torch.from_numpy(groups.astype(np.int64))


def fit_source(images: ImageData, rank: int = 0, world: int = 1) -> Any:
    """A process's share of the images as float32, for the fits: a tensor, or batches of very many."""
    share = images.subset(torch.arange(rank, len(images), world)) if world > 1 else images
    if len(share) * share.event_shape.numel() * 4 <= IN_MEMORY:
        with reading():
            return share.tensor()
    return _Batches(share)


class _Batches:
    """Batches of all images, from the first at every pass."""

    def __init__(self, images: ImageData) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        with reading():
            yield from self.images.batches(1024)


@contextmanager
def reading(when: str = "") -> Iterator[None]:
    """Ends the run where images cannot be read, which the process that has it tells.

    Raises:
        RunError: instead of ValueError and OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(f"data.source: {when}{str(error).strip().splitlines()[-1]}") from error


def generator_for(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a pure function of a seed and a key, such as ("noise", step).

    With it, a resumed run draws what an uninterrupted one would.
    """
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Indices of the step's samples in an endless stream of shuffled epochs: a pure function of the step."""
    start, parts = step * batch, []
    end = start + batch
    while start < end:
        epoch, offset = divmod(start, count)
        part = _shuffled(count, seed, epoch)[offset : offset + end - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, "epoch", epoch))


@dataclass(frozen=True)
class StepSampler:
    """Indices of one process's share of each step's batch, from a step on: a sampler for DataLoader."""

    count: int
    batch: int
    seed: int
    first: int
    steps: int
    share: slice

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.first, self.steps):
            yield batch_indices(self.count, self.batch, step, self.seed)[self.share]

    def __len__(self) -> int:
        return self.steps - self.first


def loader(
    images: ImageData, sampler: StepSampler, workers: int, pin: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of stored values and labels in the sampler's order, read ahead by worker processes."""
    ahead: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": own_group} if workers else {}
    if workers and sys.platform == "linux":
        # By Python 3.14's default a server forks them: a signal to the group ends it, and they end with it.
        ahead["multiprocessing_context"] = "fork"
    return DataLoader(images, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin, **ahead)


def own_group(_: int) -> None:
    """A signal to the whole group, by a launcher or Ctrl-C, is not for a worker: the run ends it in time."""
    os.setpgrp()
