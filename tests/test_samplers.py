"""Noise schedules and solvers: the paper's tables, orders of convergence, the calling convention."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import COVARIANCES, DTYPES, denoiser, gaussian, randn, relative_error
from torch import Tensor, nn

from gaussnet import GaussianDenoiser, count_nfe, euler, heun, karras_sigmas, teleport

SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun}
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


@solvers
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


@solvers
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
        assert relative_error(together[i : i + 1], alone) < 1e-9, f"sample {i}"


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
    assert [step["sigma"] for step in seen] == [step["sigma_hat"] for step in seen] == grid[:-1].tolist()
    assert seen[0]["x"].equal(start)
    for step in seen:
        assert relative_error(step["denoised"], g(step["x"], step["sigma"])) < 1e-14, f"step {step['i']}"
    assert relative_error(end, seen[-1]["denoised"]) < 1e-14


@solvers
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_one_sigma_per_sample_and_the_labels_are_handed_on(solver: str, dtype: torch.dtype) -> None:
    net, labels, grid = Recorder(), torch.tensor([2, 0, 1]), torch.tensor([2.0, 1.0, 0.0])
    SOLVERS[solver](net, randn(3, 1, 2, 2, dtype=dtype), grid, class_labels=labels)
    expected = [2.0, 1.0] if solver == "euler" else [2.0, 1.0, 1.0]
    assert [level.tolist() for level in net.levels] == [[level] * 3 for level in expected]
    assert all(level.dtype == torch.promote_types(dtype, torch.float32) for level in net.levels)
    assert all(label is labels for label in net.labels)
    SOLVERS[solver](net, randn(3, 1, 2, 2), grid)
    assert net.labels[-1] is None


@solvers
def test_no_graph_is_kept_and_the_start_is_untouched(solver: str) -> None:
    g = gaussian()
    x = (80 * randn(2, *g.event_shape)).requires_grad_()
    before = x.detach().clone()
    assert not SOLVERS[solver](g, x, karras_sigmas(3)).requires_grad
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
