"""How well do far-field expansions and the Gaussian do against a data set's own score? Sec. 4.1, D.8.

With r = sigma / sqrt(tr Sigma) large and queries about sigma sqrt(D) away from the mean, the relative error
of order 1, the attraction to the mean, falls as r^-2: its next term is Sigma/sigma^2 (Eq. 26). Order 2 and
the Gaussian differ by Sigma^2/sigma^4, and the data set differs from both by its third moments, at r^-3: in
the far field the slopes of both are -3, and -4 where third moments vanish.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.denoisers.far_field import FarFieldDenoiser
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.numerics import wide_dtype
from gaussnet.plots.far_field import far_field_panels
from gaussnet.probes import KINDS, ScoreProbe

SOURCE = "Sec. 4.1, D.8, Eq. 25-27, 154-159"
NEEDS_DATA = True
DEFAULT_MODEL = "delta"
APPROXIMATIONS = ("order-1", "order-2", "gaussian")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0],
        metavar="R",
        help="noise levels in units of sqrt(tr Sigma) (default: %(default)s)",
    )
    parser.add_argument(
        "--far", type=float, default=3.0, metavar="R", help="the far field's beginning (default %(default)s)"
    )
    parser.add_argument("--queries", type=int, default=256, help="a level and kind (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of queries")


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A kind of queries each."""
    if min(options.ratios) <= 0 or options.queries < 1 or options.far <= 0:
        raise ValueError(
            f"expected ratios > 0, far > 0 and queries >= 1, got {min(options.ratios)}, {options.far} "
            f"and {options.queries}"
        )
    return [f"queries={kind}" for kind in options.kinds]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The relative errors at all levels, in float64: in the far field little is left to differ."""
    wide = wide_dtype(setting.device)
    # Mean and covariance of the data themselves: any shrinkage would leave an error in the first order.
    gaussian = GaussianDenoiser.fit(setting.fitted[0].to(setting.device, wide), shrinkage="none")
    radius = math.sqrt(float(gaussian.variance) * gaussian.covariance.dim)
    top = math.sqrt(float(gaussian.covariance.eigvals.max())) / radius
    orders = {f"order-{order}": FarFieldDenoiser(gaussian, order) for order in (1, 2)}
    clean = setting.queries(options.queries)[0].to(wide)
    rows: list[Row] = []
    for ratio in sorted(set(options.ratios)):
        probe = ScoreProbe(
            {**orders, "gaussian": gaussian},
            clean,
            [ratio * radius],
            setting.generator("far-field"),
            kinds=[unit.removeprefix("queries=")],
            batch_size=setting.batch,
        )
        rows += [
            {
                "ratio": ratio,
                "sigma": row["sigma"],
                "queries": row["queries"],
                "approximation": row["reference"],
                "error": math.sqrt(row["mean"]),
                "count": row["count"],
                "top": top,
            }
            for row in probe(setting.model)
            if row["quantity"] == "score"
        ]
    return rows


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Errors over the level."""
    return far_field_panels(rows, options.far)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """The slopes in the far field, and how far below it the approximations hold."""
    kind = options.kinds[0]
    table = [
        {
            "ratio": ratio,
            "sigma": next(row["sigma"] for row in rows if row["ratio"] == ratio),
            **{
                row["approximation"]: row["error"] for row in rows if _at(row, kind) and row["ratio"] == ratio
            },
        }
        for ratio in sorted({row["ratio"] for row in rows})
    ]
    text = (
        "Relative error of the score, ||s - s_approx|| / ||s||, root mean square over "
        f"{rows[0]['count']} queries ({kind}), over ratio = sigma / sqrt(tr Sigma); the expansions diverge "
        f"below sqrt(lam_max), at a ratio of {rows[0]['top']:.3g}. Slopes in log-log from {options.far:g} up:"
    )
    for where in options.kinds:
        found = [
            slope([row for row in rows if _at(row, where, name)], options.far) for name in APPROXIMATIONS
        ]
        told = ", ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}"
            for name, value in zip(APPROXIMATIONS, found, strict=True)
        )
        text += f" {told} ({where})" + ("." if where == options.kinds[-1] else ";")
    for name in APPROXIMATIONS:
        level = error_from([row for row in rows if _at(row, kind, name)], 0.1)
        text += f" {name} errs by less than 10% {'nowhere' if level is None else f'from {level:g} up'}."
    return Reading(table, text)


def slope(rows: Sequence[Row], far: float) -> float | None:
    """The slope of log error over log ratio from a ratio up; None for fewer than two points."""
    points = [(row["ratio"], row["error"]) for row in rows if row["ratio"] >= far and row["error"] > 0]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def error_from(rows: Sequence[Row], error: float) -> float | None:
    """The lowest ratio from which on, at all ratios above, the error is smaller than this."""
    found = None
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        if not row["error"] < error:
            break
        found = row["ratio"]
    return found


def _at(row: Row, kind: str, approximation: str | None = None) -> bool:
    return row["queries"] == kind and approximation in (None, row["approximation"])
