"""How much of a model's score do analytic scores explain, at each noise level? Fig. 6, Eq. 28."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gaussnet import plots
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.experiments.shared import add_references
from gaussnet.probes import KINDS, PAPER_SIGMAS, ScoreProbe

SOURCE = "Fig. 6, Eq. 28"
NEEDS_DATA = True
MARKS = 10  # eigenvalues that the figure marks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--queries", type=int, default=256, help="a level and kind (default %(default)s)")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(PAPER_SIGMAS), metavar="SIGMA")
    add_references(parser, "point", "isotropic", "gaussian", "classes", "delta")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of queries")


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A level each."""
    if min(options.sigmas) <= 0 or options.queries < 1:
        raise ValueError(
            f"expected sigmas > 0 and queries >= 1, got {min(options.sigmas)} and {options.queries}"
        )
    setting.check_references(options.references)
    return [f"sigma={sigma}" for sigma in sorted(set(options.sigmas))]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of a `ScoreProbe`, and the levels that the figure marks."""
    clean, _ = setting.queries(options.queries)
    references = setting.references(options.references)
    sigma = float(unit.removeprefix("sigma="))
    probe = ScoreProbe(
        references, clean, [sigma], setting.generator("score"), kinds=options.kinds, batch_size=setting.batch
    )
    marks = setting.gaussian.covariance.eigvals.sort(descending=True).values[:MARKS].sqrt().tolist()
    return [{**row, "marks": " ".join(f"{mark:.4g}" for mark in marks)} for row in probe(setting.model)]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 6."""
    return plots.score_deviation(rows, [float(mark) for mark in rows[0]["marks"].split()])


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """The shares that references leave, and from which level on the Gaussian explains 99%."""
    kind = options.kinds[0]
    shown = [row for row in rows if row["quantity"] == "score" and row["queries"] == kind]
    table = [
        {
            "sigma": sigma,
            **{row["reference"]: row["mean"] for row in shown if row["sigma"] == sigma},
        }
        for sigma in sorted({row["sigma"] for row in shown})
    ]
    text = f"Unexplained variance of the score (mean over {shown[0]['count']} queries, {kind})."
    for name in dict.fromkeys(options.references):
        level = level_from(shown, name, 0.01)
        where = f"from sigma = {level:g} up" if level is not None else "at no level"
        text += f" {name} explains more than 99% {where}."
    low = min(row["sigma"] for row in shown)
    closest = min((row for row in shown if row["sigma"] == low), key=lambda row: row["mean"])
    text += f" At the lowest level, {low:g}, {closest['reference']} is closest."
    return Reading(table, text)


def level_from(rows: Sequence[Row], reference: str, share: float) -> float | None:
    """The lowest level from which on, at all levels above, a reference leaves less than a share."""
    found = None
    for row in sorted((r for r in rows if r["reference"] == reference), key=lambda r: -r["sigma"]):
        if not row["mean"] < share:
            break
        found = row["sigma"]
    return found
