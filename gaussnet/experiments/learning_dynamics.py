"""Which analytic scores does a network come close to as it trains, and which does it leave? Fig. 12, 24, 25.

The model is the folder of a training run, complete or not: what its probes have written so far, probes.csv,
is drawn and told. Nothing is computed anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.plots.runs import dynamics_panels
from gaussnet.plots.style import colours
from gaussnet.probes import KINDS, QUANTITIES, minima
from gaussnet.run_report import Run

SOURCE = "Fig. 12, 24, 25"
NEEDS_DATA = False
ASKS_CLASSES = True  # a run's probes do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="(default %(default)s)")
    parser.add_argument("--quantity", choices=QUANTITIES, default="score", help="(default %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="noised", help="of queries (default %(default)s)")
    parser.add_argument(
        "--tol",
        type=float,
        default=0.05,
        help="a score is left if the last deviation is above 1 + TOL times the least (default %(default)s)",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """One, named by what the run has written: a run that went on is read again."""
    if options.tol < 0:
        raise ValueError(f"expected tol >= 0, got {options.tol}")
    if setting.data is not None:
        raise ValueError(f"expected no --data, as the run has measured on its own, got {setting.data.name}")
    told = json.dumps(_probes(setting, options))
    return [f"probes={hashlib.sha256(told.encode()).hexdigest()[:12]}"]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of probes.csv that the options name."""
    return _probes(setting, options)


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 12."""
    return dynamics_panels(rows, options.quantity, options.weights, options.kind)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """When the network was closest to each score, and which it left again."""
    found = {(row["sigma"], row["reference"]): row for row in minima(rows, options.tol)}
    sigmas = sorted({sigma for sigma, _ in found})
    references = list(colours(reference for _, reference in found))
    table = [
        {"sigma": sigma, **{name: _closest(found.get((sigma, name))) for name in references}}
        for sigma in sigmas
    ]
    steps = sorted({row["step"] for row in rows})
    text = (
        f"The least mean unexplained variance of the network's {options.quantity}, by {options.weights} "
        f"weights at {options.kind} queries, and the step where it was; an arrow and the last value where it "
        f"has grown by more than {options.tol:.0%} since. The steps are {steps[0]} to {steps[-1]}."
    )
    for name in references:
        own = [row for (_, reference), row in sorted(found.items()) if reference == name]
        left = [f"{row['sigma']:g}" for row in own if row["left"] and row["step"] > steps[0]]
        where = f"at sigma = {', '.join(left)}" if left else "at no level"
        text += f" It approached {name} and left it again {where}."
    return Reading(table, text)


def _closest(row: Row | None) -> str:
    if row is None:
        return "-"
    last = f" -> {row['last']:.3g}" if row["left"] else ""
    return f"{row['minimum']:.3g} @ {row['step']}{last}"


def _probes(setting: Setting, options: argparse.Namespace) -> list[Row]:
    wanted = {"weights": options.weights, "quantity": options.quantity, "queries": options.kind}
    run = Run(Path(setting.model_name))
    rows = [row for row in run.probes if all(row[name] == value for name, value in wanted.items())]
    if not rows:
        given = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise ValueError(f"expected rows of {given} in {run.path / 'probes.csv'}, got none")
    return rows
