"""Arithmetic against 50 digits, over dtype, noise level, condition number and rank.

The errors and their reference: benchmarks/conditioning_cases.py; the bounds: benchmarks/conditioning.py.
"""

import copy
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import orthogonal, randn, relative_error

from gaussnet import Covariance, Gate, GaussianMixtureDenoiser, Marginals

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
cases, table = (importlib.import_module(name) for name in ("conditioning_cases", "conditioning"))
sys.path.remove(str(FOLDER))
MP: Any = cases.MP

dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)
conditions = pytest.mark.parametrize("condition", cases.CONDITIONS)
sigmas = pytest.mark.parametrize("sigma", cases.SIGMAS)
ranks = pytest.mark.parametrize("rank", cases.RANKS)


def too_large(errors: dict[str, float], dtype: str = "float64") -> dict[str, float]:
    return {name: value for name, value in errors.items() if not value <= table.bound(name, dtype)}


# The arithmetic -----------------------------------------------------------------------------------


@dtypes
@sigmas
@conditions
@ranks
def test_gaussian(dtype: str, sigma: float, condition: float, rank: str) -> None:
    assert not too_large(cases.gaussian_errors(dtype, sigma, condition, rank), dtype)


@dtypes
@sigmas
@conditions
@pytest.mark.parametrize("kind", cases.MIXTURES)
def test_mixture(dtype: str, sigma: float, condition: float, kind: str) -> None:
    assert not too_large(cases.mixture_errors(dtype, sigma, condition, kind), dtype)


@dtypes
def test_gate(dtype: str) -> None:
    assert not too_large(cases.gate_errors(dtype), dtype)


@pytest.mark.parametrize("step", cases.STEPS)
def test_weights(step: float) -> None:
    assert not too_large(cases.weight_errors(step))


def test_mixture_of_many_dimensions() -> None:
    dim, generator = 256, torch.Generator().manual_seed(0)
    variances = torch.logspace(2, -4, dim, dtype=torch.float64)
    laws = [
        Covariance(orthogonal(dim, seed), variances * (1 + torch.rand(dim, generator=generator) / 3))
        for seed in range(4)
    ]
    single = GaussianMixtureDenoiser(torch.ones(4), randn(4, dim, seed=5) / 2, laws).float()
    x = (single.means[0] + 80 * randn(16, dim, seed=6)).float()
    double = copy.deepcopy(single).double()
    assert relative_error(single(x, 80.0), double(x.double(), 80.0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gate_where_the_logs_of_two_levels_coincide(dtype: torch.dtype) -> None:
    gate = Gate.step(12.9).to(dtype)
    if dtype == torch.float32:
        level = torch.tensor(12.9)
        gate = Gate(torch.stack([level, torch.nextafter(level, level + 1)]), torch.tensor([1.0, 0.0]))
    assert 0 <= float(gate(12.9)) <= 1


# The reference ------------------------------------------------------------------------------------


def hadamard(rank: int) -> Any:
    """A covariance of 4 dimensions with axes that are orthonormal to the last digit."""
    axes = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double() / 2
    return Covariance(axes[:, :rank], torch.tensor([9.0, 0.3, 1e-6, 2.0]).double()[:rank], tail=0.07)


def dense(law: Any) -> Any:
    outside = MP.eye(4) - MP.matrix((law.basis @ law.basis.T).tolist())
    return MP.matrix(((law.basis * law.lam) @ law.basis.T).tolist()) + law.tail[0] * outside


@pytest.mark.parametrize("rank", [4, 2])
def test_the_reference_is_the_law(rank: int) -> None:
    law = cases.Spectral(hadamard(rank), cases.exact(randn(1, 4)))
    variance, sigma = MP.mpf(0.002) ** 2, dense(law)
    noisy = sigma + variance * MP.eye(4)
    u = MP.matrix(law.u[0].tolist())

    def close(actual: Any, expected: Any) -> bool:
        return bool(MP.mnorm(MP.matrix(np.ravel(actual).tolist()) - MP.matrix(expected)) < MP.mpf(10) ** -40)

    assert close(law.apply(lambda lam: 1 / (lam + variance)), MP.lu_solve(noisy, u))
    posterior, diagonal = sigma * MP.inverse(noisy) * variance, range(4)
    assert close(law.apply(lambda lam: lam * variance / (lam + variance)), posterior * u)
    left = law.diagonal(lambda lam: lam * variance / (lam + variance))
    assert close(left, [posterior[k, k] for k in diagonal])
    assert close(law.trace(lambda lam: lam), [sum(sigma[k, k] for k in diagonal)])
    distance = (u.T * MP.lu_solve(noisy, u))[0]
    expected = -(distance + MP.log(MP.det(noisy)) + 4 * MP.log(2 * MP.pi)) / 2
    assert close(law.log_prob(variance), [expected])


def test_the_reference_of_marginals_is_the_integral() -> None:
    widths = torch.tensor([0.3, 0.05]).double()
    own = Marginals(torch.tensor([-1.0, 0.8]).double(), widths, torch.log_softmax(randn(1, 2), -1))
    numbers = ([0.1], [0.9], [0.2], [[0.4]])
    mean, prior, left, denoised = (cases.exact(torch.tensor(number)) for number in numbers)
    eta, h = 1 / left[0] - 1 / prior[0], (denoised[0, 0] - mean[0]) / prior[0]
    levels, variances, shares = (cases.exact(part) for part in (own.levels, widths, own.log_weights.exp()))

    def density(z: Any) -> Any:
        parts = shares[0] * cases.EXP(-((z - levels) ** 2) / (2 * variances)) / cases.ROOT(variances)
        off = z - denoised[0, 0]
        return parts.sum() * MP.exp(h * off - eta * off**2 / 2)

    mass, first = (MP.quad(lambda z, k=k: z**k * density(z), [-4, -1, 0, 1, 4]) for k in (0, 1))
    found = cases.exact_marginal(own, mean, prior, left, denoised)[0, 0]
    assert abs(found - first / mass) < MP.mpf(10) ** -10


@pytest.mark.parametrize("rate", [-1, 0, 1])
@pytest.mark.parametrize("length", [1e-8, 0.3, 10.0])
def test_the_reference_of_weights_is_the_integral(length: float, rate: int) -> None:
    h, nodes = MP.mpf(length), [MP.mpf(0), MP.mpf(-length), MP.mpf(-3 * length)]
    for node, found in zip(nodes, cases.interpolating(h, nodes, rate), strict=True):
        others = [other for other in nodes if other != node]

        def integrand(tau: Any, node: Any = node, others: Any = others) -> Any:
            return MP.exp(rate * (tau - h)) * MP.fprod((tau - other) / (node - other) for other in others)

        assert abs(found / MP.quad(integrand, [0, h]) - 1) < MP.mpf(10) ** -20


def test_bounds_name_what_is_measured() -> None:
    named = cases.gaussian_errors("float64", 0.5, 1.0, "full") | cases.mixture_errors(
        "float64", 0.5, 1.0, "apart"
    )
    named |= cases.gate_errors("float64")
    assert set(table.LOOSER) | set(table.WIDE) <= set(named)
    assert math.isinf(cases.relative(torch.tensor([[math.nan]]), cases.exact(torch.ones(1, 1))))
