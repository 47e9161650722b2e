"""The Gaussian mixture against sums over its dense components."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from cases import (
    COVARIANCES,
    DTYPES,
    SIGMAS,
    covariance,
    denoiser,
    gaussian,
    mixture,
    noised,
    normal_logpdf,
    orthogonal,
    randn,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor

from gaussnet import Covariance, GaussianDenoiser, GaussianMixtureDenoiser

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def parts() -> list[GaussianDenoiser]:
    """The components of `cases.mixture` as denoisers of their own."""
    covariances = [covariance(name, seed=k) for k, name in enumerate(COVARIANCES)]
    return [GaussianDenoiser(mean, cov) for mean, cov in zip(mixture().means, covariances, strict=True)]


def queries(sigma: float, count: int = 12) -> Tensor:
    """Noised component means: every component is met."""
    m = mixture()
    means = m.means[torch.arange(count) % m.n_components]
    return means + (0.5 + sigma) * randn(*means.shape, seed=5)


def dense_log_joint(m: GaussianMixtureDenoiser, x: Tensor, sigma: float) -> Tensor:
    """Log pi_k + log N(x; mu_k, Sigma_k + s^2 I), (B, K), by scipy."""
    rows: list[Tensor] = []
    for weight, part in zip(m.weights, parts(), strict=True):
        cov = part.covariance.dense() + sigma**2 * torch.eye(6, dtype=torch.float64)
        rows.append(weight.log() + normal_logpdf(x, part.mean, cov))
    return torch.stack(rows, 1)


@sigmas
def test_log_prob_and_responsibilities_are_those_of_scipy(sigma: float) -> None:
    m, x = mixture(), queries(sigma)
    joint = dense_log_joint(m, x, sigma)
    expected = torch.from_numpy(logsumexp(joint.numpy(), axis=1))
    torch.testing.assert_close(m.log_prob(x, sigma), expected, rtol=1e-8, atol=1e-8)
    weights = m.responsibilities(x, sigma)
    assert weights.shape == (12, 4)
    torch.testing.assert_close(weights, joint.softmax(1), rtol=1e-6, atol=1e-8)
    assert (weights.argmax(1).unique().numel() > 1) or sigma > 1, "all queries in one component"


@sigmas
def test_denoiser_and_score_average_those_of_the_components(sigma: float) -> None:
    m, x = mixture(), queries(sigma)
    weights = dense_log_joint(m, x, sigma).softmax(1)[..., None, None, None]
    denoised = torch.stack([part(x, sigma) for part in parts()], 1)
    scores = torch.stack([part.score(x, sigma) for part in parts()], 1)
    assert relative_error(m(x, sigma), (weights * denoised).sum(1)) < 1e-8  # Eq. 7
    assert relative_error(m.score(x, sigma), (weights * scores).sum(1)) < 1e-7  # Eq. 35


@sigmas
def test_score_is_the_gradient_of_log_prob(sigma: float) -> None:
    m, x = mixture(), queries(sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(m.log_prob(x, sigma).sum(), x)
    assert relative_error(m.score(x, sigma), gradient) < 1e-10


@sigmas
@pytest.mark.parametrize("name", ["mixture-kmeans", "mixture-classes", "mixture-unequal-ranks"])
def test_score_is_the_gradient_of_log_prob_with_float32_buffers(name: str, sigma: float) -> None:
    # The stored eigenvectors are orthonormal to 1e-7 only: both must be the same function of them.
    m, x = denoiser(name, torch.float32), noised(sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(m.log_prob(x, sigma).sum(), x)
    assert relative_error(m.score(x, sigma), gradient) < 1e-10


@sigmas
@dtypes
@pytest.mark.parametrize("kind", ["full", "low-rank", "isotropic"])
def test_one_component_is_the_gaussian(kind: str, sigma: float, dtype: torch.dtype) -> None:
    # Also with float32 buffers, where D - x at low noise would show the rounding of the eigenvectors.
    dim = 64
    mean, q = randn(1, 8, 8, dtype=dtype), orthogonal(dim)
    rank, tail = {"full": (dim, 0.0), "low-rank": (9, 0.02), "isotropic": (0, 0.5)}[kind]
    eigvals = torch.logspace(1, -2, rank, dtype=torch.float64)
    cov = Covariance(q[:, :rank], eigvals, tail).to(dtype)
    one = GaussianMixtureDenoiser(torch.ones(1, dtype=dtype), mean[None], [cov])
    g, x = GaussianDenoiser(mean, cov), (mean + (1 + sigma) * randn(9, 1, 8, 8, seed=1)).to(dtype)
    bound = 1e-11 if dtype == torch.float64 else 1e-6
    assert relative_error(one(x, sigma), g(x, sigma)) < bound
    assert relative_error(one.score(x, sigma), g.score(x, sigma)) < bound
    torch.testing.assert_close(one.log_prob(x, sigma), g.log_prob(x, sigma), rtol=bound, atol=0)


@sigmas
@pytest.mark.parametrize("tail", [0.01, 1e-4, 0.0])
def test_float32_products_fall_back_where_they_cannot_tell_components(sigma: float, tail: float) -> None:
    # Overlapping components, so that responsibilities are far from 0 and 1, on a common subspace.
    q, means = orthogonal(64), 0.02 * randn(6, 64, seed=2)
    scales = torch.linspace(0.5, 2, 6).double()
    cov = [Covariance(q[:, :20], s * torch.logspace(1, -2, 20).double(), s * tail) for s in scales]
    double = GaussianMixtureDenoiser(torch.ones(6).double(), means @ q[:, :20] @ q[:, :20].T, cov)
    single = copy.deepcopy(double).float()
    exact = copy.deepcopy(single).double()
    x = randn(40, 20, seed=3) @ (q[:, :20] * torch.logspace(0.5, -1, 20).double()).T
    x = (x + tail**0.5 * randn(40, 64, seed=4) + sigma * randn(40, 64, seed=5)).float()
    error = (single(x, sigma) - exact(x.double(), sigma)).norm(dim=1) / exact(x.double(), sigma).norm(dim=1)
    assert error.max() < 1e-5, error.max()
    weights = exact.responsibilities(x.double(), sigma)
    torch.testing.assert_close(
        single.responsibilities(x, sigma).double(), weights, rtol=0, atol=1e-3 if sigma < 0.01 else 1e-5
    )


@sigmas
def test_float32_decides_between_far_components(sigma: float) -> None:
    # Halfway between two means that lie apart outside of U, where the rounding of U^T x decides.
    q, zeros = orthogonal(64), torch.zeros(64).double()
    cov = [Covariance(q[:, :20], torch.logspace(2, 0, 20).double(), 0.0)] * 2
    means = torch.stack([zeros, q[:, 30]])
    single = GaussianMixtureDenoiser(torch.ones(2).double(), means, cov).float()
    exact = copy.deepcopy(single).double()
    x = (0.5 * q[:, 30] + randn(40, 20, seed=3) @ (q[:, :20] * torch.logspace(1, 0, 20).double()).T).float()
    expected = exact(x.double(), sigma)
    error = (single(x, sigma) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-5, error.max()


def test_unequal_ranks_are_padded_without_effect() -> None:
    # A component alone equals the same component beside one of higher rank that is far away.
    low, full = covariance("low-rank"), covariance("full", seed=1)
    means = torch.stack([torch.zeros(6), torch.full((6,), 1e3)]).double()
    pair = GaussianMixtureDenoiser(torch.ones(2, dtype=torch.float64), means, [low, full])
    alone = GaussianDenoiser(means[0], low)
    x = randn(5, 6)
    assert pair.ranks.tolist() == [3, 6]
    for sigma in SIGMAS[:-1]:
        assert relative_error(pair(x, sigma), alone(x, sigma)) < 1e-9, sigma
        assert relative_error(pair.score(x, sigma), alone.score(x, sigma)) < 1e-9, sigma
        expected = alone.log_prob(x, sigma) - math.log(2)
        torch.testing.assert_close(pair.log_prob(x, sigma), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.002, 0.5])
def test_a_large_common_mean_costs_no_digits(sigma: float) -> None:
    m, x = mixture(), queries(sigma)
    shifted = GaussianMixtureDenoiser(m.weights, m.means + 1e5, [part.covariance for part in parts()])
    moved = x + 1e5
    assert relative_error(shifted(moved, sigma) - 1e5, m(moved - 1e5, sigma)) < 1e-9
    assert relative_error(shifted.score(moved, sigma), m.score(moved - 1e5, sigma)) < 1e-6


def test_far_queries_at_low_noise_are_finite() -> None:
    m = denoiser("mixture-unequal-ranks", torch.float32)
    for distance in (1e2, 1e4, 1e6):
        x = distance * randn(4, 1, 8, 8, dtype=torch.float32)
        for out in (m(x, 0.002), m.score(x, 0.002), m.log_prob(x, 0.002), m.responsibilities(x, 0.002)):
            assert out.isfinite().all(), distance
        torch.testing.assert_close(m.responsibilities(x, 0.002).sum(1), torch.ones(4))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)), sigma=st.sampled_from(SIGMAS))
def test_the_order_of_components_is_immaterial(order: list[int], sigma: float) -> None:
    m, x = mixture(), queries(sigma)
    covariances = [parts()[k].covariance for k in order]
    permuted = GaussianMixtureDenoiser(m.weights[order], m.means[order], covariances)
    assert relative_error(permuted(x, sigma), m(x, sigma)) < 1e-10
    assert relative_error(permuted.score(x, sigma), m.score(x, sigma)) < 1e-10
    torch.testing.assert_close(permuted.log_prob(x, sigma), m.log_prob(x, sigma), rtol=1e-10, atol=1e-10)
    expected = m.responsibilities(x, sigma)[:, order]
    torch.testing.assert_close(permuted.responsibilities(x, sigma), expected, rtol=1e-8, atol=1e-10)


def test_splitting_a_component_changes_nothing() -> None:
    m, x = mixture(), queries(0.5)
    twice = [0, 1, 2, 3, 1]
    weights = m.weights[twice] * torch.tensor([1, 0.25, 1, 1, 0.75], dtype=torch.float64)
    split = GaussianMixtureDenoiser(weights, m.means[twice], [parts()[k].covariance for k in twice])
    assert relative_error(split(x, 0.5), m(x, 0.5)) < 1e-12
    torch.testing.assert_close(split.log_prob(x, 0.5), m.log_prob(x, 0.5))


def test_weights_are_normalised() -> None:
    g = gaussian()
    m = GaussianMixtureDenoiser(torch.tensor([3.0, 1.0]), torch.zeros(2, 1, 2, 3), [g.covariance] * 2)
    assert m.weights.tolist() == [0.75, 0.25]
    assert m.n_components == 2


# Classes ------------------------------------------------------------------------------------------


def labelled(dtype: torch.dtype = torch.float64) -> GaussianMixtureDenoiser:
    """Components 0, 2 are class 3; components 1, 3 are class 7."""
    classes = torch.tensor([3, 7, 3, 7])
    m = mixture()
    parts_ = [part.covariance for part in parts()]
    return GaussianMixtureDenoiser(m.weights, m.means, parts_, class_labels=classes).to(dtype)


@pytest.mark.parametrize(("label", "members"), [(3, [0, 2]), (7, [1, 3])])
def test_class_labels_restrict_the_components(label: int, members: list[int]) -> None:
    m, x = labelled(), queries(0.5)
    alone = GaussianMixtureDenoiser(
        m.weights[members], m.means[members], [parts()[k].covariance for k in members]
    )
    classes = torch.full((len(x),), label)
    assert relative_error(m(x, 0.5, classes), alone(x, 0.5)) < 1e-11
    assert relative_error(m.score(x, 0.5, classes), alone.score(x, 0.5)) < 1e-11
    torch.testing.assert_close(m.log_prob(x, 0.5, classes), alone.log_prob(x, 0.5))
    others = [k for k in range(4) if k not in members]
    assert m.responsibilities(x, 0.5, classes)[:, others].count_nonzero() == 0
    assert relative_error(m(x, 0.5, classes), m(x, 0.5)) > 1e-3


@dtypes
@sigmas
def test_with_weights_tells_what_the_estimate_is_made_of(sigma: float, dtype: torch.dtype) -> None:
    m, x = labelled(dtype), queries(sigma).to(dtype)
    for classes in (None, torch.full((len(x),), 3)):
        denoised, weights = m.with_weights(x, sigma, classes)
        assert denoised.equal(m(x, sigma, classes))
        assert weights.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 0.03  # a tenth in logits
        exact = m.double().responsibilities(x.double(), sigma, classes)
        torch.testing.assert_close(weights.double(), exact, rtol=0, atol=tolerance)
        m = m.to(dtype)


def test_a_label_of_one_component_needs_no_responsibilities() -> None:
    m = GaussianMixtureDenoiser(mixture().weights, mixture().means, [COVARIANCE] * 4, torch.arange(4))
    x, classes = randn(3, 4, 1, 2, 3), torch.arange(12).reshape(3, 4) % 4
    expected = torch.nn.functional.one_hot(classes, 4).double()
    assert m.responsibilities(x, 0.5, classes).equal(expected)
    denoised, weights = m.with_weights(x, 0.5, classes)
    assert weights.equal(expected)
    alone = torch.stack([m.component(k)(x, 0.5) for k in range(4)])
    torch.testing.assert_close(denoised, torch.einsum("abk,kab...->ab...", expected, alone))


def test_classes_add_up_to_the_whole() -> None:
    # p(x) = sum_c p(c) p(x | c)
    m, x = labelled(), queries(0.5)
    log_probs = [m.log_prob(x, 0.5, torch.full((len(x),), label)) for label in (3, 7)]
    priors = [m.weights[[0, 2]].sum().log(), m.weights[[1, 3]].sum().log()]
    joint = torch.stack([p + log_prob for p, log_prob in zip(priors, log_probs, strict=True)])
    torch.testing.assert_close(joint.logsumexp(0), m.log_prob(x, 0.5), rtol=1e-11, atol=1e-11)


COVARIANCE = Covariance(torch.eye(6), torch.ones(6))


@pytest.mark.parametrize(
    ("weights", "count", "dim", "labels", "message"),
    [
        (torch.ones(3), 2, 6, None, r"2 weights and covariances, one for each mean, got \(3,\) and 2"),
        (torch.ones(2), 1, 6, None, r"got \(2,\) and 1"),
        (torch.ones(2), 2, 5, None, r"covariances of 5 dimensions, as the means have, got \[6\]"),
        (torch.tensor([1.0, 0.0]), 2, 6, None, r"finite weights > 0, got \[1.0, 0.0\]"),
        (torch.tensor([1.0, -1.0]), 2, 6, None, "finite weights > 0"),
        (torch.tensor([1.0, math.nan]), 2, 6, None, "finite weights > 0"),
        (torch.ones(2), 2, 6, torch.zeros(3).long(), r"each of 2 samples, got torch.int64 of shape \(3,\)"),
    ],
)
def test_impossible_arguments(weights: Tensor, count: int, dim: int, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDenoiser(weights, torch.zeros(2, dim), [COVARIANCE] * count, labels)


@pytest.mark.parametrize(
    ("means", "shape"),
    [
        (torch.zeros(0, 6), r"\(0, 6\)"),
        (torch.zeros(6), r"\(6,\)"),
        (torch.tensor([[0.0, math.inf]]), r"\(1, 2\)"),
        (torch.tensor([[0.0, math.nan]]), r"\(1, 2\)"),
    ],
    ids=["none", "vector", "inf", "nan"],
)
def test_impossible_means(means: Tensor, shape: str) -> None:
    message = rf"expected finite means \(K, \*event_shape\), K >= 1, got shape {shape}"
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDenoiser(torch.ones(len(means)), means, [COVARIANCE] * len(means))


def test_a_class_of_equal_samples_is_a_point() -> None:
    data = randn(40, 1, 2, 3)
    data[:10] = data[0]
    labels = (torch.arange(40) >= 10).long()
    fitted = GaussianMixtureDenoiser.fit(data, labels=labels)
    assert (fitted.weights * 40).round().tolist() == [10, 30]
    x, sigma = data[:10] + 0.1 * randn(10, 1, 2, 3, seed=1), 0.1
    denoised = fitted(x, sigma, torch.zeros(10, dtype=torch.long))
    torch.testing.assert_close(denoised, data[:10])
    assert bool(torch.isfinite(fitted.log_prob(x, sigma)).all())


def test_integer_data_are_fitted_as_floats() -> None:
    data = torch.randint(0, 255, (40, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data[:10] = data[0]
    labels = (torch.arange(40) >= 10).long()
    fitted = GaussianMixtureDenoiser.fit(data, labels=labels)
    assert fitted.means.dtype == torch.float32
    torch.testing.assert_close(fitted.means[0], data[0].float())


def test_rows_that_are_not_one_hot_are_errors() -> None:
    labelled, x = denoiser("mixture-classes"), noised(0.5, 2)
    rows = torch.eye(10)[[3, 4]]
    assert torch.equal(labelled(x, 0.5, rows), labelled(x, 0.5, torch.tensor([3, 4])))
    rows[1, 5] = 1
    with pytest.raises(ValueError, match=r"expected one-hot class_labels, .* several non-zero entries"):
        labelled(x, 0.5, rows)


def test_autocast_rounds_neither_mean_nor_variance() -> None:
    m = GaussianMixtureDenoiser.equal_isotropic(randn(3, 6, dtype=torch.float32), 0.1)
    mean, variance = m.mean, m.variance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close((m.mean, m.variance), (mean, variance), rtol=0, atol=0)


@pytest.mark.parametrize("weights", [[2, 3], [0.4, 0.6]], ids=["counts", "float32"])
@dtypes
def test_weights_and_covariances_may_have_another_dtype(weights: list[float], dtype: torch.dtype) -> None:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    one = Covariance(torch.eye(2, dtype=torch.float64)[:, :1], torch.ones(1, dtype=torch.float64), tail=0.5)
    m = GaussianMixtureDenoiser(torch.tensor(weights), means, [one, one])
    torch.testing.assert_close(m.variance, means.new_tensor((1 + 0.5 + 0.96) / 2))
    assert m.weights.dtype == m.tails.dtype == dtype
