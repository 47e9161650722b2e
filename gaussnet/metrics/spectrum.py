r"""Are the variances of samples right, along each axis of a Gaussian and at each spatial frequency?

Along the eigenvector u_k of a GaussianDenoiser, with eigenvalue lam_k, samples of its distribution at noise
level s have

    var(u_k^T x) / (lam_k + s^2) = 1,

up to sqrt(2 / N) for N Gaussian samples. The radial power spectrum averages |x_hat|^2 (orthonormal DFT) over
channels and rings of frequencies, r - 1/2 <= |f| < r + 1/2, with f in cycles per shorter side of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.fit import Data
from gaussnet.fit.streams import batches
from gaussnet.metrics.samples import check_finite

_FLOOR = torch.finfo(torch.float32).eps  # of the largest variance: what is less counts as none


class VarianceRatio(NamedTuple):
    """Variances of samples along the axes of a Gaussian.

    Attributes:
        ratio: measured over expected, (r,), float64, in the order of the eigenvectors. Where the
            eigenvectors leave out directions (r < D), one more entry tells of the mean variance of these.
            1 where both are below 1e-7 of the largest.
        measured: variances over N - 1, of the same shape.
        expected: eigenvalues and tail plus sigma^2, of the same shape.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 4.0)
        >>> found = variance_ratio(torch.tensor([[-1.0], [1.0]]), gaussian)
        >>> found.measured.item(), found.expected.item(), found.ratio.item()
        (2.0, 4.0, 0.5)
    """

    ratio: Tensor
    measured: Tensor
    expected: Tensor


def variance_ratio(samples: Data, gaussian: GaussianDenoiser, sigma: float = 0.0) -> VarianceRatio:
    """The variance of samples along each eigenvector, over that of a Gaussian.

    Args:
        samples: (N, *event_shape), N >= 2, or an iterable of batches, read once.
        gaussian: whose axes and eigenvalues are the reference.
        sigma: noise level of the samples, in their units, >= 0.

    Returns:
        Measured over expected variances, and both.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if the samples do not fit the Gaussian, one is not finite, there are fewer than two, or
            sigma is negative or not finite.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(2), 4.0)
        >>> samples = gaussian.sample(10_000, generator=torch.Generator().manual_seed(0))
        >>> variance_ratio(samples, gaussian).ratio.round(decimals=1)  # of the tail, which all axes are here
        tensor([1.], dtype=torch.float64)
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"expected sigma to be finite and >= 0, got {sigma}")
    covariance, wide = gaussian.covariance, gaussian.mean.double()
    axes, pixels = _Variances(), _Variances()
    for batch in _finite_batches(samples):
        if batch.shape[1:] != gaussian.event_shape:
            raise ValueError(
                f"expected samples of shape {tuple(gaussian.event_shape)}, got {tuple(batch.shape[1:])}"
            )
        x = batch.flatten(1).to(wide)
        pixels.add(x)
        axes.add(covariance.to_basis(x))
    measured, expected = axes.variances(), covariance.eigvals.double()
    left = covariance.dim - covariance.rank
    if left:
        rest = (pixels.variances().sum() - measured.sum()).clamp_min(0) / left
        measured = torch.cat([measured, rest[None]])
        expected = torch.cat([expected, covariance.tail.double()[None]])
    expected = expected + sigma**2
    return VarianceRatio(_ratio(measured, expected), measured, expected)


def radial_power(images: Data) -> Tensor:
    """The radial power spectrum of images.

    Args:
        images: (N, C, H, W), or an iterable of batches, read once.

    Returns:
        Mean power in the rings r = 0, 1, ... up to the corner of the spectrum, (R,), float64. White noise of
        variance v has power v in each.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: if they are not images of one shape, one is not finite, or there is none.

    Example:
        >>> radial_power(torch.ones(1, 1, 4, 4))  # flat: all power at frequency 0
        tensor([16.,  0.,  0.,  0.], dtype=torch.float64)
    """
    total, count, shape = None, 0, None
    for batch in _finite_batches(images):
        if batch.ndim != 4 or (shape or batch.shape[1:]) != batch.shape[1:]:
            expected = "C, H, W" if shape is None else ", ".join(map(str, shape))
            raise ValueError(f"expected images (N, {expected}), got {tuple(batch.shape)}")
        shape = batch.shape[1:]
        power = torch.fft.fft2(batch.double(), norm="ortho").abs().square().mean(1).sum(0)  # (H, W)
        total, count = power if total is None else total + power, count + len(batch)
    if total is None:
        raise ValueError("expected at least one image, got none")
    rings = _rings(*total.shape).to(total.device).flatten()
    sums = total.new_zeros(int(rings.max()) + 1).index_add_(0, rings, total.flatten())
    return sums / (count * rings.bincount())


def radial_power_ratio(samples: Data, reference: Data) -> Tensor:
    """The radial power spectrum of samples over that of reference images; 1 where both have none.

    Args:
        samples: (N, C, H, W), or an iterable of batches, read once.
        reference: (M, C, H, W), or such batches.

    Returns:
        Tensor (R,), float64, for the rings of `radial_power`.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: as `radial_power`, or if the spectra differ in length.

    Example:
        >>> images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> radial_power_ratio(2 * images, images)
        tensor([4., 4., 4., 4.], dtype=torch.float64)
    """
    power, expected = radial_power(samples), radial_power(reference)
    if power.shape != expected.shape:
        raise ValueError(
            f"expected images of one size, got spectra of {len(power)} and {len(expected)} frequencies"
        )
    return _ratio(power, expected.to(power.device))


def _rings(height: int, width: int) -> Tensor:
    """The ring of each frequency, (H, W), int64."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64)
    return (min(height, width) * torch.hypot(rows, columns) + 0.5).floor().long()


def _ratio(measured: Tensor, expected: Tensor) -> Tensor:
    """The first over the second, finite: neither counts as less than a floor."""
    floor = (_FLOOR * expected.max()).clamp_min(torch.finfo(torch.float64).tiny)
    return measured.clamp_min(floor) / expected.clamp_min(floor)


class _Variances:
    """Running variances of columns, merged batch by batch (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        scatter = (rows - mean).square().sum(0)
        total = self.count + len(rows)
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + delta**2 * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def variances(self) -> Tensor:
        if self.count < 2:
            raise ValueError(f"expected at least two samples, got {self.count}")
        return self.scatter / (self.count - 1)


def _finite_batches(data: Data) -> Iterator[Tensor]:
    seen = 0
    for batch, _ in batches(data):
        if len(batch):
            check_finite(batch, seen)
            seen += len(batch)
            yield batch
