"""DPM-Solver-v3 against manufactured solutions, its limits, and statistics that are known in closed form."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, denoiser, gaussian, mixture, randn, relative_error, train_digits
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.integrate import quad, solve_ivp
from test_solvers_convergence import HIGH, LOW, STEPS, levels_above, slope, solve, trajectory
from torch import Tensor

from gaussnet import Covariance, GaussianDenoiser, count_nfe, karras_sigmas
from gaussnet.samplers import (
    ModelStatistics,
    compute_ems,
    dop853,
    dpm_v3,
    dpmpp_2m,
    euler,
    log_snr_sigmas,
    unipc,
    weights,
)
from gaussnet.samplers.model_statistics import _statistics
from gaussnet.samplers.multistep import multistep

GRID = log_snr_sigmas(40, 0.002, 80.0)


def tables(sigmas: Tensor, shape: tuple[int, ...] = (1, 2, 3)) -> ModelStatistics:
    """Smooth statistics that are nobody's: each pixel has its own."""
    at = sigmas.log().reshape(-1, *(1,) * len(shape)) + 0.3 * randn(*shape, seed=9)
    return ModelStatistics(sigmas, torch.sigmoid(2 * at), 0.5 * torch.tanh(at), 0.4 * torch.cos(at))


def constant(l: float, s: float, b: float) -> ModelStatistics:  # noqa: E741 - the name in the paper
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    return ModelStatistics(torch.tensor([0.001, 100.0]), l * one, s * one, b * one)


smooth = tables(torch.logspace(-3, 2, 200, dtype=torch.float64))


# Steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("ahead", [False, True])
def test_steps_are_exact_for_polynomials(count: int, ahead: bool) -> None:
    # dx/dlambda = -l x - f with g = e^(-S) f - B a polynomial of the degree that `count` outputs determine
    now, then = np.log(1 / 2.0), np.log(1 / 0.4)
    c = [0.7, -1.3, 0.4][:count]
    spline: Any = smooth._spline

    def values(lam: float) -> np.ndarray:
        return spline(lam)[:, 0, 1, 2]

    def rates(lam: float, y: np.ndarray) -> np.ndarray:  # of S, B, x
        l, s, b = values(lam)  # noqa: E741
        g = sum(factor * (lam - now) ** k for k, factor in enumerate(c))
        return np.array([s, np.exp(-y[0]) * b, -l * y[2] - np.exp(y[0]) * (g + y[1])])

    def solved(end: float) -> tuple[float, float]:
        """X and f at another lambda."""
        S, B, x = solve_ivp(rates, (now, end), [0, 0, 1.5], method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        return x, np.exp(S) * (sum(factor * (end - now) ** k for k, factor in enumerate(c)) + B)

    nodes = [now, now - 0.3, now - 0.7][:count]
    if ahead:  # as in a corrector
        nodes = [then, *nodes][:count]
    sigma, sigma_next, *levels = np.exp(-np.array([now, then, *nodes])).tolist()
    factor, factors, rest = smooth.step(sigma, sigma_next, levels)
    outputs = [solved(node)[1] if node != now else c[0] for node in nodes]
    step = factor * 1.5 + sum(w * f for w, f in zip(factors, outputs, strict=True)) + rest
    assert step[0, 1, 2] == pytest.approx(solved(then)[0], rel=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pseudo_steps_have_divided_differences_for_derivatives(count: int) -> None:
    nodes = [0.3, 0.1, -0.4][:count]
    sigma, *levels = np.exp(-np.array(nodes)).tolist()
    values = [0.7, -1.3, 0.4][:count]
    slopes = [(values[j] - values[j + 1]) / (nodes[j] - nodes[j + 1]) for j in range(count - 1)]
    taylor = [values[0], *slopes[:1]]
    if count == 3:
        taylor.append((slopes[0] - slopes[1]) / (nodes[0] - nodes[2]))
    one = constant(1, 0, 0)  # g = f, and x' = e^(-h) x - int e^(tau - h) g dtau
    factor, factors, rest = one.step(sigma, sigma / 2, [sigma, *levels], pseudo=True)
    h = np.log(2)
    expected = [quad(lambda tau, k=k: np.exp(tau - h) * tau**k, 0, h)[0] for k in range(count)]
    step = sum(w * f for w, f in zip(factors, values, strict=True))
    assert np.ravel(factor)[0] == pytest.approx(0.5)
    assert np.ravel(step)[0] == pytest.approx(-sum(c * e for c, e in zip(taylor, expected, strict=True)))
    assert np.ravel(rest)[0] == pytest.approx(0)


LIMITS = {
    "data": (constant(1, 0, 0), weights.exponential, False),
    "noise": (constant(0, -1, 0), weights.log_adams, True),
}


@pytest.mark.parametrize("corrector", ["none", "same"])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, order: int, lower: bool, corrector: Any) -> None:
    statistics, rule, noise = LIMITS[name]
    m, grid, levels = mixture(), karras_sigmas(8), (96.0, 90.0, 85.0)
    x = 80 * randn(4, *m.event_shape)
    states = [level / 80 * x for level in levels]
    history = [(level, state, m(state, level)) for level, state in zip(levels, states, strict=True)]
    arguments: dict[str, Any] = {"order": order, "history": history, "lower_order_final": lower}
    out = dpm_v3(m, x, grid, statistics=statistics, corrector=corrector, **arguments)
    if corrector == "none":
        expected = multistep(
            m, x, grid, rule, order, history, None, None, None, noise=noise, lower_order_final=lower
        )
    else:
        expected = corrected(m, x, grid.tolist(), rule, order, history, noise, lower)
    assert relative_error(out, expected) < 1e-11


def corrected(
    m: Any, x: Tensor, levels: list[float], rule: Any, p: int, history: Any, noise: bool, lower: bool
) -> Tensor:
    """Steps of order p, each repeated with the output at its end in place of the oldest."""

    def step(x: Tensor, start: float, end: float, outputs: list[tuple[float, Tensor]]) -> Tensor:
        x = x if noise else end / start * x
        return x + sum(
            w * o
            for w, (_, o) in zip(rule(start, end, [level for level, _ in outputs]), outputs, strict=True)
        )

    past = [(s, (y - d) / s if noise else d) for s, y, d in reversed(history)]
    used: list[tuple[float, Tensor]] = []
    before = x
    for i, level in enumerate(levels[:-1]):
        denoised = m(x, level)
        if levels[i + 1] == 0:
            return denoised
        # what is kept at a level is its f: with the noise and l = 0 that is x - D at the predicted state
        output = (x - denoised) / level if noise else denoised
        if len(used) > 1:
            x = step(before, levels[i - 1], level, [(level, output), *used[:-1]])
        past, before = [(level, output), *past][:p], x
        used = past[: len(levels) - 1 - i] if lower else past
        x = step(x, level, levels[i + 1], used)
    raise AssertionError("the grid ends in 0")


def test_limits_by_name() -> None:
    m, data = mixture(), constant(1, 0, 0)
    grid, x = log_snr_sigmas(9), 80 * randn(4, *mixture().event_shape)
    for corrector in ("none", "same"):  # the latter leaves steps of order 1
        out = dpm_v3(m, x, grid, statistics=data, order=1, corrector=corrector)
        assert relative_error(out, euler(m, x, grid)) < 1e-12
    # The published weights of two outputs are simplified: they agree in the limit of small steps.
    for solver, arguments in (
        (dpmpp_2m, {"order": 2, "corrector": "none"}),
        (partial(unipc, order=1), {"order": 1, "corrector": "pseudo"}),
    ):
        errors = []
        for n in (60, 120):
            seen: list[list[dict[str, Any]]] = [[], []]
            fine = log_snr_sigmas(n, 0.5, 5.0)
            dpm_v3(m, x / 16, fine, statistics=data, callback=seen[0].append, **arguments)
            solver(m, x / 16, fine, callback=seen[1].append)
            errors.append(relative_error(*(s[-1]["x"] for s in seen)))
        assert errors[1] < 0.3 * errors[0] < 1e-3, f"{errors}"


# What the authors' sampler (github.com/thu-ml/DPM-Solver-v3, ba16871, codebases/edm) makes of x with the
# tables `smooth`, resolved by 24,000 steps: its state before the last of six evaluations, at 0.0117.
# order, pseudo, corrector -> the state of mixture()
PUBLISHED = {
    (1, False, "pseudo"): (1.083307, -0.246473, 2.414183, -1.848698, 2.189442, 1.345725),
    (2, False, "none"): (0.789709, 0.885518, 0.658637, -0.947537, 1.434668, -0.048666),
    (2, False, "same"): (1.895582, 0.44984, 2.027416, -1.217009, 2.814482, 0.399416),
    (2, False, "pseudo"): (2.333284, 0.349041, 2.436011, -1.167299, 3.310912, 0.506465),
    (3, False, "same"): (0.461135, 0.088784, 2.08267, -2.282497, 2.125153, 0.707458),
    (3, True, "same"): (1.243117, 0.316854, 1.977439, -1.602671, 2.428702, 0.530178),
    (3, False, "pseudo"): (1.017138, 0.153648, 2.458054, -2.25676, 2.806461, 0.601956),
    (3, True, "none"): (1.348917, 0.340862, 1.631496, -0.887848, 2.067062, 0.711068),
}


@pytest.mark.parametrize(("order", "pseudo", "corrector"), PUBLISHED)
def test_the_authors_states(order: int, pseudo: bool, corrector: Any) -> None:
    grid = torch.cat(
        [torch.logspace(np.log10(80), np.log10(0.002), 7, dtype=torch.float64)[:-1], torch.zeros(1)]
    )
    seen: list[dict[str, Any]] = []
    arguments: dict[str, Any] = {"order": order, "pseudo": pseudo, "corrector": corrector}
    x = 80 * randn(1, 1, 2, 3, seed=7)
    dpm_v3(mixture(), x, grid, statistics=smooth, callback=seen.append, **arguments)
    expected = torch.tensor(PUBLISHED[order, pseudo, corrector]).double()
    assert (seen[-1]["x"].flatten() - expected).abs().max() < 5e-6


# Orders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("order", "pseudo", "corrector", "expected"),
    [
        *((p, False, corrector, p) for p in (1, 2, 3) for corrector in ("none", "same")),
        *((p, False, "pseudo", 2) for p in (1, 2)),
        (3, True, "none", 2),
    ],
)
def test_order(order: int, pseudo: bool, corrector: Any, expected: int, kind: str) -> None:
    solver = partial(
        dpm_v3, statistics=smooth, order=order, corrector=corrector, pseudo=pseudo, lower_order_final=False
    )
    errors, steps = [], [4 * n for n in STEPS] if corrector == "same" else STEPS
    for n in steps:
        grid = log_snr_sigmas(n + 1, LOW, HIGH)
        errors.append(solve(kind, solver, grid, trajectory(kind, levels_above(grid, 3))))
    assert slope(steps, errors) == pytest.approx(-expected, abs=0.3), f"{errors}"


@pytest.mark.parametrize("corrector", ["none", "same", "pseudo"])
def test_history_goes_on_as_if_never_interrupted(corrector: Any) -> None:
    solver = partial(dpm_v3, statistics=smooth, order=3, corrector=corrector)
    m, grid = mixture(), karras_sigmas(14)
    x, seen = 80 * randn(4, *m.event_shape), list[dict[str, Any]]()
    whole = solver(m, x, grid, callback=seen.append)
    history = [(step["sigma"], step["x"], step["denoised"]) for step in seen[:6]]
    resumed = solver(m, seen[6]["x"], grid[6:], history=history)
    if corrector != "none":  # the state at the cut is corrected only when it has come from above
        assert 1e-12 < relative_error(resumed, whole) < 0.1
    else:
        assert resumed.equal(whole)
    assert relative_error(solver(m, seen[6]["x"], grid[6:]), whole) > relative_error(resumed, whole)


# Statistics ---------------------------------------------------------------------------------------


def diagonal_gaussian(isotropic: bool) -> tuple[GaussianDenoiser, Tensor]:
    """A Gaussian of independent pixels, and their variances."""
    variances = torch.full((6,), 0.3) if isotropic else torch.logspace(0.5, -2, 6)
    variances = variances.double()
    covariance = Covariance(torch.eye(6, dtype=torch.float64), variances)
    return GaussianDenoiser(randn(1, 2, 3, seed=3), covariance), variances.reshape(1, 2, 3)


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_is_exact_for_independent_pixels(isotropic: bool, dtype: torch.dtype) -> None:
    g, variances = diagonal_gaussian(isotropic)
    data = (g.mean + variances.sqrt() * randn(50, 1, 2, 3, seed=4)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    statistics = compute_ems(g.to(dtype), data, log_snr_sigmas(200), n=64, generator=generator)
    level = statistics.sigmas.reshape(-1, 1, 1, 1)
    linear = level**2 / (variances + level**2)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(statistics.l, linear, rtol=tolerance, atol=tolerance)
    assert statistics.s.abs().max() == 0, "f is the same everywhere: there is nothing to explain"
    # f = -l mu, and dl/dlambda = -2 l (1 - l)
    torch.testing.assert_close(
        statistics.b, 2 * linear * (1 - linear) * g.mean.double(), rtol=1e-3, atol=5e-4
    )

    x = (80 * randn(5, 1, 2, 3, seed=5)).to(dtype)
    grid, seen = torch.tensor([80.0, 0.002, 0.0]), list[dict[str, Any]]()
    for order in (1, 2, 3):
        dpm_v3(g, x, grid, statistics=statistics, order=order, callback=seen.append)
        exact = g.flow(x, 80.0, 0.002)
        assert relative_error(seen[-1]["x"], exact) < 1e-4
        dpm_v3(g, x, grid, statistics=constant(1, 0, 0), order=order, callback=seen.append)
        assert relative_error(seen[-1]["x"], exact) > 0.1, "the statistics do it"


def test_statistics_of_dependent_pixels() -> None:
    # f and df/dlambda of a Gaussian are linear in x ~ N(mu, Sigma + sigma^2 I): all moments are known.
    g = gaussian()
    cov, mean, eye = g.covariance.dense(), g.mean.flatten(), torch.eye(6, dtype=torch.float64)
    data = mean + randn(30_000, 6, seed=4) @ torch.linalg.cholesky(cov).T
    levels = torch.logspace(-1, 1, 41, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    statistics = compute_ems(
        g, data.reshape(-1, 1, 2, 3), levels, n=30_000, batch_size=7000, generator=generator
    )

    def parts(lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, and f = F x + k: f's matrix and its constant."""
        shrink = cov @ torch.linalg.inv(cov + torch.exp(-2 * lam) * eye)
        linear = 1 - shrink.diagonal()
        return linear, torch.diag(1 - linear) - shrink, -(eye - shrink) @ mean

    for i in (8, 20, 32):
        lam = -levels[i].log()
        linear, f, k = parts(lam)
        rates: Any = torch.autograd.functional.jacobian(parts, lam)
        shrink = torch.diag(1 - linear) - f
        drift = shrink - eye  # dx/dlambda = (M - I) (x - mu)
        f1, k1 = rates[1] + f @ drift, rates[2] - f @ drift @ mean
        noisy = cov + levels[i] ** 2 * eye
        s = (f1 @ noisy @ f.T).diagonal() / (f @ noisy @ f.T).diagonal()
        b = (f1 @ mean + k1) - s * (f @ mean + k)
        assert relative_error(statistics.l[i].flatten(), linear) < 0.01
        assert relative_error(statistics.s[i].flatten(), s) < 0.03, f"{statistics.s[i]} {s}"
        assert relative_error(statistics.b[i].flatten(), b) < 0.03


@pytest.fixture(scope="module")
def digits_statistics() -> ModelStatistics:
    generator = torch.Generator().manual_seed(0)
    return compute_ems(denoiser("mixture-kmeans"), train_digits(), GRID, n=128, generator=generator)


@pytest.mark.parametrize("n", [6, 10])
def test_statistics_help(digits_statistics: ModelStatistics, n: int) -> None:
    m, x = denoiser("mixture-kmeans"), 80 * randn(16, 1, 8, 8, seed=5)
    exact = dop853(m, x, torch.tensor([80.0, 0.002, 0.0]))
    for grid in (karras_sigmas(n), log_snr_sigmas(n)):
        error = relative_error(dpm_v3(m, x, grid, statistics=digits_statistics), exact)
        others = [relative_error(solver(m, x, grid), exact) for solver in (dpmpp_2m, unipc)]
        assert error < 0.8 * min(others), f"{error}, {others}"


def test_statistics_of_networks_and_classes() -> None:
    data, labels = train_digits(torch.float32)[:6], torch.tensor([0, 1, 2, 3, 4, 5])
    levels = torch.tensor([5.0, 0.5, 0.0])  # a grid will do
    network = compute_ems(denoiser("bypass", torch.float32), data, levels, n=9)
    assert network.sigmas.tolist() == [0.5, 5.0]
    assert not network.l.requires_grad
    assert {table.dtype for table in (network.sigmas, network.l, network.s, network.b)} == {torch.float64}
    arguments: dict[str, Any] = {"n": 9, "batch_size": 4}
    m = denoiser("mixture-classes", torch.float32)
    by_class, without = (
        compute_ems(
            m, data, levels, generator=torch.Generator().manual_seed(0), class_labels=given, **arguments
        )
        for given in (labels, None)
    )
    assert relative_error(by_class.l, without.l) > 0.01
    rows = torch.nn.functional.one_hot(labels, 10).float()
    again = compute_ems(
        m, data, levels, generator=torch.Generator().manual_seed(0), class_labels=rows, **arguments
    )
    torch.testing.assert_close(again.l, by_class.l)


@pytest.mark.parametrize(("spread", "rate"), [(2e-4, -0.5), (0.5e-4, 0.0)])
def test_what_hardly_varies_has_no_rate(spread: float, rate: float) -> None:
    levels = torch.logspace(-2, 1, 5, dtype=torch.float64)
    half = torch.full((5, 1), 0.5, dtype=torch.float64)  # dD/dx, and so 1 - l
    product = torch.zeros(5, 3, 3, 1, dtype=torch.float64)
    product[:, 1, 1] = (spread * half * levels[:, None]) ** 2  # D alone varies, f by as much
    found = _statistics(levels, torch.zeros(5, 3, 1, dtype=torch.float64), product, half, 1e-16)
    torch.testing.assert_close(found.s, torch.full_like(half, rate))


@pytest.mark.parametrize(("roundings", "rate"), [(16.5, -0.5), (15.5, 0.0)])
def test_what_varies_by_rounding_alone_has_no_rate(roundings: float, rate: float) -> None:
    # D = x/2 + w with l = 1/2: f = -w is told from the rounding of D, which has mean 4 and variance 9.
    levels, eps = torch.logspace(-4, -3, 5, dtype=torch.float64), 1e-7
    half = torch.full((5, 1), 0.5, dtype=torch.float64)
    mean, product = torch.zeros(5, 3, 1, dtype=torch.float64), torch.zeros(5, 3, 3, 1, dtype=torch.float64)
    mean[:, 1] = 4
    product[:, 0, 0], product[:, 0, 1], product[:, 1, 0] = 36, 18, 18
    product[:, 1, 1] = 9 + (roundings * eps * 5) ** 2
    found = _statistics(levels, mean, product, half, eps)
    torch.testing.assert_close(found.s, torch.full_like(half, rate), rtol=1e-3, atol=0)


def test_statistics_on_disk(tmp_path: Path) -> None:
    smooth.save(tmp_path / "statistics.safetensors")
    loaded = ModelStatistics.load(tmp_path / "statistics.safetensors")
    for name in ("sigmas", "l", "s", "b"):
        assert getattr(loaded, name).equal(getattr(smooth, name)), name
    with safe_open(tmp_path / "statistics.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "as other libraries ask for"
    with pytest.raises(FileNotFoundError, match=r"expected one that ModelStatistics.save wrote"):
        ModelStatistics.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ModelStatistics.load(tmp_path / "text")
    save_file({"l": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"to hold sigmas, l, s and b, got \['l'\]"):
        ModelStatistics.load(tmp_path / "other")


def test_slices() -> None:
    part = smooth.slice(7.7)
    kept = int((smooth.sigmas < 7.7).sum())
    assert (float(part.sigmas[-1]), len(part.sigmas)) == (7.7, kept + 1)
    assert part.l[:-1].equal(smooth.l[:kept]), "cut, not stretched"
    names = ("sigmas", "l", "s", "b")
    narrow = ModelStatistics(*(getattr(smooth, name).float() for name in names)).slice(7.7)
    assert {getattr(narrow, name).dtype for name in names} == {torch.float32}
    fresh = tables(torch.tensor([1.0, 7.7], dtype=torch.float64))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(part, name)[-1], getattr(fresh, name)[-1], rtol=1e-6, atol=1e-7)
    g, grid = gaussian(), log_snr_sigmas(6, 0.01, 7.7)
    x = 7.7 * randn(3, *g.event_shape)
    assert relative_error(dpm_v3(g, x, grid, statistics=part), dpm_v3(g, x, grid, statistics=smooth)) < 1e-6
    with pytest.raises(ValueError, match=r"within those of the statistics, 0.001 to 7.7, got \[10.0\]"):
        dpm_v3(g, x, log_snr_sigmas(6, 0.01, 10.0), statistics=part)
    assert len(smooth.slice(float(smooth.sigmas[-1])).sigmas) == len(smooth.sigmas)
    for level in (200.0, 0.0005, float("nan")):
        with pytest.raises(ValueError, match=r"within those of the statistics, 0.001 to 100"):
            smooth.slice(level)
    with pytest.raises(ValueError, match=r"expected sigma_max above 0.001, got 0.001$"):
        smooth.slice(0.001)


# Calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector", ["none", "same", "pseudo"])
def test_evaluations(corrector: Any) -> None:
    g = gaussian()
    for n in (1, 2, 3, 9):
        seen: list[dict[str, Any]] = []
        with count_nfe(g) as nfe:
            out = dpm_v3(
                g,
                80 * randn(2, *g.event_shape),
                karras_sigmas(n),
                statistics=smooth,
                order=3,
                corrector=corrector,
                callback=seen.append,
            )
        assert nfe() == n
        assert [(step["i"], step["sigma"]) for step in seen] == list(enumerate(karras_sigmas(n).tolist()))[
            :-1
        ]
        assert out.isfinite().all()


def test_precision() -> None:
    m, grid = mixture(), karras_sigmas(8)
    x = 80 * randn(4, *m.event_shape)
    wide = dpm_v3(m, x, grid, statistics=smooth)
    narrow = dpm_v3(m.float(), x.float(), grid, statistics=smooth)
    kept = dpm_v3(m, x.float(), grid, statistics=smooth, dtype=torch.float64)
    assert (narrow.dtype, kept.dtype) == (torch.float32, torch.float64)
    assert relative_error(narrow, wide) < 1e-4
    assert relative_error(kept, wide) < 1e-5


def test_defaults() -> None:
    m, x = mixture(), 80 * randn(4, *mixture().event_shape)
    named: dict[str, Any] = {"order": 2, "corrector": "same", "pseudo": False, "lower_order_final": True}
    run = partial(dpm_v3, m, x, karras_sigmas(8), statistics=smooth)
    assert run().equal(run(**named))


def test_history_in_another_dtype() -> None:
    g, grid = gaussian().float(), log_snr_sigmas(6, LOW, HIGH)
    (_, x, _), *_ = trajectory("gaussian", (HIGH,))
    history = trajectory("gaussian", levels_above(grid, 2))
    narrow = [(sigma, state.float(), denoised.float()) for sigma, state, denoised in history]
    wide = [(sigma, state.double(), denoised.double()) for sigma, state, denoised in narrow]
    seen: list[dict[str, Any]] = []  # the end is what the denoiser made of float32
    for given in (narrow, wide):
        run = partial(dpm_v3, g, x.float(), grid, statistics=smooth, dtype=torch.float64)
        run(history=given, callback=seen.append)
    assert seen[1]["x"].equal(seen[len(seen) // 2 + 1]["x"]), "f is computed in the dtype of the state"


def test_labels_stay_with_their_samples() -> None:
    labels = torch.arange(7)
    data = labels.double()[:, None, None, None].expand(7, 1, 2, 3)
    seen: list[Tensor] = []

    def forward(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        assert bool(((x - class_labels.reshape(-1, 1, 1, 1)).abs() < 0.1).all())
        return 0.5 * x / (1 + sigma.reshape(-1, 1, 1, 1))

    model = torch.nn.Identity()
    model.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    compute_ems(model, data, torch.tensor([0.01, 0.001]), n=10, batch_size=4, class_labels=labels)
    assert [len(part) for part in seen] == 2 * [4, 4, 4, 4, 2, 2], "two products a batch and level"
    dpm_v3(model, data, torch.tensor([0.01, 0.0]), statistics=smooth, class_labels=labels)
    assert seen[-1].equal(labels)


def test_all_randomness_comes_from_the_generator() -> None:
    g, data, levels = gaussian(), randn(8, 1, 2, 3), torch.tensor([0.5, 1.0, 2.0])
    before = torch.get_rng_state()
    run = partial(compute_ems, g, data, levels, n=12)
    once = run(generator=torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    again = run(generator=torch.Generator().manual_seed(0), batch_size=1)
    other = run(generator=torch.Generator().manual_seed(2))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(again, name), getattr(once, name))
        assert relative_error(getattr(other, name), getattr(once, name)) > 1e-3, name
    assert run(n=2).l.isfinite().all(), "two samples have a spread"


def test_narrow_data() -> None:
    g, levels, data = gaussian(), torch.tensor([0.5, 1.0]), randn(8, 1, 2, 3)
    draws = (torch.Generator().manual_seed(0) for _ in range(2))
    wide, narrow = (
        compute_ems(g.float(), data.to(dtype), levels, n=8, generator=draw)
        for dtype, draw in zip((torch.float32, torch.bfloat16), draws, strict=True)
    )
    assert relative_error(narrow.l, wide.l) < 1e-3
    seen: list[torch.dtype] = []
    model = torch.nn.Identity()
    model.forward = lambda x, sigma: (seen.append(x.dtype), x / 2)[1]  # pyright: ignore[reportAttributeAccessIssue]
    compute_ems(model, data.bfloat16(), levels, n=8)
    assert set(seen) == {torch.bfloat16}, "as a network of that dtype needs it"


def test_bad_calls() -> None:
    g, grid = gaussian(), karras_sigmas(5)
    x = randn(2, *g.event_shape)
    run = partial(dpm_v3, g, x, grid)
    with pytest.raises(
        ValueError, match="expected statistics of the denoiser: compute them once, with compute_ems"
    ):
        run()
    with pytest.raises(ValueError, match=r"0.001 to 0.5, got \[80.0, .*\]"):
        run(statistics=smooth.slice(0.5))
    with pytest.raises(ValueError, match=r"0.01 to 100, got \[0.002\]"):
        run(statistics=tables(torch.tensor([0.01, 1.0, 100.0])))
    with pytest.raises(ValueError, match=r"0.001 to 100, got \[120.0\]"):
        run(statistics=smooth, history=[(120.0, x, x)])
    with pytest.raises(ValueError, match=r"decrease to above 80, got \[70.0\]"):
        run(statistics=smooth, history=[(70.0, x, x)])
    with pytest.raises(ValueError, match="expected an order from 1 to 3, got 4"):
        run(statistics=smooth, order=4)
    with pytest.raises(ValueError, match="expected corrector to be 'none' or 'same' or 'pseudo', got True"):
        run(statistics=smooth, corrector=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected x of shape \(B, \(1, 8, 8\)\), as the statistics"):
        run(statistics=tables(torch.tensor([0.001, 100.0]), (1, 8, 8)))


def test_bad_tables() -> None:
    one = torch.ones(2, 3)
    for sigmas in ([2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0], one.tolist()):
        with pytest.raises(ValueError, match="expected at least two increasing positive sigmas"):
            ModelStatistics(torch.tensor(sigmas), one, one, one)
    sigmas = torch.tensor([1.0, 2.0])
    for bad in (torch.ones(2, 4), torch.ones(3, 3), one * float("nan")):
        with pytest.raises(ValueError, match=r"finite tables of shape \(2, \*event_shape\).*got s of shape"):
            ModelStatistics(sigmas, one, bad, one)


def test_bad_statistics() -> None:
    g, levels, data = gaussian(), torch.tensor([1.0, 2.0]), randn(4, 1, 2, 3)
    cases: list[tuple[Tensor, Tensor, dict[str, Any], str]] = [
        (data[:0], levels, {}, r"expected floating data \(N, \*event_shape\)"),
        (data.long(), levels, {}, "expected floating data"),
        (data, levels[:1], {}, "at least two finite positive sigmas"),
        (data, -levels, {}, "at least two finite positive sigmas"),
        (data, levels, {"n": 1}, "expected n >= 2"),
        (data, levels, {"class_labels": torch.zeros(3)}, "expected 4 class_labels"),
    ]
    for given, sigmas, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            compute_ems(g, given, sigmas, **arguments)
    broken = torch.nn.Identity()
    infinite = {
        "in both": lambda x, sigma: x * (0 * sigma).sqrt()[:, None, None, None],
        "in sigma": lambda x, sigma: x / 2 + 1e3 * (1e308 * sigma).sin()[:, None, None, None],
    }
    for forward in infinite.values():
        broken.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match="expected Identity to have finite derivatives in x and sigma"):
            compute_ems(broken, data, levels / 2)
