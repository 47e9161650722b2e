"""Errors of the arithmetic against mpmath with 50 digits: what `conditioning.py` tells and tests assert.

The reference takes the numbers that the layers hold, such as eigenvectors already rounded, and the same x:
what is left is the rounding of the arithmetic. x are draws of the layer's own law at each noise level, in 12
dimensions. The largest variance is 100, that of the first axis of images with some thousand pixels; the least
is smaller by the condition number, or 0, of half of the dimensions, where the tail is 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from gaussnet import Covariance, Gate, GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser, Marginals
from gaussnet.flow import GaussianFlow
from gaussnet.samplers import weights
from gaussnet.schedules import EDMSchedule, VPSchedule

MP: Any = mpmath.MPContext()  # of our own: the precision of the global one is that of its user
MP.dps = 50
ROOT, LOG, EXP = (np.vectorize(f, otypes=[object]) for f in (MP.sqrt, MP.log, MP.exp))
NUMBER = np.vectorize(MP.mpf, otypes=[object])

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SIGMAS = (0.002, 0.01, 0.05, 0.5, 5.0, 80.0)
CONDITIONS = (1.0, 1e4, 1e8, 1e12)
RANKS = ("full", "zero tail", "tail")
MIXTURES = ("apart", "close")
STEPS = tuple(10.0**power for power in range(-8, 2))  # of the log of the noise level
LARGEST, DIM, SAMPLES = 100.0, 12, 2

Exact = Any  # an array of numbers of 50 digits
Errors = dict[str, float]


# Exact numbers ------------------------------------------------------------------------------------


def exact(tensor: Tensor) -> Exact:
    """The same numbers, without rounding."""
    return NUMBER(tensor.detach().double().numpy())


def relative(actual: Tensor, expected: Exact) -> float:
    """The largest ||actual - expected|| / ||expected|| of the samples (B, ...)."""
    if not bool(torch.isfinite(actual).all()):
        return math.inf
    off, size = ((part.reshape(len(part), -1) ** 2).sum(1) for part in (exact(actual) - expected, expected))
    return float(MP.sqrt((off / size).max()))


def largest(actual: Tensor, expected: Exact, floor: float = 0.0) -> float:
    """The largest |actual - expected| / max(|expected|, floor)."""
    if not bool(torch.isfinite(actual).all()):
        return math.inf
    return float(np.max(abs(exact(actual) - expected) / np.maximum(abs(expected), floor)))


class Spectral:
    """f(Sigma) of a covariance as `gaussnet.covariance` defines it, of a few vectors u (B, D)."""

    def __init__(self, covariance: Covariance, u: Exact) -> None:
        self.full = covariance.rank == covariance.dim
        self.basis, self.lam = exact(covariance.eigvecs), exact(covariance.eigvals)
        self.tail = exact(covariance.tail[None])
        self.u, self.z = u, u @ self.basis

    def apply(self, f: Callable[[Exact], Exact]) -> Exact:
        """f(Sigma) u, (B, D)."""
        if self.full:
            return (f(self.lam) * self.z) @ self.basis.T
        return f(self.tail) * self.u + ((f(self.lam) - f(self.tail)) * self.z) @ self.basis.T

    def diagonal(self, f: Callable[[Exact], Exact]) -> Exact:
        """The diagonal, (D,)."""
        outside = 0 if self.full else f(self.tail)
        return outside + (f(self.lam) - outside) @ self.basis.T**2

    def trace(self, f: Callable[[Exact], Exact]) -> Exact:
        """The trace."""
        left = self.basis.shape[0] - len(self.lam)
        return f(self.lam).sum() + left * f(self.tail)[0]

    def log_prob(self, variance: Exact) -> Exact:
        """Log N(u; 0, Sigma + variance I), (B,)."""
        distance = (self.u * self.apply(lambda lam: 1 / (lam + variance))).sum(-1)
        logdet = self.trace(lambda lam: LOG(lam + variance))
        return -(distance + logdet + self.basis.shape[0] * MP.log(2 * MP.pi)) / 2


# Layers -------------------------------------------------------------------------------------------


def covariance(condition: float, rank: str, seed: int = 0) -> Covariance:
    """Random axes, in float64; eigenvalues evenly in log."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    top, low = math.log10(LARGEST), math.log10(LARGEST / condition)
    kept = DIM if rank == "full" else DIM // 2
    end = low if rank != "tail" else (top + low) / 2
    eigvals = torch.logspace(top, end, kept, dtype=torch.float64)
    return Covariance(axes[:, :kept], eigvals, LARGEST / condition if rank == "tail" else 0.0)


@cache
def gaussian(dtype: str, condition: float, rank: str) -> GaussianDenoiser:
    """A Gaussian with a random mean."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(DIM, generator=generator, dtype=torch.float64) / 2
    return GaussianDenoiser(mean, covariance(condition, rank)).to(DTYPES[dtype])


def draws(model: GaussianDenoiser, sigma: float, count: int = SAMPLES) -> Tensor:
    """Of N(mu, Sigma + sigma^2 I)."""
    return model.sample(count, sigma, torch.Generator().manual_seed(2))


def gradient(model: GaussianDenoiser | GaussianMixtureDenoiser, x: Tensor, sigma: float) -> Tensor:
    """Of the log density."""
    return torch.func.grad(lambda x: model.log_prob(x, sigma).sum())(x)


# Errors -------------------------------------------------------------------------------------------


def gaussian_errors(dtype: str, sigma: float, condition: float, rank: str) -> Errors:
    """Of the Gaussian, its flow and the Gaussian refined by marginals."""
    model = gaussian(dtype, condition, rank)
    x = draws(model, sigma)
    mean, variance = exact(model.mean), MP.mpf(sigma) ** 2
    law = Spectral(model.covariance, exact(x) - mean)
    score = -law.apply(lambda lam: 1 / (lam + variance))
    denoised = mean + law.apply(lambda lam: lam / (lam + variance))
    left = law.diagonal(lambda lam: lam * variance / (lam + variance))
    errors = {
        "denoiser": relative(model(x, sigma), denoised),
        "score": relative(model.score(x, sigma), score),
        "gradient of log density": relative(gradient(model, x, sigma), score),
        "log density": largest(model.log_prob(x, sigma), law.log_prob(variance), 1.0),
        "posterior variance": largest(model.posterior_variance(x, sigma)[0], left),
        "bayes error": largest(
            model.bayes_error(sigma), law.trace(lambda lam: lam * variance / (lam + variance)) / DIM
        ),
    }
    for end in (SIGMAS[0], SIGMAS[-1]):
        moved = mean + law.apply(lambda lam, end=end: ROOT((lam + MP.mpf(end) ** 2) / (lam + variance)))
        name = "flow up" if end > sigma else "flow down"
        errors[name] = max(relative(model.flow(x, sigma, end), moved), errors.get(name, 0.0))
    refined = marginal(dtype, condition, rank)
    assert isinstance(refined.marginals, Marginals)
    expected = exact_marginal(refined.marginals, mean, law.diagonal(lambda lam: lam), left, denoised)
    errors["marginal: denoiser"] = relative(refined(x, sigma), expected)
    errors["marginal: score"] = relative(refined.score(x, sigma), (expected - exact(x)) / variance)
    return errors | flow_errors(model, sigma)


def flow_errors(model: GaussianDenoiser, sigma: float) -> Errors:
    """Of the coefficients of the trajectory from either end, in EDM's and in the VP schedule."""
    lam = model.covariance.eigvals
    errors: Errors = defaultdict(float)
    for schedule, end in product((EDMSchedule(), VPSchedule()), (SIGMAS[0], SIGMAS[-1])):
        flow = GaussianFlow(model, schedule)
        times = schedule.time(sigma), schedule.time(end)
        (alpha, v), (_, v_end) = (exact_variance(schedule, time, exact(lam)) for time in times)
        psi, xi = ROOT(v / v_end), alpha * exact(lam) / ROOT(v * v_end)
        errors["flow: psi"] = max(errors["flow: psi"], largest(flow.psi(*times, lam), psi))
        errors["flow: xi"] = max(errors["flow: xi"], largest(flow.xi(*times, lam), xi))
    return dict(errors)


def exact_variance(schedule: EDMSchedule | VPSchedule, time: Tensor, lam: Exact) -> tuple[Exact, Exact]:
    """alpha_t, and sigma_t^2 + lam alpha_t^2."""
    t = MP.mpf(float(time))
    if isinstance(schedule, EDMSchedule):
        return MP.mpf(1), t**2 + lam
    share = MP.exp(-t * (MP.mpf(schedule.beta_min) + MP.mpf(schedule.beta_d) * t / 2))
    return MP.sqrt(share), 1 - share + lam * share


@cache
def marginal(dtype: str, condition: float, rank: str) -> MarginalDenoiser:
    """The Gaussian with pixels that are mixtures of five levels."""
    generator = torch.Generator().manual_seed(3)
    shares = torch.randn(DIM, 5, generator=generator, dtype=torch.float64)
    levels = torch.tensor([-9.0, -3.0, 0.0, 2.0, 8.0], dtype=torch.float64)
    widths = torch.tensor([1.0, 4.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    own = Marginals(levels, widths, torch.log_softmax(shares, -1)).to(DTYPES[dtype])
    return MarginalDenoiser(gaussian(dtype, condition, rank), own)


def exact_marginal(own: Marginals, mean: Exact, prior: Exact, left: Exact, denoised: Exact) -> Exact:
    """Eq. 2-5 of `gaussnet.denoisers.marginal`, as they stand."""
    eta, h = 1 / left - 1 / prior, (denoised - mean) / prior  # (2); (D,), (B, D)
    eta, h = eta[:, None], h[..., None]
    width, c = exact(own.widths), exact(own.levels) - denoised[..., None]
    evidence = (h * c + width * h**2 / 2 - eta * c**2 / 2) / (1 + width * eta) - LOG(1 + width * eta) / 2
    shares = EXP(evidence + exact(own.log_weights))  # 50 digits have no range to leave
    return denoised + (shares * (c + width * h) / (1 + width * eta)).sum(-1) / shares.sum(-1)


@cache
def mixture(
    dtype: str, condition: float, kind: str
) -> tuple[GaussianMixtureDenoiser, tuple[GaussianDenoiser, ...]]:
    """A component of each rank, or three that share points at the least noise, too; and each alone."""
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(len(RANKS), DIM, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    if kind == "apart":
        laws = [covariance(condition, rank, seed) for seed, rank in enumerate(RANKS)]
    else:
        means, laws = means[:1] + SIGMAS[0] * means, [covariance(condition, "zero tail")] * len(RANKS)
    model = GaussianMixtureDenoiser(shares, means, laws).to(DTYPES[dtype])
    alone = (GaussianDenoiser(mean, law).to(DTYPES[dtype]) for mean, law in zip(means, laws, strict=True))
    return model, tuple(alone)


def mixture_errors(dtype: str, sigma: float, condition: float, kind: str) -> Errors:
    """Of the mixture, at draws of each component."""
    model, alone = mixture(dtype, condition, kind)
    x = torch.cat([draws(part, sigma, 1) for part in alone])
    variance, prior = MP.mpf(sigma) ** 2, exact(model.weights)
    laws = [Spectral(part.covariance, exact(x) - exact(part.mean)) for part in alone]
    logits = np.stack([law.log_prob(variance) for law in laws], 1) + LOG(prior)  # (B, K)
    top = logits.max(1, keepdims=True)
    joint = EXP(logits - top)
    own = joint / joint.sum(1, keepdims=True)

    def combined(parts: list[Exact]) -> Exact:
        return sum(own[:, k, None] * part for k, part in enumerate(parts))

    denoised = [
        exact(part.mean) + law.apply(lambda lam: lam / (lam + variance))
        for part, law in zip(alone, laws, strict=True)
    ]
    score = combined([-law.apply(lambda lam: 1 / (lam + variance)) for law in laws])
    log_prob = (top + LOG(joint.sum(1, keepdims=True)))[:, 0] - MP.log(prior.sum())
    return {
        "mixture: denoiser": relative(model(x, sigma), combined(denoised)),
        "mixture: score": relative(model.score(x, sigma), score),
        "mixture: gradient of log density": relative(gradient(model, x, sigma), score),
        "mixture: log density": largest(model.log_prob(x, sigma), log_prob, 1.0),
        "mixture: responsibilities": largest(model.responsibilities(x, sigma), own, 1.0),
    }


def gate_errors(dtype: str) -> Errors:
    """Of a table of 25 levels, between them, and of the level where it falls below a tolerance."""
    values = torch.linspace(0.97, 0.03, 25, dtype=torch.float64) ** 2
    gate = Gate(torch.logspace(-1.3, 2, 25, dtype=torch.float64), values).to(DTYPES[dtype])
    nodes, heights = exact(gate.log_sigma), exact(gate.values)

    def between(place: Exact, x: Exact, y: Exact) -> Exact:
        k = min(max(int(np.searchsorted(x, place)), 1), len(x) - 1)
        share = min(max((place - x[k - 1]) / (x[k] - x[k - 1]), 0), 1)
        return y[k - 1] + share * (y[k] - y[k - 1])

    sigmas = torch.logspace(-3, 2.2, 40, dtype=torch.float64).to(DTYPES[dtype])
    expected = np.array([between(MP.log(sigma), nodes, heights) for sigma in exact(sigmas)])
    errors = {"gate": largest(gate(sigmas), expected, 1.0)}
    tolerances = np.linspace(0.01, 0.9, 9).tolist()
    ends = np.array([MP.exp(between(MP.mpf(tol), heights[::-1], nodes[::-1])) for tol in tolerances])
    closing = torch.tensor([gate.closes(tol) for tol in tolerances], dtype=torch.float64)
    errors["gate: closing level"] = largest(closing, ends)
    return errors


# Weights of multistep solvers ---------------------------------------------------------------------

RULES: dict[str, weights.Weights] = {
    "exponential": weights.exponential,
    "bh1": weights.simplified("bh1"),
    "bh2": weights.simplified("bh2"),
    "half curvature": weights.half_curvature,
    "Adams": weights.adams,
    "Adams in the log": weights.log_adams,
}


def moment(h: Exact, power: int, rate: int) -> Exact:
    """int_0^h exp(rate (tau - h)) tau^power dtau: phi functions, by the hypergeometric one."""
    return h ** (power + 1) * MP.exp(-rate * h) * MP.hyp1f1(power + 1, power + 2, rate * h) / (power + 1)


def interpolating(h: Exact, nodes: list[Exact], rate: int) -> list[Exact]:
    """The integrals of the Lagrange polynomials of the nodes, from those of powers."""
    moments = [moment(h, power, rate) for power in range(len(nodes))]
    found = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        powers = [MP.mpf(1)]  # of prod (tau - other), the lowest first
        for other in others:
            powers = [
                up - other * same for up, same in zip([MP.mpf(0), *powers], [*powers, MP.mpf(0)], strict=True)
            ]
        scale = MP.fprod(node - other for other in others)
        found.append(MP.fdot(powers, moments) / scale)
    return found


def exact_weights(rule: str, sigma: float, sigma_next: float, levels: list[float]) -> list[Exact]:
    """What the rule of this name should give."""
    start, end, known = MP.mpf(sigma), MP.mpf(sigma_next), [MP.mpf(level) for level in levels]
    h, nodes = MP.log(start / end), [MP.log(start / level) for level in known]
    if rule == "Adams":
        return interpolating(end - start, [level - start for level in known], 0)
    if rule == "Adams in the log":
        return [-end * weight for weight in interpolating(h, nodes, -1)]
    full = interpolating(h, nodes, 1)
    if rule == "half curvature" and len(known) == 3:
        gaps = [MP.fprod(node - other for other in nodes if other != node) for node in nodes]
        return [weight - moment(h, 2, 1) / gap / 2 for weight, gap in zip(full, gaps, strict=True)]
    if rule != "exponential" and len(known) == 2:
        total = -MP.expm1(-h)
        weight = (h if rule == "bh1" else total) * h / (2 * nodes[1])
        return [total - weight, weight]
    return full


def weight_errors(step: float) -> Errors:
    """Of a step of this length in the log, after others, up to four times as long or short, and corrected."""
    errors: Errors = defaultdict(float)
    for sigma, ratio, count, corrected in product((0.01, 3.0), (0.25, 1.0, 4.0), (1, 2, 3, 4), (False, True)):
        after = sigma * math.exp(-step)
        levels = [sigma * math.exp(step * ratio * k) for k in range(count)]
        if corrected:
            levels = [sigma, after, *levels[1:-1]][: max(count, 2)]
        for name, rule in RULES.items():
            expected = exact_weights(name, sigma, after, levels)
            off = max(
                abs(MP.mpf(float(a)) - e) for a, e in zip(rule(sigma, after, levels), expected, strict=True)
            )
            errors[f"weights: {name}"] = max(
                errors[f"weights: {name}"], float(off / max(abs(e) for e in expected))
            )
    return dict(errors)
