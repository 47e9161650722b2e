"""The Gaussian refined by marginals, against exact posteriors, integrals and counts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    EVENT,
    SIGMAS,
    covariance,
    denoiser,
    digits,
    gaussian,
    held_out_digits,
    randn,
    relative_error,
    train_digits,
)
from scipy.integrate import quad
from torch import Tensor

from gaussnet import (
    CosineCovariance,
    Covariance,
    GaussianDenoiser,
    MarginalDenoiser,
    Marginals,
    from_pretrained,
)
from gaussnet.denoisers import pixel_marginals

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def marginals(levels: Any, widths: Any, event_shape: tuple[int, ...] = (1, 2, 3), seed: int = 0) -> Marginals:
    """Pixels with random shares of the levels, in float64."""
    log_weights = torch.log_softmax(randn(*event_shape, len(levels), seed=seed), -1)
    return Marginals(
        torch.tensor(levels, dtype=torch.float64), torch.tensor(widths, dtype=torch.float64), log_weights
    )


def stationary(size: int, mean: float) -> GaussianDenoiser:
    """All pixels have this mean and one variance."""
    lags = torch.arange(size, dtype=torch.float64)
    ring = torch.minimum(lags, size - lags)
    row = torch.exp(-ring)
    matrix = torch.stack([row.roll(shift) for shift in range(size)])
    eigvals, eigvecs = torch.linalg.eigh(matrix)
    return GaussianDenoiser(torch.full((size,), mean, dtype=torch.float64), Covariance(eigvecs, eigvals))


# The denoiser -------------------------------------------------------------------------------------


@sigmas
def test_of_gaussian_pixels_it_is_the_gaussian(sigma: float) -> None:
    base = stationary(6, 0.3)
    own = Marginals(base.mean[:1], base.covariance.diagonal(lambda lam: lam)[:1], torch.zeros(6, 1).double())
    x = base.sample(32, sigma, torch.Generator().manual_seed(0))
    assert relative_error(MarginalDenoiser(base, own)(x, sigma), base(x, sigma)) < 1e-10


@sigmas
def test_of_independent_pixels_it_is_the_posterior(sigma: float) -> None:
    own = marginals([-1.0, -0.2, 0.9], [0.0, 0.04, 0.01])
    shares = own.log_weights.exp().reshape(6, 3)
    mean = shares @ own.levels
    variance = shares @ (own.levels**2 + own.widths) - mean**2
    base = GaussianDenoiser(mean.reshape(1, 2, 3), Covariance(torch.eye(6).double(), variance))
    x = randn(40, 1, 2, 3, seed=1) * (1 + sigma)
    total = own.widths + sigma**2
    distance = x.flatten(1)[..., None] - own.levels  # (B, D, K)
    responsibilities = torch.softmax(shares.log() - distance**2 / (2 * total) - total.log() / 2, -1)
    expected = (responsibilities * (own.levels + own.widths / total * distance)).sum(-1)
    assert relative_error(MarginalDenoiser(base, own)(x, sigma).flatten(1), expected) < 1e-9


@pytest.mark.parametrize("kind", ["full", "low-rank", "isotropic", "cosine"])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_it_is_the_integral(kind: str, sigma: float) -> None:
    base = gaussian("full")
    if kind == "cosine":
        variances = torch.logspace(0.5, -1, 6, dtype=torch.float64).reshape(1, 2, 3)
        base = GaussianDenoiser(base.mean, CosineCovariance(variances, torch.eye(1).double()))
    else:
        base = GaussianDenoiser(base.mean, covariance(kind, 6))
    own = marginals([-1.0, 0.1, 0.8], [0.02, 0.3, 0.05])
    x = base.sample(2, sigma, torch.Generator().manual_seed(3))
    refined = MarginalDenoiser(base, own)(x, sigma).flatten(1)
    dense = base.covariance.dense()
    inverse = torch.linalg.inv(dense + sigma**2 * torch.eye(6).double())
    estimate = base.mean.flatten() + (x - base.mean).flatten(1) @ inverse @ dense
    left = (dense - dense @ inverse @ dense).diagonal()
    precision = 1 / left - 1 / dense.diagonal()
    centre = (estimate / left - base.mean.flatten() / dense.diagonal()) / precision  # of the likelihood
    shares = own.log_weights.exp().reshape(6, 3)
    for sample in range(2):
        for pixel in range(6):

            def density(z: float, sample: int = sample, pixel: int = pixel) -> float:
                prior = shares[pixel] * torch.exp(-((z - own.levels) ** 2) / (2 * own.widths))
                likelihood = torch.exp(-precision[pixel] * (z - centre[sample, pixel]) ** 2 / 2)
                return float((prior / own.widths.sqrt()).sum() * likelihood)

            points = [*own.levels.tolist(), float(centre[sample, pixel].clamp(-6, 6))]
            options = {"points": points, "limit": 400, "epsabs": 0, "epsrel": 1e-10}
            mass, first = (
                quad(lambda z, power=power: z**power * density(z), -7, 7, **options)[0] for power in (0, 1)
            )
            assert refined[sample, pixel] == pytest.approx(first / mass, abs=1e-7), (sample, pixel)


@sigmas
def test_float32_equals_float64(sigma: float) -> None:
    exact, single = denoiser("marginal"), denoiser("marginal").float()
    x = (held_out_digits()[:64] + sigma * randn(64, *EVENT, seed=4)).float()
    assert relative_error(single(x, sigma), exact(x.double(), sigma)) < 1e-5


@dtypes
def test_it_does_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    model = denoiser("marginal", dtype)
    x, sigma = randn(150, *EVENT, seed=5, dtype=dtype), torch.linspace(0.05, 5, 150, dtype=dtype)
    alone = torch.cat([model(x[k : k + 1], sigma[k : k + 1]) for k in range(0, 150, 7)])
    torch.testing.assert_close(model(x, sigma)[::7], alone, rtol=1e-5, atol=1e-6)


def test_it_compiles_whole() -> None:
    model = denoiser("marginal", torch.float32)
    x, sigma = randn(300, *EVENT, seed=6, dtype=torch.float32), torch.linspace(0.05, 5, 300)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, sigma), model(x, sigma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [100, 1437])
def test_held_out_digits_are_denoised_better(count: int) -> None:
    data, heldout = train_digits()[:count], held_out_digits()
    model = MarginalDenoiser.fit(data)
    for sigma, most in ((0.02, 0.1), (0.1, 0.75), (0.5, 0.9), (1.0, 0.98)):
        x = heldout + sigma * randn(*heldout.shape, seed=7)
        error, plain = ((d(x, sigma) - heldout).square().mean() for d in (model, model.gaussian))
        assert error < most * plain, (sigma, float(error / plain))


def test_pixels_that_never_vary_stay() -> None:
    data = torch.cat([torch.full((50, 1, 4, 2), -1.0), randn(50, 1, 4, 2, dtype=torch.float32)], -1)
    model = MarginalDenoiser.fit(data, prior=0.0)
    for sigma in SIGMAS:
        denoised = model(data + sigma * randn(*data.shape, seed=8, dtype=torch.float32), sigma)
        assert torch.isfinite(denoised).all()
        torch.testing.assert_close(denoised[..., :2], data[..., :2], rtol=0, atol=1e-4)


# The fit ------------------------------------------------------------------------------------------


def test_shares_are_counts() -> None:
    data = digits()[0]  # 17 grey levels
    own = Marginals.fit(data, 64, prior=0.0)
    torch.testing.assert_close(own.levels, torch.arange(17).double() / 8 - 1, rtol=0, atol=1e-15)
    assert own.widths.count_nonzero() == 0
    expected = (data[..., None] == own.levels.double()).double().mean(0)
    torch.testing.assert_close(own.log_weights.exp().double(), expected, rtol=1e-5, atol=1e-7)


def test_the_prior_is_so_many_samples_of_all_pixels() -> None:
    data = digits()[0][:90]
    plain, prior = (Marginals.fit(data, 64, prior=p).log_weights.exp().double() for p in (0.0, 10.0))
    pooled = plain.mean((0, 1, 2))
    torch.testing.assert_close(prior, (90 * plain + 10 * pooled) / 100, rtol=1e-5, atol=1e-7)


def test_mirror_images_are_counted_without_being_made() -> None:
    data = digits()[0]
    both = Marginals.fit(torch.cat([data, data.flip(-1)]), prior=4.0)
    mirrored = Marginals.fit(data, prior=2.0, mirror=True)
    for name, buffer in both.named_buffers():
        torch.testing.assert_close(dict(mirrored.named_buffers())[name], buffer, msg=name)
    pair = MarginalDenoiser.fit(data, mirror=True)
    x = randn(3, 1, 8, 8)
    torch.testing.assert_close(pair(x, 0.5).flip(-1), pair(x.flip(-1), 0.5))
    with pytest.raises(ValueError, match=r"expected images to mirror, got samples of shape \(64,\)"):
        Marginals.fit(data.flatten(1), mirror=True)


def test_moments_of_smooth_data_are_kept() -> None:
    data = randn(5000, 3, seed=9) * torch.tensor([0.2, 1.0, 3.0])
    own = Marginals.fit(data, 32, prior=0.0)
    assert 16 <= len(own.levels) <= 32
    shares = own.log_weights.exp().double()
    levels, widths = own.levels.double(), own.widths.double()
    torch.testing.assert_close(shares.mean(0) @ levels, data.mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(shares.mean(0) @ (levels**2 + widths), data.square().mean(), rtol=1e-4, atol=0)


def test_frequent_values_are_levels_of_their_own() -> None:
    data = randn(400, 5, seed=10)
    data[data > 0.7] = 1.0
    data[data < -0.9] = -1.0
    own = Marginals.fit(data, 16)
    for value in (-1.0, 1.0):
        place = (own.levels - value).abs().argmin()
        assert own.levels[place] == value
        assert own.widths[place] == 0


@pytest.mark.parametrize("n_levels", [4, 5, 32])
def test_two_values_are_two_levels(n_levels: int) -> None:
    coins = torch.tensor([[-1.0], [1.0], [1.0]])
    fitted = Marginals.fit(coins, n_levels, prior=0.0)
    assert fitted.levels.tolist() == [-1, 1]
    assert fitted.widths.tolist() == [0, 0]
    torch.testing.assert_close(fitted.log_weights.exp(), torch.tensor([[1 / 3, 2 / 3]]))


def test_every_source_gives_the_same() -> None:
    data = digits()[0][:300].float()
    whole = Marginals.fit(data)
    for source in (data.numpy(), list(data.split(70)), [(part, None) for part in data.split(128)]):
        other = Marginals.fit(source)
        for name, buffer in whole.named_buffers():
            assert other.get_buffer(name).equal(buffer), name


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (torch.full((5, 2), math.nan), {}, ValueError, "expected finite data, got 10 non-finite"),
        (torch.ones(5, 2), {"n_levels": 3}, ValueError, "n_levels >= 4 and a finite prior >= 0, got 3 and"),
        (torch.ones(5, 2), {"prior": -1.0}, ValueError, r"prior >= 0, got 32 and -1\.0"),
        (iter([torch.ones(5, 2)]), {}, TypeError, "gone through several times, got a list_iterator"),
        ([], {}, ValueError, "at least one batch of samples, got none"),
        ([torch.ones(5, 2), torch.ones(5, 3)], {}, ValueError, "samples of one shape"),
        (torch.ones(5), {}, ValueError, "expected data of shape"),
    ],
    ids=["nan", "levels", "prior", "iterator", "empty", "shapes", "vector"],
)
def test_impossible_fits(data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Marginals.fit(data, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_levels_are_not_chosen_from_are_checked_too(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_marginals, "_POOLED", 6)
    data = torch.full((40, 2), bad)
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:3]
    data[drawn] = randn(3, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected finite data, got non-finite values"):
        Marginals.fit(data, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("levels", "widths", "log_weights", "message"),
    [
        (torch.zeros(2), torch.zeros(3), torch.zeros(4, 2), r"one shape \(K,\), got \(2,\) and \(3,\)"),
        (torch.zeros(2), torch.zeros(2), torch.zeros(4, 3), r"log_weights of shape \(\*event_shape, 2\)"),
        (torch.zeros(2), -torch.ones(2), torch.zeros(4, 2), "finite widths >= 0"),
        (torch.zeros(2), torch.zeros(2), torch.ones(4, 2), "values above 0, or NaN"),
    ],
)
def test_impossible_marginals(levels: Tensor, widths: Tensor, log_weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Marginals(levels, widths, log_weights)


def test_another_event_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of one event shape, got \(1, 2, 3\) and \(6,\)"):
        MarginalDenoiser(gaussian(), marginals([0.0], [1.0], (6,)))


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    model, x = denoiser("marginal", torch.float32), randn(5, *EVENT, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path)(x, 0.3).equal(model(x, 0.3))


def test_numbers_of_numpy_are_data() -> None:
    own = Marginals.fit(np.array([[-1.0, 1.0], [1.0, 1.0]]), prior=0.0)
    assert own.levels.tolist() == [-1.0, 1.0]
    torch.testing.assert_close(own.log_weights.exp(), torch.tensor([[0.5, 0.5], [0.0, 1.0]]).double())


@pytest.mark.parametrize("mean", [1e3, -1e6])
def test_a_large_mean_costs_no_digits(mean: float) -> None:
    data = (randn(300, 1, 4, 4) * 2**20).round() / 2**20  # so that the mean is added exactly
    near, far = Marginals.fit(data), Marginals.fit(data + mean)
    torch.testing.assert_close(far.levels - mean, near.levels, rtol=0, atol=1e-15 * abs(mean))
    torch.testing.assert_close(far.widths, near.widths, rtol=1e-9, atol=0)
    torch.testing.assert_close(far.log_weights, near.log_weights)
    assert near.widths.count_nonzero() > 20


def test_levels_have_the_digits_of_the_data() -> None:
    data = torch.tensor([[100.1], [101.3]], dtype=torch.float64)
    fitted = MarginalDenoiser.fit(data, prior=0.0)
    assert fitted.marginals.levels.tolist() == [100.1, 101.3]
    assert float((fitted(data + 1e-3, 0.01) - data).abs().max()) < 1e-12
    assert Marginals.fit(data.float()).levels.dtype == torch.float32
    assert Marginals.fit(torch.tensor([[0], [255]], dtype=torch.uint8)).levels.dtype == torch.float32


def test_a_gaussian_without_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a Gaussian with variance, got none"):
        MarginalDenoiser(GaussianDenoiser.isotropic(torch.zeros(1, 2, 3), 0.0), marginals([0.0], [1.0]))
