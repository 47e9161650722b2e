"""Files of a run: written whole or not at all, and named in the error when a disk is full."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class RunError(RuntimeError):
    """A run that cannot go on; the message says what its user needs to know."""


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
    with naming(path), path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old or the new one, whole, at every moment."""
    aside = path.with_name(path.name + ".partial")
    with naming(path):
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a path is written, such as a full disk, into an OSError that names it.

    Raises:
        OSError: instead of those without a file name, and of the kinds that torch and safetensors raise.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Of a full disk, torch says that a position is not the expected one.
        free = f"; {shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free there"
        raise OSError(f"{path} could not be written: {error}{free}") from error
