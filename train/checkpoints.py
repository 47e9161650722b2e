"""What tells a whole checkpoint from a damaged one, and from one of other data.

A checkpoint's manifest.json holds the SHA-256 of each of its files, and facts about the data it saw.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gaussnet import GaussianDenoiser
from train.config import ConfigError
from train.data import Data

MANIFEST = "manifest.json"


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Takes the state of a checkpoint; of one that was forked, all but fits and weight decay.

    Args:
        accelerator: which holds what is loaded.
        checkpoint: its folder.
        model: the bypass model, with what has been fitted in this run.
        optimizer: with the weight decay of this run; the learning rate is set at every step.

    Raises:
        ConfigError: if it is not that of such a run, or, without a manifest, damaged.
    """
    other = forked(checkpoint)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    hook = model.register_load_state_dict_pre_hook(keep_fit) if other else None
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # whatever pickle, zip files and safetensors raise
        reason = " ".join(str(error).split())
        hint = f"; remove {checkpoint.parent.parent} before another --fork" if other else ""
        raise ConfigError(
            f"{checkpoint} cannot be loaded: {type(error).__name__}: {reason:.500}{hint}"
        ) from error
    finally:
        if hook is not None:
            hook.remove()
    if other:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def check_state(changed: Iterable[str]) -> None:
    """Refuses a fork whose optimizer or averages are not those whose state goes on.

    An average may go on with another half-life, but not as another one of the averages.

    Args:
        changed: lines of `differences`.

    Raises:
        ConfigError: with the line of what cannot change.
    """
    for line in changed:
        key, _, values = line.partition(": ")
        decayed = [value not in ("0", "0.0") for value in values.split(" -> ")]
        if key == "train.optimizer" or (key == "train.weight_decay" and decayed[0] != decayed[1]):
            raise ConfigError(f"--fork: the state of the optimizer goes on, which does not allow {line}")
        if key == "ema.halflife_kimg":
            old, new = (json.loads(value) for value in values.split(" -> "))
            moved = len(old) != len(new) or any(h in old and old[i] != h for i, h in enumerate(new))
            if moved:
                raise ConfigError(f"--fork: averages go on in their order, which does not allow {line}")


def keep_fit(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts the model's own tensors, but for those of its network, in the place of those to be loaded."""
    own = model.state_dict()
    network = f"{prefix}model."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(network)]:
        del state[name]
    state.update({prefix + name: value for name, value in own.items() if not name.startswith("model.")})


def forked(checkpoint: Path) -> bool:
    """Whether it is the first one of a fork, which may have other data."""
    path = checkpoint / MANIFEST
    return path.exists() and json.loads(path.read_text())["data"] == {}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by the checksums of its manifest; None of a whole one."""
    try:
        sums: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())["sha256"]
        for name, expected in sums.items():
            if sha256(checkpoint / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def check_data(checkpoint: Path, data: Mapping[str, Any]) -> None:
    """Refuses to go on with other data than a checkpoint saw.

    Numbers that are measured, floats, may differ by what machines round to.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    if not (checkpoint / MANIFEST).exists():
        return
    before = json.loads((checkpoint / MANIFEST).read_text())["data"]

    def same(old: Any, new: Any) -> bool:
        return math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-3) if isinstance(new, float) else old == new

    differing = [
        f"{name}: {before[name]} -> {now}"
        for name, now in data.items()
        if name in before and not same(before[name], now)
    ]
    if differing:
        raise ConfigError(
            f"data.source: {checkpoint} was trained on other images; use another out=FOLDER, or undo:\n  "
            + "\n  ".join(differing)
        )


def data_facts(data: Data, gaussian: GaussianDenoiser) -> dict[str, Any]:
    """What a checkpoint remembers of the data, to tell whether they are still the same."""
    return {
        "images to train on": len(data.train),
        "images held out": len(data.heldout),
        "shape": list(data.event_shape),
        "classes": data.n_classes,
        "mean": round(float(gaussian.mean.double().mean()), 6),
        "variance": round(float(gaussian.variance), 6),
    }


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
