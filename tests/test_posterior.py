"""The posterior covariance, against closed forms and against the spread of the data."""

from typing import Any

import pytest
import torch
from cases import (
    ANALYTIC,
    COVARIANCES,
    LABELLED,
    denoiser,
    digits,
    gaussian,
    mixture,
    noised,
    randn,
    relative_error,
    train_digits,
)
from torch import Tensor

from gaussnet import DeltaDenoiser, Denoiser
from gaussnet.denoisers.posterior import jacobian_variance


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 80.0])
def test_gaussian_is_its_spectral_function(kind: str, sigma: float) -> None:
    exact, v = gaussian(kind), randn(4, 1, 2, 3)
    posterior = exact.posterior_cov(randn(4, 1, 2, 3, seed=2), sigma)
    dense = exact.covariance.dense()
    eye = torch.eye(6, dtype=torch.float64)
    expected = sigma**2 * dense @ torch.linalg.inv(dense + sigma**2 * eye)
    assert relative_error(posterior.apply(v).flatten(1), v.flatten(1) @ expected) < 1e-10
    assert relative_error(posterior.diagonal().flatten(1), expected.diagonal().expand(4, 6)) < 1e-10
    assert relative_error(posterior.trace(), 6 * exact.bayes_error(sigma).expand(4)) < 1e-10


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_delta_is_the_spread_of_its_weights(sigma: float) -> None:
    data, x = train_digits()[:50], noised(sigma, 3)
    weights = torch.softmax(-(torch.cdist(x.flatten(1), data.flatten(1)) ** 2) / (2 * sigma**2), 1)
    mean = weights @ data.flatten(1)
    second = torch.einsum("bn,nd,ne->bde", weights, data.flatten(1), data.flatten(1))
    expected = second - mean[:, :, None] * mean[:, None, :]
    posterior = DeltaDenoiser(data).posterior_cov(x, sigma)
    v = randn(3, 1, 8, 8)
    applied = torch.einsum("bde,be->bd", expected, v.flatten(1))
    assert relative_error(posterior.apply(v).flatten(1), applied) < 1e-9
    assert relative_error(posterior.diagonal().flatten(1), expected.diagonal(dim1=1, dim2=2)) < 1e-9


def test_mixture_is_within_plus_between_components() -> None:
    exact, sigma, eye = mixture(), 0.7, torch.eye(6, dtype=torch.float64)
    x = randn(5, 1, 2, 3, seed=3)
    w = exact.responsibilities(x, sigma)
    total = torch.zeros(5, 6, 6, dtype=torch.float64)
    means: list[torch.Tensor] = []
    for k in range(4):
        dense = exact.eigvecs[k].T @ torch.diag(exact.eigvals[k]) @ exact.eigvecs[k]
        dense = dense + exact.tails[k] * (eye - exact.eigvecs[k].T @ exact.eigvecs[k])
        gain = dense @ torch.linalg.inv(dense + sigma**2 * eye)
        mean = exact.means[k].flatten()
        means.append(mean + (x.flatten(1) - mean) @ gain.T)
        total += w[:, k, None, None] * (sigma**2 * gain + means[k][:, :, None] * means[k][:, None, :])
    average = sum((w[:, k, None] * means[k] for k in range(4)), torch.zeros(5, 6, dtype=torch.float64))
    total -= average[:, :, None] * average[:, None, :]
    v = randn(5, 1, 2, 3, seed=4)
    applied = torch.einsum("bde,be->bd", total, v.flatten(1))
    assert relative_error(exact.posterior_cov(x, sigma).apply(v).flatten(1), applied) < 1e-9
    assert relative_error(exact.posterior_cov(x, sigma).trace(), total.diagonal(dim1=1, dim2=2).sum(1)) < 1e-9


@pytest.mark.parametrize("name", ["gaussian-rank-10", "mixture-kmeans", "delta"])
def test_operator_is_symmetric_and_positive(name: str) -> None:
    exact: Denoiser = denoiser(name)
    sigma = torch.linspace(0.2, 3, 8, dtype=torch.float64)  # one level a sample
    posterior = exact.posterior_cov(noised(0.5, 8), sigma)
    u, v = randn(8, 1, 8, 8, seed=5), randn(8, 1, 8, 8, seed=6)
    left, right = (u * posterior.apply(v)).sum((1, 2, 3)), (v * posterior.apply(u)).sum((1, 2, 3))
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-12)
    assert bool(((u * posterior.apply(u)).sum((1, 2, 3)) >= -1e-12).all())


@pytest.mark.parametrize("name", ANALYTIC)
def test_closed_form_is_the_diagonal_of_the_jacobian(name: str) -> None:
    exact: Denoiser = denoiser(name)
    labels = digits()[1][:4] if name in LABELLED else None
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64)
    x = noised(1.0, 4)
    expected = jacobian_variance(exact.posterior_cov(x, sigma, labels))
    for closed in (
        exact.posterior_variance(x, sigma, labels),
        exact.posterior_cov(x, sigma, labels).diagonal(),
    ):
        torch.testing.assert_close(closed, expected, rtol=1e-8, atol=1e-12)
    together = exact.posterior_variance(x.reshape(2, 2, 1, 8, 8), 0.5)
    torch.testing.assert_close(together.reshape(x.shape), exact.posterior_variance(x, 0.5))
    single: Denoiser = denoiser(name, torch.float32)
    in_single = single.posterior_variance(x.float(), sigma.float(), labels)
    assert in_single.dtype == torch.float32
    torch.testing.assert_close(in_single.double(), expected, rtol=1e-4, atol=1e-6)


class Coin(Denoiser):
    """Of data that are -1 or 1 in each place; without a closed form of its own."""

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([2, 3])

    def forward(self, x: Tensor, sigma: Any, class_labels: Tensor | None = None) -> Tensor:
        return torch.tanh(x / torch.as_tensor(sigma).reshape(-1, 1, 1) ** 2)


def test_without_a_closed_form_it_is_the_diagonal_of_the_jacobian() -> None:
    coin, x, sigma = Coin(), randn(4, 2, 3), torch.tensor([0.5, 1.0, 2.0, 10.0], dtype=torch.float64)
    expected = 1 - coin(x, sigma) ** 2  # E[x_0^2] = 1
    torch.testing.assert_close(coin.posterior_variance(x, sigma), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(coin.posterior_cov(x, sigma).diagonal(), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(coin.posterior_cov(x, sigma).trace(), expected.sum((1, 2)), rtol=1e-10, atol=0)


def test_class_labels_reach_the_denoiser() -> None:
    exact, x, v = denoiser("mixture-classes"), noised(2.0, 4), randn(4, 1, 8, 8)
    labels = digits()[1][:4]
    with_labels = exact.posterior_cov(x, 2.0, labels).apply(v)
    assert relative_error(exact.posterior_cov(x, 2.0).apply(v), with_labels) > 1e-3


def test_wrong_shapes_are_errors() -> None:
    exact = gaussian()
    with pytest.raises(ValueError, match=r"expected x of shape \(\*batch, 1, 2, 3\), got \(4, 6\)"):
        exact.posterior_cov(randn(4, 6), 1.0)
    with pytest.raises(ValueError, match=r"expected v of the shape of x, \(4, 1, 2, 3\), got \(1, 2, 3\)"):
        exact.posterior_cov(randn(4, 1, 2, 3), 1.0).apply(randn(1, 2, 3))
    with pytest.raises(ValueError, match="sigma"):
        exact.posterior_cov(randn(4, 1, 2, 3), -1.0)
