"""Does guidance push a conditional model off the Gaussian of a class, or off its images? Fig. 17."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

import torch

from gaussnet.denoisers import GuidedDenoiser
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting, has_classes
from gaussnet.experiments.shared import add_sampling
from gaussnet.plots.trajectories import guidance as draw_guidance
from gaussnet.probes.trajectories import (
    DIVERGED,
    STATES,
    deviation_rows,
    deviations,
    exact_trajectory,
    solver_trajectory,
)
from gaussnet.samplers import SOLVERS, model_sigmas
from gaussnet.sampling import one_hot

SOURCE = "Fig. 17 B, E, F"
NEEDS_DATA = True
ASKS_CLASSES = True
ANALYTIC = ("conditional", "guided")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        metavar="W",
        help="of guidance: 0 is the unconditional model, 1 the conditional one (default: 0 to 5)",
    )
    parser.add_argument("--samples", type=int, default=16, help="of a class (default %(default)s)")
    parser.add_argument("--classes", type=int, nargs="+", metavar="CLASS", help="default: all of the images")
    add_sampling(parser)
    parser.add_argument(
        "--references",
        nargs="+",
        choices=("classes", "delta"),
        default=["classes", "delta"],
        help="the Gaussian of a class, the images of a class (default: both)",
    )
    parser.add_argument(
        "--analytic",
        nargs="+",
        choices=ANALYTIC,
        default=list(ANALYTIC),
        help="analytic trajectories: of the class alone, as in the paper, or under the same guidance",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A weight and a class each."""
    if options.samples < 1 or options.steps < 2:
        raise ValueError(f"expected samples >= 1 and steps >= 2, got {options.samples} and {options.steps}")
    if not all(math.isfinite(weight) for weight in options.weights):
        raise ValueError(f"expected finite weights, got {options.weights}")
    labels = None if setting.data is None else setting.data.labels
    if labels is None:
        where = "none" if setting.data is None else f"{setting.data.name}, which has none"
        raise ValueError(f"guidance needs images with class labels, got {where}")
    known = labels.unique().tolist()
    chosen = list(dict.fromkeys(options.classes or known))
    if set(chosen) - set(known):
        raise ValueError(f"expected classes among {known}, got {sorted(set(chosen) - set(known))}")
    if not has_classes(setting.model):
        raise ValueError(
            f"guidance needs a model with classes, got {setting.model_name} "
            f"({type(setting.model).__name__}), which has none"
        )
    one_hot(setting.model, chosen)  # classes of the images that the network does not know
    return [
        f"weight={weight} class={label}" for weight, label in product(sorted(set(options.weights)), chosen)
    ]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of `deviation_rows`, with weight, class, reference and kind of analytic trajectory."""
    weight, label = _of(unit)
    sigmas = model_sigmas(setting.model, options.steps)
    x = float(sigmas[0]) * setting.noise(options.samples, "guidance")  # the same for all classes and weights
    model, references = setting.model, setting.references(options.references)
    guided = GuidedDenoiser(model, model, weight)
    found: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = {}
    for part in x.split(setting.batch):
        index = torch.full((len(part),), label, device=setting.device)
        labels = one_hot(model, index.tolist()).to(setting.device)
        path = solver_trajectory(guided, part, sigmas, SOLVERS[options.solver], labels)
        for name, kind in product(references, options.analytic):
            analytic = references[name]
            if kind == "guided" and weight != 1:  # at 1 it is the conditional one, whose flow may be closed
                analytic = GuidedDenoiser(analytic, analytic, weight)
            other = exact_trajectory(analytic, part, sigmas, index)
            found.setdefault((name, kind), []).append(deviations(path, other))
    return [
        {"weight": weight, "class": label, "reference": name, "analytic": kind, **row}
        for (name, kind), parts in found.items()
        for row in deviation_rows(sigmas.tolist(), {q: torch.cat([p[q] for p in parts], -1) for q in STATES})
    ]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 17 E and F, for samples and trajectories."""
    return draw_guidance(rows, DIVERGED)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """The deviation of samples, mean over classes, over the weight."""
    last = max(row["step"] for row in rows if row["quantity"] == "state")
    samples = [row for row in rows if row["quantity"] == "state" and row["step"] == last]
    columns = list(dict.fromkeys((row["reference"], row["analytic"]) for row in samples))
    table: list[Row] = []
    for weight in sorted({row["weight"] for row in samples}):
        means = {
            f"{name}, {kind}": fmean(
                row["mean"]
                for row in samples
                if (row["weight"], row["reference"], row["analytic"]) == (weight, name, kind)
            )
            for name, kind in columns
        }
        table.append({"weight": weight, **means})
    classes = len({row["class"] for row in samples})
    texts = [
        f"Mean squared error per pixel from the sample of the guided model, {samples[0]['count']} samples of "
        f"each of {classes} classes."
    ]
    for name, kind in columns:
        column = f"{name}, {kind}"
        nearest = min(table, key=lambda row: row[column])
        texts.append(
            f"{name} ({kind}) is nearest at weight {nearest['weight']:g} with {nearest[column]:.3g}, and at "
            f"{table[-1]['weight']:g} off by {table[-1][column]:.3g}."
        )
    return Reading(table, " ".join(texts))


def _of(unit: str) -> tuple[float, int]:
    """Weight and class of a unit."""
    weight, label = (part.partition("=")[2] for part in unit.split())
    return float(weight), int(label)
