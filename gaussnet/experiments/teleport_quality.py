"""How many steps does teleport save, and what do they cost in quality? Fig. 14, 16, 29; Tables 1, 4-6.

Skipping i steps of Heun's method saves 2i of its 2n - 1 evaluations (Appendix A.7). For each solver and skip:
NFE, the level of the jump, the distances to the fitted images, and the RMS per pixel to the samples without a
skip, from the same noise: one generator a seed. The paper's tables are 50,000 samples of seeds 0-49999, 18
steps (CIFAR-10) or 40 (FFHQ, AFHQ), and Inception's features:

    --samples 50000 --fit-images 50000 --features inception --shrinkage none [--steps 40]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting, fingerprint
from gaussnet.metrics import load_extractor
from gaussnet.plots.teleport import teleport_quality
from gaussnet.probes.quality import SkippedRun, distances, features_of, skipped_run
from gaussnet.samplers import SOLVERS, ModelStatistics, model_sigmas

SOURCE = "Fig. 14, 16, 29; Tables 1, 4-6"
NEEDS_DATA = True
PAPER_SKIPS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)  # of Table 6
TOLERANCE = 0.03  # the paper's "less than a 3% increase" (Sec. 6)
MOST_PIXELS = 3072  # as features: their covariance is decomposed once a bootstrap draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--solvers", nargs="+", default=["heun"], metavar="NAME", help=f"of {', '.join(SOLVERS)}"
    )
    parser.add_argument("--steps", type=int, default=18, help="levels of EDM's grid (default %(default)s)")
    parser.add_argument(
        "--skips", type=int, nargs="+", metavar="I", help="steps to skip (default: those of Table 6)"
    )
    parser.add_argument("--samples", type=int, default=1000, help="a run (default %(default)s)")
    parser.add_argument(
        "--features",
        default="pixels",
        help="pixels (as they are, of small images), inception, timm:NAME, or the folder of a classifier "
        "(default %(default)s)",
    )
    parser.add_argument("--weights", help="file of the weights of inception or of the timm model")
    parser.add_argument("--regrid", action="store_true", help="keep the number of steps, on a new grid")
    parser.add_argument("--draws", type=int, default=50, help="of the bootstrap (default %(default)s)")
    parser.add_argument(
        "--statistics", metavar="FILE", help="of the model, for dpm_v3, as `gaussnet sample` saves them"
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A solver and a skip each; no skip is always among them."""
    for name in ("steps", "samples", "draws"):
        if getattr(options, name) < 2:
            raise ValueError(f"expected {name} >= 2, got {getattr(options, name)}")
    unknown = sorted(set(options.solvers) - set(SOLVERS))
    if unknown:
        raise ValueError(f"expected solvers among {', '.join(SOLVERS)}, got {', '.join(unknown)}")
    if "dpm_v3" in options.solvers and options.statistics is None:
        raise ValueError("dpm_v3: expected --statistics FILE, as `gaussnet sample` saves it, got none")
    if "dpm_v3" not in options.solvers and options.statistics is not None:
        raise ValueError(f"expected no --statistics without dpm_v3, got {options.statistics}")
    if options.features == "pixels" and options.weights is not None:
        raise ValueError(f"pixels: expected no --weights, got {options.weights}")
    skips = options.skips or [skip for skip in PAPER_SKIPS if skip < options.steps]
    wrong = sorted(skip for skip in skips if not 0 <= skip < options.steps)
    if wrong:
        raise ValueError(f"expected skips from 0 to {options.steps - 1}, got {wrong}")
    pixels = torch.Size(setting.event_shape).numel()
    if options.features == "pixels" and pixels > MOST_PIXELS:
        raise ValueError(
            f"pixels: expected images of at most {MOST_PIXELS} numbers, got {pixels}: choose other features"
        )
    return [
        f"{solver}-skip={skip}" for solver in dict.fromkeys(options.solvers) for skip in sorted({0, *skips})
    ]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """One row: of a `skipped_run` and its `distances`."""
    solver, _, skip = unit.rpartition("-skip=")
    extractor = None
    if options.features != "pixels":
        extractor = load_extractor(options.features, options.weights).to(setting.device)

    def features(images: Tensor) -> Tensor:
        return features_of(extractor, images, setting.batch)

    identity = setting.identity
    reference = _kept(
        setting,
        "features",
        [{**identity, "model": None}, fingerprint(options.features), _file(options.weights)],
        lambda: features(setting.fitted[0]),
    )
    ran = _run(setting, options, solver, int(skip))
    whole = _kept(
        setting,
        f"samples-{solver}",
        [identity, solver, options.steps, options.samples, _file(options.statistics)],
        lambda: (ran if skip == "0" else _run(setting, options, solver, 0)).images,
    )
    found = distances(
        features(ran.images), reference, draws=options.draws, generator=setting.generator("distances")
    )
    rms = (ran.images.double() - whole.double()).square().mean().sqrt()
    return [
        {
            "solver": solver,
            "skip": int(skip),
            "sigma_skip": ran.sigma_skip,
            "NFE": ran.calls,
            "evaluations": ran.evaluations,
            "samples": options.samples,
            **found,
            "rms": float(rms),
        }
    ]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 14 C and 29."""
    return teleport_quality(
        rows, TOLERANCE, {solver: furthest(rows, solver)["skip"] for solver in options.solvers}
    )


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """The table, and how far each solver may skip."""
    table = [
        {
            "solver": row["solver"],
            "skip": row["skip"],
            "NFE": row["NFE"],
            "evaluations": row["evaluations"],
            "sigma_skip": row["sigma_skip"],
            "Frechet": row["frechet"],
            "95% interval": f"{row['low']:.4g} to {row['high']:.4g}",
            "kernel": row["kernel"],
            "rms": row["rms"],
        }
        for row in rows
    ]
    grid = ", on a new grid" if options.regrid else ""
    bias = max(row["bias"] for row in rows)
    text = (
        f"{options.samples} samples, features: {options.features}{grid}. Of the Frechet distances "
        f"the bootstrap counts up to {bias:.3g} as the bias of so many samples."
    )
    for solver in dict.fromkeys(options.solvers):
        whole, best = _of(rows, solver)[0], furthest(rows, solver)
        text += f" {solver}: no skip takes {whole['NFE']:g} NFE, distance {whole['frechet']:.4g};"
        if best["skip"]:
            text += (
                f" up to {best['skip']} steps, to sigma = {best['sigma_skip']:.3g}, stay within "
                f"{TOLERANCE:.0%}: {best['NFE']:g} NFE, distance {best['frechet']:.4g}."
            )
        else:
            text += f" no skip stays within {TOLERANCE:.0%}."
        if best["evaluations"] != best["NFE"]:
            text += (
                f" Its gate spares the network all but {whole['evaluations']:g} of {whole['NFE']:g} "
                f"evaluations without a skip, {best['evaluations']:g} with."
            )
    return Reading(table, text)


def furthest(rows: Sequence[Row], solver: str) -> Row:
    """The row of the largest skip up to which all Frechet distances are at most 3% above that of no skip."""
    mine = _of(rows, solver)
    return list(takewhile(lambda row: row["frechet"] <= (1 + TOLERANCE) * mine[0]["frechet"], mine))[-1]


def _of(rows: Sequence[Row], solver: str) -> list[Row]:
    return sorted((row for row in rows if row["solver"] == solver), key=lambda row: row["skip"])


def _run(setting: Setting, options: argparse.Namespace, solver: str, skip: int) -> SkippedRun:
    first = setting.seed * options.samples  # other settings, other seeds; the paper's are 0 and on
    statistics = ModelStatistics.load(options.statistics) if solver == "dpm_v3" else None
    return skipped_run(
        setting.model,
        setting.gaussian,
        range(first, first + options.samples),
        model_sigmas(setting.model, options.steps),
        skip,
        solver=solver,
        regrid=options.regrid,
        batch_size=setting.batch,
        statistics=statistics,
    )


def _file(path: str | Path | None) -> dict[str, Any] | None:
    """What tells a file from another of the same name; None of none."""
    return None if path is None else fingerprint(str(path))


def _kept(setting: Setting, name: str, depends: list[Any], make: Callable[[], Tensor]) -> Tensor:
    """What several units need, from its file in the cache or made."""
    if setting.cache is None:
        return make()
    told = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    path = setting.cache / f"{name}-{told}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
        np.save(aside, make().numpy())
        aside.replace(path)
    return torch.from_numpy(np.load(path))
