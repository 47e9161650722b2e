"""Weights of multistep solvers against quadrature and against the formulas of their papers and codes."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import pytest
from scipy.integrate import quad
from scipy.interpolate import lagrange

from gaussnet.samplers import weights

LEVELS = (3.0, 3.7, 5.0, 9.0)  # newest first; the step starts at the first
STEPS = (2.9, 2.0, 0.3, 0.001)
steps = pytest.mark.parametrize("sigma_next", STEPS)
counts = pytest.mark.parametrize("count", [1, 2, 3, 4])


def integrals(
    nodes: Sequence[float], kernel: Callable[[float], float], start: float, end: float
) -> list[float]:
    """int kernel L_j for the Lagrange polynomials of the nodes, by scipy."""
    units = [[float(j == k) for k in range(len(nodes))] for j in range(len(nodes))]
    polynomials = [lagrange(nodes, unit) for unit in units]
    return [
        quad(lambda s, L=L: kernel(s) * L(s), start, end, epsabs=1e-13, epsrel=1e-12)[0] for L in polynomials
    ]


@pytest.mark.parametrize("ratio", [1.0, 1 + 1e-12, 1.5, 4e4, 1e12])
def test_logarithms_of_ratios_are_right_to_the_last_digit(ratio: float) -> None:
    high, low = 0.7 * ratio, 0.7
    with localcontext(prec=50):
        expected = float(Decimal(high).ln() - Decimal(low).ln())
    assert weights._log_ratio(high, low) == pytest.approx(expected, rel=1e-15, abs=0)
    assert weights._log_ratio(low, high) == pytest.approx(-expected, rel=1e-15, abs=0)


@counts
@steps
def test_exponential(sigma_next: float, count: int) -> None:
    known = LEVELS[:count]
    h = math.log(known[0] / sigma_next)
    expected = integrals([math.log(known[0] / level) for level in known], lambda s: math.exp(s - h), 0, h)
    assert weights.exponential(known[0], sigma_next, known) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert sum(expected) == pytest.approx(1 - sigma_next / known[0])


@counts
@steps
def test_adams(sigma_next: float, count: int) -> None:
    known = LEVELS[:count]
    plain = integrals(known, lambda s: 1, known[0], sigma_next)
    assert weights.adams(known[0], sigma_next, known) == pytest.approx(plain, rel=1e-8, abs=1e-10)
    logarithms = [math.log(level) for level in known]
    log = integrals(logarithms, math.exp, logarithms[0], math.log(sigma_next))  # ds = exp(log s) dlog s
    assert weights.log_adams(known[0], sigma_next, known) == pytest.approx(log, rel=1e-8, abs=1e-10)


@counts
def test_even_adams(count: int) -> None:
    known = [4.0 + 0.5 * k for k in range(count)]
    assert weights.even_adams(4.0, 3.5, known) == pytest.approx(weights.adams(4.0, 3.5, known), rel=1e-12)


@steps
def test_dpmpp_2m_of_the_paper(sigma_next: float) -> None:
    # Algorithm 2 of arXiv 2211.01095: D = (1 + 1/(2r)) D_0 - 1/(2r) D_1, r = h_last / h.
    sigma, last = LEVELS[:2]
    h = math.log(sigma / sigma_next)
    share = 1 / (2 * math.log(last / sigma) / h)
    expected = [-math.expm1(-h) * (1 + share), math.expm1(-h) * share]
    rules = (weights.simplified("bh2"), weights.half_curvature)
    for rule in rules:
        assert rule(sigma, sigma_next, (sigma, last)) == pytest.approx(expected, rel=1e-12)


@steps
def test_dpmpp_3m_of_the_published_code(sigma_next: float) -> None:
    sigma, s1, s2 = LEVELS[:3]
    h, h0, h1 = math.log(sigma / sigma_next), math.log(s1 / sigma), math.log(s2 / s1)
    r0, r1 = h0 / h, h1 / h
    # (m0, m1, m2) coefficients of the differences D1_0, D1_1, then of D1 and D2.
    d10, d11 = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
    d1 = [a + r0 / (r0 + r1) * (a - b) for a, b in zip(d10, d11, strict=True)]
    d2 = [(a - b) / (r0 + r1) for a, b in zip(d10, d11, strict=True)]
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    expected = [-phi_1 * (j == 0) + phi_2 * d1[j] - phi_3 * d2[j] for j in range(3)]
    known = LEVELS[:3]
    assert weights.half_curvature(sigma, sigma_next, known) == pytest.approx(expected, rel=1e-7, abs=1e-9)
    exact = [-phi_1 * (j == 0) + phi_2 * d1[j] - 2 * phi_3 * d2[j] for j in range(3)]
    assert weights.exponential(sigma, sigma_next, known) == pytest.approx(exact, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@steps
def test_unipc_of_the_paper(sigma_next: float, variant: str) -> None:
    # arXiv 2302.04867: weights rho B(hh) / r_k of differences to the output at sigma, hh = -h in the data.
    sigma, last = LEVELS[:2]
    h = math.log(sigma / sigma_next)
    B = -h if variant == "bh1" else math.expm1(-h)
    rule = weights.simplified(variant)
    for other, r in ((last, -math.log(last / sigma) / h), (sigma_next, 1.0)):  # predictor, corrector
        weight = -B * 0.5 / r
        expected = {sigma: -math.expm1(-h) - weight, other: weight}
        for known in ((sigma, other), (other, sigma)):
            assert rule(sigma, sigma_next, known) == pytest.approx([expected[s] for s in known], rel=1e-12)
    for known in ((sigma,), LEVELS[:3], (sigma_next, *LEVELS[:2])):
        assert rule(sigma, sigma_next, known) == weights.exponential(sigma, sigma_next, known)
