"""Steps of the optimizer: learning rate, gradients that are not finite, signals to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType

import torch
from torch import Tensor, nn


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """The rate of a step, counted from 0: a linear ramp-up, then constant."""
    return lr * min((step + 1) / max(warmup, 1), 1.0)


@torch.no_grad()
def zero_bad_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Zeroes what is not finite, and tells whether there was anything: a 0-d bool tensor."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([part.double() for part in torch._foreach_norm(gradients, torch.inf)]).amax()
    bad = ~torch.isfinite(norm)
    # On the CPU, looking costs nothing; on a GPU, it would wait for the backward pass.
    if norm.device.type != "cpu" or bool(bad):
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    return bad


class Interrupt:
    """Notes SIGTERM and SIGINT inside of its block; the loop finishes its step, saves and leaves."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)  # asked twice: leave at once
        self.signal = signal.Signals(number)
