"""What a benchmark found: printed as it is measured, and kept as numbers beside the script.

    record = Record(options)                       # options of parser(__doc__)
    record.table(["network", "times faster"], [["SongUNet", "1.30"]])
    record.number("SongUNet, times faster than NVlabs/edm", 1.30, asked=">= 1.2")
    record.close()                                 # writes options.json, if it was given

`bench.py` runs the scripts with --json, and puts what they printed into the pages beside them.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BOUNDS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Number:
    """One measured number, with what it should reach."""

    name: str
    value: float
    asked: str = ""  # "<= 1.15", ">= 1.5", or nothing: reported only
    against: str = ""  # the reference in the same process, where the number is a ratio
    unit: str = ""  # of value and bound: "%", "s", "MB"
    headline: bool = False  # whether the README shows it

    def __post_init__(self) -> None:
        sign, _, bound = self.asked.partition(" ")
        if self.asked and (sign not in BOUNDS or not _is_number(bound)):
            raise ValueError(f"{self.name}: expected a bound such as '<= 1.15', got {self.asked!r}")

    def reached(self) -> bool | None:
        """Whether the value is within its bound; None without one."""
        if not self.asked:
            return None
        sign, bound = self.asked.split()
        return bool(BOUNDS[sign](self.value, float(bound)))

    def told(self) -> str:
        """The value to three digits, with its unit."""
        return f"{self.value:.3g} {self.unit}".rstrip()


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="file for the numbers")
    made.add_argument("--threads", type=int, default=2)
    return made


@dataclass
class Record:
    """Collects the numbers of one run."""

    options: argparse.Namespace
    numbers: list[Number] = field(default_factory=list)

    def text(self, line: str = "") -> None:
        """Prints a line."""
        print(line, flush=True)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table in Markdown, each row when it is there."""
        self.text(f"| {' | '.join(head)} |")
        self.text("|---" * len(head) + "|")
        for row in rows:
            self.text(f"| {' | '.join(row)} |")
        self.text()

    def number(
        self,
        name: str,
        value: float,
        asked: str = "",
        against: str = "",
        *,
        unit: str = "",
        headline: bool = False,
    ) -> float:
        """Keeps a number; returns its value."""
        self.numbers.append(Number(name, float(value), asked, against, unit, headline))
        return float(value)

    def close(self) -> None:
        """Writes the numbers, if a file for them was given."""
        if self.options.json is not None:
            rows = [asdict(number) | {"reached": number.reached()} for number in self.numbers]
            self.options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
