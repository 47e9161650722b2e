"""The measured error of a base against what is known of it in closed form."""

import math
from typing import Any

import pytest
import torch
from cases import cubature, digits, held_out_digits, randn, split, tiny_unet, train_digits
from torch import Tensor

from gaussnet import BypassPrecond, GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser, MeasuredError

LEVELS = [0.02, 0.1, 0.5, 2.0, 20.0]


def fitted(denoiser: Any, heldout: Any, **options: Any) -> MeasuredError:
    generator = torch.Generator().manual_seed(0)
    return MeasuredError.fit(denoiser, heldout, generator=generator, **{"sigmas": LEVELS, **options})


def blended(denoiser: Any, x: Tensor, sigma: float, share: float) -> Tensor:
    isotropic = GaussianDenoiser.isotropic(denoiser.mean, denoiser.variance)
    return (1 - share) * denoiser(x, sigma) + share * isotropic(x, sigma)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_of_a_gaussian_on_its_own_data_it_is_the_closed_form(sigma: float, share: float) -> None:
    data = train_digits()
    gaussian = GaussianDenoiser.fit(data, shrinkage="none")
    table = fitted(gaussian, data, n_queries=20_000)
    level, w = torch.tensor(sigma, dtype=torch.float64), torch.tensor(share, dtype=torch.float64)
    measured = float(table.error(level, w, gaussian.variance))
    few = data[:100]
    x = (few + sigma * cubature()).flatten(0, 1)
    exact = (blended(gaussian, x, sigma, share) - few.repeat(128, 1, 1, 1)).square().mean()
    assert measured == pytest.approx(float(exact), rel=0.03)
    if share in (0, 1):
        lam = gaussian.covariance.eigvals if share == 0 else gaussian.variance
        bayes = float((lam * sigma**2 / (lam + sigma**2)).mean())
        assert measured == pytest.approx(bayes, rel=0.01)


def test_the_best_share_has_the_least_error() -> None:
    data = train_digits()
    gaussian, other = GaussianDenoiser.fit(data), GaussianMixtureDenoiser.fit(data, 5)
    table = fitted(gaussian, held_out_digits(), other=other)
    for sigma in LEVELS:
        level = torch.tensor(sigma, dtype=torch.float64)
        best = table.best_share(level)
        errors = [float(table.error(level, best + step, gaussian.variance)) for step in (0.0, -0.02, 0.02)]
        inside = 0.02 < best < 0.98
        assert not inside or errors[0] < min(errors[1:]), sigma
        ends = [float(table.error(level, torch.full_like(level, end), gaussian.variance)) for end in (0, 1)]
        assert errors[0] <= min(ends), sigma
        x = held_out_digits().repeat(6, 1, 1, 1)
        noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).double()
        blend = torch.lerp(gaussian(noisy, sigma), other(noisy, sigma), best)
        assert float((blend - x).square().mean()) == pytest.approx(errors[0], rel=0.03), sigma


def test_another_event_shape_of_the_other_is_refused() -> None:
    gaussian = GaussianDenoiser.fit(train_digits())
    with pytest.raises(ValueError, match=r"one event shape, got \(1, 8, 8\) and \(64,\)"):
        fitted(gaussian, held_out_digits(), other=GaussianDenoiser.fit(train_digits().flatten(1)))


@pytest.mark.parametrize("count", [5, 360])
@pytest.mark.parametrize("classes", [False, True])
def test_of_a_mixture_it_is_its_error(count: int, classes: bool) -> None:
    labels, (train, test) = digits()[1], split()
    mixture = GaussianMixtureDenoiser.fit(train_digits(), labels=labels[train])
    heldout, own = held_out_digits()[:count], labels[test][:count] if classes else None
    table = fitted(mixture, heldout, labels=own)
    for sigma in LEVELS:
        x = heldout.repeat(40, 1, 1, 1)
        x = x + sigma * torch.randn(x.shape, dtype=x.dtype)
        repeated = None if own is None else own.repeat(40)
        error = (mixture(x, sigma, repeated) - heldout.repeat(40, 1, 1, 1)).square().mean()
        level = torch.tensor(sigma, dtype=torch.float64)
        measured = table.error(level, torch.zeros_like(level), mixture.variance)
        assert float(measured) == pytest.approx(float(error), rel=0.03), sigma


def test_moments_of_a_mixture_are_those_of_its_samples() -> None:
    data = train_digits()
    mixture = GaussianMixtureDenoiser.fit(data, 7, rank=12, shrinkage="none")
    torch.testing.assert_close(mixture.mean, data.mean(0))
    expected = (data - data.mean(0)).square().mean()
    torch.testing.assert_close(mixture.variance, expected, rtol=1e-9, atol=0)


def test_it_is_saved_with_what_it_was_measured_against() -> None:
    gaussian = GaussianDenoiser.fit(train_digits())
    table = fitted(gaussian, held_out_digits(), other=MarginalDenoiser.fit(train_digits(), gaussian))
    assert MeasuredError.from_arguments(table.to_arguments()).other == table.other == "MarginalDenoiser"
    assert fitted(gaussian, held_out_digits()).other == "GaussianDenoiser"
    assert MeasuredError.from_arguments({"shape": [31, 3]}).other == ""  # written by an older version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_round_the_noise(dtype: torch.dtype) -> None:
    gaussian = GaussianDenoiser.fit(train_digits(torch.float32))
    heldout = held_out_digits().to(dtype)
    assert fitted(gaussian, heldout).values.equal(fitted(gaussian, heldout.float()).values)


def test_reproducible_with_a_generator() -> None:
    gaussian = GaussianDenoiser.fit(train_digits())
    assert fitted(gaussian, held_out_digits()).values.equal(fitted(gaussian, held_out_digits()).values)


@pytest.mark.parametrize("values", [torch.ones(2), torch.ones(2, 2), torch.full((2, 3), math.nan)])
def test_malformed_tables(values: Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite values of shape \(n, 3\)"):
        MeasuredError(torch.tensor([0.1, 1.0]), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_pixels_with_two_values_the_loss_weight_is_finite(dtype: torch.dtype) -> None:
    # At low noise, marginals make no error at all on them.
    images = torch.where(digits()[0] > 0, 1.0, -1.0).to(dtype)
    train, heldout = images[:1400], images[1400:]
    gaussian = GaussianDenoiser.fit(train)
    other = MarginalDenoiser.fit(train, gaussian)
    error = fitted(gaussian, heldout, other=other, sigmas=[0.002, 0.02, 0.2, 2.0], n_queries=400)
    model = BypassPrecond(
        tiny_unet(in_channels=3), gaussian, base="marginal", marginals=other.marginals, error=error
    ).to(dtype)
    assert float(error(0.01)[2]) == 0
    sigma = torch.logspace(-2.7, 1, 16, dtype=dtype)
    x = heldout[:16] + sigma[:, None, None, None] * randn(16, 1, 8, 8).to(dtype)
    weight = model.weight(sigma)
    isotropic = 1 / sigma**2 + 1 / model.gaussian.variance
    assert (weight <= 1.001e4 * isotropic).all()
    (weight * (model(x, sigma) - heldout[:16]).square().mean((1, 2, 3))).mean().backward()
    gradients = [p.grad for p in model.model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients) < 1e3
