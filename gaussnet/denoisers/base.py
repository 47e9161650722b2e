"""Everything is a denoiser: D(x, sigma) = E[x_0 | x_0 + sigma n = x], n ~ N(0, I).

A trained network, a Gaussian, a mixture and the training set itself share this one signature, and scores,
probes, losses and samplers are written once against it. Its score is (Eq. 4)

    s(x, sigma) = grad_x log p(x; sigma) = (D(x, sigma) - x) / sigma^2.

Reference: arXiv 2412.09726, Sec. 2.1; Karras et al. 2022, arXiv 2206.00364.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gaussnet.denoisers.posterior import PosteriorCovariance, jacobian_variance
from gaussnet.fit.streams import check_labels
from gaussnet.hub import Pretrained
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    check_floating,
    expand_as_event,
    known_true,
    result_dtype,
)


class Denoiser(Pretrained, ABC):
    """Base class: maps a noisy batch and its noise level to a clean estimate of the same shape.

    All state lies in parameters and buffers. The result has the dtype of `x`, but at least float32.

    Example:
        >>> class Coin(Denoiser):  # of data that are -1 or 1
        ...     event_shape = torch.Size([1])
        ...
        ...     def forward(self, x, sigma, class_labels=None):
        ...         return torch.tanh(x / sigma**2)
        >>> Coin().score(torch.tensor([[0.5]]), sigma=1.0)  # (D - x)/sigma^2
        tensor([[-0.0379]])
    """

    @property
    @abstractmethod
    def event_shape(self) -> torch.Size:
        """Shape of one sample, such as (C, H, W)."""

    @abstractmethod
    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """The denoised estimate of `x`.

        Args:
            x: noisy samples, shape (*batch, *event_shape); networks take exactly one batch axis.
            sigma: noise level in the units of `x`: a float, a 0-d tensor or one value per sample.
            class_labels: integer classes of shape (*batch,) or one-hot rows (*batch, classes), zeros
                for no class. A denoiser without classes ignores them, as unconditional EDM networks do.

        Returns:
            Tensor of the shape of `x`.

        Raises:
            TypeError: if `x` is not a floating-point tensor.
            ValueError: if a shape does not fit, or sigma is not finite and positive.
        """

    def facts(self) -> dict[str, str]:
        shape = self.event_shape
        return {**super().facts(), "event shape": str(tuple(shape)), "dimensions": f"{shape.numel():,}"}

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """The score grad_x log p(x; sigma) of Eq. 4; arguments, result and errors as in `forward`."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = result_dtype(x)
        level = expand_as_event(as_sigma(sigma, x, batch_shape, dtype), len(self.event_shape))
        return (self(x, sigma, class_labels) - x.to(dtype)) / level**2  # Eq. 4

    def posterior_cov(
        self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None
    ) -> PosteriorCovariance:
        """The covariance of the clean image given `x`, as an operator with apply, diagonal and trace.

        Arguments and errors as in `forward`.
        """
        return PosteriorCovariance(self, x, sigma, class_labels)

    def posterior_variance(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """The variance of each pixel of the clean image given `x`, of the shape of `x`.

        Arguments and errors as in `forward`. The analytic denoisers have it in closed form; the default is
        the diagonal of the Jacobian, D Jacobian-vector products.
        """
        return jacobian_variance(self.posterior_cov(x, sigma, class_labels))


def check_samples(data: Tensor, class_labels: Tensor | None) -> Tensor | None:
    """The labels as 64-bit integers, of samples (N, *event_shape) that a denoiser can be made of.

    Raises:
        TypeError: if the samples are not floating-point.
        ValueError: if the samples are empty or not finite, or the labels are not one integer >= 0 for each.
    """
    check_floating(data=data)
    if data.ndim < 2 or data.numel() == 0:
        raise ValueError(f"expected data of shape (N, *event_shape) with N >= 1, got {tuple(data.shape)}")
    if not bool(torch.isfinite(data).all()):
        raise ValueError("expected finite data, got NaN or infinite values")
    return None if class_labels is None else check_labels(class_labels, len(data))


def class_index(class_labels: Tensor, batch_shape: tuple[int, ...], known: Tensor) -> Tensor:
    """Integer classes from integer labels of shape `batch_shape`, or from one-hot rows.

    A row of zeros, EDM's label of no class, becomes -1.

    Raises:
        ValueError: if the shape is neither, a row has several non-zero entries, or a class is not among the
            `known` ones.
    """
    if class_labels.dtype == torch.bool:
        class_labels = class_labels.long()  # rows of flags
    rows = class_labels.shape[:-1] == batch_shape and class_labels.ndim == len(batch_shape) + 1
    if class_labels.shape == batch_shape and not class_labels.is_floating_point():
        index = class_labels
    elif rows:
        index = class_labels.argmax(-1)
    else:
        raise ValueError(
            f"expected class_labels to be integers of shape {tuple(batch_shape)} or one-hot rows of shape "
            f"({', '.join([*map(str, batch_shape), 'classes'])}), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    count = (class_labels != 0).sum(-1) if rows else torch.ones_like(index)
    if rows and known_true((count > 1).any()):
        raise ValueError(
            "expected one-hot class_labels, or zeros for no class, got rows with several non-zero entries"
        )
    unknown = (index[..., None] != known).all(-1) & (count > 0)  # torch.isin has no batching rule
    if known_true(unknown.any()):
        raise ValueError(
            f"expected class_labels among {sorted(set(known.tolist()))}, "
            f"got {sorted(set(index[unknown].tolist()))}"
        )
    return torch.where(count > 0, index, -1)


def other_class(index: Tensor, known: Tensor) -> Tensor:
    """Which of the `known` classes (n,) are not those of the index; shape (*index.shape, n).

    Where the index is -1, for no class, none is: the sample is not restricted.
    """
    return (known != index[..., None]) & (index >= 0)[..., None]
