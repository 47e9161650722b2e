"""Samples and features as the metrics take them: tensors, arrays or iterables of batches, all finite."""

from __future__ import annotations

import torch
from torch import Tensor

from gaussnet.fit import Data
from gaussnet.fit.streams import batches, check_finite


def collect(data: Data) -> Tensor:
    """All samples of a source as one tensor (N, *event_shape), for what cannot be streamed.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if there is no sample, they differ in shape, or one is not finite.
    """
    parts: list[Tensor] = []
    seen = 0
    for batch, _ in batches(data):
        if parts and batch.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"expected samples of one shape, got {tuple(parts[0].shape[1:])} and {tuple(batch.shape[1:])}"
            )
        check_finite(batch, seen)
        parts.append(batch)
        seen += len(batch)
    if not seen:
        raise ValueError("expected at least one sample, got none")
    return torch.cat(parts)


def collect_features(data: Data, like: Tensor | None = None) -> Tensor:
    """All features (N, F) of a source; F as of `like`, (..., F).

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: as `collect`, or if they are not of such a shape.
    """
    features = collect(data)
    if features.ndim != 2:
        raise ValueError(f"expected features of shape (N, F), got {tuple(features.shape)}")
    if like is not None and features.shape[1] != like.shape[-1]:
        raise ValueError(f"expected features of one length, got {like.shape[-1]} and {features.shape[1]}")
    return features


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) of grey or RGB ones (B, 1 or 3, H, W), as a view.

    Raises:
        ValueError: if they are of another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected grey or RGB images (B, 1 or 3, H, W), got {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def permutation(count: int, generator: torch.Generator | None = None) -> Tensor:
    """A random order of `count` samples, (count,), on the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=device).cpu()


def resampled(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """As many samples, drawn with replacement."""
    device = "cpu" if generator is None else generator.device
    return x[torch.randint(len(x), (len(x),), generator=generator, device=device).to(x.device)]
