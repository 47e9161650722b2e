"""Which analytic samples are most like a model's, from the same noise? Fig. 8, 18."""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.experiments.shared import add_references, add_sampling, numbers, ranges
from gaussnet.metrics import to_uint8
from gaussnet.metrics.perceptual import DISTANCES, load_distance
from gaussnet.plots.similarity import sample_similarity
from gaussnet.probes.pairs import paired_difference
from gaussnet.probes.trajectories import exact_sample
from gaussnet.samplers import SOLVERS, model_sigmas

SOURCE = "Fig. 8, 18, Appendix A.3"
NEEDS_DATA = True
CHUNK = 64  # samples of a unit
IMAGE = "image"  # stands for a metric in the rows that hold examples
LEVEL = 0.05  # of significance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--samples", type=int, default=256, help="their number (default %(default)s)")
    add_sampling(parser)
    add_references(parser, "gaussian", "mixture-10", "delta")
    parser.add_argument(
        "--metrics", nargs="+", choices=DISTANCES, default=["mse"], help="distances (default: %(default)s)"
    )
    parser.add_argument(
        "--examples", type=int, default=8, help="samples that the figure shows (default %(default)s)"
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """A range of samples each."""
    if options.samples < 2 or options.steps < 2 or options.examples < 0:
        raise ValueError(
            "expected samples >= 2, steps >= 2 and examples >= 0, "
            f"got {options.samples}, {options.steps} and {options.examples}"
        )
    setting.check_references(options.references)
    for name in options.metrics:
        load_distance(name)  # fails now rather than after hours of sampling
    return [f"samples={seeds}" for seeds in ranges(options.samples, CHUNK)]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """A row each sample, reference and metric; and the first samples themselves, as PNG in base64."""
    seeds = numbers(unit.removeprefix("samples="))
    noise = torch.cat([setting.noise(1, "sample", seed) for seed in seeds])
    sigmas = model_sigmas(setting.model, options.steps)
    samples = {"model": _sample_model(setting, options, noise, sigmas)}
    for name, reference in setting.references(options.references).items():
        parts = (float(sigmas[0]) * noise).split(setting.batch)
        samples[name] = torch.cat([exact_sample(reference, part, sigmas) for part in parts])
    rows: list[Row] = []
    for metric in options.metrics:
        distance = load_distance(metric).to(setting.device)
        for name in dict.fromkeys(options.references):
            pairs = zip(
                samples["model"].split(setting.batch), samples[name].split(setting.batch), strict=True
            )
            values = torch.cat([distance(a, b) for a, b in pairs]).tolist()
            rows += [
                {"seed": seed, "reference": name, "metric": metric, "distance": value}
                for seed, value in zip(seeds, values, strict=True)
            ]
    shown = max(0, options.examples - seeds[0])
    rows += [
        {"seed": seed, "reference": name, "metric": IMAGE, "image": encoded(image)}
        for name, images in samples.items()
        for seed, image in zip(seeds, images[:shown], strict=False)
    ]
    return rows


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 18, and the samples of Fig. 8 B."""
    images: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if row["metric"] == IMAGE:
            images.setdefault(row["reference"], []).append(decoded(row["image"]))
    return sample_similarity([row for row in rows if row["metric"] != IMAGE], images)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """Every two references, by pairs of samples."""
    table: list[Row] = []
    texts: list[str] = []
    for metric in dict.fromkeys(options.metrics):
        found = {
            name: torch.tensor(
                [row["distance"] for row in rows if row["metric"] == metric and row["reference"] == name],
                dtype=torch.float64,
            )
            for name in dict.fromkeys(options.references)
        }
        order = sorted(found, key=lambda name: float(found[name].mean()))
        means = ", ".join(f"{name} {float(found[name].mean()):.4g}" for name in order)
        texts.append(f"Mean distance from the model's sample by {metric}: {means}.")
        for near, far in combinations(order, 2):
            difference = paired_difference(found[near], found[far])
            table.append({"metric": metric, "nearer": near, "farther": far, **difference._asdict()})
            if difference.p_value >= LEVEL:
                texts.append(f"{near} and {far} do not differ significantly (p = {difference.p_value:.2g}).")
    texts.append(
        f"{options.samples} samples from the same noise. Differences are nearer - farther, with t intervals "
        "of 95%, p is of Wilcoxon's signed-rank test, not corrected for the number of comparisons."
    )
    return Reading(table, " ".join(texts))


def encoded(image: Tensor) -> str:
    """An image (C, H, W) in [-1, 1] as PNG in base64; more than three channels: the first as grey."""
    pixels = to_uint8(image.float()).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> np.ndarray:
    """The pixels of such a text, (H, W) or (H, W, 3), uint8."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@torch.no_grad()
def _sample_model(setting: Setting, options: argparse.Namespace, noise: Tensor, sigmas: Tensor) -> Tensor:
    solver = SOLVERS[options.solver]
    parts = (float(sigmas[0]) * noise).split(setting.batch)
    return torch.cat([solver(setting.model, part, sigmas, dtype=torch.float64) for part in parts])
