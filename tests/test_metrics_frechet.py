"""The Frechet distance against scipy and closed forms; statistics streamed, merged, saved and loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import orthogonal, randn
from torch import Tensor

from gaussnet.metrics import FeatureStatistics, frechet_distance

DIM = 7
RANKS = {"full": DIM, "half": 3, "one": 1, "none": 0}


def spd(rank: int = DIM, seed: int = 0, dim: int = DIM) -> Tensor:
    """A random covariance (dim, dim) of a given rank."""
    root = randn(dim, rank, seed=seed) * torch.logspace(0.5, -1, rank, dtype=torch.float64)
    return root @ root.mT


def by_scipy(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The formula with C1 C2, whose root scipy takes by another algorithm (Schur)."""
    root: Any = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    trace = float((cov1 + cov2).trace()) - 2 * float(np.trace(root).real)
    return float((mean1 - mean2).square().sum()) + trace


@pytest.mark.parametrize("seed", range(5))
def test_equals_scipy(seed: int) -> None:
    mean1, mean2 = randn(DIM, seed=seed), randn(DIM, seed=seed + 10)
    cov1, cov2 = spd(seed=seed + 20), spd(seed=seed + 30)
    expected = by_scipy(mean1, cov1, mean2, cov2)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=1e-9), "not symmetric"
    assert frechet_distance(mean1.numpy(), cov1.numpy(), mean2, cov2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("second", RANKS)
@pytest.mark.parametrize("first", RANKS)
def test_commuting_covariances_of_any_rank(first: str, second: str) -> None:
    axes = orthogonal(DIM, seed=1)
    eigvals1 = torch.linspace(3, 0.5, DIM, dtype=torch.float64)
    eigvals2 = torch.linspace(0.2, 5, DIM, dtype=torch.float64)
    eigvals1[RANKS[first] :], eigvals2[: DIM - RANKS[second]] = 0, 0
    mean1, mean2 = randn(DIM, seed=2), randn(DIM, seed=3)
    cov1, cov2 = (axes * eigvals1) @ axes.mT, (axes * eigvals2) @ axes.mT
    expected = (mean1 - mean2).square().sum() + (eigvals1.sqrt() - eigvals2.sqrt()).square().sum()
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(float(expected), rel=1e-12)


def test_covariances_of_low_rank_that_do_not_commute() -> None:
    root1, root2 = randn(DIM, 2, seed=1), randn(DIM, 2, seed=2)
    overlap = torch.linalg.matrix_norm(root1.mT @ root2, "nuc")  # tr (C1^1/2 C2 C1^1/2)^1/2 of C = R R^T
    expected = root1.square().sum() + root2.square().sum() - 2 * overlap
    zero = torch.zeros(DIM)
    found = frechet_distance(zero, root1 @ root1.mT, zero, root2 @ root2.mT)
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_itself_is_at_no_distance(rank: str) -> None:
    mean, cov = randn(200, seed=1), spd(RANKS[rank] * 20, dim=200)
    assert 0 <= frechet_distance(mean, cov, mean, cov) <= 1e-12 * float(cov.trace())


@pytest.mark.parametrize("rank", RANKS)
def test_a_shift_counts_by_its_square(rank: str) -> None:
    mean, shift, cov = randn(DIM, seed=1), randn(DIM, seed=2), spd(RANKS[rank])
    found = frechet_distance(mean, cov, mean + shift, cov)
    assert found == pytest.approx(float(shift.square().sum()), rel=1e-12)


def test_float32_covariances_with_rounding() -> None:
    mean, cov = randn(50), spd(10, dim=50)
    rounded = cov.float().double()
    assert float(torch.linalg.eigvalsh(rounded).min()) < 0, "of no use: not the case that is meant"
    assert frechet_distance(mean, cov, mean, rounded) == pytest.approx(0, abs=1e-5 * float(cov.trace()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)), r"\(F, F\), got \(2,\) and \(3, 3\)"),
        ((torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), "means of one length, got 2 and 3"),
        ((torch.zeros(0), torch.eye(0), torch.zeros(0), torch.eye(0)), r"got \(0,\) and \(0, 0\)"),
        (
            (torch.zeros(2), -torch.eye(2), torch.zeros(2), torch.eye(2)),
            "without negative eigenvalues, got -1",
        ),
        ((torch.zeros(2), torch.eye(2), torch.full((2,), torch.nan), torch.eye(2)), "finite mean"),
        ((torch.zeros(2), torch.eye(2) * torch.inf, torch.zeros(2), torch.eye(2)), "finite mean"),
        ((torch.zeros(2), torch.ones(2, 2).triu(), torch.zeros(2), torch.eye(2)), "symmetric covariance"),
    ],
)
def test_what_is_no_gaussian(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


# Statistics ---------------------------------------------------------------------------------------


def features(count: int = 60, seed: int = 0) -> Tensor:
    return randn(count, DIM, seed=seed) * torch.linspace(0.2, 2, DIM) + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_streamed_statistics_are_those_of_numpy(dtype: torch.dtype) -> None:
    data = features().to(dtype)
    for name, source in {"tensor": data, "array": data.numpy(), "batches": iter(data.split(7))}.items():
        found = FeatureStatistics.fit(source)
        assert found.count == 60, name
        assert found.mean.dtype == found.cov.dtype == torch.float64, name
        np.testing.assert_allclose(found.mean, data.double().mean(0), rtol=1e-12, err_msg=name)
        expected = np.cov(data.double().numpy(), rowvar=False)  # over N - 1, as EDM's references
        np.testing.assert_allclose(found.cov, expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_shards_merge_to_the_whole() -> None:
    data = features()
    whole = FeatureStatistics.fit(data)
    merged = FeatureStatistics.fit(data[:1])  # of one sample
    for part in data[1:].split(13):
        merged = merged.merge(FeatureStatistics.fit(part))
    assert merged.count == whole.count
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-13, atol=0)
    assert torch.allclose(merged.cov, whole.cov, rtol=1e-12, atol=1e-13)
    assert merged.distance(whole) < 1e-12


def test_all_processes_need_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"all_processes=True needs an initialised"):
        FeatureStatistics.fit(features(), all_processes=True)


def test_distance_of_statistics() -> None:
    first, second = FeatureStatistics.fit(features()), FeatureStatistics.fit(features(seed=1) + 1)
    expected = by_scipy(first.mean, first.cov, second.mean, second.cov)
    assert first.distance(second) == pytest.approx(expected, rel=1e-9)


def test_saved_and_loaded(tmp_path: Path) -> None:
    statistics = FeatureStatistics.fit(features())
    statistics.save(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as file:
        assert set(file) == {"mu", "sigma", "count"}
        assert file["sigma"].dtype == file["mu"].dtype == np.float64
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert loaded.count == 60
    assert loaded.mean.equal(statistics.mean)
    assert loaded.cov.equal(statistics.cov)


def test_a_reference_without_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(3), sigma=np.eye(3))
    reference = FeatureStatistics.load(str(tmp_path / "edm.npz"))
    assert reference.count is None
    assert reference.distance(FeatureStatistics(torch.ones(3), torch.eye(3))) == pytest.approx(3)
    with pytest.raises(ValueError, match="statistics with a count"):
        reference.merge(reference)
    reference.save(tmp_path / "again.npz")
    assert FeatureStatistics.load(tmp_path / "again.npz").count is None


def test_files_that_hold_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        FeatureStatistics.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("other.npz", "array.npy", "text.npz"):
        with pytest.raises(ValueError, match=f"{name}: expected an npz file with mu and sigma, got"):
            FeatureStatistics.load(tmp_path / name)
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"shapes.npz: expected a mean \(F,\)"):
        FeatureStatistics.load(tmp_path / "shapes.npz")


def test_features_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"features of shape \(N, F\), got \(N, 1, 4, 4\)"):
        FeatureStatistics.fit(torch.ones(5, 1, 4, 4))
    with pytest.raises(ValueError, match="NaN or infinite values in sample 3"):
        FeatureStatistics.fit(torch.tensor([0.0, 1, 2, torch.nan])[:, None])
    with pytest.raises(ValueError, match="one shape"):
        FeatureStatistics.fit(features()).merge(FeatureStatistics.fit(features()[:, :3]))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        FeatureStatistics.fit(features()).distance(FeatureStatistics.fit(features(1)))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        FeatureStatistics.fit(features(1)).distance(FeatureStatistics.fit(features()))
