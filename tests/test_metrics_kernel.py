"""The kernel distance against double loops, and its freedom from bias."""

import pytest
import torch
from cases import randn
from torch import Tensor

from gaussnet.metrics import kernel_distance

DIM = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_loops(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, term by term."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * between


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_subset_of_all_equals_loops(dtype: torch.dtype) -> None:
    x, y = randn(12, DIM, dtype=dtype), (randn(12, DIM, seed=1) + 0.5).to(dtype)
    found = kernel_distance(x, y, subsets=1, subset_size=12)
    assert found.mean == pytest.approx(by_loops(x, y), rel=1e-12)
    assert found.std == 0
    assert kernel_distance(y, x, subsets=1, subset_size=12).mean == pytest.approx(found.mean, rel=1e-12)


def test_subsets_are_drawn_without_replacement_and_averaged() -> None:
    x, y = randn(12, DIM), randn(15, DIM, seed=1) + 0.5
    found = kernel_distance(x, y.numpy(), subsets=4, subset_size=6, generator=generator())
    same = generator()
    values = torch.tensor(
        [
            by_loops(x[torch.randperm(12, generator=same)[:6]], y[torch.randperm(15, generator=same)[:6]])
            for _ in range(4)
        ]
    )
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.std == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    again = kernel_distance(iter(x.split(5)), [y], subsets=4, subset_size=6, generator=generator())
    assert again == found


def test_equal_distributions_are_at_no_distance_but_for_noise() -> None:
    values = torch.tensor(
        [
            kernel_distance(
                randn(60, DIM, seed=2 * i), randn(60, DIM, seed=2 * i + 1), subsets=1, subset_size=60
            )
            for i in range(200)
        ]
    )[:, 0]
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean())) < 3 * error
    assert float(values.min()) < 0, "an unbiased estimate scatters about 0"
    biased = 2 / 60 * ((1 + 1) ** 3 - 1)  # by the diagonals, about: 10 times what is allowed
    assert biased > 10 * 3 * error


def test_gaussian_samples_have_the_known_distance() -> None:
    """With x ~ N(0, I), y ~ N(d, I) and t = |d|^2 / F, see the moments of x^T y below."""
    shift = torch.full((DIM,), 0.7, dtype=torch.float64)
    square = float(shift.square().sum())

    # E (a^T b / F + 1)^3 with a ~ N(p, I), b ~ N(q, I): moments of s = a^T b.
    def expected(p: float, q: float, pq: float) -> float:
        second = DIM + p + q + pq**2
        third = pq**3 + 3 * pq * (DIM + p + q) + 6 * pq
        return 1 + 3 * pq / DIM + 3 * second / DIM**2 + third / DIM**3

    known = expected(0, 0, 0) + expected(square, square, square) - 2 * expected(0, square, 0)
    x, y = randn(4000, DIM), randn(4000, DIM, seed=1) + shift
    found = kernel_distance(x, y, subsets=40, subset_size=500, generator=generator())
    assert found.mean == pytest.approx(known, rel=0.1)


def test_features_that_cannot_be_compared() -> None:
    x = randn(10, DIM)
    with pytest.raises(ValueError, match="features of one length, got 5 and 4"):
        kernel_distance(x, x[:, :4], subset_size=5)
    for size in (1, 11):
        with pytest.raises(ValueError, match=rf"2 <= subset_size <= min\(N, M\) = 10, got 100 and {size}"):
            kernel_distance(x, randn(20, DIM), subset_size=size)
    with pytest.raises(ValueError, match="subsets >= 1"):
        kernel_distance(x, x, subsets=0, subset_size=5)
    with pytest.raises(ValueError, match=r"features of shape \(N, F\), got \(10, 1, 5\)"):
        kernel_distance(x[:, None], x, subset_size=5)
    with pytest.raises(ValueError, match="NaN or infinite values in sample 7"):
        kernel_distance(x, [x[:4], torch.cat([x[:3], x[:1] / 0])], subset_size=5)
    with pytest.raises(ValueError, match="one shape"):
        kernel_distance(x, [x[:4], x[4:, :3]], subset_size=5)
    with pytest.raises(ValueError, match="at least one sample"):
        kernel_distance(x, [], subset_size=5)
    with pytest.raises(TypeError, match="tensors or arrays"):
        kernel_distance(x, ["features"], subset_size=5)
