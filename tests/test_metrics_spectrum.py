"""Spectra of samples: exact on sets whose variances are known, 1 for samples of the Gaussian itself."""

import math

import pytest
import torch
from cases import COVARIANCES, DTYPES, covariance, gaussian, randn
from torch import Tensor

from gaussnet import CosineCovariance, GaussianDenoiser
from gaussnet.metrics import radial_power, radial_power_ratio, variance_ratio

EVENT = (1, 2, 3)
DIM = 6


def exact_samples(of: GaussianDenoiser, count: int = 30) -> Tensor:
    """Samples whose own covariance (over N - 1) is that of a Gaussian, and whose mean is off."""
    x = randn(count, of.covariance.dim)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / (count - 1))).mT
    return of.mean + 0.7 + of.covariance.apply(torch.sqrt, white).reshape(count, *of.event_shape)


@pytest.mark.parametrize("name", COVARIANCES)
def test_exact_samples_have_ratio_one(name: str) -> None:
    of = gaussian(name)
    x = exact_samples(of)
    for source in (x, x.numpy(), iter(x.split(7)), x.split(1)):
        found = variance_ratio(source, of)
        assert found.ratio.shape == (of.covariance.rank + (of.covariance.rank < DIM),), name
        assert found.ratio.dtype == torch.float64, name
        assert torch.allclose(found.ratio, torch.ones(()).double(), atol=1e-9), name
    stored = of.covariance.eigvals
    assert torch.allclose(found.expected[: len(stored)], stored)
    assert torch.allclose(found.measured[: len(stored)], stored)


def test_empty_batches_count_for_nothing() -> None:
    of = gaussian()
    x = exact_samples(of)
    found = variance_ratio([x[:0], x[:7], x[:0], x[7:], x[:0]], of)
    assert found.ratio.equal(variance_ratio([x[:7], x[7:]], of).ratio)
    with pytest.raises(ValueError, match="NaN or infinite values in sample 7"):
        variance_ratio([x[:0], x[:7], x[:0], x[7:] / 0], of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_variance_shows_on_its_axis_alone(dtype: torch.dtype) -> None:
    of = gaussian("low-rank")
    factors = torch.tensor([1.0, 4.0, 0.25]).double()
    wrong = covariance("low-rank")
    wrong.eigvals *= factors
    x = exact_samples(GaussianDenoiser(of.mean, wrong)).to(dtype)
    expected = torch.cat([factors, torch.ones(1)])
    assert torch.allclose(variance_ratio(x, of.to(dtype)).ratio, expected.double(), rtol=1e-4)
    wrong.tail *= 3
    x = exact_samples(GaussianDenoiser(of.mean, wrong)).to(dtype)
    expected[-1] = 3
    assert torch.allclose(variance_ratio(x, of).ratio, expected.double(), rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("name", COVARIANCES)
def test_own_samples_have_ratio_one_but_for_noise(name: str, sigma: float) -> None:
    of = gaussian(name)
    x = of.sample(20_000, sigma, generator=torch.Generator().manual_seed(1))
    found = variance_ratio(x, of, sigma)
    assert float((found.ratio - 1).abs().max()) < 5 * math.sqrt(2 / 20_000)


def test_far_from_the_origin_in_float64() -> None:
    of = gaussian()
    ratio = variance_ratio(exact_samples(of) + 1e5, of.float()).ratio
    assert torch.allclose(ratio, torch.ones(()).double(), atol=1e-5)


def test_cosine_axes() -> None:
    of = GaussianDenoiser(
        randn(2, 3, 4), CosineCovariance(randn(2, 3, 4, seed=1).square(), torch.eye(2).double())
    )
    x = exact_samples(of, 60)
    assert torch.allclose(variance_ratio(x, of).ratio, torch.ones(()).double(), atol=1e-9)


def test_directions_without_variance() -> None:
    of = gaussian("zero-tail")
    x = exact_samples(of)
    noisy = variance_ratio(x + 0.1 * randn(*x.shape, seed=3), of)
    assert bool(torch.isfinite(noisy.ratio).all())
    assert float(noisy.ratio[-1]) > 100
    still = variance_ratio(x, GaussianDenoiser.isotropic(of.mean, var=0.0))
    assert bool(torch.isfinite(still.ratio).all())


def test_samples_that_do_not_fit() -> None:
    of = gaussian()
    with pytest.raises(ValueError, match=r"samples of shape \(1, 2, 3\), got \(1, 3, 2\)"):
        variance_ratio(randn(5, 1, 3, 2), of)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        variance_ratio(randn(1, *EVENT), of)
    with pytest.raises(ValueError, match="at least two samples, got 0"):
        variance_ratio([], of)
    with pytest.raises(ValueError, match="NaN or infinite values in sample 5"):
        variance_ratio([randn(5, *EVENT), randn(1, *EVENT) / 0], of)
    for sigma in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma to be finite and >= 0"):
            variance_ratio(randn(5, *EVENT), of, sigma)


# Radial power -------------------------------------------------------------------------------------


def wave(height: int, width: int, rows: int, columns: int) -> Tensor:
    """A cosine of mean square 1/2, or 1 where it alternates: (H, W)."""
    y, x = torch.arange(height).double()[:, None], torch.arange(width).double()
    return torch.cos(2 * math.pi * (rows * y / height + columns * x / width))


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 16), (16, 8), (5, 8)], ids=str)
def test_a_wave_has_its_power_in_its_ring(size: tuple[int, int]) -> None:
    height, width = size
    for rows in range(height // 2 + 1):
        for columns in range(width // 2 + 1):
            image = wave(height, width, rows, columns).expand(3, 2, -1, -1)
            power = radial_power(image)
            radius = math.hypot(rows * min(size) / height, columns * min(size) / width)
            ring = math.floor(radius + 0.5)
            assert int(power.argmax()) == ring, (rows, columns)
            assert float(power.sum() - power[ring]) < 1e-20, (rows, columns)


@pytest.mark.parametrize("size", [(8, 8), (7, 12)], ids=str)
def test_rings_hold_all_the_power(size: tuple[int, int]) -> None:
    images = randn(6, 3, *size)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1])
    members = torch.round(min(size) * torch.hypot(rows, columns)).long().flatten().bincount()
    for source in (images, images.float(), iter(images.split(4)), images.numpy()):
        power = radial_power(source)
        assert power.dtype == torch.float64
        assert float((power * members).sum()) == pytest.approx(
            float(images.square().mean() * size[0] * size[1]), rel=1e-6
        )


def test_white_noise_has_its_variance_at_all_frequencies() -> None:
    power = radial_power(2 * randn(4000, 1, 8, 8))
    assert torch.allclose(power, torch.full_like(power, 4.0), rtol=0.15)


def test_ratio_of_spectra() -> None:
    images = randn(50, 1, 8, 8)
    assert torch.allclose(radial_power_ratio(images, images), torch.ones(()).double())
    assert torch.allclose(radial_power_ratio(3 * images, images), torch.full((), 9.0).double())
    louder = images + wave(8, 8, 2, 0)
    ratio = radial_power_ratio(louder, images)
    assert int(ratio.argmax()) == 2
    assert torch.allclose(ratio[[0, 1, 3, 4, 5, 6]], torch.ones(()).double())
    flat = torch.ones(3, 1, 8, 8)
    assert torch.allclose(radial_power_ratio(flat, flat), torch.ones(()).double()), "no power but the mean's"


def test_spectra_of_the_gaussian_itself() -> None:
    of = GaussianDenoiser(torch.zeros(1, 4, 4).double(), covariance("full", 16))
    first, second = (of.sample(20_000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert float((radial_power_ratio(first, second) - 1).abs().max()) < 0.05


def test_what_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\), got \(5, 8, 8\)"):
        radial_power(randn(5, 8, 8))
    with pytest.raises(ValueError, match=r"images \(N, 1, 8, 8\), got \(2, 1, 8, 4\)"):
        radial_power([randn(2, 1, 8, 8), randn(2, 1, 8, 4)])
    with pytest.raises(ValueError, match="at least one image"):
        radial_power([])
    with pytest.raises(ValueError, match="NaN or infinite"):
        radial_power(randn(2, 1, 8, 8) / 0)
    with pytest.raises(ValueError, match="spectra of 7 and 4 frequencies"):
        radial_power_ratio(randn(2, 1, 8, 8), randn(2, 1, 4, 4))
