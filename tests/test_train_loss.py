"""The training loss: which noise, which weight."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gaussnet import EDMPrecond
from train.config import load_config
from train.data import Data, batch_indices, load_data
from train.loop import step_loss

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


class Recorder(nn.Module):
    """Returns zeros and keeps what it was asked."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.x, self.sigma = x, sigma
        return torch.zeros_like(x)


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_loss_is_the_weighted_error_at_log_normal_noise(P_mean: float, P_std: float) -> None:
    config = load_config(CONFIG, ["train.batch=4096", f"loss.P_mean={P_mean}", f"loss.P_std={P_std}"])
    data: Data = load_data(config.data)
    edm, asked, step = EDMPrecond(nn.Identity(), event_shape=(1, 8, 8)), Recorder(), 5
    loss = step_loss(asked, edm, data, config, step, Accelerator(cpu=True))

    log_sigma = asked.sigma.log().double()
    assert log_sigma.mean().item() == pytest.approx(P_mean, abs=5 * P_std / 4096**0.5)
    assert log_sigma.std().item() == pytest.approx(P_std, rel=5 / (2 * 4096) ** 0.5)
    clean = data.train[batch_indices(len(data.train), 4096, step, config.seed)]
    noise = (asked.x - clean) / asked.sigma[:, None, None, None]
    assert noise.mean().item() == pytest.approx(0, abs=5 / noise.numel() ** 0.5)
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)
    # EDM's weight is 1/sigma^2 + 1/sigma_data^2, and the recorder's error is the image itself.
    weight = 1 / asked.sigma**2 + 4
    assert loss.item() == pytest.approx((weight * clean.square().mean((1, 2, 3))).mean().item(), rel=1e-5)
