"""How long do analytic trajectories stay with a model's, from the same noise? Fig. 7, 15, Eq. 15, 16."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.experiments.shared import add_references, add_sampling
from gaussnet.plots.trajectories import trajectory_deviation
from gaussnet.probes.trajectories import (
    DIVERGED,
    STATES,
    check_trajectory,
    deviation_rows,
    deviations,
    divergence,
    exact_trajectory,
    solver_trajectory,
)
from gaussnet.samplers import SOLVERS, model_sigmas

SOURCE = "Fig. 7, 15, Eq. 15, 16, Appendix A.4"
NEEDS_DATA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--trajectories", type=int, default=64, help="their number (default %(default)s)")
    add_sampling(parser)
    add_references(parser, "gaussian", "mixture-10", "delta")
    parser.add_argument(
        "--check",
        type=int,
        default=2,
        help="trajectories of each reference to solve by scipy, too (default %(default)s)",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A reference each."""
    if options.trajectories < 1 or options.steps < 2 or options.check < 0:
        raise ValueError(
            "expected trajectories >= 1, steps >= 2 and check >= 0, "
            f"got {options.trajectories}, {options.steps} and {options.check}"
        )
    setting.check_references(options.references)
    return list(dict.fromkeys(options.references))


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of `deviation_rows`; `check` is the largest difference of a pixel from scipy's solution."""
    sigmas = model_sigmas(setting.model, options.steps)
    reference = setting.reference(unit)
    x = float(sigmas[0]) * setting.noise(options.trajectories, "trajectories")
    found: list[dict[str, torch.Tensor]] = []
    for part in x.split(setting.batch):
        path = solver_trajectory(setting.model, part, sigmas, SOLVERS[options.solver])
        found.append(deviations(path, exact_trajectory(reference, part, sigmas)))
    whole = {quantity: torch.cat([part[quantity] for part in found], -1) for quantity in STATES}
    checks = None
    if options.check:
        checks = check_trajectory(reference, x[: options.check], sigmas)
    return [
        {
            "reference": unit,
            **row,
            "check": checks[row["step"]] if checks and row["quantity"] == "state" else None,
        }
        for row in deviation_rows(sigmas.tolist(), whole)
    ]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 7 and 15, next to each other."""
    return trajectory_deviation(rows, DIVERGED)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """Where trajectories leave the model's, and whether those of the references can be trusted."""
    table: list[Row] = []
    texts = [f"Mean squared error per pixel from the model's trajectory, {rows[0]['count']} initial states."]
    for name in dict.fromkeys(row["reference"] for row in rows):
        for quantity in STATES:
            shown = [row for row in rows if row["reference"] == name and row["quantity"] == quantity]
            left = divergence(shown)
            table.append(
                {
                    "reference": name,
                    "quantity": quantity,
                    "step": "-" if left is None else left[0],
                    "sigma": "-" if left is None else left[1],
                    "last": shown[-1]["mean"],
                }
            )
            if quantity == "state":
                where = (
                    "stays below it"
                    if left is None
                    else f"exceeds it at step {left[0]}, sigma = {left[1]:.3g}"
                )
                texts.append(f"The state of {name} {where}.")
    texts.insert(1, f"The bound of the paper is {DIVERGED:g}.")
    ends = {row["reference"]: row["last"] for row in table if row["quantity"] == "state"}
    texts.append(f"At the end {min(ends, key=lambda name: ends[name])} is closest.")
    checked = [row["check"] for row in rows if row["check"] is not None]
    if checked:
        texts.append(
            f"The references' states differ from scipy's DOP853 by at most {max(checked):.1e} a pixel."
        )
    return Reading(table, " ".join(texts))
