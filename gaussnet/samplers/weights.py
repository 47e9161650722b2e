"""Weights of multistep solvers: integrals of interpolation polynomials, as numbers of the grid alone.

A step from sigma to sigma' sums outputs at known levels sigma_j, the data D or the noise e = (x - D) / sigma.
It is exact if they are polynomials, with

    x' = (sigma'/sigma) x + sum_j w_j D_j        w_j = int_0^h exp(tau - h) L_j dtau
    x' =                x + sum_j w_j e_j        w_j = int_sigma^sigma' L_j ds

for the Lagrange polynomials L_j of the levels, in tau = log(sigma / s) or in s, and h = log(sigma / sigma').
Published solvers have these weights, or simpler ones that differ in higher powers of h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

Weights = Callable[[float, float, Sequence[float]], Sequence[float]]
"""From a level, to a level, the levels of the outputs that are known: a weight for each of them."""

_NODES, _SHARES = np.polynomial.legendre.leggauss(32)  # the rule on [-1, 1]
POINTS, SHARES = _NODES / 2 + 0.5, _SHARES / 2  # and on [0, 1]
_EVEN = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def exponential(sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    """Of the data, exact for polynomials in log sigma."""
    return _integrals(_log_ratio(sigma, sigma_next), _log_nodes(sigma, levels), 1)


def simplified(variant: str) -> Weights:
    """UniPC's: of two outputs with weights 1/2 B(h) of the difference, of one or three and more exact.

    With B(h) = exp(h) - 1, "bh2", two outputs are DPM-Solver++(2M)'s.
    """
    return partial(_simplified, variant)


def _simplified(variant: str, sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    if len(levels) != 2:
        return exponential(sigma, sigma_next, levels)
    h, nodes = _log_ratio(sigma, sigma_next), _log_nodes(sigma, levels)
    other = 0 if levels[1] == sigma else 1  # the output at sigma itself carries the step
    total = -math.expm1(-h)
    weight = (h if variant == "bh1" else total) * h / (2 * nodes[other])
    return [weight, total - weight] if other == 0 else [total - weight, weight]


def half_curvature(sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    """DPM-Solver++(3M)'s as published: of three outputs, with half of their second derivative."""
    if len(levels) != 3:
        return _simplified("bh2", sigma, sigma_next, levels)
    h, nodes = _log_ratio(sigma, sigma_next), _log_nodes(sigma, levels)
    tau, measure = _quadrature(h, 1)  # in closed form, the integral of tau^2 would cancel where h is small
    square = float((measure * tau**2).sum())
    exact = exponential(sigma, sigma_next, levels)
    others = ([nodes[k] - nodes[j] for j in range(3) if j != k] for k in range(3))
    return [weight - 0.5 * square / math.prod(gaps) for weight, gaps in zip(exact, others, strict=True)]


def adams(sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    """Of the noise, exact for polynomials in sigma: Adams-Bashforth on any grid."""
    return _integrals(sigma_next - sigma, [level - sigma for level in levels], 0)


def log_adams(sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    """Of the noise, exact for polynomials in log sigma."""
    scaled = _integrals(_log_ratio(sigma, sigma_next), _log_nodes(sigma, levels), -1)
    return [-sigma_next * weight for weight in scaled]  # ds = -sigma' exp(h - tau) dtau


def even_adams(sigma: float, sigma_next: float, levels: Sequence[float]) -> list[float]:
    """Of the noise, exact for polynomials in sigma if the levels are evenly spaced."""
    return [(sigma_next - sigma) * weight for weight in _EVEN[len(levels) - 1]]


def _log_nodes(sigma: float, levels: Sequence[float]) -> list[float]:
    return [_log_ratio(sigma, level) for level in levels]


def _log_ratio(a: float, b: float) -> float:
    """log(a/b), to the last digit also where both are close: their quotient rounds away what parts them."""
    return math.log1p((a - b) / b) if a > b else -math.log1p((b - a) / a)


def _integrals(h: float, nodes: Sequence[float], rate: int) -> list[float]:
    """int_0^h exp(rate (tau - h)) L_j(tau) dtau for the Lagrange polynomials L_j of the nodes."""
    tau, measure = _quadrature(h, rate)
    bases = (
        np.prod([(tau - other) / (node - other) for other in nodes if other != node], axis=0)
        for node in nodes
    )
    return [float((measure * basis).sum()) for basis in bases]


def _quadrature(h: float, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Points tau in [0, h], and the shares that they have in int_0^h exp(rate (tau - h)) ... dtau."""
    tau = h * POINTS
    return tau, h * SHARES * np.exp(rate * (tau - h))
