"""PCA locality: local posteriors whose neighbourhoods come from the covariance of the data.

The best linear denoiser is the Wiener filter W = Sigma (Sigma + s^2 I)^-1. Its row i shows on which pixels
the estimate of pixel i depends: on few at low noise, on all correlated ones at high noise. The analytic model
of Lukoianov et al. ("Locality in Image Diffusion Models Emerges from Data Statistics", NeurIPS 2025, arXiv
2509.09672) restricts the delta denoiser to these. With y_1..y_N the data and t a threshold,

    W      = U diag(lam / (lam + s^2)) U^T                                                             (1)
    M_ij   = 1 where |W_ij| >= t W_ii, else 0                                                          (2)
    D(x)_i = sum_n w_n(i) y_n(i),   w_n(i) = softmax_n(-sum_j M_ij (x_j - y_nj)^2 / 2 s^2)             (3)

(numbered here). Every coordinate i, each channel of a pixel by itself, has its neighbourhood, row i of M, and
its weights. The softmax is exact, over all data. The code that the authors published
(ottogin/locality-in-diffusion-models) averages softmaxes over batches of the data instead, compares with t
times the largest |W_ij / W_ii| of the whole matrix, and gives pixel i the column i of that comparison; its
thresholds are 0.02 by default (faces), 0.005 for MNIST and FashionMNIST, and 0.05 for CIFAR-10.

All distances of a query are one product of M with the squared differences, D^2 N operations. The expansion of
the square would cost as much, and lose to cancellation what a sum without negative terms keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.patch import LocalDenoiser, LocalSum
from gaussnet.hub import build, describe


class PCALocalDenoiser(LocalDenoiser):
    """The delta denoiser of `data`, pixel by pixel, on what the Wiener filter of that pixel sees.

    Args:
        data: (N, *event_shape), N >= 1, finite.
        gaussian: the Gaussian whose Wiener filter gives the neighbourhoods, of the same event shape.
        threshold: t of (2), from 0 (everything) to 1 (hardly more than the pixel itself).
        class_labels: integer class of each sample, shape (N,): with them, `class_labels` of a call
            restrict the data to that class. The neighbourhoods remain those of all data.
        max_numel: numbers in the largest arrays of a step; more data or queries are handled in chunks.

    Raises:
        ValueError: if the data are empty or not finite, or labels, Gaussian or threshold do not fit.

    Example:
        >>> data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> apart = GaussianDenoiser.isotropic(torch.zeros(2), 1.0)  # no pixel tells of another
        >>> PCALocalDenoiser(data, apart)(torch.tensor([[0.1, 0.9]]), sigma=0.1).round(decimals=3)
        tensor([[0., 1.]])
    """

    def __init__(
        self,
        data: Tensor,
        gaussian: GaussianDenoiser,
        threshold: float = 0.02,
        class_labels: Tensor | None = None,
        max_numel: int = 2**20,
    ) -> None:
        super().__init__(data, class_labels, max_numel)
        if gaussian.event_shape != data.shape[1:]:
            raise ValueError(
                f"expected a Gaussian of the data's event shape {tuple(data.shape[1:])}, "
                f"got {tuple(gaussian.event_shape)}"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected 0 <= threshold <= 1, got {threshold}")
        self.gaussian = gaussian
        self.threshold = threshold

    @classmethod
    def fit(cls, data: Tensor, gaussian: GaussianDenoiser | None = None, **arguments: Any) -> Self:
        """Fits the Gaussian to the data, unless one is given.

        Args:
            data: (N, *event_shape).
            gaussian: of more data, say; default: `GaussianDenoiser.fit(data)`.
            **arguments: threshold, class_labels, max_numel.

        Raises:
            ValueError: as the class, or for fewer than two samples to fit.
        """
        return cls(data, GaussianDenoiser.fit(data) if gaussian is None else gaussian, **arguments)

    def neighbourhoods(self, sigma: Tensor) -> Tensor:
        """M of (2) as flags, (*shape of sigma, D, D): row i holds what coordinate i sees."""
        eye = torch.eye(self.event_shape.numel(), dtype=sigma.dtype, device=sigma.device)
        variance = sigma[..., None, None] ** 2
        wiener = self.gaussian.covariance.apply(lambda lam: lam / (lam + variance), eye)  # (1)
        diagonal = wiener.diagonal(dim1=-2, dim2=-1)[..., None]
        return wiener.abs() >= self.threshold * diagonal  # (2)

    @property
    def _grid(self) -> tuple[int, ...]:
        return (1, self.event_shape.numel())

    def _local_sum(self, level: Tensor) -> LocalSum:
        mask = self.neighbourhoods(level).to(level.dtype)
        return lambda squared: mask @ squared  # (3)

    def to_arguments(self) -> dict[str, Any]:
        return {
            "size": len(self.data),
            "labelled": self.data_labels is not None,
            "gaussian": describe(self.gaussian),
            "threshold": self.threshold,
            "max_numel": self.max_numel,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        gaussian, size = build(arguments["gaussian"]), arguments["size"]
        labels = torch.zeros(size, dtype=torch.long) if arguments["labelled"] else None
        data = torch.zeros(size, *gaussian.event_shape)
        return cls(data, gaussian, arguments["threshold"], labels, arguments["max_numel"])

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
