"""The folder of a run: its config, tables that grow by a row, and checkpoints that are whole or absent.

A checkpoint that does not agree with its manifest is never resumed from. One process at a time has the
folder: its lock is the kernel's, which ends with the process, however that ends, and which its data workers
do not inherit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from gaussnet import Denoiser
from gaussnet.hub import CONFIG_NAME
from train.checkpoints import MANIFEST, check_state, damage, sha256
from train.config import Config, ConfigError
from train.configfile import differences, to_yaml
from train.writing import naming, sync, write_atomically

log = logging.getLogger("train")
_HELD_OUT = "held out"  # the part of a best model's provenance


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    _lock: TextIO | None = None

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
        self.tables = (self.probes, self.heldout, self.modes, self.frechet)

    def check(self, config: Config) -> None:
        """Refuses to go on with another configuration than the run was started with.

        Raises:
            ConfigError: naming every key that differs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: expected a folder, got the file {self.path}")
        if not self.config.is_file():
            return
        try:
            differing = differences(self.config.read_text(), config)
        except ValueError as error:
            raise ConfigError(
                f"{self.config} is damaged: {error}. Put it right, or remove it to go on unchecked"
            ) from error
        if differing:
            raise ConfigError(
                f"{self.path} holds a run with another configuration; use another out=FOLDER, or undo:\n  "
                + "\n  ".join(differing)
            )

    def lock(self) -> None:
        """Takes the folder for this process, until `unlock` or its end; creates it where there is none.

        Raises:
            ConfigError: if another process has it, or it cannot be written to.
        """
        path = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            while True:
                file = path.open("a+")
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who had it until now may have removed the file in the meantime.
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
                file.close()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES) and error.filename is None:  # of lockf
                holder = path.read_text().strip() or "another process"
                raise ConfigError(f"out: {self.path} is in use by {holder}") from error
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP) and error.filename is None:
                log.warning(f"{self.path} cannot be locked ({error}): let no other run write there")
                return
            raise ConfigError(f"out: cannot write to {self.path}: {error}") from error
        self._lock = file
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

    def unlock(self) -> None:
        """Gives the folder back; one that nothing was written to is removed."""
        if self._lock is None:
            return
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.close()
        self._lock = None
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def start(self, config: Config) -> None:
        """Creates the folder and writes config.yaml."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, to_yaml(config))

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; a damaged one is named in a warning, and passed over.

        Raises:
            ConfigError: if there are checkpoints, but no whole one.
        """
        found = self._checkpoints()
        for checkpoint in reversed(found):
            if not (checkpoint / MANIFEST).exists():
                log.warning(f"{checkpoint} has no {MANIFEST} to check it by, and is taken as it is")
                return checkpoint
            wrong = damage(checkpoint)
            if wrong is None:
                return checkpoint
            log.warning(f"{checkpoint} is damaged, and passed over: {wrong}")
        if found:
            raise ConfigError(f"{self.checkpoints} holds no whole checkpoint: remove it to begin anew")
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*[0-9]"))

    def save_checkpoint(
        self,
        step: int,
        keep: int,
        write: Callable[[Path], None],
        is_main: bool,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint aside, syncs it and renames it; then removes those before the last `keep`.

        Its manifest holds the facts about the data, which `check_data` compares.

        Every process calls this, and `write` with it: all of them have something to save.
        """
        final = self.checkpoints / f"step-{step:09d}"
        aside = self.checkpoints / f"step-{step:09d}.partial"
        try:
            write(aside)  # ends with all processes done
        except OSError:
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the space
            raise
        if not is_main:
            return
        sums: dict[str, str] = {}
        for file in sorted(aside.iterdir()):
            sync(file)
            sums[file.name] = sha256(file)
        write_atomically(aside / MANIFEST, json.dumps({"data": data or {}, "sha256": sums}, indent=2))
        sync(aside)
        for table in (self.metrics, *self.tables):  # what is up to here is not dropped when it is resumed
            if table.is_file():
                sync(table)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync(self.checkpoints)
        for old in self._checkpoints()[:-keep]:
            shutil.rmtree(old)

    def fork(self, other: RunFolder, config: Config) -> None:
        """Copies the last checkpoint, tables and best model to another folder, to go on with another config.

        With other images, fits or held-out measurements, tables and best model stay behind.

        Raises:
            ConfigError: if there is nothing to go on from, something in the other folder, fewer steps than
                it has behind it, or another optimizer asked for.
        """
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            raise ConfigError(f"--fork: expected a checkpoint in {self.checkpoints}, got none")
        if other.path.exists():
            raise ConfigError(f"--fork: expected a new folder, got {other.path}, which exists")
        step = _step_of(checkpoint)
        if config.train.steps < step:
            raise ConfigError(
                f"--fork: expected train.steps >= {step}, as in {checkpoint}, got {config.train.steps}"
            )
        changed = differences(self.config.read_text(), config) if self.config.is_file() else []
        check_state(changed)
        aside = other.path.with_name(other.path.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        copy = aside / "checkpoints" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        if (copy / MANIFEST).exists():  # other data are among what a fork may choose
            manifest = json.loads((copy / MANIFEST).read_text())
            write_atomically(copy / MANIFEST, json.dumps({**manifest, "data": {}}, indent=2))
        same = self.config.is_file() and not any(
            line.startswith(("data.", "fit.", "heldout.queries", "heldout.sigmas")) for line in changed
        )
        tables = {self.metrics, *(self.tables if same else ())}  # errors on other images do not go on
        if any(line.startswith("frechet.extractor") for line in changed):  # nor do distances of others
            tables -= {self.frechet}
        for table in filter(Path.is_file, tables):
            shutil.copy(table, aside / table.name)
        # One that is later than the checkpoint is not of what goes on.
        if same and self.best.is_dir() and self.best_saved()[0] <= step:
            shutil.copytree(self.best, aside / self.best.name)
        write_atomically(aside / self.config.name, to_yaml(config))
        aside.rename(other.path)

    def discard_after(self, step: int) -> None:
        """Drops what a killed run recorded, or half saved, after the checkpoint that is resumed from.

        Checkpoints after it are damaged: they are kept under another name.
        """
        for partial in self.checkpoints.glob("*.partial"):
            shutil.rmtree(partial)
        for checkpoint in self._checkpoints():
            if _step_of(checkpoint) > step:
                damaged = checkpoint.with_name(f"{checkpoint.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                checkpoint.rename(damaged)
        if self.metrics.is_file():
            text = self.metrics.read_text(errors="replace")
            lines = [line for line in text.splitlines() if _step_of_metrics(line) <= step]
            write_atomically(self.metrics, "".join(f"{line}\n" for line in lines))
        for table in self.tables:
            if not table.is_file():
                continue
            text = table.read_text(errors="replace")
            header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]
            kept = [row for row in rows if _step_of_row(row) <= step]
            # Without a row, nothing: a kill, or a full disk, may have cut the header.
            write_atomically(table, "".join(f"{line}\n" for line in [header, *kept] if kept))

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save_best(self, model: Denoiser, step: int, error: float) -> None:
        """Saves the model of the least held-out error so far, which tells its step and error."""
        model.provenance = {_HELD_OUT: {"step": step, "relative error": error}}
        self.save_model(model, self.best)
        model.provenance = {}

    def best_saved(self) -> tuple[int, float]:
        """Step and error of the model that `save_best` saved; 0 and inf where there is none that tells."""
        try:
            told = json.loads((self.best / CONFIG_NAME).read_text())["provenance"][_HELD_OUT]
            return int(told["step"]), float(told["relative error"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, math.inf

    def save_model(self, model: Denoiser, folder: Path) -> None:
        """Saves a model to a folder inside the run's, which is the old or the new one, whole."""
        aside = folder.with_name(folder.name + ".partial")
        if aside.exists():
            shutil.rmtree(aside)
        with naming(aside):
            model.save_pretrained(aside)
        for file in aside.iterdir():
            sync(file)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed before it was removed
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _step_of_metrics(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # the last line of a killed run
        return float("inf")


def _step_of_row(row: str) -> float:
    step = row.split(",", 1)[0]
    return int(step) if step.isdigit() else float("inf")


def files(run: RunFolder) -> list[Path]:
    """What a finished run has written, without its checkpoints."""
    return sorted(path for path in run.path.iterdir() if path.is_file() and not path.name.startswith("."))
