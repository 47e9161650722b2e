"""How many modes, and of which rank, explain a model's score? Fig. 9, 10, 22, 23, Sec. 4.4, A.5."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

from gaussnet.denoisers import GaussianMixtureDenoiser
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.plots.modes import mode_panels
from gaussnet.probes import KINDS
from gaussnet.probes.modes import FULL, Rank, equal_error, minimal_ranks, modes_and_ranks

SOURCE = "Fig. 9, 10, 22, 23, Sec. 4.4, A.5"
NEEDS_DATA = True

log: logging.Logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--modes",
        type=int,
        nargs="+",
        default=[1, 2, 5, 10, 20, 50, 100, 200],
        metavar="K",
        help="components, 1 for the Gaussian (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=_rank,
        nargs="+",
        default=[10, 32, 100, 300, FULL],
        metavar="R",
        help="axes of each component; full rank is always among them (default: %(default)s)",
    )
    parser.add_argument(
        "--tail",
        choices=("mean", "zero"),
        default="mean",
        help="variance along the axes left out; the paper's is zero (default %(default)s)",
    )
    parser.add_argument("--queries", type=int, default=256, help="a level (default %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="noised", help="of queries (default %(default)s)")
    parser.add_argument(
        "--sigmas",
        type=float,
        nargs="+",
        default=[0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0],
        metavar="SIGMA",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--contour-sigma",
        type=float,
        default=0.1,
        metavar="SIGMA",
        help="level of the contours of equal error, the nearest measured (default %(default)s)",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A number of modes each."""
    if min(options.sigmas) <= 0 or options.queries < 1 or options.contour_sigma <= 0:
        raise ValueError(
            f"expected sigmas > 0 and queries >= 1, got {min(*options.sigmas, options.contour_sigma)} "
            f"and {options.queries}"
        )
    if min(options.modes) < 1:
        raise ValueError(f"expected modes >= 1, got {min(options.modes)}")
    images = len(setting.fitted[0])
    modes = [count for count in sorted(set(options.modes)) if count == 1 or 2 * count <= images]
    if not modes:
        raise ValueError(f"expected modes <= {images // 2}, two images each, got {options.modes}")
    if len(modes) < len(set(options.modes)):
        log.warning("%d images hold at most %d modes: left out those above", images, images // 2)
    if len(_ranks(setting, options)) < len({*options.ranks, FULL}):
        log.warning("ranks of %d or more, the dimensions, are full rank: left out", _dimensions(setting))
    return [f"modes={count}" for count in modes]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """All ranks and levels of a mixture."""
    modes = int(unit.removeprefix("modes="))
    mixture = setting.gaussian
    if modes > 1:
        mixture = cast("GaussianMixtureDenoiser", setting.reference(f"mixture-{modes}"))
    rows = modes_and_ranks(
        setting.model,
        mixture,
        _ranks(setting, options),
        setting.queries(options.queries)[0],
        sorted(set(options.sigmas)),
        setting.generator("modes-ranks"),
        tail=options.tail,
        kind=options.kind,
        batch_size=setting.batch,
    )
    return [{"modes": modes, **row} for row in rows]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 9 and 10."""
    return mode_panels(rows, _contour_sigma(rows, options))


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """The best number of modes at each level, the rank that it needs, and what modes save in rank."""
    full = [row for row in rows if row["rank"] == FULL]
    least = {(row["sigma"], row["modes"]): row["rank"] for row in minimal_ranks(rows)}
    few = min(row["modes"] for row in rows)
    table: list[Row] = []
    for sigma in sorted({row["sigma"] for row in full}):
        own = {row["modes"]: row["mean"] for row in full if row["sigma"] == sigma}
        best = min(own, key=lambda modes: (own[modes], modes))
        table.append(
            {
                "sigma": sigma,
                f"modes {few}": own[few],
                "best modes": best,
                "its share": own[best],
                f"minimal rank, modes {few}": least[sigma, few],
                "minimal rank, best modes": least[sigma, best],
            }
        )
    many = max(row["modes"] for row in rows)
    inside = [row["sigma"] for row in table if row["best modes"] < many]
    where = ", ".join(f"{sigma:g}" for sigma in inside) or "none"
    text = (
        f"Unexplained variance of the score, mean over {rows[0]['count']} queries ({options.kind}), of "
        "mixtures at full rank; minimal rank: the smallest that leaves at most 10% more "
        f"(tail {options.tail}). "
        f"Fewer modes than the most measured, {many}, are best at these levels: {where}."
    )
    return Reading(table, text + _trade(rows, options) + _left_out(rows, options))


def _trade(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The axes that match the fewest modes at full rank, over modes."""
    sigma = _contour_sigma(rows, options)
    own = [row for row in rows if row["sigma"] == sigma]
    few = min(row["modes"] for row in own)
    (level,) = [row["mean"] for row in own if row["rank"] == FULL and row["modes"] == few]
    points = [point for point in equal_error(rows, sigma, level) if point["modes"] != few]
    if not points:
        return f" At sigma = {sigma:g}, no other number of modes reaches what modes {few} does at full rank."
    told = ", ".join(f"{point['modes']} ({math.ceil(point['axes'])})" for point in points)
    return (
        f" At sigma = {sigma:g}, what modes {few} does at full rank is reached by modes "
        f"(axes of each, at most): {told}."
    )


def _left_out(rows: Sequence[Row], options: argparse.Namespace) -> str:
    text = ""
    for name, asked in (("modes", options.modes), ("rank", options.ranks)):
        missing = sorted(set(asked) - {row[name] for row in rows})
        if missing:
            why = "too few images" if name == "modes" else "no fewer than the dimensions"
            text += f" Left out, {why}: {name} {', '.join(map(str, missing))}."
    return text


def _contour_sigma(rows: Sequence[Row], options: argparse.Namespace) -> float:
    return min({row["sigma"] for row in rows}, key=lambda sigma: abs(math.log(sigma / options.contour_sigma)))


def _ranks(setting: Setting, options: argparse.Namespace) -> list[Rank]:
    """The numbers below D in order, and full rank."""
    dim = _dimensions(setting)
    return [*sorted({rank for rank in options.ranks if rank != FULL and rank < dim}), FULL]


def _dimensions(setting: Setting) -> int:
    return math.prod(setting.event_shape)


def _rank(text: str) -> Rank:
    if text == FULL:
        return text
    rank = int(text)  # argparse tells its ValueError
    if rank < 1:
        raise argparse.ArgumentTypeError(f"expected a rank >= 1 or {FULL}, got {text}")
    return rank
