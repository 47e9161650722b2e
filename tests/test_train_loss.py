"""The training loss: which noise, which weight, and batches that are pure functions of the step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussnet import EDMPrecond
from train.augment import AugmentConfig
from train.config import Config, LossConfig
from train.configfile import load_config
from train.data import Data, batch_indices, load_data
from train.loss import Batch, denoising_loss, draw_sigma, make_batch

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
WHOLE = slice(0, 64)


class Recorder(nn.Module):
    """Returns zeros and keeps what it was asked."""

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, **extra: Tensor) -> Tensor:
        self.x, self.sigma, self.labels, self.extra = x, sigma, class_labels, extra
        return torch.zeros_like(x)


def setting(*overrides: str) -> tuple[Config, Data]:
    config = load_config(CONFIG, ["train.batch=64", *overrides])
    return config, load_data(config.data)


def batch(config: Config, data: Data, step: int = 5, share: slice = WHOLE) -> Batch:
    index = batch_indices(len(data.train), config.train.batch, step, config.seed)[share]
    return make_batch(*data.train[index], step, share, data, config)


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_noise_is_log_normal(P_mean: float, P_std: float) -> None:
    config = LossConfig(P_mean, P_std)
    log_sigma = draw_sigma(100_000, config, torch.Generator().manual_seed(0)).log().double()
    assert log_sigma.mean().item() == pytest.approx(P_mean, abs=5 * P_std / 1e5**0.5)
    assert log_sigma.std().item() == pytest.approx(P_std, rel=5 / 2e5**0.5)


@pytest.mark.parametrize("sigma_max", [0.01, 0.3, 2.0, 50.0])
def test_truncated_noise_is_the_rest_of_the_log_normal(sigma_max: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(200_000, LossConfig(sigma_max=sigma_max), generator).double()
    assert sigma.max() <= sigma_max * (1 + 1e-6)
    whole = draw_sigma(2_000_000, LossConfig(), generator).double()
    kept = whole[whole < sigma_max]
    for share in (0.1, 0.5, 0.9):
        quantile, expected = sigma.quantile(share), kept[:1_000_000].quantile(share)
        assert abs(math.log(quantile / expected)) < 0.03, share


def test_loss_is_the_weighted_error() -> None:
    config, data = setting()
    edm, asked, drawn = EDMPrecond(nn.Identity(), event_shape=(1, 8, 8)), Recorder(), batch(*setting())
    loss = denoising_loss(asked, edm, drawn)
    clean = data.train.to_float(data.train.raw(batch_indices(len(data.train), 64, 5, config.seed)))
    torch.testing.assert_close(drawn.clean, clean)
    noise = (asked.x - clean) / asked.sigma[:, None, None, None]
    torch.testing.assert_close(noise, drawn.noise, rtol=0, atol=2e-3)
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)
    # EDM's weight is 1/sigma^2 + 1/sigma_data^2, and the recorder's error is the image itself.
    weight = 1 / asked.sigma**2 + 4
    assert loss.item() == pytest.approx((weight * clean.square().mean((1, 2, 3))).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["data.xflip=true", "data.labels=true", "loss.label_dropout=0.3", "loss.sigma_max=2"],
        ["augment.p=0.5", "augment.xflip=1", "augment.scale=1", "augment.rotate_frac=1"],
    ],
    ids=["plain", "flip-labels", "augment"],
)
def test_shares_and_parts_are_slices_of_the_whole(options: list[str]) -> None:
    config, data = setting(*options)
    whole = batch(config, data)
    for share in (slice(0, 16), slice(16, 64)):
        mine = batch(config, data, share=share)
        for name in ("clean", "sigma", "noise", "class_labels", "augment_labels"):
            own, expected = getattr(mine, name), getattr(whole, name)
            assert (own is None) == (expected is None), name
            if own is not None:
                torch.testing.assert_close(own, expected[share], msg=name)
    parts = [whole.part(i, 4) for i in range(4)]
    assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
    assert torch.equal(torch.cat([part.sigma for part in parts]), whole.sigma)
    again, other = batch(config, data), batch(config, data, step=6)
    assert torch.equal(again.noise, whole.noise)
    assert not torch.equal(other.noise, whole.noise)


def test_half_of_the_images_are_mirrored() -> None:
    config, data = setting("train.batch=1024", "data.xflip=true")
    plain = batch(*setting("train.batch=1024"), share=slice(0, 1024)).clean
    flipped = batch(config, data, share=slice(0, 1024)).clean
    is_mirror = (flipped == plain.flip(-1)).flatten(1).all(1)
    is_plain = (flipped == plain).flatten(1).all(1)
    assert bool((is_mirror | is_plain).all())
    assert 0.4 < is_mirror.float().mean() < 0.6


def test_labels_are_those_of_the_images_and_dropped_at_their_rate() -> None:
    share = slice(0, 1024)
    config, data = setting("train.batch=1024", "data.labels=true", "loss.label_dropout=0.25")
    drawn = batch(config, data, share=share).class_labels
    assert drawn is not None
    _, labels = data.train[batch_indices(len(data.train), 1024, 5, config.seed)]
    kept = drawn.sum(1) > 0
    assert 0.68 < kept.float().mean() < 0.82
    assert torch.equal(drawn[kept].argmax(1), labels[kept])
    assert drawn.shape == (1024, 10)


def test_augmented_images_come_with_their_labels() -> None:
    config, data = setting("augment.p=0.5", "augment.scale=1", "augment.yflip=1")
    assert isinstance(config.augment, AugmentConfig)
    drawn, plain, asked = batch(config, data), batch(*setting()), Recorder()
    assert drawn.augment_labels is not None
    assert drawn.augment_labels.shape == (64, 2)
    untouched = (drawn.augment_labels == 0).all(1)
    assert 0.2 < untouched.float().mean() < 0.8
    assert torch.equal(drawn.clean[untouched], plain.clean[untouched])
    changed = (drawn.clean != plain.clean).flatten(1).any(1)
    assert torch.equal(changed, ~untouched)
    model: Any = EDMPrecond(nn.Identity(), event_shape=(1, 8, 8))
    denoising_loss(asked, model, drawn)
    assert torch.equal(asked.extra["augment_labels"], drawn.augment_labels)


def test_a_teacher_takes_the_place_of_the_images() -> None:
    config, data = setting()
    model = EDMPrecond(Zero(), 0.5, event_shape=(1, 8, 8))
    drawn = batch(config, data)
    x = drawn.clean + drawn.sigma[:, None, None, None] * drawn.noise

    def twice(x: Tensor, sigma: Tensor) -> Tensor:
        return 2 * x

    loss = denoising_loss(model, model, drawn, Teacher(twice))
    error = (model(x, drawn.sigma) - 2 * x).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (model.weight(drawn.sigma) * error).mean())


class Zero(nn.Module):
    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Teacher(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.function(x, sigma)
