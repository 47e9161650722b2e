"""The eigensolvers agree with each other and with the covariance that they take apart."""

import pytest
import torch
from cases import randn

from gaussnet.fit import fit_covariance, fit_moments, solvers
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
    torch.testing.assert_close(dense.mean, gram.mean)
    # Axes of variance lam from the Gram matrix lean by eps lam_1 / lam towards the first: here 1e-10 lam_1.
    torch.testing.assert_close(dense.covariance.dense(), gram.covariance.dense(), rtol=1e-9, atol=1e-10)
    assert dense.covariance.rank == gram.covariance.rank


def test_the_cheaper_solver_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("solve_moments", "_solve_gram", "_solve_krylov"):
        original = getattr(solvers, name)
        monkeypatch.setattr(solvers, name, lambda *a, n=name, f=original: (used.append(n), f(*a))[1])
    fit_covariance(randn(20, 30))
    fit_covariance(randn(30, 20))
    fit_covariance(iter([randn(20, 30)]))
    fit_covariance(randn(20, 30), solver="dense")
    assert used == ["_solve_gram", *["solve_moments"] * 3]


def test_samples_that_hardly_vary_are_fitted_without_nan() -> None:
    data = torch.zeros(12, 20, dtype=torch.float64)
    data[0, 3] = 1.0  # two of three folds see nothing but zeros outside of their own
    covariance = fit_covariance(data).covariance
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
    with pytest.raises(
        TypeError, match='solver="gram" needs a tensor or array of all samples, got generator'
    ):
        fit_covariance((randn(4, 8) for _ in range(3)), solver="gram")
    with pytest.raises(ValueError, match="one of auto, dense, gram, krylov, got 'lanczos'"):
        fit_covariance(randn(9, 3), solver="lanczos")


def test_groups_of_a_stream_are_those_of_the_array() -> None:
    data, groups = randn(60, 8), torch.arange(60) // 4
    whole, streamed = (fit_covariance(x, groups=groups).covariance for x in (data, iter(data.split(7))))
    torch.testing.assert_close(streamed.dense(), whole.dense(), rtol=0, atol=1e-12)
    assert not torch.allclose(whole.dense(), fit_covariance(data).covariance.dense(), atol=1e-3)


@pytest.mark.parametrize("solver", ["dense", "gram"])
def test_groups_are_left_out_together(solver: str) -> None:
    """Each image thrice, with tiny differences: only whole groups tell how little the axes are worth."""
    images, copies = randn(30, 200), 3
    data = (images[:, None] + 1e-3 * randn(30, copies, 200, seed=1)).flatten(0, 1)
    groups = torch.arange(30).repeat_interleave(copies)
    together = fit_covariance(data, solver=solver, groups=groups).covariance
    apart = fit_covariance(data, solver=solver).covariance
    whole = fit_covariance(images, solver=solver).covariance
    assert float(apart.tail) < 1e-3, "variants of one image in all folds: nothing seems left over"
    assert float(together.tail) == pytest.approx(float(whole.tail), rel=0.1)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    shuffled = fit_covariance(data[order], solver=solver, groups=groups[order]).covariance
    # The variants' own directions have 1e-7 of the variance: the Gram matrix resolves them to 1e-8.
    torch.testing.assert_close(shuffled.dense(), together.dense(), rtol=0, atol=1e-7)


def test_misfitting_groups_are_errors() -> None:
    data = randn(12, 3)
    with pytest.raises(
        ValueError, match=r"expected groups to be 12 integers.*got torch.int64 of shape \(5,\)"
    ):
        fit_covariance(data, groups=torch.arange(5))
    with pytest.raises(ValueError, match="float32"):
        fit_covariance(randn(3, 12), groups=torch.zeros(3))
    with pytest.raises(ValueError, match="as many samples as groups, 5, got at least 12"):
        fit_covariance(iter([data]), groups=torch.arange(5))
    for solver in ("gram", "krylov"):
        with pytest.raises(TypeError, match=f'solver="{solver}" needs a tensor or array of all samples'):
            fit_covariance(iter([data]), 2, solver=solver, groups=torch.arange(12))


def test_a_single_group_cannot_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    data = randn(12, 3)
    fitted = fit_covariance(data, groups=torch.zeros(12, dtype=torch.long)).covariance
    torch.testing.assert_close(fitted.dense(), torch.cov(data.T, correction=0))
    assert "12 samples in 1 folds: too few" in caplog.text
