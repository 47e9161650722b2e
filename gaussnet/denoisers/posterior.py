"""The posterior covariance of a denoiser: how uncertain its estimate is, and along which images.

The Jacobian of the optimal denoiser is the covariance of the clean image given the noisy one, over s^2
(second-order Tweedie; Meng et al. 2021, arXiv 2111.04726, Eq. 7):

    Cov[x_0 | x] = s^2 dD(x, s)/dx,         E||x_0 - D||^2 = E tr Cov[x_0 | x].

So one Jacobian-vector product applies it to a vector, for every denoiser alike. For a Gaussian it is the
spectral function lam s^2/(lam + s^2), the same at every x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gaussnet.numerics import Sigma, as_sigma, check_event, expand_as_event, result_dtype

if TYPE_CHECKING:
    from gaussnet.denoisers.base import Denoiser


class PosteriorCovariance:
    """The covariance of x_0 given x = x_0 + sigma n, as an operator on images.

    It is symmetric and positive semi-definite where the denoiser is the optimal one of some data; of a
    network it is what the network implies.

    Args:
        denoiser: any denoiser that has forward-mode derivatives, as all analytic ones have. (Attention
            has none in PyTorch's fused kernels: evaluate under
            `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.)
        x: noisy samples, (B, *event_shape).
        sigma: their noise level, a number, 0-d or (B,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).

    Raises:
        TypeError: if `x` is not a floating-point tensor.
        ValueError: if a shape does not fit, or sigma is not finite and positive.

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(2), 1.0)
        >>> cov = gaussian.posterior_cov(torch.zeros(1, 2), sigma=1.0)
        >>> cov.apply(torch.ones(1, 2)), cov.trace()  # lam sigma^2/(lam + sigma^2) = 1/2 along both axes
        (tensor([[0.5000, 0.5000]]), tensor([1.]))
    """

    def __init__(
        self, denoiser: Denoiser, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None
    ) -> None:
        batch_shape = check_event(x, denoiser.event_shape, type(denoiser).__name__)
        self.denoiser = denoiser
        self.x: Tensor = x.to(result_dtype(x))
        self.sigma: Tensor = as_sigma(sigma, x, batch_shape, self.x.dtype)
        self.class_labels = class_labels

    def apply(self, v: Tensor) -> Tensor:
        """Cov[x_0 | x] v, per sample; v and the result have the shape of x.

        Raises:
            ValueError: if `v` has another shape than x.
        """
        if v.shape != self.x.shape:
            raise ValueError(f"expected v of the shape of x, {tuple(self.x.shape)}, got {tuple(v.shape)}")
        variance = expand_as_event(self.sigma**2, len(self.denoiser.event_shape))
        product = torch.func.jvp(self._denoise, (self.x,), (v.to(self.x.dtype),))
        return variance * cast(Tensor, product[1])

    def diagonal(self) -> Tensor:
        """The posterior variance of each pixel, of the shape of x.

        In closed form for analytic denoisers, by D Jacobian-vector products for others.
        """
        return self.denoiser.posterior_variance(self.x, self.sigma, self.class_labels)

    def trace(self) -> Tensor:
        """The sum of the posterior variances, the expected squared error of the estimate; (B,)."""
        return self.diagonal().flatten(-len(self.denoiser.event_shape)).sum(-1)

    def _denoise(self, x: Tensor) -> Tensor:
        return self.denoiser(x, self.sigma, self.class_labels)


def jacobian_variance(covariance: PosteriorCovariance) -> Tensor:
    """The diagonal of a posterior covariance, column by column, of the shape of x."""
    x, event_shape = covariance.x, covariance.denoiser.event_shape
    columns: list[Tensor] = []
    for k in range(event_shape.numel()):
        unit = torch.zeros(event_shape.numel(), dtype=x.dtype, device=x.device)
        unit[k] = 1
        column = covariance.apply(unit.reshape(event_shape).expand_as(x))
        columns.append(column.flatten(-len(event_shape))[..., k])
    return torch.stack(columns, -1).reshape(x.shape)
