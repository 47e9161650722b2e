"""Running an experiment: in units that are kept as they are done, shared by processes; then table and figure.

An experiment is a module with five functions and a name for its source, see `Experiment`. Its work is a list
of units, independent of each other, each a short text such as "sigma=0.5". The rows of a unit are kept in

    OUT/parts/NAME-HASH/UNIT.json

where the hash is of everything that they depend on. A command that was stopped goes on where it was, one with
other options starts anew, and units are dealt to processes in turn. At the end lie in OUT

    NAME.csv    all rows, tidy: a column a variable, a row a number
    NAME.png    the figure, and NAME.pdf
    NAME.md     a short table and a reading of the numbers
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from gaussnet.experiments.setting import Setting, fingerprint
from gaussnet.plots.style import save
from gaussnet.processes import Processes

Row = dict[str, Any]
SUFFIXES = (".csv", ".png", ".pdf", ".md")
UNLABELLED = (
    "The model knows classes and was asked without labels: what it then does, it has to have learned with "
    "labels left out."
)


class Reading(NamedTuple):
    """What the numbers say: a short table, and a paragraph that tells it.

    Attributes:
        table: rows of equal keys.
        text: a paragraph.

    Example:
        >>> print(markdown(Reading([{"sigma": 1.0, "share": 0.25}], "A quarter is left.").table))
        | sigma | share |
        | --- | --- |
        | 1 | 0.25 |
    """

    table: list[Row]
    text: str


class Experiment(Protocol):
    """What a module offers to be an experiment. `options` are those that it added, by their names.

    Example:
        >>> from gaussnet.experiments import EXPERIMENTS
        >>> experiment = EXPERIMENTS["far-field"]
        >>> experiment.SOURCE, experiment.NEEDS_DATA
        ('Sec. 4.1, D.8, Eq. 25-27, 154-159', True)
    """

    @property
    def SOURCE(self) -> str:
        """Figures, tables and equations of the paper that it makes."""
        ...

    @property
    def NEEDS_DATA(self) -> bool:
        """Whether it works on images."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options, each with a default."""
        ...

    def units(self, setting: Setting, options: argparse.Namespace) -> list[str]:
        """The names of independent pieces of work.

        Raises:
            ValueError: if an option makes no sense, before anything is computed.
        """
        ...

    def measure(self, setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
        """The rows of a unit: JSON-able values, the same in every process and order."""
        ...

    def draw(self, rows: Sequence[Row], options: argparse.Namespace) -> Any:
        """The figure of all rows, not yet saved."""
        ...

    def read(self, rows: Sequence[Row], options: argparse.Namespace) -> Reading:
        """What the rows say."""
        ...


def run(
    name: str,
    experiment: Experiment,
    setting: Setting,
    options: argparse.Namespace,
    out: Path,
    processes: Processes | None = None,
) -> Reading:
    """Measures what is missing, and writes table, figure and reading.

    Args:
        name: of the experiment, and of its files.
        experiment: a module.
        setting: model and images.
        options: the experiment's own, complete: see `defaults`.
        out: folder, made if there is none.
        processes: that share the units; each has to call this with equal arguments.

    Returns:
        The reading, in every process.

    Raises:
        ValueError: if options or setting make no sense.
        OSError: if something cannot be written.
    """
    processes = processes or Processes()
    units = experiment.units(setting, options)
    folder = out / "parts" / f"{name}-{_hash(setting.identity, vars(options), *_files(options))}"
    mine = units[processes.rank :: processes.world]
    share = [
        (unit, _kept(folder / f"{_slug(unit)}.json", experiment, setting, options, unit))
        for unit in tqdm(mine, desc=name, unit="unit", disable=None if processes.first else True)
    ]
    found = dict(processes.gather(share))
    rows = [row for unit in units for row in found[unit]]
    reading = experiment.read(rows, options)
    if not getattr(experiment, "ASKS_CLASSES", False) and setting.lacks_labels:
        reading = reading._replace(text=f"{reading.text} {UNLABELLED}")
    if processes.first:
        write_rows(out / f"{name}.csv", rows)
        save(experiment.draw(rows, options), out / f"{name}.png", out / f"{name}.pdf")
        text = f"# {name}\n\n{markdown(reading.table)}\n\n{reading.text}\n"
        (out / f"{name}.md").write_text(text)
    return reading


def defaults(experiment: Experiment, **changed: Any) -> argparse.Namespace:
    """The options of an experiment, with these changed.

    Args:
        experiment: a module.
        **changed: options by their names.

    Returns:
        All of its options.

    Raises:
        ValueError: if there is no such option.

    Example:
        >>> from gaussnet.experiments import EXPERIMENTS
        >>> options = defaults(EXPERIMENTS["far-field"], queries=16)
        >>> options.queries, options.far
        (16, 3.0)
    """
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    options = parser.parse_args([])
    unknown = set(changed) - set(vars(options))
    if unknown:
        raise ValueError(f"expected options among {sorted(vars(options))}, got {sorted(unknown)}")
    vars(options).update(changed)
    return options


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table; numbers with four digits."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as CSV; columns are all keys, in the order of their first row."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


def _kept(
    path: Path, experiment: Experiment, setting: Setting, options: argparse.Namespace, unit: str
) -> list[Row]:
    """The rows of a unit, from its file or measured."""
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not what an experiment wrote: delete it ({error})") from error
    # Through JSON once: what is used now is what is read next time.
    text = json.dumps(experiment.measure(setting, options, unit))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(path)
    return json.loads(text)


def _files(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What tells the files, and folders of models, among the options from others of the same names."""
    named = [str(value) for _, value in sorted(vars(options).items()) if isinstance(value, (str, Path))]
    return [found for found in map(fingerprint, named) if found["files"]]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _slug(unit: str) -> str:
    """A file name that tells units apart: letters that files may not have become dashes."""
    safe = re.sub(r"[^\w.=+-]", "-", unit)
    return safe if safe == unit else f"{safe}-{_hash(unit)[:6]}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
