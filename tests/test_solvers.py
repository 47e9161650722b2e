"""The eigensolvers agree with each other and with the covariance that they take apart."""

import pytest
import torch
from cases import randn

from gaussnet.fit import fit_covariance, fit_moments, spectrum
from gaussnet.fit.moments import merge_all
from gaussnet.fit.solvers import dense_axes, gram_axes


@pytest.mark.parametrize("solver", ["dense", "gram"])
def test_axes_are_as_many_as_samples_can_have(solver: str) -> None:
    data = randn(4, 10)
    axes = dense_axes(merge_all(fit_moments(data))) if solver == "dense" else gram_axes(data - data.mean(0))
    assert (axes.eigvals.shape, axes.eigvecs.shape) == ((3,), (10, 3))
    torch.testing.assert_close(axes.eigvecs.T @ axes.eigvecs, torch.eye(3, dtype=torch.float64))
    rebuilt = axes.eigvecs * axes.eigvals @ axes.eigvecs.T
    torch.testing.assert_close(rebuilt, torch.cov(data.T, correction=0))


@pytest.mark.parametrize("shrinkage", ["cv", "none"])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("shape", [(20, 50), (41, 40), (90, 30)], ids=str)
def test_both_solvers_fit_the_same_covariance(
    shape: tuple[int, int], rank: int | None, shrinkage: str
) -> None:
    data = randn(*shape) * torch.logspace(0, -3, shape[1], dtype=torch.float64) + 2
    dense, gram = (fit_covariance(data, rank, shrinkage, solver) for solver in ("dense", "gram"))
    torch.testing.assert_close(dense[1], gram[1])
    torch.testing.assert_close(dense[2].dense(), gram[2].dense(), rtol=1e-9, atol=1e-11)
    assert dense[2].rank == gram[2].rank


def test_the_cheaper_solver_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("_fit_dense", "_fit_gram"):
        original = getattr(spectrum, name)
        monkeypatch.setattr(spectrum, name, lambda *a, n=name, f=original: (used.append(n), f(*a))[1])
    fit_covariance(randn(20, 30))
    fit_covariance(randn(30, 20))
    fit_covariance(iter([randn(20, 30)]))
    fit_covariance(randn(20, 30), solver="dense")
    assert used == ["_fit_gram", "_fit_dense", "_fit_dense", "_fit_dense"]


def test_samples_that_hardly_vary_are_fitted_without_nan() -> None:
    data = torch.zeros(12, 20, dtype=torch.float64)
    data[0, 3] = 1.0  # two of three folds see nothing but zeros outside of their own
    covariance = fit_covariance(data)[2]
    assert covariance.rank <= 1
    assert bool(torch.isfinite(covariance.dense()).all())
    assert float(covariance.trace(lambda lam: lam)) > 0


@pytest.mark.parametrize("solver", ["dense", "gram"])
def test_fitting_leaves_the_data_as_they_are(solver: str) -> None:
    data = randn(20, 6)
    before = data.clone()
    fit_covariance(data, solver=solver)
    assert torch.equal(data, before)


def test_gram_needs_an_array() -> None:
    with pytest.raises(TypeError, match='solver="gram" needs a tensor or array of samples, got generator'):
        fit_covariance((randn(4, 8) for _ in range(3)), solver="gram")
    with pytest.raises(ValueError, match="expected solver to be one of auto, dense, gram, got 'lanczos'"):
        fit_covariance(randn(9, 3), solver="lanczos")
