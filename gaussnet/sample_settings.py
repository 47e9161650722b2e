"""What a folder of samples was drawn with, `sample.json`: all that decides the image of a seed.

A folder takes no images of another model or of other settings, which a command that resumes would mix.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from gaussnet.denoisers import Denoiser
from gaussnet.hub import describe
from gaussnet.sampling import Jump, parse_seeds

SETTINGS_NAME = "sample.json"


def settings_of(options: argparse.Namespace, model: Denoiser) -> dict[str, Any]:
    """What decides an image of a seed, but for what has to be measured first."""
    names = ("solver", "steps", "sigma_min", "sigma_max", "rho", "guidance")
    told = {"model": _digest(model), **{name: getattr(options, name) for name in names}}
    return told | {"classes": None if options.classes is None else parse_seeds(options.classes, "classes")}


def measured_settings(options: argparse.Namespace, jump: Jump | None) -> dict[str, Any]:
    """The rest of it."""
    held = None if options.statistics is None else options.statistics.read_bytes()
    return {
        "jump": None if jump is None else jump.sigma_skip,
        "plain_skip": jump is not None and options.plain_skip,
        "gaussian": None if jump is None else _digest(jump.gaussian),
        "statistics": None if held is None else hashlib.sha256(held).hexdigest()[:16],
    }


def _digest(model: Denoiser) -> str:
    """Tells models apart by what they are built from and by their numbers, not by where they lie."""
    digest = hashlib.sha256(json.dumps(describe(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_settings(folder: Path, told: dict[str, Any]) -> None:
    """Raises a ValueError if the images of a folder were drawn with other settings than these."""
    path = folder / SETTINGS_NAME
    if not path.exists():
        return
    try:
        held = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {path} to be JSON: {error}; use another --out") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path}: expected an object, got a {type(held).__name__}; use another --out")
    differ = [name for name in told if name in held and not _alike(held[name], told[name])]
    if differ:
        pairs = [f"{name} {json.dumps(told[name]):.60}, not {json.dumps(held[name]):.60}" for name in differ]
        raise ValueError(
            f"expected the settings of {path}, got {'; '.join(pairs)}: use another --out, or those settings"
        )


def _alike(one: Any, other: Any) -> bool:
    """Equal, or two numbers that are but for the rounding of another device."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    return one == other


def keep_settings(folder: Path, told: dict[str, Any]) -> None:
    """Writes them to a folder that has none."""
    path = folder / SETTINGS_NAME
    if not path.exists():
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(told, indent=2) + "\n")
        aside.replace(path)
