"""Fitting: streamed moments, eigenvalues and their shrinkage, clusters."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import digits, orthogonal, randn, split, train_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from gaussnet import GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.fit import Moments, fit_covariance, fit_moments, kmeans_labels
from gaussnet.fit.moments import merge_all
from gaussnet.fit.shrinkage import truncate
from gaussnet.fit.solvers import Axes
from gaussnet.fit.streams import subsample

OFFSET = 1e4  # a mean in whose square the variance would drown: 1e8 against 1


def moments_of(data: Tensor) -> Moments:
    return merge_all(fit_moments(data))


def assert_moments_equal(actual: Moments, expected: Moments, name: str) -> None:
    assert actual.count == expected.count, name
    assert actual.event_shape == expected.event_shape, name
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-12, atol=1e-12, msg=f"mean, {name}")
    scale = float(expected.scatter.abs().max())
    torch.testing.assert_close(
        actual.scatter, expected.scatter, rtol=0, atol=1e-11 * scale, msg=f"scatter, {name}"
    )


# Moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, OFFSET])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moments_are_those_of_numpy(offset: float, dtype: torch.dtype) -> None:
    data = (randn(200, 1, 2, 3) + offset).to(dtype)
    flat = data.double().flatten(1).numpy()
    moments = moments_of(data)
    assert (moments.count, moments.event_shape, moments.dtype) == (200, (1, 2, 3), dtype)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.numpy(), flat.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(flat.T, bias=True), rtol=0, atol=1e-11)


def test_low_precision_data_are_accumulated_in_float64() -> None:
    data = randn(64, 5).to(torch.bfloat16)
    moments = moments_of(data)
    assert moments.dtype == torch.float32
    assert_moments_equal(moments, moments_of(data.double()), "bfloat16")
    assert moments_of((randn(64, 5) * 99).to(torch.uint8)).dtype == torch.float32


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 59), max_size=6), folds=st.integers(1, 5), seed=st.integers(0, 9))
def test_moments_do_not_depend_on_batches(cuts: list[int], folds: int, seed: int) -> None:
    data = randn(60, 4, seed=seed) + 100.0
    edges = [0, *sorted(set(cuts)), 60]
    batches = [data[a:b] for a, b in pairwise(edges)]
    whole = fit_moments(data, folds)
    for k, (streamed, expected) in enumerate(zip(fit_moments(iter(batches), folds), whole, strict=True)):
        assert_moments_equal(streamed, expected, f"fold {k} of {folds}, edges {edges}")
        assert_moments_equal(expected, moments_of(data[k::folds]), f"fold {k} of {folds}")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 20), min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_moments_merge_in_any_order(sizes: list[int], order: Any) -> None:
    data = randn(sum(sizes), 4) + 100.0
    parts = [moments_of(part) for part in data.split(sizes)]
    order.shuffle(parts)
    assert_moments_equal(merge_all(parts), moments_of(data), f"{sizes}")
    left, right = parts[0], merge_all(parts[1:])
    assert_moments_equal(left.merge(right), right.merge(left), f"commuted, {sizes}")


def test_merged_moments_have_the_wider_dtype() -> None:
    single, double = moments_of(randn(4, 3, dtype=torch.float32)), moments_of(randn(4, 3))
    assert single.merge(double).dtype == double.merge(single).dtype == torch.float64


@pytest.mark.parametrize("as_array", [False, True])
def test_generators_of_tensors_and_arrays(as_array: bool) -> None:
    data = randn(50, 1, 2, 3)

    def batches() -> Iterator[Any]:
        for part in data.split(7):
            yield part.numpy() if as_array else part

    fitted, expected = GaussianDenoiser.fit(batches()), GaussianDenoiser.fit(data)
    assert_moments_equal(merge_all(fit_moments(batches())), moments_of(data), "generator")
    torch.testing.assert_close(fitted.covariance.dense(), expected.covariance.dense(), rtol=0, atol=1e-12)
    assert_moments_equal(merge_all(fit_moments(data.numpy())), moments_of(data), "array")


def test_some_samples_of_an_array_are_those_of_the_tensor(tmp_path: Path) -> None:
    data, labels = randn(50, 2, 3), torch.arange(50)
    np.save(tmp_path / "data.npy", data.numpy())
    expected, places = subsample(data, 7, labels, torch.Generator().manual_seed(4))
    assert places is not None
    assert len(set(places.tolist())) == 7
    assert expected.equal(data[places])
    for array in (data.numpy(), np.load(tmp_path / "data.npy", mmap_mode="r")):
        found, same = subsample(array, 7, labels, torch.Generator().manual_seed(4))
        assert found.equal(expected)
        assert same is not None
        assert same.equal(places)
        assert subsample(array, 50)[0].equal(data)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, "at least one sample, got none"),
        ([], ValueError, "at least one sample, got none"),
        (torch.zeros(3), ValueError, r"shape \(N, \*event_shape\), got \(3,\)"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], ValueError, r"one shape, got \(3,\) and \(4,\)"),
        ([[1.0, 2.0]], TypeError, "batches to be tensors or arrays, .* got float"),
        (torch.tensor([[0.0], [1.0], [math.nan]]), ValueError, r"NaN or infinite values in sample 2"),
        ([torch.zeros(5, 1), torch.tensor([[0.0], [math.inf]])], ValueError, r"in sample 6"),
    ],
    ids=["empty", "no-batch", "1-d", "shapes", "list", "nan", "inf"],
)
def test_impossible_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_moments(data)


# Spectrum -----------------------------------------------------------------------------------------


def test_without_shrinkage_the_fit_has_the_moments_of_the_data() -> None:
    data = train_digits()
    fitted = GaussianDenoiser.fit(data, shrinkage="none")
    flat = data.flatten(1)
    torch.testing.assert_close(fitted.mean.flatten(), flat.mean(0), rtol=1e-12, atol=1e-13)
    expected = torch.cov(flat.T, correction=0)
    torch.testing.assert_close(fitted.covariance.dense(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(fitted.variance, expected.trace() / 64, rtol=1e-13, atol=0)
    assert fitted.covariance.rank == 64
    assert bool((fitted.covariance.eigvals.diff() <= 0).all())


@pytest.mark.parametrize("rank", [1, 10, 63])
def test_the_tail_is_the_mean_dropped_eigenvalue(rank: int) -> None:
    data = train_digits()
    expected = torch.linalg.eigvalsh(torch.cov(data.flatten(1).T, correction=0)).flip(0)
    cov = GaussianDenoiser.fit(data, rank=rank, shrinkage="none").covariance
    assert cov.rank == rank
    torch.testing.assert_close(cov.eigvals, expected[:rank], rtol=0, atol=1e-13)
    torch.testing.assert_close(cov.tail, expected[rank:].mean(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(cov.trace(lambda lam: lam), expected.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shrinkage", ["cv", "none"])
@pytest.mark.parametrize("rank", [None, 5])
def test_truncation_preserves_the_trace(shrinkage: str, rank: int | None) -> None:
    data = train_digits()[:40]  # N < D
    whole, cut = (fit_covariance(data, r, shrinkage).covariance for r in (None, rank))
    total = whole.trace(lambda lam: lam)
    torch.testing.assert_close(cut.trace(lambda lam: lam), total, rtol=1e-12, atol=0)
    if shrinkage == "none":
        torch.testing.assert_close(total, data.flatten(1).var(0, correction=0).sum(), rtol=1e-12, atol=0)
        assert whole.rank == 39


def test_truncate_counts_the_directions_that_have_no_eigenvector() -> None:
    axes, tail = truncate(Axes(torch.tensor([4.0, 2.0, 1.0]), torch.eye(6)[:, :3]), torch.tensor(0.5), rank=1)
    assert (axes.eigvals.tolist(), axes.eigvecs.shape) == ([4.0], (6, 1))
    assert tail.item() == pytest.approx((2 + 1 + 3 * 0.5) / 5)


@pytest.mark.parametrize("shrinkage", ["cv", "none"])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 10, 63, 64, 65])
def test_any_number_of_samples(count: int, shrinkage: str) -> None:
    fitted = GaussianDenoiser.fit(train_digits()[:count], shrinkage=shrinkage)
    out = fitted(train_digits()[:4], 0.1)
    assert fitted.covariance.rank <= count - 1
    assert out.isfinite().all()
    assert fitted.variance > 0


@pytest.mark.parametrize("count", [40, 60, 90])
def test_cross_validation_predicts_the_error_on_new_data(count: int) -> None:
    # Truth: D = 48, eigenvalues 1/k^2 in a random basis; N about D training samples.
    dim = 48
    roots = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
    basis = orthogonal(dim)
    data, new = ((randn(n, dim, seed=seed) * roots) @ basis.T for n, seed in ((count, 1), (5000, 2)))
    noise = randn(5000, dim, seed=3)
    cv, sample = (GaussianDenoiser.fit(data, shrinkage=shrinkage) for shrinkage in ("cv", "none"))
    for sigma in (0.02, 0.05, 0.1, 0.3):
        held_out = {
            name: float((fitted(new + sigma * noise, sigma) - new).square().mean())
            for name, fitted in (("cv", cv), ("none", sample))
        }
        predicted = {"cv": float(cv.bayes_error(sigma)), "none": float(sample.bayes_error(sigma))}
        off = {name: abs(math.log(held_out[name] / predicted[name])) for name in held_out}
        bound = 1.0 if sigma <= 0.1 else 1.005  # at higher noise, overfitted eigenvalues cost nothing
        assert held_out["cv"] < bound * held_out["none"], f"{count=} {sigma=}: {held_out}"
        assert off["cv"] < min(0.1, 0.5 * off["none"]), f"{count=} {sigma=}: {off}"


@pytest.mark.parametrize("count", [20, 31, 200])
def test_cross_validated_eigenvalues_are_left_out_variances(count: int) -> None:
    # Of each third of the data, about the mean and along the eigenvectors of the other two.
    data = randn(count, 12) / torch.arange(1, 13) + 5.0
    variances, total = torch.zeros(12, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    rank = min(12, count - math.ceil(count / 3) - 1)
    for k in range(3):
        rest = torch.cat([data[j::3] for j in range(3) if j != k])
        eigvecs = torch.linalg.eigh(torch.cov(rest.T))[1].flip(1)
        left_out = data[k::3] - rest.mean(0)
        variances += (left_out @ eigvecs).square().sum(0) / count
        total += left_out.square().sum() / count
    cov = fit_covariance(data).covariance
    assert cov.rank == rank
    expected = isotonic_regression(variances[:rank].numpy(), increasing=False)
    torch.testing.assert_close(cov.eigvals, torch.from_numpy(expected.copy()), rtol=1e-9, atol=0)
    torch.testing.assert_close(cov.trace(lambda lam: lam), total, rtol=1e-9, atol=0)


def test_cross_validation_hardly_moves_well_determined_eigenvalues() -> None:
    data = randn(90 * 6, 6) * torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0, 0.5])
    cv, sample = (fit_covariance(data, shrinkage=shrinkage).covariance for shrinkage in ("cv", "none"))
    assert not cv.eigvals.equal(sample.eigvals)
    torch.testing.assert_close(cv.eigvals, sample.eigvals, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (randn(1, 4), {}, "at least 2 samples to fit a covariance, got 1"),
        (torch.full((7, 4), 0.1), {}, "expected data that vary, got 7 samples that are all equal"),
        (torch.full((7, 4), 1 / 3, dtype=torch.float64), {}, "expected data that vary"),
        (torch.full((7, 4), math.nan), {}, "finite data, got NaN or infinite values in sample 0"),
        (1e200 * randn(20, 3), {}, r"data whose squares are finite in float64, got a variance of (inf|nan)"),
        (randn(9, 4), {"rank": 0}, r"1 <= rank <= min\(N - 1, D\) = 4 .*, got 0"),
        (randn(9, 4), {"rank": 5}, r"1 <= rank <= min\(N - 1, D\) = 4 .*, got 5"),
        (randn(3, 4), {"rank": 3}, r"min\(N - 1, D\) = 2 for 3 samples of 4 dimensions, got 3"),
        (
            randn(9, 4),
            {"shrinkage": "lw"},
            "shrinkage to be one of cv, none, remap, ledoit-wolf, oas, got 'lw'",
        ),
    ],
)
def test_impossible_fits(data: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDenoiser.fit(data, **arguments)


@pytest.mark.parametrize("count", [2, 100, 1001, 5000])
@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_equal_samples_are_noticed_in_any_number(count: int, batch: int) -> None:
    data = (0.1 * torch.arange(1, 5, dtype=torch.float64)).expand(count, 4)
    with pytest.raises(ValueError, match="expected data that vary"):
        fit_covariance(iter(data.split(batch)))


# Clusters -----------------------------------------------------------------------------------------


def test_mixture_weights_and_means_are_those_of_the_clusters() -> None:
    data = train_digits(torch.float32)
    labels = kmeans_labels(data, 7, seed=3)
    assert labels.unique().tolist() == list(range(7))
    mixture = GaussianMixtureDenoiser.fit(data.double(), n_components=7, seed=3, shrinkage="none")
    for k in range(7):
        cluster = data[labels == k].double()
        share = len(cluster) / len(data)
        assert float(mixture.weights[k]) == pytest.approx(share, rel=1e-12), f"weight {k}"
        torch.testing.assert_close(mixture.means[k], cluster.mean(0), rtol=0, atol=1e-12, msg=f"mean {k}")
        rank = int(mixture.ranks[k])
        torch.testing.assert_close(
            mixture.eigvals[k, :rank].sum() + (64 - rank) * mixture.tails[k],
            cluster.flatten(1).var(0, correction=0).sum(),
            msg=f"trace {k}",
        )


def test_mixture_of_classes() -> None:
    data, classes = train_digits(), digits()[1][split()[0]]
    mixture = GaussianMixtureDenoiser.fit(data, labels=classes, rank=5, shrinkage="none")
    labels = mixture.component_labels
    assert labels is not None
    assert labels.tolist() == list(range(10))
    for k in range(10):
        torch.testing.assert_close(mixture.means[k], data[classes == k].mean(0), msg=f"mean {k}")
        expected = GaussianDenoiser.fit(data[classes == k], rank=5, shrinkage="none").covariance
        torch.testing.assert_close(mixture.eigvals[k], expected.eigvals, msg=f"eigvals {k}")
        torch.testing.assert_close(mixture.tails[k], expected.tail, msg=f"tail {k}")


def test_the_seed_reproduces_the_clusters() -> None:
    data = train_digits()
    assert kmeans_labels(data, 6, seed=1).equal(kmeans_labels(data, 6, seed=1))
    assert not kmeans_labels(data, 6, seed=1).equal(kmeans_labels(data, 6, seed=2))


def test_singleton_clusters_dissolve_into_the_nearest() -> None:
    blobs = torch.cat([randn(20, 2), randn(20, 2, seed=1) + 50, torch.tensor([[200.0, 0.0], [0.0, 90.0]])])
    labels = kmeans_labels(blobs, 4)
    assert labels.unique().tolist() == [0, 1]
    assert labels[:20].unique().numel() == labels[20:40].unique().numel() == 1
    assert int(labels[41]) == int(labels[20])  # (0, 90) is nearer to (50, 50) than to 0
    mixture = GaussianMixtureDenoiser.fit(blobs, n_components=4)
    assert mixture.n_components == 2
    torch.testing.assert_close(mixture.weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_single_cluster_is_never_dissolved() -> None:
    assert kmeans_labels(randn(1, 3), 1).tolist() == [0]
    assert kmeans_labels(randn(5, 3), 5).unique().tolist()[0] == 0  # all singletons: they merge


LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either n_components or labels, got none"),
        ({"n_components": 2, "labels": LABELS}, "either n_components or labels, got both"),
        ({"n_components": 8}, "1 <= n_components <= N = 7, got 8"),
        ({"n_components": 0}, "1 <= n_components <= N = 7, got 0"),
        ({"n_components": 2, "rank": 0}, r"rank >= 1 or in \(0, 1\), got 0"),
        ({"n_components": 2, "shrinkage": "lw"}, "shrinkage to be one of"),
        ({"labels": LABELS}, r"at least 2 samples of each class, got one of \[2\]"),
        ({"labels": LABELS[:5]}, r"one integer label for each of 7 samples, got torch.int64 of shape \(5,\)"),
        ({"labels": LABELS.float()}, r"one integer label .* got torch.float32"),
    ],
    ids=str,
)
def test_impossible_mixtures(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDenoiser.fit(randn(7, 3), **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_mixtures_of_bad_data(bad: float) -> None:
    data = randn(7, 3)
    data[2, 1] = bad
    with pytest.raises(ValueError, match="finite data, got NaN or infinite"):
        GaussianMixtureDenoiser.fit(data, n_components=2)


def test_a_rank_beyond_the_folds_is_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    data = randn(30, 64)
    fitted = GaussianDenoiser.fit(data, rank=29)
    assert fitted.covariance.rank == 19
    assert "rank 29 is lowered to 19" in caplog.text


def test_data_that_require_grad_are_fitted_as_they_are() -> None:
    data = randn(50, 4)
    fitted = GaussianDenoiser.fit(data.clone().requires_grad_())
    assert torch.equal(fitted.mean, GaussianDenoiser.fit(data).mean)
    assert not fitted.covariance.eigvals.requires_grad
