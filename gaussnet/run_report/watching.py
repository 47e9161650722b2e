"""A run's status in a terminal, redrawn until the run is complete."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from gaussnet.run_report.folder import Run, printable
from gaussnet.run_report.page import PAGE, write_page
from gaussnet.run_report.status import Status


def watch(path: str | Path, every: float = 10.0, once: bool = False, stream: TextIO | None = None) -> None:
    """Prints a run's status again and again, and writes its page anew whenever its files have changed.

    In a terminal, a status takes the place of the last one; elsewhere, they follow each other. It ends when
    the run is complete, or by Ctrl-C. Where the page cannot be drawn or written, a line says why.

    Args:
        path: the run's folder.
        every: seconds between two looks.
        once: print one status and leave; no page is written.
        stream: where to print; default: standard output.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if `every` is not positive.
    """
    if not every > 0:
        raise ValueError(f"expected seconds > 0, got {every:g}")
    output = stream or sys.stdout
    drawn, seen, note = 0, None, ""
    try:
        while True:
            run = Run(Path(path))
            signature, complete = run.signature(), run.complete  # before the tables: none is missed
            drawn = _print(Status.of(run), note, output, drawn)
            if once:
                return
            if signature != seen:
                seen, before, note = signature, note, _refresh(run)
                if note != before:
                    drawn = _print(Status.of(run), note, output, drawn)
            if complete:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        print(file=output, flush=True)


def _print(status: Status, note: str, stream: TextIO, drawn: int) -> int:
    """Prints a status, in a terminal over the `drawn` lines of the last one; returns its number of lines."""
    terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if terminal else 80
    lines = status.lines(width) + ([printable(note)] if note else [])
    if terminal:
        back = f"\x1b[{drawn}F\x1b[J" if drawn else ""  # up to the first line, and clear from there
        print(back + "\n".join(line[:width] for line in lines), file=stream, flush=True)
    else:
        print("\n".join(lines), end="\n\n", file=stream, flush=True)
    return len(lines)


def _refresh(run: Run) -> str:
    try:
        return f"page: {write_page(run)}"
    except (ImportError, OSError) as error:
        return f"no {PAGE}: {error}"
