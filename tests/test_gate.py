"""The gate: a table over log sigma, and what it measures on data."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from cases import denoiser, digits, randn, split, train_digits
from scipy.integrate import quad
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gaussnet import DeltaDenoiser, Gate, GaussianDenoiser, GaussianMixtureDenoiser, find_sigma_gate
from gaussnet.fit import Data
from gaussnet.gate import measure_gate
from gaussnet.numerics import Sigma

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
        (SIGMAS, VALUES[:3], r"sigmas of shape \(n,\), n >= 2, .*, got \(4,\) and \(3,\)"),
        (SIGMAS[:1], VALUES[:1], r"n >= 2, .*, got \(1,\) and \(1,\)"),
        (SIGMAS[None], VALUES[None], r"got \(1, 4\) and \(1, 4\)"),
        (SIGMAS, VALUES[:, None], r"gate values of shape \(n,\), got \(4, 1\)"),
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


# Closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [0.06, 0.2, 0.5, 0.9])
def test_it_closes_where_it_falls_below_the_tolerance(tol: float) -> None:
    gate = table(torch.float64)
    level = gate.closes(tol)
    assert float(gate(level)) == pytest.approx(tol, abs=1e-6)
    assert float(gate(level * 1.01)) < tol
    assert float(gate(level * 0.99)) > tol


def test_it_closes_nowhere_or_everywhere() -> None:
    assert table().closes(0.05) == table().closes(0.0) == math.inf, "its last value is that"
    assert table().closes(0.96) == 0.0
    bumpy = Gate(SIGMAS, torch.tensor([0.05, 0.7, 0.01, 0.0]))
    assert 0.4 < bumpy.closes(0.1) < 2.0, "not where it was below before it rose"


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 100.0])
def test_cut(sigma: float) -> None:
    gate, cut = table(), table().cut(sigma)
    below = torch.tensor([0.01, 0.2, 0.5, 0.9, 1.0]) * sigma
    torch.testing.assert_close(cut(below), gate(below))
    assert cut(torch.tensor([1.001, 2.0, 1e3]) * sigma).tolist() == [0, 0, 0]
    assert cut.closes(0.01) == pytest.approx(sigma, rel=1e-4)


def test_step() -> None:
    gate = Gate.step(7.3)
    level = torch.tensor([0.01, 7.3, 7.301, 80.0])
    assert gate(level).tolist() == [1, 1, 0, 0]
    assert gate.closes(0.01) == pytest.approx(7.3, rel=1e-4)


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


# Data ---------------------------------------------------------------------------------------------


def _fitted(data: Data, **options: Any) -> Tensor:
    gaussian = GaussianDenoiser.fit(train_digits())
    generator = torch.Generator().manual_seed(0)
    return Gate.fit(gaussian, data, [0.5, 1.5, 4.0], 200, generator, **options).values


def test_arrays_streams_and_integers_are_one() -> None:
    data = train_digits()
    expected = _fitted(data)
    assert _fitted(data.numpy()).equal(expected)
    levels = ((data + 1) * 8).round().byte()  # 0..16
    gaussian = GaussianDenoiser.fit(levels)
    generator = torch.Generator().manual_seed(0)
    integers = Gate.fit(gaussian, levels, [4.0, 12.0, 32.0], 200, generator).values
    torch.testing.assert_close(integers.double(), expected, rtol=1e-5, atol=1e-6)
    stream = _fitted(DataLoader(TensorDataset(data, torch.zeros(len(data))), batch_size=100))
    torch.testing.assert_close(stream, expected, rtol=0.1, atol=0)  # it draws other queries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_round_the_noise(dtype: torch.dtype) -> None:
    data = train_digits()[:300].to(dtype)
    gaussian = GaussianDenoiser.fit(data)
    values = [
        measure_gate(gaussian, x, [0.02, 0.3, 2.0], 200, torch.Generator().manual_seed(0))
        for x in (data, data.float())
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_share_of_many_data_stands_for_them() -> None:
    data = train_digits()
    some = _fitted(data, max_data=500)
    assert some[0] == pytest.approx(float(_fitted(data)[0]), rel=0.2)
    assert _fitted(iter([data]), max_data=500)[0] == pytest.approx(float(some[0]), rel=0.2)


def test_classes_leave_more_to_learn() -> None:
    classes = digits()[1][split()[0]]
    plain, classy = _fitted(train_digits()), _fitted(train_digits(), labels=classes)
    assert bool((classy[1:] > 1.02 * plain[1:]).all()), (plain, classy)


def test_the_gate_of_a_mixture_is_lower() -> None:
    data = train_digits()
    mixture = GaussianMixtureDenoiser.fit(data, 10)
    generator = torch.Generator().manual_seed(0)
    ours = Gate.fit(mixture, data, [0.5, 1.5, 4.0], 200, generator).values
    assert bool((ours[1:] < _fitted(data)[1:]).all())


def test_data_must_fit() -> None:
    with pytest.raises(ValueError, match=r"data of shape \(N, 1, 8, 8\), got \(3, 1, 4, 4\)"):
        _fitted(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="one integer label for each of 1437 samples"):
        _fitted(train_digits(), labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match="at least one batch"):
        _fitted(iter([]))


# From the model alone -----------------------------------------------------------------------------


class Off(GaussianDenoiser):
    """A Gaussian that errs by 0.2 e(sigma) below sigma = 5."""

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        error = 0.2 * self.bayes_error(sigma).sqrt() * (float(sigma) < 5)
        return super().forward(x, sigma) + error


def test_finds_where_a_model_is_its_gaussian() -> None:
    gaussian = GaussianDenoiser.fit(train_digits())
    model = Off(gaussian.mean, gaussian.covariance)
    assert find_sigma_gate(gaussian, gaussian) == pytest.approx(0.5)
    assert 5.0 <= find_sigma_gate(model, gaussian, tol=0.19) < 6.0
    assert find_sigma_gate(model, gaussian, tol=0.21) == pytest.approx(0.5)
    other = GaussianDenoiser(gaussian.mean + 1, gaussian.covariance)
    with pytest.raises(ValueError, match=r"less than 0.1 e\(sigma\) at sigma = 80, got 1.8"):
        find_sigma_gate(other, gaussian)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_mixture_is_measured_on_the_same_samples(labelled: bool) -> None:
    """Written out: the error is measured, and classes reach both denoisers."""
    data, classes = randn(40, 1, 2, 3), torch.arange(40) % 2
    labels = classes if labelled else None
    mixture = GaussianMixtureDenoiser.fit(data, None, 2, labels=classes)
    sigmas, generator = [0.3, 2.0], torch.Generator().manual_seed(5)
    values = measure_gate(mixture, data, sigmas, 7, generator, labels=labels)
    again = torch.Generator().manual_seed(5)
    torch.randperm(40, generator=again)  # of the data that stand for all
    picked = torch.randperm(40, generator=again)[:7]
    clean, noise = data[picked], torch.randn(7, 1, 2, 3, generator=again).double()
    own = classes[picked] if labelled else None
    delta = DeltaDenoiser(data, labels)
    for sigma, value in zip(sigmas, values, strict=True):
        x = clean + sigma * noise
        base = mixture(x, sigma, own)
        gain = (delta(x, sigma, own) - base).square().mean() / (base - clean).square().mean()
        assert value == pytest.approx(min(1.0, math.sqrt(float(gain))), rel=1e-12)
    gate = Gate.fit(mixture, data, sigmas, 7, torch.Generator().manual_seed(5), labels=labels)
    assert gate.values.tolist() == pytest.approx([values[0], min(values)], rel=1e-12)
    drawn = Gate.fit(mixture, data, sigmas, 7, torch.Generator().manual_seed(5), labels=labels, max_data=20)
    assert drawn.values.tolist() != gate.values.tolist(), "20 samples stand for 40"


def test_with_mirror_images_it_is_that_of_both() -> None:
    data, labels = train_digits()[:100], torch.arange(100) % 3
    both = torch.cat([data, data.flip(-1)])
    gaussian = GaussianDenoiser.fit(data, mirror=True)
    for own in (None, labels):
        twice = None if own is None else own.repeat(2)
        mirrored, expected = (
            measure_gate(
                gaussian, samples, [0.5, 80.0], 200, torch.Generator().manual_seed(0), labels=given, mirror=m
            )
            for samples, given, m in ((data, own, True), (both, twice, False))
        )
        assert mirrored == pytest.approx(expected, rel=0.02)  # of other noise
    assert float(Gate.fit(gaussian, data, [0.5, 80.0], mirror=True)(80.0)) < 0.01
    with pytest.raises(ValueError, match="expected images to mirror"):
        measure_gate(GaussianDenoiser.isotropic(torch.zeros(2), 1.0), torch.zeros(3, 2), [1.0], mirror=True)
