"""Images of one shape under one interface, whether in memory, in a memory map or still encoded.

Stored values stay as they are, uint8 in particular, until `to_float` maps them on the device of the batch:

    x / half - shift,    half = (high - low) / 2,    shift = (high + low) / (high - low)

takes (low, high), the stored values of black and white, to (-1, 1). For uint8 it is EDM's x / 127.5 - 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

log: logging.Logger = logging.getLogger(__name__)

Scaling = tuple[float, float] | Literal["none"]

_SAMPLE = 32  # images that are looked at to tell what the others are like
_SAMPLE_BYTES = 1 << 28  # that they may take, if they are more than two
_SLACK = 1e-4  # rounding that a range forgives, as a share of its width


class Store(Protocol):
    """What images are read from: (n,) integer indices to (n, C, H, W) stored values. A tensor is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class Found(NamedTuple):
    """What a format reads: images, integer labels if it has any, the range of its values if it is known."""

    images: Any
    labels: Tensor | None = None
    scaling: Scaling | None = None


class ImageData(Dataset[tuple[Tensor, Tensor]]):
    """A data set of N images of one shape.

    `data[i]` is image i as stored and its label (of shape (0,) where there are no labels), `data[indices]` or
    `data[start:stop:step]` a batch of them, so that a DataLoader takes single indices or, with
    `batch_size=None`, a sampler of whole batches. What it loads goes through `to_float` on its device.

    Args:
        images: (N, C, H, W), a tensor or what reads one from a tensor of indices.
        labels: N integer classes >= 0.
        name: what the data are called in messages and records.
        scaling: the stored values (low, high) that become -1 and 1, or "none" to take values as they are.
            By default (0, 255) for uint8. Floats are taken as they are if they lie in [-1, 1] and reach
            below -0.5; all others need it said.
        skipped: images that were left out because they could not be used.

    Attributes:
        event_shape: (C, H, W).
        labels: int64 (N,); None where there are none.
        scaling: how stored values become floats, such as "uint8 / 127.5 - 1".

    Raises:
        ValueError: if there is no image, a shape, label or range is not as above, or a value read later lies
            outside of the range or is not finite.

    Example:
        >>> data = ImageData(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), labels=[3, 7])
        >>> data, data.tensor().flatten()
        (ImageData(images: 2 of 1 x 1 x 1, uint8 / 127.5 - 1, 2 classes), tensor([-1.,  1.]))
    """

    def __init__(
        self,
        images: Store,
        labels: Any = None,
        *,
        name: str = "images",
        scaling: Scaling | None = None,
        skipped: int = 0,
    ) -> None:
        if len(images) == 0:
            raise ValueError(f"{name}: expected at least one image, got none")
        one = images[torch.tensor([0])].nbytes  # of large images, fewer are looked at
        sample = images[spread(len(images), _SAMPLE_BYTES // max(1, one))]
        if sample.ndim != 4 or 0 in sample.shape:
            raise ValueError(f"{name}: expected images (N, C, H, W), got {(len(images), *sample.shape[1:])}")
        self.name = name
        self.skipped = skipped
        self.event_shape: torch.Size = sample.shape[1:]
        self.labels: Tensor | None = None if labels is None else class_labels(labels, len(images), name)
        self._images = images
        self._range = value_range(sample, scaling, name)
        low, high = self._range or (-1, 1)
        self._half, self._shift = (high - low) / 2, (high + low) / (high - low)
        self.scaling: str = _formula(sample.dtype, self._half, self._shift)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(index, slice):
            index = range(len(self))[index]
        one = np.ndim(index) == 0
        indices = _as_index(cast("Sequence[int]", [index] if one else index), len(self))
        images = self.raw(indices)
        labels = torch.empty(len(images), 0).long() if self.labels is None else self.labels[indices]
        return (images[0], labels[0]) if one else (images, labels)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.event_shape))
        classes = "no labels" if self.labels is None else f"{len(self.labels.unique())} classes"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"ImageData({self.name}: {len(self)} of {shape}, {self.scaling}, {classes}{skipped})"

    def raw(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Images as stored, (n, C, H, W), uint8 in particular.

        Raises:
            IndexError: if an index is not in [-N, N).
            TypeError: if the indices are not integers.
            ValueError: if a value lies outside of the range of `scaling` or is not finite; `ImageError`, a
                kind of it, if an image file cannot be used.
        """
        index = _as_index(indices, len(self))
        images = self._images[index]
        good = self._in_range(images)
        if not bool(good.all()):
            where = int(index[~good][0])
            raise ValueError(self.complaint(where, images[~good][0]))
        return images

    def to_float(self, raw: Tensor) -> Tensor:
        """Stored values to float32 in [-1, 1], on the device of `raw`; any shape."""
        return raw.to(torch.float32) / self._half - self._shift

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order as float32 batches in [-1, 1], `size` images each but for the last.

        Raises:
            ValueError: if `size` < 1, or as `raw`.
        """
        if size < 1:
            raise ValueError(f"expected batches of at least one image, got size {size}")
        for index in torch.arange(len(self)).split(size):
            yield self.to_float(self.raw(index))

    def tensor(self) -> Tensor:
        """All images as one float32 tensor (N, C, H, W) in [-1, 1]; errors as `raw`."""
        images = torch.empty(len(self), *self.event_shape)
        start = 0
        for batch in self.batches(1024):
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> ImageData:
        """The data set of these images only, scaled as this one; errors as `raw`, for the indices."""
        index = _as_index(indices, len(self))
        return ImageData(
            Picked(self._images, index),
            None if self.labels is None else self.labels[index],
            name=self.name,
            scaling=self._range or "none",
            skipped=self.skipped,
        )

    def padded(self, pixels: int) -> ImageData:
        """The data set with a frame of black of this width around each image, scaled as this one.

        Raises:
            ValueError: if `pixels` is negative, or the range of values is not known.
        """
        if pixels < 0 or (pixels and self._range is None):
            raise ValueError(f"{self.name}: expected pixels >= 0 and a range with a black, got {pixels}")
        if not pixels:
            return self
        assert self._range is not None
        return ImageData(
            Padded(self._images, pixels, self._range[0]),
            self.labels,
            name=self.name,
            scaling=self._range,
            skipped=self.skipped,
        )

    def usable(self) -> Tensor:
        """Whether the values of each image are finite and in range, (N,), bool: reads all of them."""
        return torch.cat([self._in_range(self._images[i]) for i in torch.arange(len(self)).split(1024)])

    def complaint(self, index: int, image: Tensor | None = None) -> str:
        """What is wrong with the values of an image that is not `usable`."""
        low, high = map(float, (self._images[torch.tensor([index])] if image is None else image).aminmax())
        expected = "finite values" if self._range is None else f"values in {list(self._range)}"
        return f"{self.name}, image {index}: expected {expected}, got {low:g} to {high:g}"

    def _in_range(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8 and self._range in (None, (0, 255)):
            return torch.ones(len(images), dtype=torch.bool)
        flat = images.flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        if self._range is None:
            return torch.isfinite(low) & torch.isfinite(high)
        slack = _SLACK * (self._range[1] - self._range[0])
        return (low >= self._range[0] - slack) & (high <= self._range[1] + slack)  # False where NaN


class Picked:
    """Some images of a store, in a given order."""

    def __init__(self, images: Store, index: Tensor) -> None:
        self.images = images
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.index[index]]


class Padded:
    """Images of a store in a frame."""

    def __init__(self, images: Store, pixels: int, value: float) -> None:
        self.images = images
        self.pixels = pixels
        self.value = value

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return functional.pad(self.images[index], (self.pixels,) * 4, value=self.value)


def spread(count: int, most: int = _SAMPLE) -> Tensor:
    """Indices of up to 32, or `most`, of `count` images, the first and the last among them."""
    number = max(2, min(most, _SAMPLE))
    return torch.linspace(0, count - 1, number, dtype=torch.float64).round().long().unique()


def class_labels(labels: Any, count: int, source: str) -> Tensor:
    """`count` integers >= 0 as an int64 tensor.

    Raises:
        ValueError: if the labels are anything else.
    """
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{source}: expected {count} integer labels, one an image, "
            f"got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64)
    if count and array.min() < 0:
        where = int(array.argmin())
        raise ValueError(f"{source}: expected labels >= 0, got {array[where]} for image {where}")
    return torch.from_numpy(array)


def value_range(sample: Tensor, scaling: Scaling | None, name: str) -> tuple[float, float] | None:
    """The stored values that become -1 and 1; None to take values as they are. See `ImageData`.

    Raises:
        ValueError: if `scaling` is neither of the two, or it is needed and was not given.
    """
    if scaling == "none":
        return None
    if scaling is not None:
        # Of a caller without types it may be anything.
        pair = tuple(scaling) if isinstance(scaling, Sequence) else ()  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(pair) != 2 or not all(map(math.isfinite, pair)) or not pair[0] < pair[1]:
            raise ValueError(f'expected scaling to be (low, high), low < high, or "none", got {scaling!r}')
        return (pair[0], pair[1])
    if sample.dtype == torch.uint8:
        if int(sample.max()) <= 1:
            log.warning("%s: uint8 values of 0 and 1 are read as 0..255; did you mean scaling=(0, 1)?", name)
        return (0, 255)
    finite = sample[torch.isfinite(sample)].double()
    low, high = map(float, finite.aminmax()) if len(finite) else (math.nan, math.nan)
    if -1 - 2 * _SLACK <= low < -0.5 and high <= 1 + 2 * _SLACK:
        return (-1, 1)
    raise ValueError(
        f"{name}: expected uint8, or floats in [-1, 1] that reach below -0.5, got {_dtype(sample.dtype)} "
        f"from {low:g} to {high:g}; say which values become -1 and 1 by scaling=(low, high), such as (0, 1) "
        'or (0, 255), or scaling="none" to take them as they are'
    )


def _formula(dtype: torch.dtype, half: float, shift: float) -> str:
    scale = "" if half == 1 else f" / {half:.9g}"
    return _dtype(dtype) + scale + (f" {'-' if shift > 0 else '+'} {abs(shift):.9g}" if shift else "")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_index(indices: Sequence[int] | np.ndarray | Tensor, count: int) -> Tensor:
    index = torch.as_tensor(indices, device="cpu")
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"expected a sequence of integers, got {index.dtype} of shape {tuple(index.shape)}")
    index = index.long()
    outside = index[(index < -count) | (index >= count)]
    if len(outside):
        raise IndexError(f"expected indices of {count} images, got {int(outside[0])}")
    return index % count
