"""Karras' grid, the paper's tables, steps by hand, the calling convention of every solver."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import COVARIANCES, DTYPES, denoiser, gaussian, randn, relative_error
from torch import Tensor, nn

from gaussnet import GaussianDenoiser, count_nfe, euler, heun, karras_sigmas, teleport
from gaussnet.samplers import SOLVERS as ALL
from gaussnet.samplers import edm_stochastic, rounded_sigmas

SOLVERS: dict[str, Callable[..., Tensor]] = {**ALL, "edm_stochastic": partial(edm_stochastic, S_churn=0)}
del SOLVERS["dpm_v3"]  # needs statistics: see test_dpm_v3
solvers = pytest.mark.parametrize("solver", SOLVERS)

# arXiv 2412.09726, Tables 4-6: skipped steps, NFE, noise level as printed.
CIFAR10 = """
 0 35 80.0    1 33 57.6    2 31 40.8    3 29 28.4    4 27 19.4    5 25 12.9
 6 23  8.4    7 21  5.3    8 19  3.3   10 15  1.1   12 11  0.3
"""
FFHQ64 = """
 0 79 80.0    2 75 60.1    4 71 44.6    6 67 32.7    8 63 23.6   10 59 16.8
12 55 11.7   14 51  8.0   16 47  5.4   20 39  2.2
"""
TABLES = [
    (steps, int(skip), int(nfe), sigma)
    for steps, table in ((18, CIFAR10.split()), (40, FFHQ64.split()))
    for skip, nfe, sigma in zip(table[::3], table[1::3], table[2::3], strict=True)
]


# Schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "sigma_min", "sigma_max", "rho"),
    [(18, 0.002, 80.0, 7.0), (40, 0.01, 20.0, 3.0), (2, 0.1, 1.0, 1.0)],
)
def test_karras_sigmas_are_the_closed_form(n: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    levels = karras_sigmas(n, sigma_min, sigma_max, rho)
    assert (levels.shape, levels.dtype) == ((n + 1,), torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    expected = [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)]
    torch.testing.assert_close(levels[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (float(levels[0]), float(levels[n - 1]), float(levels[n])) == (sigma_max, sigma_min, 0.0)
    assert bool((levels.diff() < 0).all())


def test_karras_sigmas_of_one_step() -> None:
    assert karras_sigmas(1).tolist() == [80.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n >= 1 steps, got 0"),
        ({"n": 5, "sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0.0 and 80.0"),
        ({"n": 5, "sigma_min": 80.0}, "got 80.0 and 80.0"),
        ({"n": 5, "sigma_max": math.inf}, "got 0.002 and inf"),
        ({"n": 5, "sigma_max": math.nan}, "got 0.002 and nan"),
        ({"n": 5, "rho": 0.0}, "rho > 0, got 0.0"),
    ],
    ids=str,
)
def test_impossible_schedules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        karras_sigmas(**arguments)


@pytest.mark.parametrize(("n", "skip", "nfe", "sigma"), TABLES)
def test_tables_of_the_paper(n: int, skip: int, nfe: int, sigma: str) -> None:
    g = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
    x, sigmas = teleport(g, 80 * randn(1, 1, 2, 2), karras_sigmas(n), skip=skip)
    assert f"{float(sigmas[0]):.1f}" == sigma
    with count_nfe(g) as count:
        heun(g, x, sigmas)
    assert count() == nfe


# Accuracy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", [kind for kind in COVARIANCES if kind != "zero-tail"])
def test_order_of_convergence(solver: str, kind: str) -> None:
    # Against the closed-form flow. (A direction without variance ends with its last level, whatever n.)
    g, order = gaussian(kind), {"euler": 1, "heun": 2}[solver]
    x = g.mean + 80 * randn(8, *g.event_shape, seed=1)
    exact, steps = g.flow(x, 80.0, 0.0), [64, 96, 128, 192, 256]
    errors = [relative_error(SOLVERS[solver](g, x, karras_sigmas(n, sigma_min=1e-4)), exact) for n in steps]
    slope = float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    assert slope == pytest.approx(-order, abs=0.15), f"{errors}"
    assert errors[-1] < {"euler": 0.02, "heun": 3e-4}[solver]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_steps_by_hand(solver: str) -> None:
    # D = x/2 at sigma = 1 for unit variance; one step from 1 to 0.5, then one to 0.
    g = GaussianDenoiser.isotropic(torch.zeros(1, dtype=torch.float64), 1.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    slope = 1 - 1 / (1 + 1)
    after = 1 - 0.5 * slope
    if solver == "heun":
        slope_next = (after - after / (1 + 0.25)) / 0.5
        after = 1 - 0.5 * (slope + slope_next) / 2
    expected = after / (1 + 0.25)  # the last step is Euler's: it ends on D
    out = SOLVERS[solver](g, x, torch.tensor([1.0, 0.5, 0.0]))
    assert float(out) == pytest.approx(expected, rel=1e-14)


@solvers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_ends_on_the_denoised(solver: str, dtype: torch.dtype) -> None:
    g = denoiser("gaussian-full", dtype)
    x = 80 * randn(3, 1, 8, 8, dtype=dtype)
    out = SOLVERS[solver](g, x, karras_sigmas(1))
    assert out.dtype == dtype
    assert relative_error(out, g(x, 80.0)) < (1e-13 if dtype == torch.float64 else 1e-4)


@solvers
def test_samples_are_independent(solver: str) -> None:
    m = denoiser("mixture-kmeans")
    x = 80 * randn(4, 1, 8, 8)
    together = SOLVERS[solver](m, x, karras_sigmas(10))
    for i in range(4):
        alone = SOLVERS[solver](m, x[i : i + 1], karras_sigmas(10))
        tolerance = 1e-4 if solver == "dop853" else 1e-9  # its steps are those of the whole batch
        assert relative_error(together[i : i + 1], alone) < tolerance, f"sample {i}"


# Calling convention -------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Halves x, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[Tensor] = []
        self.labels: list[Any] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.levels.append(sigma)
        self.labels.append(class_labels)
        return x / 2


@solvers
def test_callback_once_a_step(solver: str) -> None:
    g, grid = gaussian(), karras_sigmas(5)
    seen: list[dict[str, Any]] = []
    start = 80 * randn(2, *g.event_shape)
    end = SOLVERS[solver](g, start, grid, callback=seen.append)
    assert [step["i"] for step in seen] == list(range(5))
    assert all(set(step) == {"x", "i", "sigma", "sigma_hat", "denoised"} for step in seen)
    levels = [step["sigma"] for step in seen]
    assert levels == [step["sigma_hat"] for step in seen] == grid[:-1].tolist()
    assert seen[0]["x"].equal(start)
    for step in seen:
        assert relative_error(step["denoised"], g(step["x"], step["sigma"])) < 1e-14, f"step {step['i']}"
    assert relative_error(end, seen[-1]["denoised"]) < 1e-14


CALLS = {
    "euler": [2.0, 1.0],
    "heun": [2.0, 1.0, 1.0],
    "dpmpp_2s": [2.0, 2**0.5, 1.0],
    "pndm": [2, 1.5, 1.5, 1, 1],
}
CALLS["edm_stochastic"] = CALLS["heun"]


@solvers
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_one_sigma_per_sample_and_the_labels_are_handed_on(solver: str, dtype: torch.dtype) -> None:
    net, labels, grid = Recorder(), torch.tensor([2, 0, 1]), torch.tensor([2.0, 1.0, 0.0])
    SOLVERS[solver](net, randn(3, 1, 2, 2, dtype=dtype), grid, class_labels=labels)
    assert all(level.dtype == torch.promote_types(dtype, torch.float32) for level in net.levels)
    assert all(label is labels for label in net.labels)
    if solver != "dop853":
        expected = torch.tensor(CALLS.get(solver, CALLS["euler"]), dtype=torch.float64)[:, None].expand(-1, 3)
        torch.testing.assert_close(torch.stack(net.levels).double(), expected, rtol=1e-7, atol=0)
    SOLVERS[solver](net, randn(3, 1, 2, 2), grid)
    assert net.labels[-1] is None


@solvers
def test_state_in_float64_around_a_float32_denoiser(solver: str) -> None:
    net, seen = Recorder(), list[dict[str, Any]]()
    x = 80 * randn(2, 1, 2, 2, dtype=torch.float32)
    out = SOLVERS[solver](net, x, karras_sigmas(4), dtype=torch.float64, callback=seen.append)
    assert out.dtype == torch.float64
    assert all(level.dtype == torch.float32 for level in net.levels), "the denoiser gets x in its own dtype"
    assert all(step["x"].dtype == step["denoised"].dtype == torch.float64 for step in seen)
    # x' = x / 2 is linear: the float64 state differs from a float64 run by the denoiser's rounding alone.
    exact = SOLVERS[solver](Recorder(), x.double(), karras_sigmas(4))
    assert 0 < relative_error(out, exact) < 1e-5
    g = denoiser("gaussian-full", torch.float32)
    x, grid = 80 * randn(2, 1, 8, 8, dtype=torch.float32), karras_sigmas(60)
    exact = SOLVERS[solver](denoiser("gaussian-full"), x.double(), grid)
    # Few adaptive steps carry the rounding of few evaluations; more of them average it.
    finer: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8} if solver == "dop853" else {}
    assert relative_error(SOLVERS[solver](g, x, grid, dtype=torch.float64, **finer), exact) < 2e-6


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dop853"])
def test_steps_need_nothing_from_the_device(solver: str) -> None:
    # Tensors of the meta device have no values: reading one, which would synchronise a GPU, is an error.
    net, x = Recorder(), torch.empty(2, 1, 2, 2, device="meta")
    assert ALL[solver](net, x, karras_sigmas(6)).shape == x.shape
    assert all(level.device == x.device for level in net.levels), "levels are where the state is"


@solvers
def test_no_graph_is_kept_and_the_start_is_untouched(solver: str) -> None:
    g = gaussian()
    x = (80 * randn(2, *g.event_shape)).requires_grad_()
    before = x.detach().clone()
    assert not SOLVERS[solver](g, x, karras_sigmas(5)).requires_grad
    assert x.detach().equal(before)


@solvers
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([80.0, 1.0], "at least two levels that end in 0"),
        ([0.0], "at least two levels that end in 0"),
        ([], "at least two levels that end in 0"),
        ([[80.0, 1.0, 0.0]], "at least two levels that end in 0"),
        ([1.0, 80.0, 0.0], "strictly decreasing sigmas, got"),
        ([80.0, 1.0, 1.0, 0.0], "strictly decreasing sigmas"),
        ([80.0, 1.0, -1.0, 0.0], "strictly decreasing sigmas"),
        ([math.inf, 1.0, 0.0], "finite, strictly decreasing"),
        ([80.0, math.nan, 0.0], "strictly decreasing sigmas"),
    ],
    ids=str,
)
def test_impossible_grids(solver: str, sigmas: list[Any], message: str) -> None:
    g = gaussian()
    with count_nfe(g) as count, pytest.raises(ValueError, match=message):
        SOLVERS[solver](g, randn(1, *g.event_shape), torch.tensor(sigmas))
    assert count() == 0, "an error costs no evaluation"


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        ("dpmpp_3m", {"variant": "taylor"}, "expected variant to be 'published' or 'exact', got 'taylor'"),
        ("unipc", {"variant": "bh3"}, "expected variant to be 'bh1' or 'bh2', got 'bh3'"),
        ("unipc", {"order": 4}, "expected an order from 1 to 3, got 4"),
        ("deis", {"variant": "t"}, "expected variant to be 'log_rho' or 'tab', got 't'"),
        ("deis", {"order": 0}, "expected an order from 1 to 4, got 0"),
        ("ipndm", {"order": 5}, "expected an order from 1 to 4, got 5"),
        ("edm_stochastic", {"S_churn": -1.0}, "S_noise >= 0, got -1.0, 0.05, 50.0, 1.003"),
        ("edm_stochastic", {"S_noise": math.nan}, "S_noise >= 0, got 40.0, 0.05, 50.0, nan"),
    ],
)
def test_impossible_options(solver: str, arguments: dict[str, Any], message: str) -> None:
    g = gaussian()
    with count_nfe(g) as count, pytest.raises(ValueError, match=message):
        ALL[solver](g, randn(1, *g.event_shape), karras_sigmas(4), **arguments)
    assert count() == 0, "an error costs no evaluation"


# Stochastic sampling ------------------------------------------------------------------------------


def test_stochastic_steps_by_hand() -> None:
    # Algorithm 2 of arXiv 2206.00364, for D = x/2.
    x, generator = randn(2, 1, 2, 2), torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    seen: list[dict[str, Any]] = []
    out = edm_stochastic(
        Recorder(),
        x,
        torch.tensor([3.0, 2.0, 1.0, 0.0]),
        callback=seen.append,
        generator=generator,
        S_churn=0.6,
        S_min=1.5,
        S_max=2.5,
        S_noise=1.1,
    )
    slope = x / 2 / 3.0  # 3 lies above S_max
    at_2 = x - (slope + (x - slope) / 2 / 2.0) / 2
    raised = 2.0 * 1.2  # gamma = 0.6 / 3 steps
    x_hat = at_2 + 1.1 * (raised**2 - 2.0**2) ** 0.5 * noise
    slope = x_hat / 2 / raised
    ahead = x_hat - (raised - 1.0) * slope
    at_1 = x_hat - (raised - 1.0) * (slope + ahead / 2) / 2
    assert [step["sigma_hat"] for step in seen] == pytest.approx([3.0, raised, 1.0])
    assert [step["sigma"] for step in seen] == [3.0, 2.0, 1.0]
    assert relative_error(seen[1]["x"], x_hat) < 1e-14
    assert relative_error(out, at_1 / 2) < 1e-14


def test_levels_at_the_bounds_are_raised() -> None:
    g, seen = gaussian(), list[dict[str, Any]]()
    grid = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    edm_stochastic(g, randn(2, *g.event_shape), grid, callback=seen.append, S_min=2.0, S_max=3.0)
    assert [step["sigma_hat"] > step["sigma"] for step in seen] == [False, True, True, False]


def test_churn_is_bounded_and_drawn_by_the_generator() -> None:
    g, seen = gaussian(), list[dict[str, Any]]()
    x, grid = 80 * randn(2, *g.event_shape), karras_sigmas(6)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return edm_stochastic(g, x, grid, generator=generator, S_churn=1e3, callback=seen.append)

    first = sample(0)
    raised = [step["sigma_hat"] / step["sigma"] for step in seen]
    inside = [0.05 <= step["sigma"] <= 50 for step in seen]
    assert raised == pytest.approx([2**0.5 if raise_ else 1.0 for raise_ in inside])
    assert sum(inside) == 4
    assert sample(0).equal(first)
    assert not sample(1).equal(first)
    assert edm_stochastic(g, x, grid, S_churn=0).equal(heun(g, x, grid))


def test_churn_keeps_the_marginals() -> None:
    g = GaussianDenoiser.isotropic(torch.zeros(1, 8, 8, dtype=torch.float64), 0.3)
    generator = torch.Generator().manual_seed(0)
    x = (80**2 + 0.3) ** 0.5 * randn(400, 1, 8, 8)
    out = edm_stochastic(g, x, karras_sigmas(150), generator=generator, S_noise=1.0)
    assert float(out.var()) == pytest.approx(0.3, rel=0.03)


def test_raised_levels_are_the_models() -> None:
    model = denoiser("iddpm")
    grid, seen = rounded_sigmas(model, karras_sigmas(6, max(0.01, model.sigma_min))), list[dict[str, Any]]()
    edm_stochastic(model, randn(1, 1, 8, 8), grid, callback=seen.append)
    raised = [step["sigma_hat"] for step in seen]
    assert raised == model.round_sigma(raised).tolist() != grid[:-1].tolist()
    seen.clear()
    between = torch.tensor([60.0, 0.04, 0.0], dtype=torch.float64)  # beyond S_max and S_min
    edm_stochastic(model, randn(1, 1, 8, 8), between, callback=seen.append)
    assert [step["sigma_hat"] for step in seen] == [60.0, 0.04], "a level that is not raised is not rounded"


# Evaluations --------------------------------------------------------------------------------------


def test_count_nfe() -> None:
    g, other = gaussian(), gaussian()
    x = randn(2, *g.event_shape)
    with count_nfe(g) as outer:
        g(x, 1.0)
        other(x, 1.0)
        with count_nfe(g) as inner:
            euler(g, x, karras_sigmas(7))
        g(x, 1.0)
    g(x, 1.0)
    assert (inner(), outer()) == (7, 9)
    with pytest.raises(ZeroDivisionError), count_nfe(g) as count:
        _ = 1 / 0
    g(x, 1.0)
    assert count() == 0, "no hook stays"
