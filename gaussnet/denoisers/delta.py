"""The delta denoiser: the exact, memorising denoiser of a finite data set.

The data y_1..y_N, noised to level s, are an equal mixture of N(y_i, s^2 I) (arXiv 2412.09726):

    w_i(x, s) = softmax_i(-||x - y_i||^2 / 2 s^2)                                       (Eq. 11, 39)
    D(x, s)   = sum_i w_i(x, s) y_i                                                     (Eq. 10, 38)

(Eq. 11 as printed has an exponential inside the softmax, and mu_i for y_i; this is what is meant.)
It is attention over the data, computed in chunks with an online softmax, so that memory does not grow with
N. Logits reach 1e6 at low noise. Scores and densities are therefore computed in float64. The denoised image
of float32 data needs only the differences between the largest logits: its products are in float32, and the
nearest few points of each chunk are scored again by direct differences in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from gaussnet.denoisers.base import Denoiser, check_samples, class_index, other_class
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    compute_dtype,
    full_precision,
    pick,
    result_dtype,
    wide_dtype,
)

_RESCORED = 4  # points of each chunk that get exact logits
_CHUNK = 2**23  # elements of a chunk's arrays: 32 MB in float32


class _Attention(NamedTuple):
    """Mean and variance (*batch, D) of the data under their weights, and the log of the summed weights."""

    mean: Tensor
    variance: Tensor
    log_sum: Tensor


class DeltaDenoiser(Denoiser):
    """The optimal denoiser of the empirical distribution of `data`.

    Args:
        data: (N, *event_shape), N >= 1, floating and finite.
        class_labels: integer class >= 0 of each sample, shape (N,): with them, `class_labels` of a call
            restrict the data to that class.
        chunk_size: number of data points handled at a time; memory grows with (batch + D) x chunk_size.
            Default: what makes up 32 MB.

    Raises:
        TypeError: if the data are not floating-point.
        ValueError: if the data are empty or not finite, the labels do not fit them, or chunk_size < 1.

    Example:
        >>> delta = DeltaDenoiser(torch.tensor([[-1.0], [1.0]]))
        >>> delta(torch.tensor([[0.5]]), sigma=1.0)  # tanh(0.5)
        tensor([[0.4621]])
    """

    data: Tensor
    data_labels: Tensor | None

    def __init__(
        self, data: Tensor, class_labels: Tensor | None = None, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        class_labels = check_samples(data, class_labels)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"expected chunk_size >= 1, got {chunk_size}")
        self.register_buffer("data", data)
        self.register_buffer("data_labels", class_labels)
        self.chunk_size = chunk_size

    @property
    def event_shape(self) -> torch.Size:
        return self.data.shape[1:]

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        denoised = self._attend(x, sigma, class_labels, compute_dtype(x, self.data)).mean
        return denoised.reshape(x.shape).to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        denoised = self._attend(x, sigma, class_labels, wide_dtype(x.device)).mean
        level = as_sigma(sigma, x, tuple(denoised.shape[:-1]), denoised.dtype)[..., None]
        score = (denoised - x.to(denoised.dtype).reshape(denoised.shape)) / level**2  # Eq. 10
        return score.reshape(x.shape).to(result_dtype(x))

    def posterior_variance(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        variance = self._attend(x, sigma, class_labels, wide_dtype(x.device), squares=True).variance
        return variance.reshape(x.shape).to(result_dtype(x))

    def log_prob(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """Log p(x; sigma) of the noised data set (Eq. 9), (*batch,); arguments and errors as in `forward`."""
        log_sum = self._attend(x, sigma, class_labels, wide_dtype(x.device)).log_sum
        level = as_sigma(sigma, x, tuple(log_sum.shape), log_sum.dtype)
        count = self._count(class_labels, tuple(log_sum.shape))
        log_norm = 0.5 * self.event_shape.numel() * torch.log(2 * math.pi * level**2)
        log_prob = log_sum - torch.log(count) - log_norm
        return log_prob.to(result_dtype(x))

    def _attend(
        self, x: Tensor, sigma: Sigma, class_labels: Tensor | None, dtype: torch.dtype, squares: bool = False
    ) -> _Attention:
        """Online softmax over the data, with products in `dtype`; `squares` asks for the variance, too."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dim, wide = self.event_shape.numel(), wide_dtype(x.device)
        variance = as_sigma(sigma, x, batch_shape, wide)[..., None] ** 2
        flat = x.to(wide).reshape(*batch_shape, dim)
        chunk_size = self.chunk_size or max(1, _CHUNK // max(dim, flat[..., 0].numel()))
        data = self.data.flatten(1)
        # Distances about a common centre: the expansion then loses no digits to a large mean.
        centre = data[:chunk_size].to(wide).mean(0)
        query = flat - centre
        labels = None
        if class_labels is not None and self.data_labels is not None:
            labels = class_index(class_labels, batch_shape, self.data_labels)
        # Weights of e^-60 (float32) are nothing; much smaller ones become denormal numbers, which are slow.
        least = 0.7 * math.log(torch.finfo(dtype).tiny)
        # -||x - y||^2/2 = <x - c, y - c> - ||y - c||^2/2 - ||x - c||^2/2: the last is the same for all y.
        common = 0.5 * (query**2).sum(-1)
        best = torch.full(batch_shape, -math.inf, dtype=wide, device=x.device)
        total = torch.zeros(batch_shape, dtype=dtype, device=x.device)
        first = torch.zeros(*batch_shape, dim, dtype=dtype, device=x.device)
        second = torch.zeros_like(first)
        precision = (1 / variance).to(dtype)
        # Used again for each chunk: new arrays of this size cost time. Gradients need them all.
        memory = None
        if dtype == data.dtype and not (flat.requires_grad or variance.requires_grad):
            memory = torch.empty_like(data[:chunk_size])
        for start in range(0, len(data), chunk_size):
            chunk = data[start : start + chunk_size]
            keys = torch.sub(chunk, centre.to(dtype), out=None if memory is None else memory[: len(chunk)])
            half = 0.5 * torch.linalg.vector_norm(keys, dim=1) ** 2
            with full_precision(x.device.type):
                gains = functional.linear(query.to(dtype), keys, -half)  # (*batch, chunk)
            other = None
            if labels is not None and self.data_labels is not None:
                other = other_class(labels, self.data_labels[start : start + chunk_size])
                gains = gains.masked_fill(other, -math.inf)
            nearest = exact = None
            if dtype == wide:
                largest = gains.amax(-1)
            else:
                top, nearest = gains.topk(min(_RESCORED, len(keys)), -1)
                distances = [
                    torch.linalg.vector_norm(flat - pick(chunk, i), dim=-1) for i in nearest.unbind(-1)
                ]
                exact = common[..., None] - 0.5 * torch.stack(distances, -1) ** 2
                exact = exact.masked_fill(top == -math.inf, -math.inf)
                largest = exact.amax(-1)
            new_best = torch.maximum(best, largest)
            # A class may have no sample in the chunks so far: keep exp(-inf - -inf) out.
            shift = torch.where(torch.isfinite(new_best), new_best, 0.0)[..., None]
            logits = (gains - shift.to(dtype)) * precision  # Eq. 39, relative to the largest
            weights = torch.exp(logits.clamp_min(least))
            if nearest is not None and exact is not None:
                weights = weights.scatter(-1, nearest, torch.exp((exact - shift) / variance).to(dtype))
            if other is not None:
                weights = weights.masked_fill(other, 0)
            # Before the first chunk there is nothing to decay; forward mode makes NaN of -inf.
            gap = torch.where(torch.isfinite(best), best - shift[..., 0], 0.0)
            decay = torch.exp(gap / variance[..., 0]).to(dtype)
            with full_precision(x.device.type):
                total = total * decay + weights.sum(-1)
                first = first * decay[..., None] + weights @ keys
                if squares:
                    second = second * decay[..., None] + weights @ keys**2
            best = new_best
        mean = first / total[..., None]
        return _Attention(
            mean=mean + centre.to(dtype),
            variance=(second / total[..., None] - mean**2).clamp_min(0),
            log_sum=(best - common) / variance[..., 0] + torch.log(total.to(wide)),
        )

    def _count(self, class_labels: Tensor | None, batch_shape: tuple[int, ...]) -> Tensor:
        """Number of data points that each query sees."""
        if class_labels is None or self.data_labels is None:
            return self.data.new_tensor(len(self.data), dtype=wide_dtype(self.data.device))
        labels = class_index(class_labels, batch_shape, self.data_labels)
        return (~other_class(labels, self.data_labels)).sum(-1).to(wide_dtype(self.data.device))

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
