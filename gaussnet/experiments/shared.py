"""What several experiments share: options, units that are ranges of numbers, and quartiles."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import numpy as np

from gaussnet.samplers import SOLVERS

# dpm_v3 needs statistics of the model, and a stochastic solver has no trajectory of its own.
PLAIN_SOLVERS = [name for name in SOLVERS if name not in ("dpm_v3", "edm_stochastic")]


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How a model is sampled: steps and solver."""
    parser.add_argument("--steps", type=int, default=18, help="of EDM's grid (default %(default)s)")
    parser.add_argument(
        "--solver", choices=PLAIN_SOLVERS, default="heun", help="of the model (default %(default)s)"
    )


def add_references(parser: argparse.ArgumentParser, *names: str) -> None:
    """Which analytic denoisers, by default these."""
    parser.add_argument(
        "--references",
        nargs="+",
        default=list(names),
        metavar="NAME",
        help="analytic denoisers (default: %(default)s)",
    )


def ranges(count: int, size: int) -> list[str]:
    """The numbers below `count` in ranges "first-last" of at most `size`."""
    return [f"{first}-{min(first + size, count) - 1}" for first in range(0, count, size)]


def numbers(text: str) -> range:
    """The numbers of one of `ranges`."""
    first, last = map(int, text.split("-"))
    return range(first, last + 1)


def quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return np.percentile(list(values), [25, 50, 75]).tolist()


def in_words(found: Sequence[float]) -> str:
    """Of `quartiles`: the median, and the others in brackets."""
    low, middle, high = found
    return f"{middle:.4f} (quartiles {low:.4f} to {high:.4f})"
