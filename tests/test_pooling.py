"""Covariances that components share in part, against their definition and on held-out data."""

from itertools import product

import pytest
import torch
from cases import COVARIANCES, covariance, digits, held_out_digits, randn, relative_error, split, train_digits
from torch import Tensor

from gaussnet import Covariance, GaussianMixtureDenoiser, MarginalDenoiser
from gaussnet.fit import fit_mixture
from gaussnet.fit.pooling import pool


def labelled(count: int = 120) -> tuple[Tensor, Tensor]:
    """Three classes of 4 dimensions, of different sizes, means and covariances; float64."""
    labels = torch.arange(count) % 6 % 4 % 3
    scales = torch.tensor([[1.0, 2.0, 0.5, 0.1], [0.3, 1.0, 1.0, 2.0], [1.0, 0.1, 3.0, 1.0]]).double()
    return randn(3, 4, seed=1)[labels] + randn(count, 4, seed=2) * scales[labels], labels


def sample_covariance(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize(("one", "other"), list(product(COVARIANCES, COVARIANCES)))
def test_it_is_the_weighted_mean(one: str, other: str) -> None:
    own, within = covariance(one, seed=1), covariance(other, seed=2)
    (pooled,) = pool([own], [30], within, prior=10.0)
    expected = 0.75 * own.dense() + 0.25 * within.dense()
    torch.testing.assert_close(pooled.dense(), expected)
    axes = pooled.eigvecs
    torch.testing.assert_close(axes.mT @ axes, torch.eye(pooled.rank).double())
    assert bool((pooled.eigvals.diff() <= 1e-12).all()), "the leading axes first"


def test_of_no_samples_and_of_many() -> None:
    own, within = covariance("full", seed=1), covariance("low-rank", seed=2)
    torch.testing.assert_close(pool([own], [30], within, prior=0.0)[0].dense(), own.dense())
    torch.testing.assert_close(pool([own], [30], within, prior=1e12)[0].dense(), within.dense())
    assert pool([own.to(torch.float32)], [30], within, 5.0)[0].eigvals.dtype == torch.float32


def test_a_rank_keeps_the_leading_axes_and_the_mean_of_the_others() -> None:
    own, within = covariance("full", seed=1), covariance("full", seed=2)
    (whole,) = pool([own], [30], within, 20.0)
    (cut,) = pool([own], [30], within, 20.0, rank=2)
    torch.testing.assert_close(cut.eigvals, whole.eigvals[:2])
    torch.testing.assert_close(cut.tail, whole.eigvals[2:].mean())
    (share,) = pool([own], [30], within, 20.0, rank=0.6)
    explained = whole.eigvals.cumsum(0) / whole.eigvals.sum()
    assert share.rank == int((explained < 0.6).sum()) + 1
    assert pool([own], [30], within, 20.0, rank=2, tail="zero")[0].tail == 0


def test_a_fit_pools_the_covariances_of_its_classes() -> None:
    data, labels = labelled()
    fitted = fit_mixture(data, labels=labels, shrinkage="none", prior=8.0)
    rest = torch.cat([data[labels == k] - data[labels == k].mean(0) for k in range(3)])
    within = rest.mT @ rest / len(rest)
    for k, found in enumerate(fitted.covariances):
        members = data[labels == k]
        expected = (len(members) * sample_covariance(members) + 8 * within) / (len(members) + 8)
        torch.testing.assert_close(found.dense(), expected, msg=f"class {k}")
    plain = fit_mixture(data, labels=labels, shrinkage="none")
    torch.testing.assert_close(fitted.means, plain.means)
    torch.testing.assert_close(fitted.weights, plain.weights)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_stream_is_pooled_as_an_array_is(mirror: bool) -> None:
    data, labels = labelled()
    images = data.reshape(-1, 1, 2, 2)
    stream = zip(images.split(32), labels.split(32), strict=True)
    found = fit_mixture(stream, shrinkage="none", prior=8.0, mirror=mirror)
    expected = fit_mixture(images, labels=labels, shrinkage="none", prior=8.0, mirror=mirror)
    for k in range(3):
        torch.testing.assert_close(found.covariances[k].dense(), expected.covariances[k].dense())


def test_a_class_of_equal_samples_has_the_common_covariance() -> None:
    data, labels = labelled(60)
    data[labels == 1] = 0.5
    stream = zip(data.split(16), labels.split(16), strict=True)
    for fitted in (
        fit_mixture(data, labels=labels, shrinkage="none", prior=1e9),
        fit_mixture(stream, shrinkage="none", prior=1e9),
    ):
        assert float(fitted.covariances[1].dense().diagonal().min()) > 0.01
    equal = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    points = fit_mixture(equal, labels=torch.tensor([0, 0, 1, 1]), prior=3.0)
    assert [float(part.dense()) for part in points.covariances] == [0.0, 0.0]


@pytest.mark.parametrize(("shrinkage", "sigma"), [("cv", 0.2), ("none", 0.5)])
def test_of_few_samples_it_denoises_better(shrinkage: str, sigma: float) -> None:
    labels = digits()[1]
    data, own, clean = train_digits()[:400], labels[split()[0]][:400], held_out_digits()
    x = clean + sigma * randn(*clean.shape, seed=3)

    def error(prior: float) -> float:
        mixture = GaussianMixtureDenoiser.fit(data, labels=own, prior=prior, shrinkage=shrinkage)
        assert mixture.provenance["arguments"]["prior"] == prior
        refined = MarginalDenoiser.fit(data, mixture, labels=own)
        return float((refined(x, sigma, labels[split()[1]]) - clean).square().mean())

    assert error(32.0) < 0.97 * error(0.0), "than with none"
    assert error(32.0) < 0.99 * error(1e9), "than with one covariance for all"


def test_clusters_are_pooled_too() -> None:
    data, _ = labelled()
    own, pooled = (fit_mixture(data, 3, shrinkage="none", prior=prior) for prior in (0.0, 1e9))
    spread = [
        float(relative_error(part.dense(), pooled.covariances[0].dense())) for part in pooled.covariances
    ]
    assert max(spread) < 1e-6, "they are all the same"
    assert relative_error(own.covariances[0].dense(), own.covariances[1].dense()) > 0.1


@pytest.mark.parametrize("prior", [-1.0, float("inf"), float("nan")])
def test_impossible_priors(prior: float) -> None:
    data, labels = labelled()
    with pytest.raises(ValueError, match=f"expected a finite prior >= 0, a number of samples, got {prior}"):
        fit_mixture(data, labels=labels, prior=prior)
    with pytest.raises(ValueError, match="expected a finite prior"):
        pool([Covariance(torch.eye(2), torch.ones(2))], [3], Covariance(torch.eye(2), torch.ones(2)), prior)


def test_the_likeliest_covariances_have_no_prior() -> None:
    with pytest.raises(ValueError, match=r"em_steps .* expected prior=0 with them, got 2\.0"):
        fit_mixture(labelled()[0], 3, em_steps=2, prior=2.0)
