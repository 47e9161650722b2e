"""Data sets, their held-out split, and the order in which training sees them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from train.config import ConfigError, DataConfig


@dataclass(frozen=True)
class Data:
    """Images in [-1, 1], float32, (N, C, H, W): those to train on, and those that training never sees."""

    train: Tensor
    heldout: Tensor

    @property
    def event_shape(self) -> torch.Size:
        """(C, H, W)."""
        return self.train.shape[1:]


def load_data(config: DataConfig) -> Data:
    """Loads a data set and splits it at random, by a fixed seed.

    Raises:
        ConfigError: if the name is unknown, or the split leaves a side empty.
    """
    if config.name not in _LOADERS:
        raise ConfigError(f"data.name: expected one of {', '.join(_LOADERS)}, got {config.name!r}")
    images = _LOADERS[config.name]()
    order = torch.randperm(len(images), generator=generator_for(config.split_seed, "split"))
    count = round(len(images) * config.heldout)
    if not 0 < count < len(images):
        raise ConfigError(f"data.heldout: a share of {config.heldout} of {len(images)} images is {count}")
    return Data(train=images[order[count:]], heldout=images[order[:count]])


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


def _digits() -> Tensor:
    """scikit-learn's digits: 1,797 scans of 8x8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)  # (1797, 64), 0..16
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1


_LOADERS = {"digits": _digits}
