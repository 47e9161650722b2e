"""Averages of weights, learning rate, gradients that are not finite, signals."""

import copy
import math
import os
import signal

import pytest
import torch
from torch import nn

from train.ema import EMA
from train.optim import Interrupt, learning_rate, zero_bad_gradients


def test_learning_rate_ramps_up() -> None:
    assert [learning_rate(step, 0.4, 4) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(0, 0.4, 0) == 0.4


@pytest.mark.parametrize("halflife", [100.0, 1000.0])
def test_half_of_a_weight_is_left_after_a_half_life(halflife: float) -> None:
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    average = EMA(net, halflife, rampup=None)
    nn.init.ones_(net.weight)
    for step in range(1, round(halflife) // 10 + 1):
        average.update(net, 10 * step, 10)
    assert float(average.state_dict()["weight"]) == pytest.approx(0.5, rel=1e-4)


def test_ramp_up_is_edms() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    average, expected = EMA(net, 500.0, rampup=0.05), net.weight.detach().clone()
    for step in range(1, 40):
        nn.init.normal_(net.weight)
        average.update(net, 32 * step, 32)
        beta = 0.5 ** (32 / min(500.0, 0.05 * 32 * step))
        expected = beta * expected + (1 - beta) * net.weight.detach()
    torch.testing.assert_close(average.network.weight, nn.Parameter(expected, requires_grad=False))


def test_no_half_life_is_the_network_itself() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = EMA(net, 0.0)
    net(torch.randn(8, 2)).sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    average.update(net, 8, 8)
    for name, value in net.state_dict().items():
        assert torch.equal(average.state_dict()[name], value), name
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    twin = EMA(net, 1.0)
    twin.load_state_dict(copy.deepcopy(average.state_dict()))
    assert torch.equal(twin.state_dict()["0.weight"], average.state_dict()["0.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_gradients_are_zeroed(value: float) -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1))]
    parameters[0].grad = torch.tensor([1.0, value, 3.0])
    parameters[1].grad = torch.full((2, 2), 1e30)  # large is not infinite
    assert bool(zero_bad_gradients(parameters))
    assert parameters[0].grad.tolist() == [1, 0, 3]
    assert parameters[1].grad.eq(1e30).all()
    assert not bool(zero_bad_gradients(parameters))


def test_a_signal_is_noted_once_and_obeyed_twice() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
