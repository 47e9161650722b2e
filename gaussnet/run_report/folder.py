"""The folder of a run, read while it may be written.

A run can have just begun, or have been killed inside of a write: what is not there, and what is not whole, is
left out. A line is whole with its line end, a row with all its columns, a picture with its last chunk.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

MAX_NUMBER = 1e300  # beyond, sums overflow; no run measures it
MAX_STEP = 10**15

_CURVE = ("weights", "queries", "reference", "quantity")
_PNG, _IEND = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Run:
    """What a run has written so far, each part read once, when it is first asked for.

    Args:
        path: the run's folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise FileNotFoundError(f"expected the folder of a run, got {self.path}, which is none")
        if not any((self.path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise FileNotFoundError(
                f"expected the folder of a run, with a config.yaml or metrics.jsonl, got {self.path}"
            )

    @property
    def name(self) -> str:
        """The folder's name, printable."""
        return printable(self.path.resolve().name)

    @property
    def complete(self) -> bool:
        """Whether the run is over: report.md is the last file that it writes."""
        return (self.path / "report.md").is_file()

    @cached_property
    def config_text(self) -> str:
        """config.yaml as it stands."""
        return _text(self.path / "config.yaml")

    @cached_property
    def config(self) -> Row:
        """config.yaml as a tree; {} if it is none."""
        try:
            tree = yaml.safe_load(self.config_text)
        except Exception:  # what is no YAML, and what its constructors raise of values that are none
            return {}
        return tree if isinstance(tree, dict) else {}

    def setting(self, group: str, key: str) -> Any:
        """A value of the configuration, or None."""
        values = self.config.get(group)
        return values.get(key) if isinstance(values, dict) else None

    @cached_property
    def metrics(self) -> list[Row]:
        """Rows of metrics.jsonl: step, an integer, and numbers; None for those that are not finite."""
        rows: list[Row] = []
        for line in _whole_lines(self.path / "metrics.jsonl").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(step, int) and 0 <= step < MAX_STEP:
                numbers = ("loss", "lr", "images_per_second", "waiting", "bad_steps")
                rows.append({"step": step} | {name: _finite(row.get(name)) for name in numbers})
        return rows

    @cached_property
    def probes(self) -> list[Row]:
        """Rows of probes.csv: step, weights, sigma, queries, reference, quantity, mean."""
        return read_table(self.path / "probes.csv", _CURVE, ("step", "sigma", "mean"))

    @cached_property
    def heldout(self) -> list[Row]:
        """Rows of heldout.csv: step, weights, sigma, error, relative; of weights with all of a step's."""
        rows = read_table(self.path / "heldout.csv", ("weights",), ("step", "sigma", "error", "relative"))
        counts = Counter((row["step"], row["weights"]) for row in rows)
        levels: dict[int, int] = {}
        for (step, _), count in counts.items():
            levels[step] = max(levels.get(step, 0), count)
        return [row for row in rows if counts[row["step"], row["weights"]] == levels[row["step"]]]

    @cached_property
    def frechet(self) -> list[Row]:
        """Rows of frechet.csv: step and numbers."""
        return [row for row in read_table(self.path / "frechet.csv") if isinstance(row.get("step"), int)]

    @cached_property
    def errors(self) -> list[Row]:
        """Rows of errors.csv: sigma and the error of each denoiser."""
        return [row for row in read_table(self.path / "errors.csv") if isinstance(row.get("sigma"), float)]

    @cached_property
    def skips(self) -> list[Row]:
        """Rows of skips.csv: skipped, sigma_skip, NFE, RMS."""
        return [row for row in read_table(self.path / "skips.csv") if isinstance(row.get("skipped"), int)]

    def pictures(self) -> list[tuple[int, Path]]:
        """Steps and files of the samples while training, in order."""
        found = ((path.stem.removeprefix("step-"), path) for path in self.path.glob("samples/step-*.png"))
        return sorted((int(step), path) for step, path in found if step.isdecimal())

    def signature(self) -> tuple[object, ...]:
        """Changes whenever a table, a picture or the state does."""
        names = ("config.yaml", "metrics.jsonl", "probes.csv", "heldout.csv", "frechet.csv", "errors.csv")
        names += ("skips.csv", "samples.png", "report.md", "config.json", "best/config.json")
        return (*map(_stamp, (self.path / name for name in names)), *(_stamp(p) for _, p in self.pictures()))


def read_table(path: Path, texts: Iterable[str] = (), numbers: Iterable[str] | None = None) -> list[Row]:
    """The whole rows of a CSV file.

    Args:
        path: of the file; there need not be one.
        texts: columns to keep as they are. Rows that lack one are left out.
        numbers: columns of numbers. Rows in which one is missing or not a number are left out; "step" is an
            integer >= 0. Default: all columns, each cell a number where it is one.

    Returns:
        Rows with these columns, or with all of them.
    """
    rows: list[Row] = []
    reader = csv.DictReader(io.StringIO(_whole_lines(path), newline=""))
    try:
        for line in reader:
            if None in line or None in line.values():  # more or fewer cells than columns
                continue
            if numbers is None:
                cells = {printable(name): number(cell, name) for name, cell in line.items()}
                rows.append(
                    {
                        name: printable(cell) if value is None else value
                        for (name, value), cell in zip(cells.items(), line.values(), strict=True)
                    }
                )
                continue
            row: Row = {name: printable(line.get(name, "")) for name in texts}
            row |= {name: number(line.get(name, ""), name) for name in numbers}
            if all(value is not None and value != "" for value in row.values()):
                rows.append(row)
    except csv.Error:
        pass
    return rows


def number(text: str, name: str) -> float | int | None:
    """A cell as a number, which may be infinite but not nan; else None. Steps are integers."""
    if name in ("step", "skipped", "NFE"):
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= MAX_NUMBER or math.isinf(value) else None


def printable(text: str) -> str:
    """Without control characters: a terminal would obey them, XML has no place for them."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_picture(path: Path) -> bytes | None:
    """A PNG file that is whole, or None."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if data.startswith(_PNG) and data.endswith(_IEND) else None


def _whole_lines(path: Path) -> str:
    text = _text(path)
    return text[: text.rfind("\n") + 1]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _finite(value: object) -> float | int | None:
    if isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER:  # which nan is not
        return value
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size
