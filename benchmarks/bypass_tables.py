"""The tables of benchmarks/bypass_ablation.py: rows of runs, tidy, in CSV files that are committed."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from bypass_tasks import RATE_SEED, Run

HERE = Path(__file__).parent
TABLES = HERE / "bypass_ablation"


def collect(run: Run, folder: Path) -> None:
    """Puts a run's rows into the tables, in place of those of the same run."""
    TABLES.mkdir(exist_ok=True)
    with (TABLES / ".lock").open("w") as lock:  # released when the file is closed
        fcntl.flock(lock, fcntl.LOCK_EX)
        _collect(run, folder / run.name)


def _collect(run: Run, path: Path) -> None:
    label = label_of(run, device_of(path))
    heldout = [row for row in read(path / "heldout.csv") if row["weights"] == "ema" and shown(row["step"])]
    modes = [row for row in read(path / "modes.csv") if row["weights"] == "ema"]
    probes = [
        row
        for row in read(path / "probes.csv")
        if row["weights"] == "ema" and row["queries"] == "noised" and row["quantity"] == "denoiser"
    ]
    if run.seed == RATE_SEED:  # these only choose a rate
        last = max((int(row["step"]) for row in heldout), default=0)
        heldout = [row for row in heldout if int(row["step"]) == last]
    merge("errors", label, heldout, ("step", "sigma", "error"))
    merge("measures", label, json.loads((path / "measured.json").read_text()), ("name", "value"))
    if run.seed != RATE_SEED:
        merge(
            "modes",
            label,
            learned(modes),
            ("sigma", "axes", "variance", "first", "last", "gaussian", "learned"),
        )
        merge("probes", label, probes, ("step", "sigma", "reference", "mean"))


def label_of(run: Run, device: str) -> dict[str, object]:
    """The columns that tell runs apart; on another device a run sees other noise."""
    named = {"task": run.task, "arm": run.arm, "seed": run.seed, "lr": f"{run.lr:g}", "steps": run.steps}
    return {**named, "device": device}


def device_of(path: Path) -> str:
    """`cpu` or `cuda`, as the run's own log tells.

    Raises:
        ValueError: if the log does not tell.
    """
    line = r"^training .* process\(es\), (cpu|cuda)\b"
    told = re.findall(line, (path / "log.txt").read_text(), re.MULTILINE)
    if not told:
        raise ValueError(f"{path / 'log.txt'}: expected a line 'training ... process(es), cpu' or cuda")
    return told[-1]


def shown(step: str) -> bool:
    """Whether the tables hold a step: of long runs, few of the later ones."""
    return int(step) <= 1500 or int(step) % 500 == 0


def learned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for each level and band of axes: errors before and after training, and when it came.

    `learned` is the first step measured at which the error is within a tenth of the last one.
    """
    bands: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        bands.setdefault((row["sigma"], row["axes"]), []).append(row)
    table: list[dict[str, str]] = []
    for curve in bands.values():
        target = 1.1 * float(curve[-1]["error"])
        step = next(row["step"] for row in curve if float(row["error"]) <= target)
        ends = {"first": curve[0]["error"], "last": curve[-1]["error"], "learned": step}
        table.append({**curve[-1], **ends})
    return table


def merge(
    table: str, label: Mapping[str, object], rows: list[dict[str, str]], columns: tuple[str, ...]
) -> None:
    """Replaces one run's rows in a table."""
    path = TABLES / f"{table}.csv"
    own = {key: str(value) for key, value in label.items()}
    kept = [row for row in read(path) if any(row[key] != value for key, value in own.items())]
    kept += [own | {name: short(row[name]) for name in columns} for row in rows]
    kept.sort(key=lambda row: [row["task"], row["arm"], int(row["seed"]), float(row["lr"])])
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*own, *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    aside.replace(path)


def short(value: object) -> str:
    """Numbers with six digits: the tables are committed."""
    text = str(value)
    try:
        return text if text.isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def last_error(path: Path) -> float:
    """The mean logarithm of the held-out error over the levels, of the averaged weights at the last step."""
    rows = [row for row in read(path / "heldout.csv") if row["weights"] == "ema"]
    last = max(int(row["step"]) for row in rows)
    return float(np.mean([np.log(float(row["error"])) for row in rows if int(row["step"]) == last]))
