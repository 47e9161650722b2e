"""The delta denoiser: the exact, memorising denoiser of a finite data set.

The data y_1..y_N, noised to level s, are an equal mixture of N(y_i, s^2 I) (arXiv 2412.09726):

    w_i(x, s) = softmax_i(-||x - y_i||^2 / 2 s^2)                                       (Eq. 11, 39)
    D(x, s)   = sum_i w_i(x, s) y_i                                                     (Eq. 10, 38)

(Eq. 11 as printed has an exponential inside the softmax, and mu_i for y_i; this is what is meant.)
It is attention over the data, computed in chunks with an online softmax, so that memory does not grow with
N. Logits reach 1e6 at low noise, so they are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.base import Denoiser, class_index
from gaussnet.numerics import Sigma, as_sigma, check_event, full_precision, result_dtype, wide_dtype


class DeltaDenoiser(Denoiser):
    """The optimal denoiser of the empirical distribution of `data`.

    Args:
        data: (N, *event_shape).
        class_labels: integer class of each sample, shape (N,): with them, `class_labels` of a call
            restrict the data to that class.
        chunk_size: number of data points handled at a time; memory grows with batch x chunk_size.

    Raises:
        ValueError: if the data are empty or not finite, or the labels do not fit them.
    """

    data: Tensor
    data_labels: Tensor | None

    def __init__(self, data: Tensor, class_labels: Tensor | None = None, chunk_size: int = 4096) -> None:
        super().__init__()
        if data.ndim < 2 or data.shape[0] == 0:
            raise ValueError(f"expected data of shape (N, *event_shape) with N >= 1, got {tuple(data.shape)}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError("expected finite data, got NaN or infinite values")
        if class_labels is not None and class_labels.shape != data.shape[:1]:
            got = tuple(class_labels.shape)
            raise ValueError(f"expected one class label for each of {len(data)} samples, got shape {got}")
        if chunk_size < 1:
            raise ValueError(f"expected chunk_size >= 1, got {chunk_size}")
        self.register_buffer("data", data)
        self.register_buffer("data_labels", class_labels)
        self.chunk_size = chunk_size

    @property
    def event_shape(self) -> torch.Size:
        return self.data.shape[1:]

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        denoised, _ = self._attend(x, sigma, class_labels)
        return denoised.reshape(x.shape).to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        denoised, _ = self._attend(x, sigma, class_labels)
        level = as_sigma(sigma, x, tuple(denoised.shape[:-1]), denoised.dtype)[..., None]
        score = (denoised - x.to(denoised.dtype).reshape(denoised.shape)) / level**2  # Eq. 10
        return score.reshape(x.shape).to(result_dtype(x))

    def log_prob(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """Log p(x; sigma) of the noised data set (Eq. 9); shape (*batch,)."""
        _, log_sum = self._attend(x, sigma, class_labels)
        level = as_sigma(sigma, x, tuple(log_sum.shape), log_sum.dtype)
        count = self._count(class_labels, tuple(log_sum.shape))
        log_norm = 0.5 * self.event_shape.numel() * torch.log(2 * math.pi * level**2)
        log_prob = log_sum - torch.log(count) - log_norm
        return log_prob.to(result_dtype(x))

    def _attend(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Online softmax over the data: the denoised (*batch, D) and the log of the summed weights."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = wide_dtype(x.device)
        variance = as_sigma(sigma, x, batch_shape, dtype)[..., None] ** 2
        flat = x.to(dtype).reshape(*batch_shape, self.event_shape.numel())
        # Distances about a common centre: the expansion then loses no digits to a large mean.
        centre = self.data[0].to(dtype).flatten()
        query = flat - centre
        labels = None
        if class_labels is not None and self.data_labels is not None:
            labels = class_index(class_labels, batch_shape, self.data_labels)
        running_max = torch.full(batch_shape, -math.inf, dtype=dtype, device=x.device)
        total = torch.zeros_like(running_max)
        weighted = torch.zeros_like(query)
        for start in range(0, len(self.data), self.chunk_size):
            keys = self.data[start : start + self.chunk_size].to(dtype).flatten(1) - centre
            with full_precision(x.device.type):
                distance2 = (query**2).sum(-1, keepdim=True) - 2 * query @ keys.mT + (keys**2).sum(-1)
                logits = -distance2.clamp_min(0) / (2 * variance)  # (*batch, chunk), Eq. 39
                if labels is not None and self.data_labels is not None:
                    other = self.data_labels[start : start + self.chunk_size] != labels[..., None]
                    logits = logits.masked_fill(other, -math.inf)
                new_max = torch.maximum(running_max, logits.amax(-1))
                # A class may have no sample in the chunks so far: keep exp(-inf - -inf) out.
                shift = torch.where(torch.isfinite(new_max), new_max, 0.0)
                decay = torch.exp(running_max - shift)
                weights = torch.exp(logits - shift[..., None])
                total = total * decay + weights.sum(-1)
                weighted = weighted * decay[..., None] + weights @ keys
                running_max = new_max
        return weighted / total[..., None] + centre, running_max + torch.log(total)

    def _count(self, class_labels: Tensor | None, batch_shape: tuple[int, ...]) -> Tensor:
        """Number of data points that each query sees."""
        if class_labels is None or self.data_labels is None:
            return self.data.new_tensor(len(self.data), dtype=wide_dtype(self.data.device))
        labels = class_index(class_labels, batch_shape, self.data_labels)
        return (self.data_labels == labels[..., None]).sum(-1).to(wide_dtype(self.data.device))

    def to_arguments(self) -> dict[str, Any]:
        return {
            "event_shape": list(self.event_shape),
            "size": len(self.data),
            "labelled": self.data_labels is not None,
            "chunk_size": self.chunk_size,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        size = arguments["size"]
        labels = torch.zeros(size, dtype=torch.long) if arguments["labelled"] else None
        return cls(torch.zeros(size, *arguments["event_shape"]), labels, arguments["chunk_size"])
