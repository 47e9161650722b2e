"""The folder of a run: its config, tables that grow by a row, and checkpoints that are whole or absent."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from train.config import Config, ConfigError, differences, to_yaml


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.probes = self.path / "probes.csv"
        self.report = self.path / "report.md"
        self.checkpoints = self.path / "checkpoints"

    def check(self, config: Config) -> None:
        """Refuses to go on with another configuration than the run was started with.

        Raises:
            ConfigError: naming every key that differs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: expected a folder, got the file {self.path}")
        if not self.config.is_file():
            return
        differing = differences(self.config.read_text(), config)
        if differing:
            raise ConfigError(
                f"{self.path} holds a run with another configuration; use another out=FOLDER, or undo:\n  "
                + "\n  ".join(differing)
            )

    def start(self, config: Config) -> None:
        """Creates the folder and writes config.yaml."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, to_yaml(config))

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(self.checkpoints.glob("step-*[0-9]"))
        return found[-1] if found else None

    def save_checkpoint(self, step: int, keep: int, write: Callable[[Path], None], is_main: bool) -> None:
        """Writes a checkpoint aside, syncs it and renames it; then removes those before the last `keep`.

        Every process calls this, and `write` with it: all of them have something to save.
        """
        final = self.checkpoints / f"step-{step:09d}"
        aside = self.checkpoints / f"step-{step:09d}.partial"
        write(aside)  # ends with all processes done
        if not is_main:
            return
        for file in aside.rglob("*"):
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync(self.checkpoints)
        for old in sorted(self.checkpoints.glob("step-*[0-9]"))[:-keep]:
            shutil.rmtree(old)

    def discard_after(self, step: int) -> None:
        """Drops what a killed run recorded, or half saved, after the checkpoint that is resumed from."""
        for partial in self.checkpoints.glob("*.partial"):
            shutil.rmtree(partial)
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step(line) <= step]
            write_atomically(self.metrics, "".join(f"{line}\n" for line in lines))
        if self.probes.is_file():
            header, *rows = self.probes.read_text().splitlines() or [""]
            kept = [
                row for row in rows if row.split(",", 1)[0].isdigit() and int(row.split(",", 1)[0]) <= step
            ]
            write_atomically(self.probes, "".join(f"{line}\n" for line in [header, *kept]))

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log_probes(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends tidy rows, with step first, to probes.csv."""
        append_csv(self.probes, rows)

    def read_probes(self) -> list[dict[str, str]]:
        """All rows of probes.csv."""
        with self.probes.open(newline="") as file:
            return list(csv.DictReader(file))


def append_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows of equal keys, with a header where the file is new."""
    rows = list(rows)
    new = not path.is_file() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old or the new one, whole, at every moment."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the last line of a killed run
        return float("inf")
