"""The Gaussian denoiser against its dense formulas, scipy, and its own probability-flow ODE."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import (
    COVARIANCES,
    DTYPES,
    SIGMAS,
    cubature,
    denoiser,
    gaussian,
    noised,
    normal_logpdf,
    orthogonal,
    randn,
    relative_error,
    train_digits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from gaussnet import Covariance, GaussianDenoiser

kinds = pytest.mark.parametrize("kind", COVARIANCES)
sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

EYE = torch.eye(6, dtype=torch.float64)


def queries(sigma: float, count: int = 8) -> torch.Tensor:
    g = gaussian()
    return g.mean + (1 + sigma) * randn(count, *g.event_shape, seed=5)


@kinds
@sigmas
@dtypes
def test_denoiser_and_score_are_the_dense_formulas(kind: str, sigma: float, dtype: torch.dtype) -> None:
    g, x = gaussian(kind), queries(sigma).to(dtype)
    cov = g.covariance.dense()
    u = (x.double() - g.mean).flatten(1)
    precision = torch.linalg.inv(cov + sigma**2 * EYE)
    denoised = g.mean + (u @ precision @ cov).reshape(x.shape)  # Eq. 12
    score = -(u @ precision).reshape(x.shape)  # Eq. 5
    assert relative_error(g(x, sigma), denoised) < (1e-10 if dtype == torch.float64 else 1e-6)
    assert relative_error(g.score(x, sigma), score) < (1e-9 if dtype == torch.float64 else 1e-6)
    if dtype == torch.float32:
        assert relative_error(g.float()(x, sigma), denoised) < 2e-6


@kinds
@sigmas
def test_log_prob_is_that_of_scipy(kind: str, sigma: float) -> None:
    g, x = gaussian(kind), queries(sigma)
    expected = normal_logpdf(x, g.mean, g.covariance.dense() + sigma**2 * EYE)
    torch.testing.assert_close(g.log_prob(x, sigma), expected, rtol=1e-8, atol=1e-8)


@kinds
@sigmas
def test_score_is_the_gradient_of_log_prob(kind: str, sigma: float) -> None:
    g, x = gaussian(kind), queries(sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(g.log_prob(x, sigma).sum(), x)
    assert relative_error(g.score(x, sigma), gradient) < 1e-11, f"{kind} {sigma}"


# Flow ---------------------------------------------------------------------------------------------

LEVELS = (0.01, 0.3, 4.0, 80.0)


@kinds
@pytest.mark.parametrize("a", LEVELS)
@pytest.mark.parametrize("c", [0.0, *LEVELS])
def test_flow_is_a_semigroup(kind: str, a: float, c: float) -> None:
    g, x = gaussian(kind), queries(a)
    direct = g.flow(x, a, c)
    for b in LEVELS:
        two_steps = g.flow(g.flow(x, a, b), b, c)
        assert relative_error(two_steps, direct) < 1e-11, f"{a} -> {b} -> {c}"
    if c > 0:
        assert relative_error(g.flow(direct, c, a), x) < 1e-11, f"{a} -> {c} and back"
    if c == a:
        assert relative_error(direct, x) < 1e-13, "staying"


@kinds
@pytest.mark.parametrize(("a", "b"), [(80.0, 0.05), (0.05, 80.0), (3.0, 0.5)])
def test_flow_solves_the_probability_flow_ode(kind: str, a: float, b: float) -> None:
    g, x = gaussian(kind), queries(a, 1)

    def slope(sigma: float, state: np.ndarray) -> np.ndarray:  # dx/dsigma = -sigma s(x, sigma)
        score = g.score(torch.from_numpy(state.copy()).reshape(x.shape), float(sigma))
        return -sigma * score.flatten().numpy()

    solution = solve_ivp(slope, (a, b), x.flatten().numpy(), "DOP853", rtol=1e-11, atol=1e-12)
    assert solution.success, solution.message
    end = torch.from_numpy(solution.y[:, -1].copy()).reshape(x.shape)
    assert relative_error(g.flow(x, a, b), end) < 1e-8


@kinds
def test_flow_to_zero_is_whitening_and_colouring(kind: str) -> None:
    # At sigma_to = 0 the map is Sigma^(1/2) (Sigma + s^2 I)^(-1/2), which carries p(x; s) to the data.
    g, s = gaussian(kind), 2.0
    jacobian = torch.func.vmap(lambda v: g.flow(g.mean + v.reshape(g.event_shape), s, 0.0) - g.mean)(EYE)
    a = jacobian.reshape(6, 6)
    cov = g.covariance.dense()
    torch.testing.assert_close(a.T @ (cov + s**2 * EYE) @ a, cov, rtol=1e-11, atol=1e-12)


def test_flow_takes_one_pair_of_levels_per_sample() -> None:
    g, x = gaussian("low-rank"), queries(1.0, 3)
    a, b = torch.tensor([80.0, 0.5, 2.0]), torch.tensor([0.1, 40.0, 0.0])
    together = g.flow(x, a, b)
    for i in range(3):
        torch.testing.assert_close(together[i], g.flow(x[i], float(a[i]), float(b[i])), msg=f"sample {i}")


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_flow_between_impossible_levels(a: float, b: float) -> None:
    with pytest.raises(ValueError, match="expected sigma to be finite and"):
        gaussian().flow(queries(1.0), a, b)


# Error --------------------------------------------------------------------------------------------


@kinds
@sigmas
def test_bayes_error_is_the_trace_formula(kind: str, sigma: float) -> None:
    g = gaussian(kind)
    cov = g.covariance.dense()
    expected = (cov * sigma**2 @ torch.linalg.inv(cov + sigma**2 * EYE)).trace() / 6
    torch.testing.assert_close(g.bayes_error(sigma), expected, rtol=1e-9, atol=0)
    assert g.bayes_error(torch.tensor([sigma, sigma])).shape == (2,)
    assert g.bayes_error(0.0) == 0
    torch.testing.assert_close(g.float().bayes_error(sigma).double(), expected, rtol=1e-5, atol=0)


@sigmas
def test_bayes_error_is_the_measured_error_on_any_data(sigma: float) -> None:
    data = train_digits()[:100]
    g = GaussianDenoiser.fit(data, shrinkage="none")
    x = data + sigma * cubature()  # (128, 100, 1, 8, 8)
    error = (g(x, sigma) - data).square().mean()
    torch.testing.assert_close(g.bayes_error(sigma), error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_bayes_error_is_the_measured_error_under_gaussian_noise(sigma: float) -> None:
    data = train_digits()
    g = GaussianDenoiser.fit(data, shrinkage="none")
    x = data + sigma * randn(*data.shape, seed=2)
    errors = (g(x, sigma) - data).square().flatten(1).mean(1)
    standard_error = errors.std() / len(errors) ** 0.5
    assert standard_error < 0.02 * errors.mean(), "the sample is too small to tell"
    assert abs(g.bayes_error(sigma) - errors.mean()) < 4 * standard_error


def test_no_affine_denoiser_errs_less() -> None:
    # Perturbing eigenvalues in either direction raises the error on the data of the fit.
    data = train_digits()[:100]
    g = GaussianDenoiser.fit(data, shrinkage="none")
    points = cubature()
    for factor in (0.8, 1.25):
        cov = Covariance(g.covariance.eigvecs, factor * g.covariance.eigvals)
        error = (GaussianDenoiser(g.mean, cov)(data + 0.5 * points, 0.5) - data).square().mean()
        assert error > g.bayes_error(0.5), f"{factor=}"


# Samples ------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_samples_have_mean_and_covariance(kind: str, sigma: float) -> None:
    g, n = gaussian(kind), 40_000
    samples = g.sample(n, sigma, generator=torch.Generator().manual_seed(3)).flatten(1)
    expected = g.covariance.dense() + sigma**2 * EYE
    variance = expected.diagonal()
    errors = (samples.mean(0) - g.mean.flatten()) / (variance / n).sqrt().clamp_min(1e-12)
    assert errors.abs().max() < 4.5, "mean, in standard errors"
    # Var of a sample covariance: (S_ii S_jj + S_ij^2) / n
    spread = ((variance.outer(variance) + expected**2) / n).sqrt()
    errors = (torch.cov(samples.T) - expected) / spread.clamp_min(1e-12)
    assert errors.abs().max() < 4.5, "covariance, in standard errors"


def test_samples_are_reproducible_and_take_one_level_each() -> None:
    g = gaussian()
    draws = [g.sample(5, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].shape == (5, 1, 2, 3)
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    levels = torch.tensor([1.0, 1.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    mixed = g.sample(5, levels, generator=torch.Generator().manual_seed(0))
    assert (mixed == draws[0]).flatten(1).all(1).tolist() == [True, True, False, True, False]
    assert g.bfloat16().sample(2).dtype == torch.float32


# Invariance, construction, precision --------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), kind=st.sampled_from(COVARIANCES), sigma=st.sampled_from(SIGMAS))
def test_rotating_the_data_rotates_the_denoiser(seed: int, kind: str, sigma: float) -> None:
    g, q = gaussian(kind), orthogonal(6, seed)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(-1, 6) @ q.T).reshape(x.shape)

    cov = g.covariance
    rotated = GaussianDenoiser(rotate(g.mean), Covariance(q @ cov.eigvecs, cov.eigvals, cov.tail))
    x = queries(sigma)
    assert relative_error(rotated(rotate(x), sigma), rotate(g(x, sigma))) < 1e-11
    assert relative_error(rotated.flow(rotate(x), sigma, 0.3), rotate(g.flow(x, sigma, 0.3))) < 1e-11
    torch.testing.assert_close(rotated.log_prob(rotate(x), sigma), g.log_prob(x, sigma))


@pytest.mark.parametrize("name", ["isotropic", "gaussian-full", "gaussian-rank-10"])
@pytest.mark.parametrize("start", SIGMAS)
@pytest.mark.parametrize("end", [0.0, *SIGMAS])
def test_float32_flow_equals_float64(name: str, start: float, end: float) -> None:
    single, double = denoiser(name, torch.float32), denoiser(name, torch.float32).double()
    x = noised(start, dtype=torch.float32)
    assert relative_error(single.flow(x, start, end), double.flow(x.double(), start, end)) < 1e-5


@pytest.mark.parametrize("shrinkage", ["cv", "none"])
@pytest.mark.parametrize("rank", [None, 50])
def test_float32_with_dense_eigenvectors(shrinkage: str, rank: int | None) -> None:
    # Many pixels of the digits never vary, which hides rounding: rotate them.
    q = orthogonal(64)
    data = (train_digits().flatten(1) @ q).float()
    single = GaussianDenoiser.fit(data, rank, shrinkage)
    double = copy.deepcopy(single).double()
    x = (noised(0.002).flatten(1) @ q).float()
    assert relative_error(single(x, 0.002), double(x.double(), 0.002)) < 1e-6
    assert relative_error(single.score(x, 0.002), double.score(x.double(), 0.002)) < 1e-6
    assert relative_error(single.flow(x, 0.002, 80.0), double.flow(x.double(), 0.002, 80.0)) < 1e-6
    assert relative_error(single.log_prob(x, 0.002), double.log_prob(x.double(), 0.002)) < 1e-6
    gradient = torch.func.grad(lambda x: single.log_prob(x, 0.002).sum())(x)
    assert relative_error(gradient, double.score(x.double(), 0.002)) < 1e-6


@dtypes
def test_isotropic(dtype: torch.dtype) -> None:
    mean = randn(1, 2, 3, dtype=dtype)
    x = randn(4, 1, 2, 3, seed=1, dtype=dtype)
    g = GaussianDenoiser.isotropic(mean, var=0.25)
    torch.testing.assert_close(g(x, 0.5), (mean + x) / 2)
    torch.testing.assert_close(g.variance, torch.tensor(0.25, dtype=dtype))
    assert g.covariance.rank == 0
    point = GaussianDenoiser.isotropic(mean, var=0)
    torch.testing.assert_close(point.score(x, 0.5), (mean - x) / 0.25)  # Eq. 29
    assert point(x, 0.5).equal(mean.expand_as(x))


def test_impossible_arguments() -> None:
    cov = gaussian().covariance
    with pytest.raises(ValueError, match=r"covariance of 8 dimensions for a mean of shape \(2, 4\), got 6"):
        GaussianDenoiser(torch.zeros(2, 4), cov)
    with pytest.raises(ValueError, match=r"expected a mean of shape \(\*event_shape\), got a 0-d tensor"):
        GaussianDenoiser(torch.tensor(0.5), cov)
    with pytest.raises(ValueError, match="finite mean, got 2 non-finite values"):
        GaussianDenoiser(torch.tensor([0.0, math.nan, math.inf, 0, 0, 0]), cov)
    with pytest.raises(ValueError, match="eigenvalues >= 0"):
        GaussianDenoiser.isotropic(torch.zeros(3), var=-1.0)
