"""Far-field expansions: what any data look like from far away, in powers of Sigma / s^2.

The Gaussian's score expanded for s^2 > lam_max (arXiv 2412.09726, Eq. 27, 154-159),

    s(x, s) = (1/s^2) sum_{j < order} (-Sigma/s^2)^j (mu - x) + O((lam/s^2)^order),

is the attraction to the mean at order 1, and bends along the covariance at order 2. The score of the data set
itself, expanded about its mean with weights w_i = (1 + (x - mu)^T (y_i - mu)/s^2) / N (Eq. 25, 26), is the
same expression at order 2, with mean and covariance of the data: the mean-field expansion. As a denoiser,

    D(x, s) = x + s^2 s(x, s) = mu + [1 - sum_{j < order} (-Sigma/s^2)^j] (x - mu).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.base import Denoiser
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.hub import build, describe
from gaussnet.numerics import Sigma, result_dtype, wide_dtype


class FarFieldDenoiser(Denoiser):
    """The expansion of a Gaussian's denoiser and score in powers of Sigma / sigma^2.

    It converges where sigma^2 exceeds the largest eigenvalue, and diverges below: a probe of the far field,
    not an approximation to use in its place.

    Args:
        gaussian: the Gaussian to expand. Fitted with shrinkage="none", order 2 is the mean-field expansion
            of its data's delta denoiser, too (Eq. 26).
        order: number of terms of the score, >= 1.

    Raises:
        ValueError: if order < 1.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> FarFieldDenoiser(gaussian, order=2).score(torch.ones(1, 1), sigma=2.0)
        tensor([[-0.1875]])
    """

    def __init__(self, gaussian: GaussianDenoiser, order: int) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"expected order >= 1, got {order}")
        self.gaussian = gaussian
        self.order = order

    @property
    def event_shape(self) -> torch.Size:
        return self.gaussian.event_shape

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        shrunk = self.gaussian.filter(lambda lam, level: -self._series(lam / level**2, first=1), x, sigma)
        return (self.gaussian.mean + shrunk).to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        def negative(lam: Tensor, level: Tensor) -> Tensor:
            return -self._series(lam / level**2, first=0) / level**2  # Eq. 159

        return self.gaussian.filter(negative, x, sigma, wide_dtype(x.device)).to(result_dtype(x))

    def _series(self, ratio: Tensor, first: int) -> Tensor:
        """The sum of (-ratio)^j over first <= j < order."""
        total = torch.zeros_like(ratio)
        for j in range(first, self.order):
            total = total + (-ratio) ** j
        return total

    def to_arguments(self) -> dict[str, Any]:
        return {"gaussian": describe(self.gaussian), "order": self.order}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(build(arguments["gaussian"]), arguments["order"])

    def extra_repr(self) -> str:
        return f"order={self.order}"
