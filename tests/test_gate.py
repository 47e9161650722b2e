"""The gate: a table over log sigma, and what it measures on data."""

import math
from functools import cache

import pytest
import torch
from cases import denoiser, train_digits
from scipy.integrate import quad
from torch import Tensor

from gaussnet import Gate, GaussianDenoiser

SIGMAS = torch.tensor([0.1, 0.4, 2.0, 30.0])
VALUES = torch.tensor([0.95, 0.7, 0.2, 0.05])


def table(dtype: torch.dtype = torch.float32) -> Gate:
    return Gate(SIGMAS.to(dtype), VALUES.to(dtype))


# Table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_at_the_nodes_and_constant_beyond(dtype: torch.dtype) -> None:
    gate = table(dtype)
    assert gate(SIGMAS.to(dtype)).equal(VALUES.to(dtype))
    assert gate(torch.tensor([1e-6, 0.05, 31.0, 1e6], dtype=dtype)).equal(VALUES[[0, 0, 3, 3]].to(dtype))


def test_linear_in_log_sigma_between() -> None:
    gate = table(torch.float64)
    for i in range(3):
        for share in (0.25, 0.5, 0.9):
            sigma = float(SIGMAS[i]) ** (1 - share) * float(SIGMAS[i + 1]) ** share
            expected = (1 - share) * float(VALUES[i]) + share * float(VALUES[i + 1])
            assert float(gate(sigma)) == pytest.approx(expected, rel=1e-6), f"{share} after node {i}"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_shape_follows_sigma(shape: tuple[int, ...]) -> None:
    assert table()(torch.full(shape, 0.4)).shape == shape
    assert table()(torch.full(shape, 0.4, dtype=torch.float64)).dtype == torch.float32
    assert table()(0.4).shape == ()
    strided = torch.stack([SIGMAS, SIGMAS], 1)[:, 0]
    assert table()(strided).equal(VALUES)


@pytest.mark.parametrize(
    ("sigmas", "values", "message"),
    [
        (SIGMAS, VALUES[:3], r"one shape \(n,\), n >= 2, got \(4,\) and \(3,\)"),
        (SIGMAS[:1], VALUES[:1], r"n >= 2, got \(1,\) and \(1,\)"),
        (SIGMAS[None], VALUES[None], r"got \(1, 4\) and \(1, 4\)"),
        (SIGMAS.flip(0), VALUES, "increasing positive sigmas, got"),
        (SIGMAS[[0, 1, 1, 2]], VALUES, "increasing positive sigmas"),
        (SIGMAS - 0.1, VALUES, "increasing positive sigmas"),
        (torch.tensor([0.1, 1.0, 2.0, math.inf]), VALUES, "increasing positive sigmas"),
        (torch.tensor([0.1, math.nan, 2.0, 3.0]), VALUES, "increasing positive sigmas"),
        (SIGMAS, VALUES + 0.1, r"values within \[0, 1\], got \[1.0"),
        (SIGMAS, VALUES - 0.1, r"values within \[0, 1\]"),
        (SIGMAS, VALUES * math.nan, r"values within \[0, 1\], got \[nan"),
    ],
)
def test_malformed_tables(sigmas: Tensor, values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(sigmas, values)


def test_life_cycle() -> None:
    gate = table()
    twin = Gate.from_arguments(gate.to_arguments())
    assert not twin(SIGMAS).equal(gate(SIGMAS))
    twin.load_state_dict(gate.state_dict())
    assert twin(SIGMAS).equal(gate(SIGMAS))
    assert repr(gate) == "Gate(size=4)"
    assert gate.double()(0.4).dtype == torch.float64


# Fit ----------------------------------------------------------------------------------------------


@cache
def digits_gate() -> Gate:
    generator = torch.Generator().manual_seed(0)
    data = train_digits()
    return Gate.fit(GaussianDenoiser.fit(data, shrinkage="none"), data, generator=generator)


def test_on_digits_it_falls_from_1_to_0() -> None:
    gate = digits_gate()
    assert gate.values.shape == (25,)
    assert gate.log_sigma.exp()[[0, -1]].tolist() == pytest.approx([0.05, 100.0], rel=0.01)
    assert bool((gate.values.diff() <= 0).all()), gate.values.tolist()
    assert gate(0.05) > 0.97, "everything is left to learn"
    assert gate(80.0) < 0.02, "the Gaussian is all there is"
    assert 0.1 < gate(1.5) < 0.9


def test_reproducible_with_a_generator() -> None:
    g, data = denoiser("gaussian-rank-10"), train_digits()[:100]
    sigmas = [0.1, 1.0, 10.0]
    values = [
        Gate.fit(g, data, sigmas, n_queries=20, generator=torch.Generator().manual_seed(seed)).values
        for seed in (0, 0, 1)
    ]
    assert values[0].equal(values[1])
    assert not values[0].equal(values[2])


def test_keeps_the_levels_and_the_dtype_of_the_gaussian() -> None:
    data = train_digits(torch.float32)[:50]
    gate = Gate.fit(GaussianDenoiser.fit(data), data, torch.tensor([0.2, 3.0]), n_queries=1000)
    assert gate.values.dtype == gate.log_sigma.dtype == torch.float32
    torch.testing.assert_close(gate.log_sigma.exp(), torch.tensor([0.2, 3.0]))


def two_point_gate(sigma: float, radius: float) -> float:
    """g(sigma) of the two points +-a, |a| = radius, by quadrature.

    With t = a.x/|a|: D_delta = a tanh(|a| t / s^2), D_gauss = a |a| t / (|a|^2 + s^2).
    """

    def gain(noise: float) -> float:
        t = radius + sigma * noise  # by symmetry, x_0 = +a
        difference = math.tanh(radius * t / sigma**2) - radius * t / (radius**2 + sigma**2)
        return radius**2 * difference**2 * math.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi)

    error = radius**2 * sigma**2 / (radius**2 + sigma**2)  # D e(s)^2
    return math.sqrt(quad(gain, -10, 10, limit=200)[0] / error)


def test_on_two_points_it_is_the_integral() -> None:
    count = 2000
    point = torch.tensor([1.0, -0.5, 0.25, 0.5], dtype=torch.float64)
    data = torch.stack([point, -point]).repeat(count // 2, 1)
    g = GaussianDenoiser.fit(data, shrinkage="none")
    sigmas = [0.2, 0.6, 1.0, 2.0]
    gate = Gate.fit(g, data, sigmas, count, torch.Generator().manual_seed(0))
    for sigma, value in zip(sigmas, gate.values.tolist(), strict=True):
        expected = two_point_gate(sigma, float(point.norm()))
        assert value == pytest.approx(expected, rel=0.05), f"{sigma=}"


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, torch.tensor([0.5, math.nan])])
def test_impossible_sigma(sigma: float | Tensor) -> None:
    with pytest.raises(ValueError, match="expected sigma to be finite and > 0"):
        Gate(torch.tensor([0.1, 1.0]), torch.tensor([0.9, 0.1]))(sigma)
