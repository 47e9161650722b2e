"""How does what gaussnet computes grow with images, dimensions, rank and batch? What is it at ImageNet-512?

    python benchmarks/scaling.py [--quick] [--only TEXT] [--out benchmarks/scaling.csv]
    python benchmarks/scaling.py --plan [--gpus 8] [--images 1e7] [--fp32 67] ...

Each computation runs at several sizes, in turn with a fixed unit of work, a float32 product of two matrices
of 1,024 x 1,024, and with the bare operation of its own size that it cannot do without (`scaling_cases.py`).
The time in units is fitted by a power of the size, as is the peak of the memory that a call allocates
(torch.profiler; what NumPy allocates is not in it). Beside each exponent stands that of counted operations
and bytes at the same sizes, lower orders included (`scaling_plan.py`). Writes a CSV row a measurement, and a
figure of the same name.

--plan measures nothing: it prints the tables of docs/planning.md, from these counts and stated rates.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from results import Record, parser
from scaling_cases import Case, cases, normal, samples
from scaling_plan import Assumptions, cosine_bytes, plan
from timing import Call, compare, peak_memory
from torch import distributed, multiprocessing

from gaussnet.fit import fit_covariance, fit_moments
from gaussnet.plots.style import pyplot, save

COLUMNS = ("panel", "name", "axis", "size", "units", "over_bare", "memory_mb", "work", "bytes")
PROCESSES = "fit over processes of one thread"
MOST = 40  # repetitions


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a straight line through log values over log sizes."""
    x, y = (torch.tensor(list(v), dtype=torch.float64).log() for v in (sizes, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def measure(case: Case, quick: bool, unit: Call) -> Iterator[dict[str, Any]]:
    """A row a size. Short calls are repeated more often."""
    for size in case.sizes[: -1 if quick else None]:
        ours, bare = case.make(size)
        calls = {"unit": unit, "bare": bare, "ours": ours}
        start = time.perf_counter()
        for call in calls.values():
            call()
        once = time.perf_counter() - start
        times = compare(calls, max(1, min(MOST, int((0.4 if quick else 1.5) / once))))
        yield {
            "panel": case.panel,
            "name": case.name,
            "axis": case.axis,
            "size": size,
            "units": times["ours"] / times["unit"],
            "over_bare": times["ours"] / times["bare"],
            "memory_mb": peak_memory(ours),
            "work": case.work(size),
            "bytes": case.space(size),
        }


def over_processes(count: int, dim: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for one and two processes of one thread, of which each has its share of the images."""
    single: dict[str, float] = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_process, (world, folder, count, dim, repeats), nprocs=world)
            found = torch.load(f"{folder}/found.pt")
        for name, (seconds, unit, memory) in found.items():
            single.setdefault(name, seconds)
            yield {
                "panel": PROCESSES,
                "name": name,
                "axis": "processes",
                "size": world,
                "units": seconds / unit,
                "over_bare": seconds / single[name],
                "memory_mb": memory,
                "work": 1 / world,
                "bytes": cosine_bytes(count // 2 // world, 3072) if "cosine" in name else 1,
            }


def _process(rank: int, world: int, folder: str, count: int, dim: int, repeats: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    x, images = samples(count, dim)[rank::world], normal(count // 2, 3, 32, 32)[rank::world]
    square = normal(1024, 1024)
    calls: dict[str, Call] = {
        f"moments, {count} x {dim}": lambda: fit_moments(x, all_processes=True),
        f"cosine, {count // 2} x 3 x 32 x 32": lambda: fit_covariance(
            images, basis="cosine", all_processes=True
        ),
    }
    times = compare({"unit": lambda: square @ square, **calls}, repeats)
    found = {name: (times[name], times["unit"], peak_memory(call)) for name, call in calls.items()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()


def series(rows: list[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    """Neighbouring rows that agree in the keys."""
    return [list(group) for _, group in groupby(rows, key=lambda row: [row[key] for key in keys])]


def tell(record: Record, rows: list[dict[str, Any]]) -> None:
    """The table of exponents, and their numbers."""
    lines: list[list[str]] = []
    for one in series(rows, "panel", "name"):
        sizes = [row["size"] for row in one]
        time, work, memory, counted = (
            exponent(sizes, [row[key] for row in one]) for key in ("units", "work", "memory_mb", "bytes")
        )
        name, ratio = f"{one[0]['panel']}: {one[0]['name']}", one[-1]["over_bare"]
        span = f"{one[0]['axis']} = {sizes[0]} to {sizes[-1]}"
        record.number(f"{name}: exponent of time", time, f"<= {work + 0.5:.2f}", "operations")
        record.number(f"{name}: exponent of memory", memory, f"<= {counted + 0.5:.2f}", "bytes")
        record.number(f"{name}: time at {one[0]['axis']} = {sizes[-1]}", ratio, against="bare operation")
        exponents = [f"{value:.2f}" for value in (time, work, memory, counted)]
        lines.append([one[0]["panel"], one[0]["name"], span, *exponents, f"{ratio:.2f}"])
    head = ["panel", "what", "sizes", "time", "operations", "memory", "bytes", "over bare operation"]
    record.table(head, lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against size, a pair of panels for each kind; dashed: what is counted."""
    panels = series(rows, "panel")
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot().subplots(
        height, 2 * columns, figsize=(11 * columns, 3.4 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[2 * len(panels) :]:
        axis.axis("off")
    for place, mine in enumerate(panels):
        left, right = axes.flat[2 * place : 2 * place + 2]
        over = mine[0]["panel"].startswith("training step")
        for axis, key, counted in ((left, "units", "work"), (right, "memory_mb", "bytes")):
            ratio = over and key == "units"
            for index, one in enumerate(series(mine, "name")):
                sizes = [row["size"] for row in one]
                values = [row["over_bare" if ratio else key] for row in one]
                axis.plot(sizes, values, "o-", color=f"C{index}", markersize=4, label=one[0]["name"])
                if not ratio:
                    expected = [values[-1] * row[counted] / one[-1][counted] for row in one]
                    axis.plot(sizes, expected, "--", color=f"C{index}", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_yscale("linear" if ratio else "log")
            axis.yaxis.set_major_formatter("{x:g}")
            if mine[0]["axis"] == "processes":
                axis.set_xticks([1, 2], ["1", "2"])
            axis.set_xlabel(", ".join(dict.fromkeys(row["axis"] for row in mine)))
            axis.grid(alpha=0.3)
        left.set_title(mine[0]["panel"], loc="left")
        left.set_ylabel("time over EDM's step" if over else "time, units")
        right.set_ylabel("memory at once, MB")
        right.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, path)


def main() -> None:
    """Measures, or plans."""
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="without the largest sizes, fewer repetitions")
    made.add_argument("--only", default="", help="computations whose panel or name contains this")
    made.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    made.add_argument("--plan", action="store_true", help="print the tables of docs/planning.md")
    for one in fields(Assumptions):
        made.add_argument(f"--{one.name}", type=float, default=one.default, help=one.metadata["help"])
    options: argparse.Namespace = made.parse_args()
    record = Record(options)
    if options.plan:
        plan(Assumptions(**{one.name: getattr(options, one.name) for one in fields(Assumptions)}), record)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    square = normal(1024, 1024)
    rows: list[dict[str, Any]] = []
    for case in cases():
        if options.only in f"{case.panel}: {case.name}":
            rows += measure(case, options.quick, lambda: square @ square)
    if options.only in PROCESSES:
        found = over_processes(8192 if options.quick else 16_384, 1024, 3 if options.quick else 5)
        rows += sorted(found, key=lambda row: row["name"])
    if not rows:
        raise SystemExit(f"--only: expected a part of a panel's or computation's name, got {options.only!r}")
    tell(record, rows)
    with options.out.open("w", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()})
    draw(rows, options.out.with_suffix(".png"))
    record.close()


if __name__ == "__main__":
    main()
