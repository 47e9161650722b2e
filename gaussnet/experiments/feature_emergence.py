"""When do features emerge, how flat are trajectories, what becomes of perturbations? Fig. 3, 5."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.experiments.shared import in_words, numbers, quartiles, ranges
from gaussnet.plots.emergence import feature_emergence
from gaussnet.probes.emergence import (
    CRITICAL_SHARES,
    Features,
    emergence,
    emergence_level,
    feature_course,
    measured_course,
    perturbation_gains,
    predicted_emergence_level,
    select_features,
)
from gaussnet.probes.geometry import trajectory_rows
from gaussnet.probes.trajectories import Trajectory, solver_trajectory
from gaussnet.samplers import model_sigmas

SOURCE = "Fig. 3, 5, Eq. 18-23"
NEEDS_DATA = True
SEEDS_A_UNIT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--seeds", type=int, default=64, help="trajectories (default %(default)s)")
    parser.add_argument("--features", type=int, default=6, help="eigenvectors, by rank (default %(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="of Heun (default %(default)s)")
    parser.add_argument("--sigma-min", type=float, default=0.002, help="(default %(default)s)")
    parser.add_argument("--sigma-max", type=float, default=80.0, help="(default %(default)s)")
    parser.add_argument(
        "--gain-sigmas",
        type=float,
        nargs="+",
        default=[40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1],
        metavar="SIGMA",
        help="where states are perturbed: the nearest levels of the grid (default: 0.1 to 40)",
    )
    parser.add_argument(
        "--gain-seeds", type=int, default=8, help="trajectories perturbed (default %(default)s)"
    )
    parser.add_argument(
        "--perturbation",
        type=float,
        default=0.05,
        help="in standard deviations of the state along the eigenvector (default %(default)s)",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """The closed form, trajectories in groups, and perturbations by level."""
    for name, least in (("seeds", 1), ("gain_seeds", 1), ("steps", 2), ("features", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"expected {name} >= {least}, got {getattr(options, name)}")
    if not 0 < options.sigma_min < options.sigma_max:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max, got {options.sigma_min} and {options.sigma_max}"
        )
    levels = sorted(set(options.gain_sigmas), reverse=True)
    if not options.sigma_min <= levels[-1] <= levels[0] <= options.sigma_max:
        raise ValueError(
            f"expected gain_sigmas within [{options.sigma_min:g}, {options.sigma_max:g}], got {levels}"
        )
    if not options.perturbation > 0:
        raise ValueError(f"expected perturbation > 0, got {options.perturbation}")
    grid = _grid(setting, options)
    distinct = {
        _place(grid, level): level for level in levels
    }  # of those that are one level of the grid, one
    return [
        "psi",
        *(f"trajectory seeds={seeds}" for seeds in ranges(options.seeds, SEEDS_A_UNIT)),
        *(f"gain sigma={level}" for level in distinct.values()),
    ]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of one kind of unit."""
    grid = _grid(setting, options)
    features = select_features(setting.gaussian, options.features, float(grid[-2]))
    if unit == "psi":
        return list(_closed_form(features, grid[:-1]))
    what, _, where = unit.partition("=")
    if what == "gain sigma":
        return list(_gains(setting, options, grid, features, float(where)))
    return list(_trajectories(setting, grid, features, numbers(where)))


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Four panels: denoised features, critical levels, rotation, gains."""
    return feature_emergence(rows)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """Critical levels and gains of features; flatness and rotation of trajectories."""
    centre = f"{CRITICAL_SHARES[1]:.3g}"
    table: list[Row] = []
    critical = [row for row in rows if row["kind"] == "critical" and row["share"] == CRITICAL_SHARES[1]]
    gains = [row for row in rows if row["kind"] == "gain"]
    for feature in sorted({row["feature"] for row in critical}):
        own = [row for row in critical if row["feature"] == feature]
        low, middle, high = quartiles(row["level"] for row in own)
        off = [row["gain"] / row["predicted"] - 1 for row in gains if row["feature"] == feature]
        table.append(
            {
                "eigenvector": feature,
                "eigenvalue": own[0]["eigenvalue"],
                "predicted level": own[0]["predicted"],
                "measured": middle,
                "quartiles": f"{low:.3g} to {high:.3g}",
                "gain off by": median(abs(value) for value in off),
            }
        )
    paths = [row for row in rows if row["kind"] == "geometry"]
    shares, expected = (
        {count: in_words(quartiles(row[f"{name}{count}"] for row in paths)) for count in (2, 3)}
        for name in ("pc", "gaussian_pc")
    )
    missed, bound = (median(row[name] for row in paths) for name in ("rotation_error", "rotation_bound"))
    order = [row["measured"] for row in table]
    ordered = "in" if order == sorted(order, reverse=True) else "not in"
    means = {count: sum(row[f"pc{count}"] for row in paths) / len(paths) for count in (2, 3)}
    within = sum(row["within_bound"] for row in paths)
    text = (
        f"Level at which D(x_t) has {centre} of its last projection on an eigenvector (median over "
        f"{len(paths)} trajectories), and the median of |gain/predicted - 1| over levels and trajectories. "
        f"Features emerge {ordered} the order of their variance. In variance-preserving coordinates 2 "
        f"principal components have {shares[2]} of a trajectory's variance (mean {means[2]:.4f}), 3 "
        f"have {shares[3]} (mean {means[3]:.4f}); of the Gaussian's from the same noise "
        f"{expected[2]} and {expected[3]}. The rotation formula misses at most {missed:.3g} of "
        f"a state's length (median over trajectories of the largest error; the Gaussian's bound: "
        f"{bound:.3g}); {within} of {len(paths)} trajectories stay within the bound at all levels."
    )
    return Reading(table, text)


# Units ------------------------------------------------------------------------------------------------


def _closed_form(features: Features, levels: Tensor) -> Iterator[Row]:
    course = feature_course(features.eigvals, levels, float(levels[0]))
    table = torch.stack(course, -1).tolist()
    for sigma, line in zip(levels.tolist(), table, strict=True):
        for row, (psi, xi, rate, gain) in zip(_named(features), line, strict=True):
            yield {"kind": "closed form", **row, "sigma": sigma} | {
                "psi": psi,
                "xi": xi,
                "rate": rate,
                "gain": gain,
            }


def _trajectories(setting: Setting, grid: Tensor, features: Features, seeds: range) -> Iterator[Row]:
    path = _path(setting, grid, seeds)
    levels = path.levels[:-1]
    psi, xi = (part.tolist() for part in measured_course(path, features))
    weights = features.project(path.x[:1])[0].square().sum(0).tolist()
    for sigma, psi_line, xi_line in zip(levels.tolist(), psi, xi, strict=True):
        for row, weight, *values in zip(_named(features), weights, psi_line, xi_line, strict=True):
            yield {"kind": "course", **row, "sigma": sigma, "weight": weight} | dict(
                zip(("psi", "xi"), values, strict=True)
            )
    shares = emergence(path, features)
    for share in CRITICAL_SHARES:
        found = emergence_level(shares, levels, share).tolist()
        predicted = predicted_emergence_level(features.eigvals, share, levels).tolist()
        for seed, line in zip(seeds, found, strict=True):
            for row, level, expected in zip(_named(features), line, predicted, strict=True):
                yield {"kind": "critical", **row, "seed": seed, "share": share} | {
                    "level": level,
                    "predicted": expected,
                }
    yield from trajectory_rows(setting.gaussian, path.x, path.levels, seeds)


def _gains(
    setting: Setting, options: argparse.Namespace, grid: Tensor, features: Features, sigma: float
) -> Iterator[Row]:
    seeds = range(options.gain_seeds)
    place = _place(grid, sigma)
    states = _path(setting, grid, seeds).x[place].float()
    gains, across = perturbation_gains(
        setting.model, states, grid[place:], features, options.perturbation, batch_size=setting.batch
    )
    predicted = feature_course(features.eigvals, grid[place : place + 1], float(grid[0])).gain[0].tolist()
    for row, expected, gain, spread in zip(
        _named(features), predicted, gains.tolist(), across.tolist(), strict=True
    ):
        for seed, *values in zip(seeds, gain, spread, strict=True):
            yield {
                "kind": "gain",
                **row,
                "sigma": float(grid[place]),
                "seed": seed,
                "predicted": expected,
            } | (dict(zip(("gain", "across"), values, strict=True)))


# Parts ------------------------------------------------------------------------------------------------


def _grid(setting: Setting, options: argparse.Namespace) -> Tensor:
    """EDM's, within what the model was made for."""
    return model_sigmas(setting.model, options.steps, options.sigma_min, options.sigma_max)


def _place(grid: Tensor, sigma: float) -> int:
    """Where the grid's level nearest to sigma is."""
    return int((grid[:-1].log() - math.log(sigma)).abs().argmin())


def _path(setting: Setting, grid: Tensor, seeds: range) -> Trajectory:
    """The model's trajectories; that of a seed is the same in all units."""
    noise = torch.cat([setting.noise(1, "seed", seed) for seed in seeds])
    parts = [
        solver_trajectory(setting.model, float(grid[0]) * part, grid) for part in noise.split(setting.batch)
    ]
    return Trajectory(
        parts[0].levels,
        torch.cat([part.x for part in parts], 1),
        torch.cat([part.denoised for part in parts], 1),
    )


def _named(features: Features) -> list[Row]:
    return [
        {"feature": rank, "eigenvalue": eigenvalue}
        for rank, eigenvalue in zip(features.ranks, features.eigvals.tolist(), strict=True)
    ]
