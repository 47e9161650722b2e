"""The loss of a step: EDM's weighted denoising error over log-normal noise.

    ln s ~ N(P_mean, P_std^2), given s < sigma_max,      loss = E weight(s) ||D(x_0 + s n, s) - x_0||^2 / D

In the first `gaussian_steps`, x_0 is replaced by what the Gaussian denoiser makes of the noisy image: the
network begins as a regression to the best affine denoiser (a linear warm-up).

Every random number is a pure function of (seed, step), drawn for the whole batch and sliced by process. A
resumed run therefore sees what an uninterrupted one would, and several processes train on what one process
with the same batch would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaussnet import BypassPrecond, CrossFit
from train.augment import apply, draw
from train.config import Config, LossConfig
from train.data import Data, batch_indices, generator_for


@dataclass(frozen=True)
class Batch:
    """One process's share of a step: clean images and what goes with them."""

    clean: Tensor  # (b, C, H, W)
    sigma: Tensor  # (b,)
    noise: Tensor  # as clean
    class_labels: Tensor | None = None  # (b, classes), rows of zeros where dropped
    augment_labels: Tensor | None = None
    index: Tensor | None = None  # (b,), on the CPU: which training images these are

    def part(self, index: int, parts: int) -> Batch:
        """One of several equal parts."""
        size = len(self.clean) // parts
        mine = slice(index * size, (index + 1) * size)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[mine]

        return Batch(
            self.clean[mine],
            self.sigma[mine],
            self.noise[mine],
            cut(self.class_labels),
            cut(self.augment_labels),
            cut(self.index),
        )


def draw_sigma(count: int, config: LossConfig, generator: torch.Generator) -> Tensor:
    """Noise levels (count,), float32: log-normal, truncated by the inverse of its distribution function."""
    device = generator.device
    if config.sigma_max is None:
        z = torch.randn(count, generator=generator, device=device)
    else:
        top = torch.special.ndtr(
            torch.tensor((math.log(config.sigma_max) - config.P_mean) / config.P_std).double()
        )
        u = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        z = torch.special.ndtri(u.clamp_min(1e-12) * top).float()
    return torch.exp(config.P_mean + config.P_std * z)


def make_batch(raw: Tensor, labels: Tensor, step: int, share: slice, data: Data, config: Config) -> Batch:
    """A process's share of the step's batch, from stored values that lie on its device."""
    device, count = raw.device, config.train.batch
    clean = data.train.to_float(raw)
    if config.data.xflip:
        flips = torch.rand(count, generator=generator_for(config.seed, "flip", step))[share] < 0.5
        clean = torch.where(flips.to(device, non_blocking=True)[:, None, None, None], clean.flip(-1), clean)
    augment_labels = None
    if config.augment.on():
        drawn = draw(count, config.augment, generator_for(config.seed, "augment", step))
        clean, augment_labels = apply(clean, drawn[share])
    generator = generator_for(config.seed, "noise", step, device=device)
    sigma = draw_sigma(count, config.loss, generator)
    noise = torch.randn(count, *clean.shape[1:], generator=generator, device=device)
    class_labels = data.one_hot(labels)
    if class_labels is not None and config.loss.label_dropout:
        kept = (
            torch.rand(count, generator=generator_for(config.seed, "labels", step))
            >= config.loss.label_dropout
        )
        class_labels = class_labels * kept[share].to(device, non_blocking=True)[:, None]
    index = batch_indices(len(data.train), count, step, config.seed)[share]
    return Batch(clean, sigma[share], noise[share], class_labels, augment_labels, index)


def denoising_loss(
    wrapped: nn.Module,
    model: BypassPrecond,
    batch: Batch,
    teacher: nn.Module | None = None,
    cross: CrossFit | None = None,
) -> Tensor:
    """The mean weighted error of a batch. `wrapped` is the model, as the processes share it.

    The error is to the clean images, or to what a teacher makes of the noisy ones. The closed forms are the
    model's, or those of folds without the image.
    """
    extra: dict[str, Any] = {} if batch.augment_labels is None else {"augment_labels": batch.augment_labels}
    x = batch.clean + batch.sigma[:, None, None, None] * batch.noise
    if cross is not None:
        assert batch.index is not None
        extra["closed_forms"] = cross(x, batch.sigma, batch.index, batch.class_labels)
    denoised = wrapped(x, batch.sigma, batch.class_labels, **extra)
    target = batch.clean if teacher is None else teacher(x, batch.sigma).detach()
    error = (denoised - target).square().flatten(1).mean(1)
    return (model.weight(batch.sigma) * error).mean()
