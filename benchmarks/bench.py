"""Runs the benchmarks one after another, and writes what they found.

    make bench MNIST=FOLDER EMOJI=ZIP EDM=CHECKOUT MODEL=FOLDER    about 20 minutes on two quiet cores
    make bench-full MNIST=FOLDER ...                               with more repetitions and samples: hours
    python benchmarks/bench.py --only fitting precision --mnist FOLDER
    python benchmarks/bench.py --list
    python benchmarks/bench.py --readme

Beside each script NAME.py it writes NAME.json, and into NAME.md, between `<!-- results -->` and
`<!-- /results -->`, what the script printed; then the table of the README. All else on these pages stays.
Every result is written as soon as it is there, and a script that fails is named at the end, so that neither a
failure nor an interruption costs what was finished. A result of a full run, or of one with more data, is
not replaced by a lesser one, unless with --replace.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import gpu, machine, versions
from results import Number

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
RESULTS = ("<!-- results -->", "<!-- /results -->")
PERFORMANCE = ("<!-- performance: made by benchmarks/bench.py -->", "<!-- /performance -->")
DATA = {
    "mnist": "folder of MNIST's four files",
    "emoji": "zip of 64x64 colour PNGs",
    "edm": "checkout of NVlabs/edm",
    "model": "folder of a trained run of configs/mnist_mini_edm.yaml",
}

STAND_INS = {"model": "runs/digits/model.safetensors"}  # of `make demo`; scripts know where it is


@dataclass(frozen=True)
class Entry:
    """A script, with its arguments in either mode."""

    name: str
    quick: str | None = ""  # None: too long for `make bench`
    full: str = ""
    takes: tuple[str, ...] = ()  # data that it uses if they are given
    needs: tuple[str, ...] = ()  # data without which it has nothing to measure
    gpu: bool = False  # whether it measures one


ENTRIES = (
    Entry("import_time", "--repeats 5", "--repeats 15"),
    Entry("analytic_speed", "--repeats 7", "--repeats 15"),
    Entry("fitting", "--repeats 2", "--repeats 5", takes=("mnist", "emoji")),
    Entry("few_images", needs=("emoji",), takes=("mnist",)),
    Entry("classes", None, takes=("mnist",)),
    Entry("local_denoisers"),
    Entry("precision", "--queries 16 --images 10000", "--queries 64", takes=("mnist",)),
    Entry("conditioning"),
    Entry("network_speed", "--repeats 7", "--repeats 15 --compile", needs=("edm",)),
    Entry("train_step", "--repeats 3", "--repeats 9", takes=("mnist",)),
    Entry("sampler_overhead", "--batch 128 --repeats 2", "--repeats 7"),
    Entry(
        "teleport",
        "--seeds 96 --solvers dpmpp_2m unipc deis --parts rms heun --samples 500",
        "--seeds 256 --parts rms heun frechet rho",
        takes=("mnist",),
        needs=("model",),
    ),
    Entry("scaling", None),
    Entry("gpu_step", "--repeats 5", "--repeats 15 --compile", gpu=True),
    Entry("mnist_features", "--evaluate tests/fixtures/mnist_features", needs=("mnist",)),
)


def arguments_of(entry: Entry, full: bool) -> str | None:
    """The arguments in a mode; None if it is left out."""
    return entry.full if full else entry.quick


def lacks(entry: Entry, options: argparse.Namespace) -> list[str]:
    """The options without which a script is left out."""
    there = {
        name: getattr(options, name) or (FOLDER.parent / STAND_INS.get(name, "-")).exists() for name in DATA
    }
    time = ["--full"] if arguments_of(entry, options.full) is None else []
    time += ["a GPU"] if entry.gpu and gpu() is None else []
    return time + [f"--{name}" for name in entry.needs if not there[name]]


def run(entry: Entry, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs a script in its own process: its result, and what it printed.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    given = {name: getattr(options, name) for name in entry.takes + entry.needs if getattr(options, name)}
    mode = "full" if options.full else "quick"
    arguments = (arguments_of(entry, options.full) or "").split()
    for name, value in given.items():
        arguments += [f"--{name}", value]
    script = folder / f"{entry.name}.py"
    # Libraries that look at the environment get as many threads as PyTorch.
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONUNBUFFERED": "1"}
    began, printed = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as temporary:
        numbers = Path(temporary) / "numbers.json"
        command = [sys.executable, str(script), *arguments]
        command += ["--threads", str(options.threads), "--json", str(numbers)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    printed += line
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        measured = json.loads(numbers.read_text())
    command = " ".join(["python", f"benchmarks/{entry.name}.py", *arguments])
    for name, value in sorted(given.items(), key=lambda item: -len(item[1])):
        command, printed = (text.replace(value, name.upper()) for text in (command, printed))
    result = {
        "script": f"benchmarks/{entry.name}.py",
        "command": command,
        "mode": mode,
        "data": sorted(given),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine() | {"threads": options.threads, "load": options.load},
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
        "numbers": measured,
    }
    return result, printed.strip("\n")


def fuller(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What the old result has and the new one lacks; nothing if the new one may replace it."""
    lacks = ["the full run"] if (old["mode"], new["mode"]) == ("full", "quick") else []
    lacks += [f"--{name}" for name in sorted(set(old["data"]) - set(new["data"]))]
    return ", ".join(lacks)


def replace_block(text: str, markers: tuple[str, str], block: str) -> str:
    """The text with another block between its markers, which are appended if it has none.

    Raises:
        ValueError: if one of the markers is there without the other, or more than once.
    """
    start, end = markers
    if (text.count(start), text.count(end)) == (0, 0):
        return f"{text.rstrip()}\n\n{start}\n{block}\n{end}\n"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended) or text.count(start) > 1 or text.count(end) > 1:
        raise ValueError(f"expected one {start} before one {end}")
    return f"{before}{start}\n{block}\n{end}{after}"


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def numbers_of(result: dict[str, Any]) -> list[Number]:
    """The numbers as they were recorded."""
    return [
        Number(**{key: value for key, value in row.items() if key != "reached"}) for row in result["numbers"]
    ]


def where(result: dict[str, Any]) -> str:
    """Machine and versions in a line."""
    had = result["machine"]
    parts = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    cores = f"{had['cores']} cores, {had['threads']} threads, {had['memory_gb']} GB"
    card = f"{had['gpu']}, " if "gpu" in had else ""
    return f"{card}{had['cpu']}, {cores}, load {had['load']:g} before; {parts}"


def page_block(result: dict[str, Any], printed: str) -> str:
    """What NAME.md shows of a result."""
    parts = [
        f"    {result['command']}",
        f"{where(result)}. {result['date']}, {result['seconds']:.0f} s.",
        printed,
    ]
    asked = [number for number in numbers_of(result) if number.asked]
    if asked:
        rows = ["| number | measured | asked | reached | against |", "|---|---|---|---|---|"]
        rows += [
            f"| {number.name} | {number.told()} | {number.asked} {number.unit} "
            f"| {'yes' if number.reached() else 'no'} | {number.against} |"
            for number in asked
        ]
        parts.append("\n".join(rows))
    return "\n" + "\n\n".join(parts) + "\n"


def save(result: dict[str, Any], printed: str, folder: Path) -> None:
    """Writes NAME.json and the block of NAME.md."""
    script = folder / Path(result["script"]).name
    write(script.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    page = script.with_suffix(".md")
    text = page.read_text() if page.exists() else f"# {script.stem}\n"
    write(page, replace_block(text, RESULTS, page_block(result, printed)))


def load(entries: Sequence[Entry], folder: Path) -> list[dict[str, Any]]:
    """The results that are there."""
    paths = [folder / f"{entry.name}.json" for entry in entries]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def readme_block(entries: Sequence[Entry] = ENTRIES, folder: Path = FOLDER) -> str:
    """The README's table: the headlines of the results that are there."""
    rows: list[str] = []
    runs: dict[str, list[float]] = {}  # machine and date -> loads
    for result in load(entries, folder):
        page = Path(result["script"]).with_suffix(".md").as_posix()
        shown = [number for number in numbers_of(result) if number.headline]
        for number in shown:
            missed = " (missed)" if number.reached() is False else ""
            asked = f"{number.asked} {number.unit}".strip()
            rows.append(f"| [{number.name}]({page}) | {number.told()}{missed} | {asked} | {number.against} |")
        if shown:
            had, make = result["machine"], "bench-full" if result["mode"] == "full" else "bench"
            told = f"{had.get('gpu', had['cpu'])}, {had['cores']} cores, torch {result['versions']['torch']}"
            runs.setdefault(f"`make {make}`, {result['date']}, {told}", []).append(had["load"])
    if not rows:
        return "No results yet: `make bench` measures them."
    head = ["| what | measured | asked | against |", "|---|---|---|---|"]
    loads = {
        told: sorted({f"{load:g}" for load in (min(had), max(had))}, key=float) for told, had in runs.items()
    }
    told = "; ".join(f"{told}, load {' to '.join(load)} before" for told, load in loads.items())
    return "\n".join([*head, *rows, "", f"{told}."])


def write_readme(entries: Sequence[Entry], folder: Path, readme: Path) -> None:
    """Puts the table into the README."""
    write(readme, replace_block(readme.read_text(), PERFORMANCE, readme_block(entries, folder)))


def parse(argv: Sequence[str] | None, entries: Sequence[Entry]) -> argparse.Namespace:
    """The options, with data as absolute paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="as make bench-full")
    names = [entry.name for entry in entries]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="what would run, and with which arguments")
    parser.add_argument("--readme", action="store_true", help="write the README's table and run nothing")
    parser.add_argument("--replace", action="store_true", help="fuller results, too")
    parser.add_argument("--threads", type=int, default=2)
    for name, what in DATA.items():
        parser.add_argument(f"--{name}", default="", help=what)
    options = parser.parse_args(argv)
    for name in DATA:
        path = Path(getattr(options, name))
        if getattr(options, name) and path.exists():  # the scripts run in the root of the repository
            setattr(options, name, str(path.resolve()))
    return options


def main(
    argv: Sequence[str] | None = None,
    entries: Sequence[Entry] = ENTRIES,
    folder: Path = FOLDER,
    readme: Path = README,
) -> int:
    """Runs what was asked for; the number of scripts that failed."""
    options = parse(argv, entries)
    chosen = [entry for entry in entries if not options.only or entry.name in options.only]
    if options.list:
        for entry in chosen:
            data = [f"--{name}" for name in entry.needs] + [f"[--{name}]" for name in entry.takes]
            arguments = arguments_of(entry, options.full)
            print(" ".join([entry.name, "(only with --full)" if arguments is None else arguments, *data]))
        return 0
    options.load = round(os.getloadavg()[0], 1)  # a process each that would run on its own core
    if options.load > 0.5 and not options.readme:
        print(f"Other work is on this machine (load {options.load:g}): times will be off.\n", flush=True)
    failed, missed, began = [], [], time.perf_counter()
    for number, entry in enumerate(chosen if not options.readme else (), 1):
        title, lacking = f"[{number}/{len(chosen)}] {entry.name}", lacks(entry, options)
        if lacking:
            print(f"{title}: left out, it needs {' and '.join(lacking)}\n", flush=True)
            continue
        print(f"{title}\n", flush=True)
        try:
            result, printed = run(entry, folder, options)
            old = load([entry], folder)
            lost = fuller(old[0], result) if old and not options.replace else ""
            if lost:
                end = f"not written, the result of {old[0]['date']} has more: {lost}"
            else:
                save(result, printed, folder)
                write_readme(entries, folder, readme)
                end = f"written to {entry.name}.json and .md"
        except (subprocess.CalledProcessError, FileNotFoundError, ValueError) as error:
            failed.append(entry.name)
            print(f"\n{title}: failed: {error}\n", flush=True)
            continue
        except KeyboardInterrupt:
            print(f"\n{title}: interrupted; what was finished before is written", flush=True)
            return 130
        print(f"\n{title}: {result['seconds']:.0f} s, {end}\n", flush=True)
        missed += [f"{entry.name}: {row['name']}" for row in result["numbers"] if row["reached"] is False]
    write_readme(entries, folder, readme)
    if not options.readme:
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    for what in missed:
        print(f"missed: {what}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
