"""The delta denoiser against a brute-force softmax over the data."""

import math

import pytest
import torch
from cases import (
    DTYPES,
    EVENT,
    SIGMAS,
    digits,
    held_out_digits,
    noised,
    normal_logpdf,
    randn,
    relative_error,
    train_digits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor

from gaussnet import Covariance, DeltaDenoiser, GaussianMixtureDenoiser

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

COUNT = 200


def brute_force(data: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Denoised and log p by direct differences, in float64 (Eq. 9, 38, 39)."""
    data, flat = data.double().flatten(1), x.double().flatten(1)
    logits = -(flat[:, None] - data).square().sum(-1) / (2 * sigma**2)
    log_norm = math.log(len(data)) + 0.5 * data.shape[1] * math.log(2 * math.pi * sigma**2)
    return (logits.softmax(1) @ data).reshape(x.shape), logits.logsumexp(1) - log_norm


@sigmas
@dtypes
@pytest.mark.parametrize("at", ["test digits", "training digits", "midpoints"])
def test_equals_brute_force(at: str, sigma: float, dtype: torch.dtype) -> None:
    data = train_digits(dtype)[:COUNT]
    x = {
        "test digits": noised(sigma, dtype=dtype),
        "training digits": data[:16] + sigma * randn(16, *EVENT, dtype=dtype),
        "midpoints": (data[:16] + data[16:32]) / 2,  # where a tiny error of the distances decides
    }[at]
    denoised, log_prob = brute_force(data, x, sigma)
    delta = DeltaDenoiser(data)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    if at == "midpoints":
        bound = max(bound, 1e-8)
    assert relative_error(delta(x, sigma), denoised) < bound
    torch.testing.assert_close(delta.log_prob(x, sigma).double(), log_prob, rtol=max(bound, 1e-9), atol=0)


@sigmas
def test_log_prob_is_that_of_scipy(sigma: float) -> None:
    data = randn(5, 3)
    x = data + sigma * randn(5, 3, seed=1)
    noise = sigma**2 * torch.eye(3, dtype=torch.float64)
    each = torch.stack([normal_logpdf(x, point, noise) for point in data])
    expected = torch.from_numpy(logsumexp(each.numpy(), axis=0)) - math.log(5)
    torch.testing.assert_close(DeltaDenoiser(data).log_prob(x, sigma), expected, rtol=1e-9, atol=1e-9)


@sigmas
def test_score_is_the_gradient_of_log_prob(sigma: float) -> None:
    delta, x = DeltaDenoiser(train_digits()[:COUNT], chunk_size=64), noised(sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(delta.log_prob(x, sigma).sum(), x)
    assert relative_error(delta.score(x, sigma), gradient) < 1e-10


@sigmas
def test_equals_a_mixture_of_points(sigma: float) -> None:
    data = train_digits()[:50]
    point = Covariance(torch.zeros(64, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), tail=0.0)
    mixture = GaussianMixtureDenoiser(torch.ones(50, dtype=torch.float64), data, [point] * 50)
    delta, x = DeltaDenoiser(data), noised(sigma)
    assert relative_error(delta(x, sigma), mixture(x, sigma)) < 1e-10
    assert relative_error(delta.score(x, sigma), mixture.score(x, sigma)) < 1e-10
    torch.testing.assert_close(delta.log_prob(x, sigma), mixture.log_prob(x, sigma), rtol=1e-10, atol=1e-10)


def test_limits() -> None:
    data = train_digits()[:COUNT]
    delta, x = DeltaDenoiser(data), held_out_digits()[:16]
    nearest = torch.cdist(x.flatten(1), data.flatten(1)).argmin(1)
    assert relative_error(delta(x, 1e-3), data[nearest]) < 1e-12, "low noise: the nearest point"
    mean = data.mean(0).expand_as(x)
    assert relative_error(delta(x, 1e6), mean) < 1e-9, "high noise: the mean"


@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
def test_far_queries_at_low_noise_are_finite(distance: float) -> None:
    delta = DeltaDenoiser(train_digits(torch.float32)[:COUNT], chunk_size=7)
    x = distance * randn(4, *EVENT, dtype=torch.float32)
    for out in (delta(x, 0.002), delta.score(x, 0.002), delta.log_prob(x, 0.002)):
        assert out.isfinite().all()
    assert delta(x, 0.002).abs().max() <= 1, "an average of the data"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    chunk_size=st.integers(1, 80),
    seed=st.integers(0, 99),
    sigma=st.sampled_from(SIGMAS),
    labelled=st.booleans(),
)
def test_order_and_chunks_are_immaterial(chunk_size: int, seed: int, sigma: float, labelled: bool) -> None:
    images, classes = digits()
    data, classes = images[:60], classes[:60]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    x, labels = noised(sigma, 8), torch.arange(8) % 3
    whole = DeltaDenoiser(data, classes)
    chunked = DeltaDenoiser(data[order], classes[order], chunk_size)
    arguments = (x, sigma, labels if labelled else None)
    assert relative_error(chunked(*arguments), whole(*arguments)) < 1e-10
    torch.testing.assert_close(chunked.log_prob(*arguments), whole.log_prob(*arguments))


def test_a_large_common_mean_costs_no_digits() -> None:
    data, x = train_digits()[:COUNT], noised(0.05)
    shifted = DeltaDenoiser(data + 1e5)
    assert relative_error(shifted(x + 1e5, 0.05) - 1e5, DeltaDenoiser(data)(x, 0.05)) < 1e-9


@sigmas
def test_float32_products_tell_near_twins_apart(sigma: float) -> None:
    # Thirty variants of each of ten digits, about a mean far from 0: chunks see some of each.
    twins = train_digits()[:10].repeat(30, 1, 1, 1) + 5 + 0.02 * randn(300, *EVENT, seed=4)
    data = twins[torch.randperm(300, generator=torch.Generator().manual_seed(0))].float()
    x = (data[:40] + sigma * randn(40, *EVENT, seed=5)).float()
    denoised, _ = brute_force(data, x, sigma)
    for chunk_size in (None, 64, 5):
        found = DeltaDenoiser(data, chunk_size=chunk_size)(x, sigma).double()
        error = (found - denoised).flatten(1).norm(dim=1) / (denoised - 5).flatten(1).norm(dim=1)
        assert error.max() < 1e-5, chunk_size


# Classes ------------------------------------------------------------------------------------------


@sigmas
@pytest.mark.parametrize("chunk_size", [3, 4096])
def test_class_labels_restrict_the_data(sigma: float, chunk_size: int) -> None:
    images, classes = digits()
    data, classes = images[:COUNT], classes[:COUNT]
    delta, x = DeltaDenoiser(data, classes, chunk_size), noised(sigma, 10)
    labels = torch.arange(10)
    denoised, scores = delta(x, sigma, labels), delta.score(x, sigma, labels)
    log_prob = delta.log_prob(x, sigma, labels)
    for k in range(10):
        one = x[k : k + 1]
        expected, log_p = brute_force(data[classes == k], one, sigma)
        assert relative_error(denoised[k : k + 1], expected) < 1e-12, f"class {k}"
        assert relative_error(scores[k : k + 1], (expected - one) / sigma**2) < 1e-7, f"class {k}"
        torch.testing.assert_close(log_prob[k : k + 1], log_p, rtol=1e-9, atol=0, msg=f"class {k}")


def test_one_datum() -> None:
    data, x = train_digits()[:1], noised(0.5)
    assert relative_error(DeltaDenoiser(data)(x, 0.5), data.expand_as(x)) < 1e-14


@pytest.mark.parametrize(
    ("data", "labels", "chunk_size", "message"),
    [
        (torch.zeros(3), None, 8, r"shape \(N, \*event_shape\) with N >= 1, got \(3,\)"),
        (torch.zeros(0, 3), None, 8, r"N >= 1, got \(0, 3\)"),
        (torch.tensor([[1.0, math.nan]]), None, 8, "finite data, got NaN"),
        (torch.zeros(4, 3), torch.zeros(3).long(), 8, r"each of 4 samples, got torch.int64 of shape \(3,\)"),
        (torch.zeros(4, 3), None, 0, "chunk_size >= 1, got 0"),
    ],
    ids=["1-d", "empty", "nan", "labels", "chunk"],
)
def test_impossible_arguments(data: Tensor, labels: Tensor | None, chunk_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaDenoiser(data, labels, chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_forward_mode_is_the_derivative(chunk_size: int | None) -> None:
    d = DeltaDenoiser(train_digits()[:50], chunk_size=chunk_size)
    x, v = noised(0.8, 3), randn(3, *EVENT, seed=8)
    sigma = torch.full((3,), 0.8, dtype=torch.float64)
    along_x = torch.func.jvp(lambda x: d(x, sigma), (x,), (v,))[1]
    along_sigma = torch.func.jvp(lambda s: d(x, s), (sigma,), (torch.ones_like(sigma),))[1]
    h = 1e-5
    torch.testing.assert_close(
        along_x, (d(x + h * v, sigma) - d(x - h * v, sigma)) / (2 * h), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        along_sigma, (d(x, sigma + h) - d(x, sigma - h)) / (2 * h), rtol=1e-4, atol=1e-7
    )
