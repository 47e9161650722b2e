"""What comes in: batches of samples of any source, their labels, and the processes that share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import (
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from tqdm import tqdm

Data = Tensor | np.ndarray | Iterable[Any]
"""Samples: (N, *event_shape), a tensor, array or memory map; or an iterable of such batches, or of tuples of
which they are the first entry, such as a DataLoader of images and labels."""

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_CHUNK = 2**25  # elements converted to float64 at a time: 256 MB


def check_labels(labels: Any, count: int) -> Tensor:
    """Integer labels (count,), from a tensor or array.

    Raises:
        TypeError: if they are neither.
        ValueError: if they are not one integer >= 0 for each sample.
    """
    if not isinstance(labels, (Tensor, np.ndarray)):
        raise TypeError(f"expected integer labels for {count} samples, got {type(labels).__name__}")
    labels = torch.as_tensor(labels)
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"expected one integer label for each of {count} samples, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()
    if count and int(labels.min()) < 0:
        raise ValueError(f"expected labels >= 0, got {int(labels.min())}")
    return labels


def check_shape(batch: Tensor, event_shape: torch.Size) -> None:
    """Raises a ValueError if the samples of a batch have another shape than those before them."""
    if batch.shape[1:] != event_shape:
        raise ValueError(
            f"expected samples of one shape, got {tuple(event_shape)} and {tuple(batch.shape[1:])}"
        )


def check_finite(batch: Tensor, start: int = 0) -> None:
    """Raises a ValueError that names the first sample with NaN or infinite values, counted from `start`."""
    if not bool(torch.isfinite(batch).all()):
        bad = int((~torch.isfinite(batch.flatten(1)).all(1)).nonzero()[0])
        raise ValueError(f"expected finite data, got NaN or infinite values in sample {start + bad}")


def check_groups(count: int, seen: int, ended: bool = True) -> None:
    """Raises a ValueError unless `count` groups are one for each of the `seen` samples of a stream so far."""
    if seen > count or (ended and seen < count):
        raise ValueError(
            f"expected as many samples as groups, {count}, got {'' if ended else 'at least '}{seen}"
        )


def check_order(data: Data) -> None:
    """Refuses a DataLoader that shuffles: which of its samples is which, nothing tells.

    Raises:
        ValueError: if it does.
    """
    if isinstance(getattr(data, "sampler", None), _SHUFFLING):
        raise ValueError(
            "expected samples in the order of their groups or labels, "
            f"got a {type(data).__name__} that shuffles"
        )


def check_mirror(event_shape: torch.Size | tuple[int, ...]) -> None:
    """Refuses to mirror vectors.

    Raises:
        ValueError: if the samples have fewer than two axes.
    """
    if len(event_shape) < 2:
        raise ValueError(f"expected images to mirror, got samples of shape {tuple(event_shape)}")


def process_rank() -> tuple[int, int]:
    """Rank and number of processes.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "all_processes=True needs an initialised torch.distributed, as `accelerate launch` and an "
            "Accelerator() provide"
        )
    return distributed.get_rank(), distributed.get_world_size()


def process_sum(x: Tensor) -> Tensor:
    """The sum of `x` over the processes; where their backend sums on GPUs alone (NCCL), by way of those."""
    backends = distributed.get_backend_config()  # such as "cuda:nccl"
    devices = [pair.split(":")[0] for pair in backends.split(",")]
    total = x.clone() if x.device.type in devices else x.to(devices[0])
    distributed.all_reduce(total)
    return total.to(x.device)


def process_cat(x: Tensor) -> Tensor:
    """The vectors (n,) of all processes one after the other, in the order of their ranks."""
    rank, world = process_rank()
    sizes = torch.zeros(world, dtype=torch.float64)
    sizes[rank] = len(x)
    sizes = process_sum(sizes).long().tolist()
    joined = x.new_zeros(sum(sizes))
    joined[sum(sizes[:rank]) :][: len(x)] = x
    return process_sum(joined)


def batches(data: Data) -> Iterator[tuple[Tensor, Any]]:
    """Batches of samples, and what came with each; arrays are cut into chunks, with None.

    A bar shows the progress of long passes on a terminal.

    Raises:
        TypeError: if a batch is neither a tensor nor an array, not of real numbers, or a data set gives
            single samples.
        ValueError: if an array has no axis of samples.
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"expected batches, got the samples of a {type(data).__name__}: use a DataLoader of it"
        )
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim < 2:
            raise ValueError(f"expected data of shape (N, *event_shape), got {tuple(data.shape)}")
        size = max(1, min(4096, _CHUNK // max(1, int(np.prod(data.shape[1:])))))
        for start in _progress(range(0, len(data), size)):
            yield as_tensor(data[start : start + size]), None
        return
    for batch in _progress(data):
        first, *rest = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
        if not isinstance(first, (Tensor, np.ndarray)):
            raise TypeError(
                f"expected batches to be tensors or arrays, or tuples that begin with one, "
                f"got {type(first).__name__}"
            )
        if first.ndim < 2:
            raise ValueError(f"expected batches of shape (n, *event_shape), got {tuple(first.shape)}")
        yield as_tensor(first), rest[0] if rest else None


def subsample(
    data: Data, count: int, labels: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """At most `count` samples, drawn without replacement, and their labels.

    Args:
        data: as everywhere in `gaussnet.fit`.
        count: how many to keep; all of them, in their order, if there are no more.
        labels: integer classes (N,), in the order of the data.
        generator: draws the samples.

    Returns:
        Samples (n, *event_shape), floating, and labels (n,) or None.

    Raises:
        TypeError: as of `batches`.
        ValueError: if there are no data, their shapes differ, the labels do not fit them, or for a DataLoader
            that shuffles, with labels.
    """
    if labels is not None:
        check_order(data)
    device = torch.device("cpu") if generator is None else generator.device
    if isinstance(data, (Tensor, np.ndarray)):
        size = len(data)
        places = torch.randperm(size, generator=generator, device=device)[:count].sort().values.cpu()
        if size <= count:
            kept = as_tensor(data)
        elif isinstance(data, Tensor):
            kept = as_tensor(data[places.to(data.device)])
        else:
            kept = as_tensor(data[places.numpy()])  # of a memory map, this alone is read
    else:
        samples: list[Tensor] = []
        slots: list[int] = []  # the place in the stream of each sample
        size = 0
        for images, _ in batches(data):
            for image in images:  # reservoir sampling: of what came so far, each has the same chance
                size += 1
                slot = size - 1
                if slot >= count:
                    slot = int(torch.randint(size, (), generator=generator, device=device))
                if samples and image.shape != samples[0].shape:
                    shapes = f"{tuple(samples[0].shape)} and {tuple(image.shape)}"
                    raise ValueError(f"expected samples of one shape, got {shapes}")
                if slot < count:
                    samples[slot : slot + 1], slots[slot : slot + 1] = [image.clone()], [size - 1]
        if not samples:
            raise ValueError("expected at least one batch of samples, got none")
        kept, places = torch.stack(samples), torch.tensor(slots)
    chosen = None
    if labels is not None:
        chosen = check_labels(labels, size)
        chosen = chosen[places.to(chosen.device)]
    return (kept if kept.is_floating_point() else kept.float()), chosen


def _progress(steps: Iterable[Any]) -> Iterable[Any]:
    return tqdm(steps, desc="moments", unit="batch", delay=5, leave=False, disable=None)


def as_tensor(batch: Tensor | np.ndarray) -> Tensor:
    """A tensor of real numbers; of NumPy arrays a copy, in native memory that PyTorch can hold.

    Raises:
        TypeError: if they are complex.
    """
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.array(batch, dtype=batch.dtype.newbyteorder("=")))
    if batch.is_complex():
        raise TypeError(f"expected real numbers, got {batch.dtype}")
    return batch.detach().byte() if batch.dtype == torch.bool else batch.detach()
