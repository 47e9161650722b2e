"""The folder of a run: its config, tables that grow by a row, and checkpoints that are whole or absent."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gaussnet import Denoiser
from train.config import Config, ConfigError
from train.configfile import differences, to_yaml


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.probes = self.path / "probes.csv"
        self.heldout = self.path / "heldout.csv"
        self.modes = self.path / "modes.csv"
        self.frechet = self.path / "frechet.csv"
        self.pictures = self.path / "samples"
        self.best = self.path / "best"
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

    def fork(self, other: RunFolder, config: Config) -> None:
        """Copies the last checkpoint and the tables to another folder, to go on there with another config.

        Raises:
            ConfigError: if there is nothing to go on from, or something in the other folder.
        """
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            raise ConfigError(f"--fork: expected a checkpoint in {self.checkpoints}, got none")
        if other.path.exists():
            raise ConfigError(f"--fork: expected a new folder, got {other.path}, which exists")
        aside = other.path.with_name(other.path.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(checkpoint, aside / "checkpoints" / checkpoint.name)
        for table in (self.metrics, self.probes, self.heldout, self.modes, self.frechet):
            if table.is_file():
                shutil.copy(table, aside / table.name)
        write_atomically(aside / self.config.name, to_yaml(config))
        aside.rename(other.path)

    def discard_after(self, step: int) -> None:
        """Drops what a killed run recorded, or half saved, after the checkpoint that is resumed from."""
        for partial in self.checkpoints.glob("*.partial"):
            shutil.rmtree(partial)
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step(line) <= step]
            write_atomically(self.metrics, "".join(f"{line}\n" for line in lines))
        for table in (self.probes, self.heldout, self.modes, self.frechet):
            if not table.is_file():
                continue
            header, *rows = table.read_text().splitlines() or [""]
            kept = [
                row for row in rows if row.split(",", 1)[0].isdigit() and int(row.split(",", 1)[0]) <= step
            ]
            write_atomically(table, "".join(f"{line}\n" for line in [header, *kept]))

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save_model(self, model: Denoiser, folder: Path) -> None:
        """Saves a model to a folder inside the run's, which is the old or the new one, whole."""
        aside = folder.with_name(folder.name + ".partial")
        if aside.exists():
            shutil.rmtree(aside)
        model.save_pretrained(aside)
        for file in aside.iterdir():
            sync(file)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a table; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
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


def files(run: RunFolder) -> list[Path]:
    """What a finished run has written, without its checkpoints."""
    return sorted(path for path in run.path.iterdir() if path.is_file())
