"""Guidance between two denoisers is itself a denoiser.

    D_w(x, s) = D_uncond(x, s) + w (D_cond(x, s) - D_uncond(x, s))

w = 0 is the unconditional denoiser, w = 1 the conditional one, and w > 1 extrapolates. By Eq. 4 the scores
combine alike. This w is the guidance_scale of diffusers; Ho and Salimans count from the conditional one.

Reference: Ho and Salimans 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.base import Denoiser
from gaussnet.hub import build, describe
from gaussnet.numerics import Sigma, check_event


class GuidedDenoiser(Denoiser):
    """Extrapolates from an unconditional to a conditional denoiser.

    Args:
        cond: gets the class labels of the call.
        uncond: gets none; it may be the same object as `cond`.
        w: guidance scale, 1 for the conditional denoiser.

    Raises:
        ValueError: if the event shapes differ, or w is not finite.

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> cond = GaussianDenoiser.isotropic(torch.ones(1), 1.0)
        >>> uncond = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> GuidedDenoiser(cond, uncond, w=2.0)(torch.ones(1, 1), sigma=1.0)
        tensor([[1.5000]])
    """

    def __init__(self, cond: Denoiser, uncond: Denoiser, w: float) -> None:
        super().__init__()
        if cond.event_shape != uncond.event_shape:
            shapes = f"{tuple(cond.event_shape)} and {tuple(uncond.event_shape)}"
            raise ValueError(f"expected two denoisers of one event shape, got {shapes}")
        if not math.isfinite(w):
            raise ValueError(f"expected a finite guidance scale w, got {w}")
        self.cond = cond
        self.uncond = uncond
        self.w = w

    @property
    def event_shape(self) -> torch.Size:
        return self.cond.event_shape

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        check_event(x, self.event_shape, type(self).__name__)
        return torch.lerp(self.uncond(x, sigma), self.cond(x, sigma, class_labels), self.w)

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        check_event(x, self.event_shape, type(self).__name__)
        return torch.lerp(self.uncond.score(x, sigma), self.cond.score(x, sigma, class_labels), self.w)

    def to_arguments(self) -> dict[str, Any]:
        return {"cond": describe(self.cond), "uncond": describe(self.uncond), "w": self.w}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(build(arguments["cond"]), build(arguments["uncond"]), arguments["w"])

    def extra_repr(self) -> str:
        return f"w={self.w}"
