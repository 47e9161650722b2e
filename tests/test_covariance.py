"""Covariance against dense matrix functions."""

import math
from collections.abc import Callable

import pytest
import torch
from cases import COVARIANCES, DTYPES, covariance, orthogonal, randn, relative_error
from torch import Tensor, nn

from gaussnet import Covariance

DIM = 6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda lam: lam,
    "root": torch.sqrt,
    "denoise": lambda lam: lam / (lam + 0.3**2),
    "score": lambda lam: -1 / (lam + 0.3**2),
    "transport": lambda lam: torch.sqrt((lam + 0.1**2) / (lam + 2.0**2)),
    "constant": lambda lam: torch.full_like(lam, 2.5),
}
kinds = pytest.mark.parametrize("kind", COVARIANCES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
functions = pytest.mark.parametrize("function", FUNCTIONS)


def by_hand(cov: Covariance) -> Tensor:
    """U diag(lam) U^T + tail (I - U U^T), written out in float64."""
    u = cov.eigvecs.double()
    eye = torch.eye(cov.dim, dtype=torch.float64)
    return u @ cov.eigvals.double().diag() @ u.T + cov.tail.double() * (eye - u @ u.T)


def matrix_function(f: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    eigvals, eigvecs = torch.linalg.eigh(matrix)
    return eigvecs @ f(eigvals.clamp_min(0)).diag() @ eigvecs.T


@kinds
@dtypes
def test_dense(kind: str, dtype: torch.dtype) -> None:
    cov = covariance(kind, DIM, dtype=dtype)
    assert cov.dense().dtype == dtype
    assert relative_error(cov.dense(), by_hand(cov)) < TOLERANCE[dtype]
    assert (cov.dim, cov.rank) == (DIM, {"full": 6, "isotropic": 0}.get(kind, 3))


def test_one_axis_and_no_tail() -> None:
    axis = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    cov = Covariance(axis, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(cov.dense(), 2 * axis @ axis.T)
    assert float(cov.trace(lambda lam: lam + 1)) == pytest.approx(4)


def test_a_full_basis_has_no_tail() -> None:
    cov = Covariance(torch.eye(3), torch.tensor([1.0, 2.0, 4.0]))  # the logarithm of its tail is -inf
    assert float(cov.trace(torch.log)) == pytest.approx(math.log(8))
    torch.testing.assert_close(cov.apply(torch.log, torch.ones(3)), torch.log(cov.eigvals))


@kinds
def test_functions_are_evaluated_in_the_dtype_asked_for(kind: str) -> None:
    cov = covariance(kind, DIM, dtype=torch.float32)
    seen: list[torch.dtype] = []

    def f(lam: Tensor) -> Tensor:
        seen.append(lam.dtype)
        return lam / (lam + 0.3**2)

    wide = torch.float64
    for name, result in {
        "apply": cov.apply(f, randn(2, DIM, dtype=wide)),
        "trace": cov.trace(f, wide),
        "diagonal": cov.diagonal(f, wide),
        "logdet": cov.logdet(0.3, wide),
    }.items():
        assert result.dtype == wide, name
    assert set(seen) == {wide}
    cov.trace(f)
    assert seen[-1] == torch.float32
    exact = torch.logdet(by_hand(cov) + 0.3**2 * torch.eye(DIM, dtype=wide))
    assert float(cov.logdet(0.3, wide)) == pytest.approx(float(exact), abs=1e-5)


@kinds
@functions
@dtypes
def test_apply_is_the_matrix_function(kind: str, function: str, dtype: torch.dtype) -> None:
    cov, f = covariance(kind, DIM, dtype=dtype), FUNCTIONS[function]
    u = randn(5, 2, DIM, dtype=dtype)
    expected = u.double() @ matrix_function(f, by_hand(covariance(kind, DIM)))
    if kind == "zero-tail" and function == "root":  # eigh's zeros are 1e-16, whose root is 1e-8
        assert relative_error(cov.apply(f, u), expected) < max(TOLERANCE[dtype], 1e-7)
    else:
        assert relative_error(cov.apply(f, u), expected) < 2 * TOLERANCE[dtype]
    assert cov.apply(f, u).dtype == dtype


@kinds
@functions
def test_trace_is_that_of_the_matrix_function(kind: str, function: str) -> None:
    cov, f = covariance(kind, DIM), FUNCTIONS[function]
    expected = matrix_function(f, by_hand(cov)).trace()
    assert cov.trace(f).shape == ()
    torch.testing.assert_close(cov.trace(f), expected, rtol=1e-6 if function == "root" else 1e-12, atol=0)


@kinds
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_logdet(kind: str, sigma: float) -> None:
    cov = covariance(kind, DIM)
    expected = torch.linalg.slogdet(by_hand(cov) + sigma**2 * torch.eye(DIM, dtype=torch.float64)).logabsdet
    torch.testing.assert_close(cov.logdet(sigma), expected, rtol=1e-9, atol=1e-9)
    single = covariance(kind, DIM, dtype=torch.float32)
    assert single.logdet(sigma).dtype == torch.float32
    torch.testing.assert_close(single.logdet(sigma).double(), expected, rtol=1e-5, atol=1e-5)
    assert single.logdet(sigma, dtype=torch.float64).dtype == torch.float64


@kinds
def test_one_sigma_per_sample(kind: str) -> None:
    cov = covariance(kind, DIM)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    u = randn(3, DIM)

    def shrink(level: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda lam: lam / (lam + level[..., None] ** 2)

    together = cov.apply(shrink(sigma), u)
    traces, logdets = cov.trace(shrink(sigma)), cov.logdet(sigma)
    assert (together.shape, traces.shape, logdets.shape) == ((3, DIM), (3,), (3,))
    for i in range(3):
        torch.testing.assert_close(together[i], cov.apply(shrink(sigma[i]), u[i]), msg=f"{kind} apply {i}")
        torch.testing.assert_close(traces[i], cov.trace(shrink(sigma[i])), msg=f"{kind} trace {i}")
        torch.testing.assert_close(logdets[i], cov.logdet(float(sigma[i])), msg=f"{kind} logdet {i}")


@kinds
def test_functions_compose(kind: str) -> None:
    # f(Sigma) g(Sigma) = (f g)(Sigma)
    cov, u = covariance(kind, DIM), randn(4, DIM)
    twice = cov.apply(torch.sqrt, cov.apply(torch.sqrt, u))
    torch.testing.assert_close(twice, cov.apply(lambda lam: lam, u), rtol=1e-12, atol=1e-13)


@kinds
def test_rotation_of_the_basis_rotates_the_matrix(kind: str) -> None:
    cov, q = covariance(kind, DIM), orthogonal(DIM, seed=9)
    rotated = Covariance(q @ cov.eigvecs, cov.eigvals, cov.tail)
    torch.testing.assert_close(rotated.dense(), q @ cov.dense() @ q.T, rtol=1e-12, atol=1e-13)


def test_a_truncated_isotropic_basis_is_isotropic() -> None:
    cov = Covariance(orthogonal(DIM)[:, :2], torch.full((2,), 0.7, dtype=torch.float64), 0.7)
    torch.testing.assert_close(cov.dense(), 0.7 * torch.eye(DIM, dtype=torch.float64))


@kinds
def test_module_apply_visits_the_covariance(kind: str) -> None:
    parent = nn.Sequential(nn.Linear(2, 2), covariance(kind, DIM))
    seen: list[str] = []
    assert parent.apply(lambda module: seen.append(type(module).__name__)) is parent
    assert seen == ["Linear", "Covariance", "Sequential"]
    assert parent[1].apply(lambda module: seen.append(type(module).__name__)) is parent[1]
    assert seen[-1] == "Covariance"


@kinds
def test_state_is_in_buffers(kind: str) -> None:
    cov = covariance(kind, DIM)
    assert set(cov.state_dict()) == {"eigvecs", "eigvals", "tail"}
    assert list(cov.parameters()) == []
    assert repr(cov) == f"Covariance(dim={DIM}, rank={cov.rank})"
    assert all(t.dtype == torch.float32 for t in cov.float().state_dict().values())


BASIS = torch.eye(3)


@pytest.mark.parametrize(
    ("eigvecs", "eigvals", "tail", "message"),
    [
        (torch.ones(3), torch.ones(3), 0.0, r"eigvecs of shape \(D, r\) with r <= D, got \(3,\)"),
        (torch.ones(2, 3), torch.ones(3), 0.0, r"r <= D, got \(2, 3\)"),
        (BASIS, torch.ones(2), 0.0, r"each of the 3 eigenvectors, got eigvals of shape \(2,\)"),
        (BASIS, torch.ones(3), torch.ones(1), r"tail to be a scalar, got shape \(1,\)"),
        (BASIS, torch.tensor([1.0, -0.5, 2.0]), 0.0, r"finite eigenvalues >= 0, got a range of \[-0.5, 2\]"),
        (BASIS, torch.tensor([1.0, math.inf, 2.0]), 0.0, r"finite eigenvalues >= 0"),
        (BASIS, torch.tensor([1.0, math.nan, 2.0]), 0.0, r"finite eigenvalues >= 0"),
        (BASIS[:, :1], torch.ones(1), -1.0, r"got a range of \[-1, 1\] \(the tail included\)"),
        (BASIS[:, :1], torch.ones(1), math.nan, r"the tail included"),
    ],
)
def test_impossible_arguments(eigvecs: Tensor, eigvals: Tensor, tail: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Covariance(eigvecs, eigvals, tail)


@pytest.mark.parametrize("rank", [5, 2])
def test_autocast_rounds_nothing(rank: int) -> None:
    cov = Covariance(orthogonal(5)[:, :rank].float(), torch.rand(rank) + 0.5, tail=0.1)
    u = randn(3, 5, dtype=torch.float32)
    expected, dense = cov.apply(torch.sqrt, u), cov.dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cov.apply(torch.sqrt, u), expected, rtol=0, atol=0)
        torch.testing.assert_close(cov.dense(), dense, rtol=0, atol=0)
