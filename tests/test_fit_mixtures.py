"""Mixtures: clusters, classes and streams of them, and expectation maximisation against a plain one."""

import logging
import math
from collections.abc import Iterator
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    digits,
    held_out_digits,
    normal_logpdf,
    orthogonal,
    randn,
    relative_error,
    split,
    train_digits,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gaussnet import Covariance, GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.fit import MixtureFit, fit_covariance, fit_mixture, kmeans_labels, mixtures
from gaussnet.fit.maximisation import FLOOR, _likeliest, _log_prob, maximise


def train_classes() -> Tensor:
    return digits()[1][split()[0]]


def lively_digits(count: int) -> Tensor:
    """Digits of which no pixel is constant: where nothing varies, axes would be rounding."""
    return train_digits()[:count] + 1e-2 * randn(count, 1, 8, 8)


def loader(data: Tensor, labels: Tensor, size: int) -> Iterator[Any]:
    yield from zip(data.split(size), labels.split(size), strict=True)


def assert_same(actual: MixtureFit, expected: MixtureFit, bound: float = 1e-9) -> None:
    assert len(actual.covariances) == len(expected.covariances)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.means, expected.means, rtol=0, atol=bound)
    for k, (one, other) in enumerate(zip(actual.covariances, expected.covariances, strict=True)):
        assert one.rank == other.rank, f"component {k}"
        torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=bound, msg=f"component {k}")
    assert (actual.classes is None) == (expected.classes is None)
    if actual.classes is not None and expected.classes is not None:
        assert actual.classes.tolist() == expected.classes.tolist()


# Streams and arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shrinkage": "none", "rank": 7},
        {"shrinkage": "oas"},
        {"rank": 0.8, "tail": "zero"},
        {"rank": 500},
    ],
    ids=str,
)
def test_a_stream_of_classes_fits_what_arrays_fit(options: dict[str, Any], mirror: bool) -> None:
    data, classes = lively_digits(600), train_classes()[:600]  # 60 a class: fewer than dimensions
    expected = fit_mixture(data, labels=classes, mirror=mirror, **options)
    for size in (1, 37, 600):
        assert_same(fit_mixture(loader(data, classes, size), mirror=mirror, **options), expected)
    assert expected.classes is not None
    assert expected.classes.tolist() == list(range(10))


def test_the_folds_of_a_class_are_in_its_own_order() -> None:
    # Were folds those of the whole stream, one class would be in a single fold.
    data, classes = randn(90, 6), torch.arange(90) % 3
    fitted = fit_mixture(loader(data, classes, 8))
    for k in range(3):
        expected = fit_covariance(data[classes == k]).covariance
        torch.testing.assert_close(fitted.covariances[k].dense(), expected.dense(), msg=f"class {k}")


def test_classes_of_any_numbers() -> None:
    data, classes = randn(30, 4), torch.tensor([7, 0, 123]).repeat(10)
    for fitted in (fit_mixture(data, labels=classes), fit_mixture(loader(data, classes, 7))):
        assert fitted.classes is not None
        assert fitted.classes.tolist() == [0, 7, 123]
        assert fitted.weights.tolist() == [10, 10, 10]
        torch.testing.assert_close(fitted.means[1], data[classes == 7].mean(0))


def test_plenty_of_mirrored_images_are_fitted_alike(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gaussnet")
    data, classes = (
        randn(700, 1, 2, 2) / torch.arange(1, 3),
        torch.arange(700) % 2,
    )  # 700 of a class, mirrored
    expected = fit_mixture(data, labels=classes, mirror=True)
    assert_same(fit_mixture(loader(data, classes, 99), mirror=True), expected, 1e-12)
    assert "no need to cross-validate" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_a_class_of_equal_samples_is_a_point(stream: bool, value: float) -> None:
    data = torch.cat([randn(20, 3), torch.full((20, 3), value, dtype=torch.float64)])
    classes = torch.arange(40) // 20
    fitted = fit_mixture(loader(data, classes, 7)) if stream else fit_mixture(data, labels=classes)
    assert (fitted.covariances[0].rank, fitted.covariances[1].rank) == (3, 0)
    assert float(fitted.covariances[1].tail) == 0
    torch.testing.assert_close(fitted.means[1], data[20], rtol=0, atol=1e-15)
    alone = fit_mixture(loader(data[20:], classes[20:], 7)) if stream else fit_mixture(data[20:], 1)
    assert (len(alone.covariances), float(alone.covariances[0].dense().abs().max())) == (1, 0.0)


def test_classes_that_hardly_vary_are_no_points() -> None:
    data = torch.cat([randn(20, 3), 1e-4 * randn(20, 3, seed=1) + 100])
    classes = torch.arange(40) // 20
    expected = 1e-8 * torch.cov(randn(20, 3, seed=1).T, correction=0)
    for fitted in (
        fit_mixture(data, labels=classes, shrinkage="none"),
        fit_mixture(loader(data, classes, 7), shrinkage="none"),
    ):
        assert relative_error(fitted.covariances[1].dense(), expected) < 1e-3


@pytest.mark.parametrize(
    "options", [{"groups": torch.arange(60)}, {"select": "heldout"}, {"em_steps": 1}], ids=str
)
def test_a_stream_of_classes_cannot_be_read_twice(options: dict[str, Any]) -> None:
    message = "groups, select and em_steps need an array of samples, got generator"
    with pytest.raises(TypeError, match=message):
        fit_mixture(loader(randn(60, 3), torch.arange(60) % 2, 7), **options)
    with pytest.raises(ValueError, match='"ledoit-wolf" needs an array of samples'):
        fit_mixture(loader(randn(60, 3), torch.arange(60) % 2, 7), shrinkage="ledoit-wolf")


# Clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "generator", "tuples", "numpy", "memmap", "uint8"])
def test_clusters_of_anything_that_holds_samples(kind: str, tmp_path: Path) -> None:
    data = train_digits()[:200]
    other: Any = data.numpy()
    if kind in ("list", "generator"):
        other = list(data.split(33)) if kind == "list" else (batch for batch in data.split(33))
    elif kind == "tuples":
        other = loader(data, torch.zeros(200), 33)
    elif kind == "memmap":
        np.save(tmp_path / "data.npy", data.numpy())
        other = np.load(tmp_path / "data.npy", mmap_mode="r")
    elif kind == "uint8":
        data = ((data + 1) * 100).byte()
        other, data = data.numpy(), data.float()
    expected, found = fit_mixture(data, 4, 5), fit_mixture(other, 4, 5)
    assert_same(found, expected, 0)
    assert found.means.dtype == expected.means.dtype
    labels = train_classes()[:200]
    if kind in ("numpy", "memmap", "uint8"):
        assert_same(fit_mixture(other, labels=labels), fit_mixture(data, labels=labels), 0)


@pytest.mark.parametrize("count", [3, 10])
def test_components_are_fits_to_their_clusters(count: int) -> None:
    data = train_digits()
    clusters = kmeans_labels(data, count)
    groups = torch.arange(len(data)) // 2
    for options in ({}, {"rank": 5, "shrinkage": "remap"}, {"rank": 0.9, "tail": "zero"}, {"groups": groups}):
        given: dict[str, Any] = options
        fitted = fit_mixture(data, count, **given)
        for k in range(count):
            mine = clusters == k
            own = {**given, "groups": groups[mine]} if "groups" in given else given
            expected = fit_covariance(data[mine], **own)
            assert fitted.weights[k] == int(mine.sum())
            assert fitted.means[k].equal(expected.mean)
            assert fitted.covariances[k].dense().equal(expected.covariance.dense()), f"{k}, {options}"


def test_mirrored_clusters_hold_out_images_with_their_mirror_images() -> None:
    data, classes = lively_digits(300), train_classes()[:300]
    fitted = fit_mixture(data, labels=classes, mirror=True)
    groups = torch.arange(300) // 2
    grouped = fit_mixture(data, labels=classes, mirror=True, groups=groups)
    for k in range(10):
        mine = classes == k
        for mixture, own in ((fitted, None), (grouped, groups[mine])):
            expected = fit_covariance(data[mine], mirror=True, groups=own)
            torch.testing.assert_close(mixture.means[k], expected.mean)
            dense = mixture.covariances[k].dense()
            torch.testing.assert_close(dense, expected.covariance.dense(), rtol=0, atol=1e-10)


def test_rank_and_shrinkage_are_selected_for_each_component(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gaussnet")
    data = torch.cat([train_digits()[:160], train_digits()[160:168]])
    classes = torch.cat([torch.arange(160) % 2, torch.full((8,), 2)])
    fitted = fit_mixture(data, labels=classes, select="heldout")
    for k in range(2):
        expected = fit_covariance(data[classes == k], select="heldout")
        assert expected.selection is not None
        assert fitted.covariances[k].dense().equal(expected.covariance.dense())
    few = fit_covariance(data[160:])
    assert fitted.covariances[2].dense().equal(few.covariance.dense())
    assert "too few samples or groups to hold some of component 2 out: 8" in caplog.text


def test_components_of_few_groups_or_samples_are_not_selected() -> None:
    data, classes = train_digits()[:120], torch.arange(120) % 3
    one_group = fit_mixture(data, labels=classes, groups=classes, select="heldout")
    for k in range(3):
        expected = fit_covariance(data[classes == k], groups=torch.zeros(40, dtype=torch.long))
        assert one_group.covariances[k].dense().equal(expected.covariance.dense())
    ranked = fit_mixture(data[:42], labels=classes[:42], rank=13, select="heldout")  # 11 remain to choose by
    assert {covariance.rank for covariance in ranked.covariances} <= set(range(8, 14))


def test_a_rank_is_lowered_to_what_a_component_has() -> None:
    data, classes = randn(30, 8), torch.tensor([0] * 3 + [1] * 27)
    for rank in (5, np.int64(5)):
        given: Any = rank
        fitted = fit_mixture(data, labels=classes, rank=given, shrinkage="none")
        assert [covariance.rank for covariance in fitted.covariances] == [2, 5]
    assert fit_mixture(data, labels=classes, rank=500, shrinkage="none").covariances[1].rank == 8
    assert fit_mixture(data, labels=classes, rank=0.5, shrinkage="none").covariances[1].rank < 8


def test_clusters_of_points() -> None:
    points = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    for options in ({}, {"select": "heldout"}, {"mirror": False, "rank": 1}):
        given: dict[str, Any] = options
        fitted = fit_mixture(points.repeat(5, 1), 3, **given)
        assert sorted(fitted.means.tolist()) == sorted(points.tolist())
        assert all(float(covariance.dense().abs().max()) == 0 for covariance in fitted.covariances)
    mixture = GaussianMixtureDenoiser.fit(points.repeat(5, 1), 3)
    assert bool(torch.isfinite(mixture(randn(4, 2), 0.1)).all())
    torch.testing.assert_close(mixture(points + 0.1, 0.5), points, rtol=0, atol=1e-6)


def test_single_samples() -> None:
    fitted = fit_mixture(randn(1, 3), 1)
    assert (fitted.weights.tolist(), float(fitted.covariances[0].tail)) == ([1.0], 0.0)
    assert fitted.means.equal(randn(1, 3))
    apart = torch.cat([randn(9, 2), torch.tensor([[99.0, 0.0]])])
    assert fit_mixture(apart, 2).weights.tolist() == [10.0]


def test_data_that_require_grad_are_fitted_as_they_are() -> None:
    data = train_digits()[:100].clone().requires_grad_()
    for options in ({}, {"em_steps": 2, "shrinkage": "none"}, {"em_steps": 2}):
        given: dict[str, Any] = options
        fitted = fit_mixture(data, 3, 4, **given)
        tensors = (fitted.weights, fitted.means, *(p.eigvals for p in fitted.covariances))
        assert not any(tensor.requires_grad for tensor in tensors)
    assert not fit_mixture(torch.ones(9, 2, requires_grad=True), 1).means.requires_grad


LABELS = torch.tensor([0] * 8 + [1] * 8)
ONE_ALONE = torch.tensor([0] * 8 + [1] * 7 + [2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either n_components or labels, got none"),
        ({"n_components": 2, "labels": LABELS}, ValueError, "either n_components or labels, got both"),
        ({"n_components": 17}, ValueError, "1 <= n_components <= N = 16, got 17"),
        ({"n_components": -1}, ValueError, "1 <= n_components <= N = 16, got -1"),
        ({"labels": LABELS - 1}, ValueError, "labels >= 0, got -1"),
        ({"labels": LABELS.double()}, ValueError, "one integer label .*float64"),
        ({"labels": LABELS.bool()}, ValueError, "one integer label .*bool"),
        ({"labels": LABELS[:9]}, ValueError, r"of 16 samples, got torch.int64 of shape \(9,\)"),
        ({"labels": [0] * 16}, TypeError, "integer labels for 16 samples, got list"),
        ({"labels": ONE_ALONE}, ValueError, r"at least 2 samples of each class, got one of \[2\]"),
        (
            {"labels": LABELS, "em_steps": 1},
            ValueError,
            "em_steps moves samples .* which then are no classes: expected n_components, got labels",
        ),
        ({"n_components": 2, "rank": -3}, ValueError, r"rank >= 1 or in \(0, 1\), got -3"),
        ({"n_components": 2, "rank": 1.5}, ValueError, r"share in \(0, 1\), got 1.5"),
        ({"n_components": 2, "rank": 0.5, "em_steps": 2}, ValueError, "integer rank with em_steps, got 0.5"),
        ({"n_components": 2, "rank": 0.5, "select": "heldout"}, ValueError, "integer rank with select"),
        ({"n_components": 2, "em_steps": -1}, ValueError, "em_steps >= 0, got -1"),
        ({"n_components": 2, "tail": "median"}, ValueError, "tail to be one of mean, zero, got 'median'"),
        ({"n_components": 2, "select": "cv"}, ValueError, "select to be one of None, heldout, got 'cv'"),
        ({"n_components": 2, "shrinkage": "lw"}, ValueError, "shrinkage to be one of"),
        ({"n_components": 2, "groups": torch.arange(5)}, ValueError, "groups to be 16 integers"),
        ({"n_components": 2, "groups": torch.zeros(16)}, ValueError, "groups to be 16 integers"),
        ({"n_components": 2, "mirror": True}, ValueError, r"images to mirror, got samples of shape \(3,\)"),
    ],
    ids=str,
)
def test_impossible_mixtures(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GaussianMixtureDenoiser.fit(randn(16, 3), **arguments)


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (iter([randn(4, 3)]), {}, TypeError, "integer labels for 4 samples, got NoneType"),
        (loader(randn(16, 3), LABELS, 5), {"n_components": 2, "labels": LABELS}, ValueError, "got both"),
        (loader(randn(16, 3), ONE_ALONE, 5), {}, ValueError, r"of each class, got one of \[2\]"),
        (loader(randn(16, 3), LABELS - 1, 5), {}, ValueError, "labels >= 0, got -1"),
        (loader(randn(16, 3), LABELS.double(), 5), {}, ValueError, "one integer label .*float64"),
        (loader(randn(16, 3), LABELS, 5), {"rank": 1.5}, ValueError, r"share in \(0, 1\), got 1.5"),
        (loader(randn(16, 3), LABELS, 5), {"tail": "median"}, ValueError, "tail to be one of"),
        (loader(randn(16, 3) * math.nan, LABELS, 5), {}, ValueError, "NaN or infinite values in sample 0"),
        (iter([]), {}, ValueError, "at least one sample, got none"),
        (iter([]), {"n_components": 2}, ValueError, "at least one sample, got none"),
        (iter([randn(0, 3)]), {"n_components": 2}, ValueError, "at least one sample, got none"),
        (
            iter([randn(4, 3), randn(4, 2)]),
            {"n_components": 2},
            ValueError,
            r"one shape, got \(2,\) and \(3,\)",
        ),
        (randn(0, 3), {"n_components": 1}, ValueError, r"with N >= 1, got \(0, 3\)"),
        (randn(9), {"n_components": 1}, ValueError, r"\(N, \*event_shape\) with N >= 1, got \(9,\)"),
    ],
    ids=range(14),
)
def test_impossible_data(data: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_mixture(data, **arguments)


# Expectation maximisation -------------------------------------------------------------------------


def plain_em(x: Tensor, labels: Tensor, rank: int | None, steps: int) -> tuple[Any, ...]:
    """Weights, means, dense covariances and log-likelihoods, by full matrices and scipy's densities."""
    count, dim = x.shape
    floor = FLOOR * float(x.var(0, correction=0).mean())
    resp = torch.nn.functional.one_hot(labels).double()
    ranks = [min(rank or dim, int(n) - 1, dim) for n in resp.sum(0)]
    history = []
    for _ in range(steps + 1):
        means = [r @ x / r.sum() for r in resp.T]
        covs = []
        for r, mean, size in zip(resp.T, means, ranks, strict=True):
            eigvals, eigvecs = torch.linalg.eigh((x - mean).T @ ((x - mean) * r[:, None]) / r.sum())
            dropped = dim - size
            cut = torch.cat([eigvals[:dropped].mean().expand(dropped), eigvals[dropped:]]).clamp_min(floor)
            covs.append(eigvecs * cut @ eigvecs.T)
        shares = resp.mean(0)
        joint = (
            torch.stack([normal_logpdf(x, m, c) for m, c in zip(means, covs, strict=True)], 1) + shares.log()
        )
        history.append(float(joint.logsumexp(1).mean()))
        resp = joint.softmax(1)
    return shares * count, torch.stack(means), torch.stack(covs), history, resp  # pyright: ignore


def blobs(count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three overlapping clusters of a few large variances, and labels that are right for most."""
    labels = torch.arange(count) % 3
    factors = randn(3, 2, dim, seed=seed)
    x = torch.einsum("nr,nrd->nd", randn(count, 2, seed=seed + 1), factors[labels])
    x = x + randn(3, dim, seed=seed + 2)[labels] + 0.3 * randn(count, dim, seed=seed + 3)
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.2
    return x, torch.where(wrong, (labels + 1) % 3, labels)


def start_from(clusters: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """These clusters in the place of those that k-means finds."""
    monkeypatch.setattr(mixtures, "kmeans_labels", lambda *_: clusters)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(
    ("shape", "rank"), [((90, 5), 2), ((90, 5), None), ((30, 16), 3), ((30, 16), None), ((90, 1), 1)], ids=str
)
def test_expectation_maximisation_is_that_of_full_matrices(
    shape: tuple[int, int], rank: int | None, steps: int
) -> None:
    x, labels = blobs(*shape)
    weights, means, covs, history, resp = plain_em(x, labels, rank, steps)
    found_weights, found_means, parts, clusters, found_history = maximise(x, labels, rank, steps)
    assert found_history == pytest.approx(history, rel=1e-9)
    torch.testing.assert_close(found_weights, weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.stack(found_means), means, rtol=0, atol=1e-9)
    dense = torch.stack([part.dense() for part in parts])
    torch.testing.assert_close(dense, covs, rtol=0, atol=1e-9)
    assert clusters.equal(resp.argmax(1))


@pytest.mark.parametrize("rank", [3, None])
def test_without_shrinkage_its_components_are_the_result(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = blobs(90, 8)
    start_from(labels + 4, monkeypatch)
    weights, means, covs, history, _ = plain_em(x, labels, rank, 5)
    fitted = fit_mixture(x.reshape(90, 2, 4), 3, rank, shrinkage="none", em_steps=5)
    torch.testing.assert_close(fitted.weights, weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(fitted.means.flatten(1), means, rtol=0, atol=1e-9)
    dense = torch.stack([part.dense() for part in fitted.covariances])
    torch.testing.assert_close(dense, covs, rtol=0, atol=1e-9)
    assert fitted.log_likelihood == pytest.approx(history, rel=1e-9)
    assert fitted.classes is None, "clusters have no classes"


@pytest.mark.parametrize("shrinkage", ["cv", "oas"])
def test_with_shrinkage_components_are_fitted_to_the_samples_that_they_are_likeliest_for(
    shrinkage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = blobs(90, 8)
    start_from(labels, monkeypatch)
    *_, history, resp = plain_em(x, labels, 3, 5)
    groups = torch.arange(90) // 2
    fitted = fit_mixture(x, 3, 3, shrinkage=shrinkage, em_steps=5, groups=groups)
    for k in range(3):
        mine = resp.argmax(1) == k
        expected = fit_covariance(x[mine], 3, shrinkage, groups=groups[mine])
        assert fitted.weights[k] == int(mine.sum())
        torch.testing.assert_close(fitted.means[k], expected.mean)
        torch.testing.assert_close(fitted.covariances[k].dense(), expected.covariance.dense())
    assert fitted.log_likelihood == pytest.approx(history, rel=1e-9)
    selected = fit_mixture(x, 3, shrinkage="none", em_steps=5, select="heldout")
    assert selected.weights.sum() == 90
    assert bool((selected.weights == selected.weights.round()).all())


@pytest.mark.parametrize("rank", [2, 16, None])
@pytest.mark.parametrize(("count", "start"), [(1437, "k-means"), (1437, "bad"), (120, "bad")], ids=str)
def test_the_log_likelihood_never_falls(count: int, start: str, rank: int | None) -> None:
    data = train_digits()[:count]
    for components in (1, 4, 12):
        bad = torch.randint(components, (count,), generator=torch.Generator().manual_seed(3))
        labels = kmeans_labels(data, components) if start == "k-means" else bad
        *_, history = maximise(data, labels, rank, 15)
        assert len(history) == 16
        assert all(b >= a - 1e-9 for a, b in pairwise(history)), f"{components} components: {history}"
        if components == 4 and count > 500:
            assert history[-1] > history[0] + 0.01


@pytest.mark.parametrize("rank", [3, None])
def test_convergence_is_to_the_weighted_moments(rank: int | None) -> None:
    x, labels = blobs(300, 6)
    weights, means, parts, _, history = maximise(x, labels, rank, 300)
    assert history[-1] - history[-2] < 1e-12
    joint = torch.stack([normal_logpdf(x, m, p.dense()) for m, p in zip(means, parts, strict=True)], 1)
    resp = (joint + torch.log(weights / 300)).softmax(1)
    torch.testing.assert_close(resp.sum(0), weights, rtol=1e-5, atol=0)
    for r, mean, part in zip(resp.T, means, parts, strict=True):
        torch.testing.assert_close(r @ x / r.sum(), mean, rtol=0, atol=1e-4)
        cov = torch.cov(x.T, correction=0, aweights=r)
        size = part.rank
        torch.testing.assert_close(torch.linalg.eigvalsh(cov).flip(0)[:size], part.eigvals, rtol=1e-4, atol=0)
        torch.testing.assert_close(part.dense().trace(), cov.trace(), rtol=1e-4, atol=0)


def principal_mixture(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Covariance]]:
    """Samples of a mixture of three probabilistic principal component analysers, and its parameters."""
    weights, means = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 1.5 * randn(3, 10, seed=50)
    parts = [
        Covariance(orthogonal(10, k)[:, :2], torch.tensor([4.0 + k, 2.0]).double(), 0.1 * (k + 1))
        for k in range(3)
    ]
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(weights, count, True, generator=generator)
    noise = randn(count, 10, seed=seed)
    draws = torch.stack([part.apply(torch.sqrt, noise) for part in parts], 1)
    return means[index] + draws[torch.arange(count), index], weights, means, parts


def mean_log_prob(x: Tensor, weights: Tensor, means: Tensor, parts: Any) -> float:
    joint = torch.stack([normal_logpdf(x, m, p.dense()) for m, p in zip(means, parts, strict=True)], 1)
    return float((joint + torch.log(weights / weights.sum())).logsumexp(1).mean())


def test_a_known_mixture_is_recovered() -> None:
    x, weights, means, parts = principal_mixture(6000)
    fitted = fit_mixture(x, 3, 2, shrinkage="none", em_steps=60)
    order = min(permutations(range(3)), key=lambda p: float((fitted.means[list(p)] - means).square().sum()))
    for k, j in enumerate(order):
        assert float(fitted.weights[j]) / 6000 == pytest.approx(float(weights[k]), abs=0.02)
        torch.testing.assert_close(fitted.means[j], means[k], rtol=0, atol=0.15)
        assert float(fitted.covariances[j].tail) == pytest.approx(float(parts[k].tail), rel=0.05)
        assert relative_error(fitted.covariances[j].dense(), parts[k].dense()) < 0.1
    truth = mean_log_prob(x, weights, means, parts)
    assert fitted.log_likelihood[0] < truth - 0.05
    assert truth < fitted.log_likelihood[-1] < truth + 0.03
    new = principal_mixture(3000, 1)[0]
    held_out = mean_log_prob(new, fitted.weights, fitted.means, fitted.covariances)
    assert held_out == pytest.approx(mean_log_prob(new, weights, means, parts), abs=0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_denoisers_density_is_the_likelihood(dtype: torch.dtype) -> None:
    data = train_digits(dtype)
    mixture = GaussianMixtureDenoiser.fit(data, 5, 10, shrinkage="none", em_steps=4)
    history = mixture.provenance["log_likelihood"]
    assert {b.dtype for n, b in mixture.named_buffers() if n != "ranks"} == {dtype}
    found = float(mixture.log_prob(data.double(), 1e-6).mean())
    assert found == pytest.approx(history[-1], abs=1e-8 if dtype == torch.float64 else 1e-2)
    assert len(history) == 5


def test_it_improves_on_k_means_for_new_digits() -> None:
    data, new = train_digits(), held_out_digits()
    noise = randn(*new.shape, seed=5)
    for components, rank in ((5, 4), (10, 10)):
        for shrinkage in ("none", "cv"):
            before, after = (
                GaussianMixtureDenoiser.fit(data, components, rank, shrinkage=shrinkage, em_steps=steps)
                for steps in (0, 15)
            )
            name = f"{components} components of rank {rank}, {shrinkage}"
            gain = [float((after.log_prob(new, s) - before.log_prob(new, s)).mean()) for s in (0.1, 0.3)]
            assert min(gain) > 0.3, name
            for sigma in (0.3, 1.0):
                errors = [
                    float((m(new + sigma * noise, sigma) - new).square().mean()) for m in (before, after)
                ]
                assert errors[1] < 0.997 * errors[0], f"{name}, {sigma=}: {errors}"


def test_components_of_less_than_a_sample_stay_where_they_are() -> None:
    # Two components of one point each, at the same place: the broad one takes a little of both.
    x = torch.cat([randn(50, 2), torch.tensor([[0.3, 0.2]] * 2, dtype=torch.float64)])
    labels = torch.cat([torch.zeros(50), torch.tensor([1.0, 2.0])]).long()
    weights, means, parts, clusters, history = maximise(x, labels, None, 15)
    assert 0 < float(weights[1]) == pytest.approx(float(weights[2]))
    assert float(weights[1]) < 1
    assert all(b >= a - 1e-9 for a, b in pairwise(history))
    torch.testing.assert_close(means[1], x[-1])
    assert all(bool(torch.isfinite(part.dense()).all()) for part in parts)
    assert set(clusters.tolist()) <= {0, 1, 2}


def test_a_component_that_loses_all_samples_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # A broad one between two narrow ones, which explain its samples better: its weight goes to zero.
    x = torch.tensor([-3.0] * 100 + [3.0] * 100 + [-3.0, 3.0], dtype=torch.float64)[:, None]
    labels = torch.tensor([4] * 100 + [6] * 100 + [5, 5])
    start_from(labels, monkeypatch)
    *_, history = maximise(x, labels, None, 150)
    assert all(b >= a - 1e-9 for a, b in pairwise(history))
    for steps, count in ((0, 3), (3, 3), (150, 2)):
        fitted = fit_mixture(x, 3, shrinkage="none", em_steps=steps)
        assert len(fitted.weights) == len(fitted.covariances) == count, f"{steps} steps"
        assert float(fitted.weights.sum()) == pytest.approx(202)
        assert bool((fitted.weights > 0).all())
        assert fitted.means[[0, -1]].flatten().tolist() == pytest.approx([-3, 3])
    assert fit_mixture(x, 3, em_steps=3).weights.tolist() == [101, 101]


def test_components_of_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(*arguments: Any) -> Any:
        weights, *others = maximise(*arguments)
        return (weights * torch.tensor([1.0, 0.0, 1.0]), *others)

    monkeypatch.setattr(mixtures, "maximise", losing)
    x = blobs(90, 4)[0]
    fitted = GaussianMixtureDenoiser.fit(x, 3, shrinkage="none", em_steps=2)
    whole = maximise(x, kmeans_labels(x, 3), None, 2)
    assert fitted.n_components == 2
    torch.testing.assert_close(fitted.means, torch.stack([whole[1][0], whole[1][2]]))
    torch.testing.assert_close(fitted.eigvals, torch.stack([whole[2][0].eigvals, whole[2][2].eigvals]))


def test_single_samples_go_to_the_next_likeliest_component() -> None:
    joint = torch.tensor([[0.0, -1, -9], [0, -1, -9], [-3, -2, -9], [-5, -4, -1], [-2, -1, -3], [0, -3, -9]])
    before = joint.clone()
    assert _likeliest(joint).tolist() == [0, 0, 1, 1, 1, 0]
    assert joint.equal(before)
    apart = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    assert _likeliest(apart).tolist() == [1, 1]


def test_a_zero_tail_cuts_its_components_off() -> None:
    data = train_digits()[:200]
    mean, zero = (
        fit_mixture(data, 3, 4, shrinkage="none", em_steps=3, tail=tail) for tail in ("mean", "zero")
    )
    for one, other in zip(mean.covariances, zero.covariances, strict=True):
        assert float(one.tail) > 0
        assert float(other.tail) == 0
        assert one.eigvals.equal(other.eigvals)
        assert one.eigvecs.equal(other.eigvecs)


def test_mirrored_images_take_part() -> None:
    data = train_digits()[:150]
    both = torch.cat([data, data.flip(-1)])
    mirrored = fit_mixture(data, 3, 4, shrinkage="none", em_steps=3, mirror=True)
    assert_same(mirrored, fit_mixture(both, 3, 4, shrinkage="none", em_steps=3), 0)
    assert float(mirrored.weights.sum()) == pytest.approx(300)


def test_no_steps_are_the_plain_fit() -> None:
    data = train_digits()[:200]
    plain = fit_mixture(data, 3, 4)
    assert_same(fit_mixture(data, 3, 4, em_steps=0), plain, 0)
    assert plain.log_likelihood == []


@pytest.mark.parametrize("shrinkage", ["none", "cv"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_data_that_do_not_vary_have_no_likelihood(value: float, shrinkage: str) -> None:
    equal = torch.full((9, 4), value, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected data that vary, got 9 samples that are all equal"):
        fit_mixture(equal, 2, em_steps=3, shrinkage=shrinkage)


def test_densities_of_nearly_flat_components_keep_their_digits() -> None:
    data = train_digits()[:20].flatten(1)
    _, means, parts, _, _ = maximise(data, torch.zeros(20).long(), None, 0)
    assert parts[0].rank == 19  # of 64, the others at the floor
    inside = (data - means[0]) @ parts[0].eigvecs
    exact = (inside.square() / parts[0].eigvals).sum(1)  # nothing lies outside
    exact = -0.5 * (exact + parts[0].logdet(0.0) + 64 * math.log(2 * math.pi))
    torch.testing.assert_close(_log_prob(data, means[0], parts[0]), exact, rtol=0, atol=1e-11)


# Equal, isotropic ---------------------------------------------------------------------------------


def test_equal_isotropic_components() -> None:
    means, labels = randn(4, 1, 2, 3), torch.tensor([0, 1, 0, 1])
    mixture = GaussianMixtureDenoiser.equal_isotropic(means, 0.25, labels)
    x = randn(5, 1, 2, 3, seed=1)
    joint = torch.stack([normal_logpdf(x, m, torch.eye(6).double() * 0.5) for m in means], 1)
    torch.testing.assert_close(mixture.log_prob(x, 0.5), joint.logsumexp(1) - math.log(4))
    denoised = 0.5 * x + 0.5 * torch.einsum("nk,kchw->nchw", joint.softmax(1), means)
    torch.testing.assert_close(mixture(x, 0.5), denoised)
    own = mixture(x, 0.5, torch.ones(5, dtype=torch.long))
    rest = GaussianMixtureDenoiser.equal_isotropic(means[1::2], 0.25)
    torch.testing.assert_close(own, rest(x, 0.5))
    point = GaussianMixtureDenoiser.equal_isotropic(means[:1], 0.0)
    torch.testing.assert_close(point(x, 0.5), means[:1].expand_as(x))
    one = GaussianDenoiser.isotropic(means[0], 0.25)
    single = GaussianMixtureDenoiser.equal_isotropic(means[:1], 0.25)
    torch.testing.assert_close(single(x, 0.5), one(x, 0.5))
    with pytest.raises(ValueError, match="finite eigenvalues >= 0"):
        GaussianMixtureDenoiser.equal_isotropic(means, -1.0)


def test_a_loader_that_shuffles_has_no_labels_or_groups_beside_it() -> None:
    labels = torch.arange(8) % 2
    loader = DataLoader(TensorDataset(labels[:, None].float()), 4, shuffle=True)
    cases: list[dict[str, Any]] = [{"labels": labels}, {"n_components": 2, "groups": labels}]
    for own in cases:
        with pytest.raises(ValueError, match="groups or labels, got a DataLoader that shuffles"):
            fit_mixture(loader, **own)
