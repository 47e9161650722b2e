"""What do scores look like on a plane through three images? Fig. 2, 11, 13, 19-21, 26-28."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from gaussnet.denoisers import Denoiser
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting, fingerprint, load_model
from gaussnet.plots.planes import field_panels
from gaussnet.probes import unexplained_variance
from gaussnet.probes.planes import Plane, score_field

SOURCE = "Fig. 2, 11, 13, 19-21, 26-28"
NEEDS_DATA = True
MODEL = "model"
PLANE = "plane"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--images",
        type=int,
        nargs=3,
        metavar="INDEX",
        help="three images of the data that span the plane (default: three at random, of those held out)",
    )
    parser.add_argument(
        "--references",
        nargs="*",
        default=["delta", "mixture-50", "mixture-10", "gaussian"],
        metavar="NAME",
        help="analytic denoisers (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        metavar="PATH",
        help="further models, such as earlier checkpoints of the same run, as --model; drawn before it",
    )
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[2.0, 1.0, 0.5, 0.1], metavar="SIGMA", help="noise levels"
    )
    parser.add_argument("--grid", type=int, default=28, help="points a side (default %(default)s)")
    parser.add_argument(
        "--margin", type=float, default=0.35, help="about the images, relative (default %(default)s)"
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """The three images, and each denoiser at each level."""
    if min(options.sigmas) <= 0 or options.grid < 2 or options.margin < 0:
        raise ValueError(
            f"expected sigmas > 0, grid >= 2 and margin >= 0, got {min(options.sigmas)}, {options.grid} "
            f"and {options.margin}"
        )
    if MODEL in options.models:
        raise ValueError(f"expected --models other than {MODEL!r}, the name of --model: write ./{MODEL}")
    setting.check_references(options.references)
    _plane(setting, options)
    return [PLANE, *_fields(setting, options)]


def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The coordinates of the images, or a field."""
    plane = _plane(setting, options)
    if unit == PLANE:
        return [{"anchor": place, "u": u, "v": v} for place, (u, v) in enumerate(plane.anchors.tolist())]
    name, sigma = _fields(setting, options)[unit]
    uv = plane.grid(options.grid, options.margin)
    field = score_field(_denoiser(setting, options, name), plane, uv, sigma, batch_size=setting.batch)
    return [{"denoiser": name, "sigma": sigma, **row} for row in field]


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Fig. 11 or 13."""
    anchors = [(row["u"], row["v"]) for row in rows if "anchor" in row]
    return field_panels([row for row in rows if "anchor" not in row], anchors)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """How far points inside the triangle are moved, and how near each field is to the model's."""
    fields: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if "anchor" not in row:
            fields.setdefault((row["denoiser"], row["sigma"]), []).append(row)
    table: list[Row] = []
    for (name, sigma), own in sorted(fields.items(), key=lambda item: -item[0][1]):
        within = [row for row in own if row["inside"]] or own
        table.append(
            {
                "sigma": sigma,
                "denoiser": name,
                "moved": sigma**2 * _rms(row["norm"] for row in within),
                "moved in plane": sigma**2 * _rms(row["norm_in_plane"] for row in within),
                "unexplained": _unexplained(fields[MODEL, sigma], own),
            }
        )
    low = min(sigma for _, sigma in fields)
    at_low = [row for row in table if row["sigma"] == low]
    moved = ", ".join(f"{row['denoiser']} {row['moved in plane']:.3g}" for row in at_low)
    sides = ", ".join(f"{side:.3g}" for side in _sides([row for row in rows if "anchor" in row]))
    text = (
        "Moved: the root mean square of sigma^2 times the score over the points inside of the triangle of "
        "the three images, that is how far a denoiser moves them, in all and in the plane; unexplained: the "
        "share of the model's field in the plane that another leaves, over the whole grid. The sides of the "
        f"triangle are {sides}. At sigma = {low:g} points inside are moved in the plane by: {moved}."
    )
    return Reading(table, text)


def _plane(setting: Setting, options: argparse.Namespace) -> Plane:
    if options.images is None:
        images, _ = setting.queries(3)
        return Plane.through(images)
    if setting.data is None:
        raise ValueError("expected images (--data), got none")
    if not all(0 <= index < len(setting.data) for index in options.images):
        raise ValueError(f"expected indices of {len(setting.data)} images, got {options.images}")
    raw = setting.data.raw(options.images)
    return Plane.through(setting.data.to_float(raw).to(setting.device))


def _fields(setting: Setting, options: argparse.Namespace) -> dict[str, tuple[str, float]]:
    """Unit -> name and level; units of further models tell their files, which may change."""
    sigmas = sorted(set(options.sigmas), reverse=True)
    found: dict[str, tuple[str, float]] = {}
    for name in dict.fromkeys([*options.models, MODEL, *options.references]):
        told = name
        if name in options.models:
            told += "@" + hashlib.sha256(str(fingerprint(name)).encode()).hexdigest()[:8]
        found |= {f"{told} sigma={sigma}": (name, sigma) for sigma in sigmas}
    return found


def _denoiser(setting: Setting, options: argparse.Namespace, name: str) -> Denoiser:
    if name == MODEL:
        return setting.model
    if name in options.models:
        return load_model(name).to(setting.device).eval()
    return setting.reference(name)


def _unexplained(model: Sequence[Row], other: Sequence[Row]) -> float:
    """The share of the model's field that another leaves, in the plane (Eq. 28, over all points at once)."""
    a, b = (torch.tensor([[[row["score_u"], row["score_v"]] for row in field]]) for field in (model, other))
    return float(unexplained_variance(a, b))


def _rms(values: Any) -> float:
    numbers = list(values)
    return math.sqrt(sum(value**2 for value in numbers) / len(numbers))


def _sides(anchors: Sequence[Row]) -> list[float]:
    points = [(row["u"], row["v"]) for row in anchors]
    return [math.dist(points[i], points[i - 1]) for i in (1, 2, 0)]
