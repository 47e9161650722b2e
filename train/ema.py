"""Exponential moving averages of a network's weights, with half-lives counted in images.

After each step of B images, with N images seen so far (Karras et al. 2022, arXiv 2206.00364, appendix F.1):

    h = min(half-life, rampup N),    w_ema <- lerp(w, w_ema, 2^(-B / h))
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """A moving average of a network.

    Args:
        network: its copy is averaged; buffers are copied at every update.
        halflife: in images; 0 for the network itself.
        rampup: no half-life exceeds this share of the images seen; None for no such limit.
    """

    def __init__(self, network: nn.Module, halflife: float, rampup: float | None = 0.05) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.halflife = halflife
        self.rampup = rampup

    @torch.no_grad()
    def update(self, network: nn.Module, seen: int, batch: int) -> None:
        """Averages in the weights after a step of `batch` images, the last of `seen`."""
        halflife = self.halflife if self.rampup is None else min(self.halflife, self.rampup * seen)
        share = 1 - 0.5 ** (batch / max(halflife, 1e-8))
        own: list[Tensor] = list(self.network.parameters())
        new: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(own, new, share)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """That of the averaged network."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the averaged network's back."""
        self.network.load_state_dict(state)
