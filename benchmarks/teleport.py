"""What does teleport save? Distances to the fine solution and Frechet distances, at equal evaluations.

    python benchmarks/teleport.py MODEL --out CSV [--seeds 512] [--parts rms rho overhead]
    python benchmarks/teleport.py MODEL --out CSV --parts heun frechet --mnist FOLDER [--samples 10000]

MODEL is a trained bypass model, such as a run of configs/mnist_mini_edm.yaml. Its gate is kept, but never
closed, so that the rivals pay for every step, as with any other model. For each solver and number of
evaluations (NFE):

    plain      from sigma_max
    afs        the first step free, with the score of a unit Gaussian
    teleport   a jump, all steps on a new grid from there, multistep solvers with the Gaussian history

The level of the jump is chosen by the RMS on a quarter of as many other seeds, among 3, 5, 6, 8 and 12. RMS
is per pixel to a 100-step Heun solution from the same noise. Frechet distances are between --samples samples
and the training images, in the features of `benchmarks/mnist_features.py`, with bootstrap intervals: of Heun
with plain skips, and at 8 and 10 evaluations of the solver with the lowest RMS without teleport, against the
one with the lowest RMS with it at 5 and 7.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import compare
from torch import Tensor

from gaussnet import (
    SOLVERS,
    BypassPrecond,
    GaussianDenoiser,
    afs,
    count_nfe,
    from_pretrained,
    heun,
    karras_sigmas,
    open_images,
    teleport,
)
from gaussnet.metrics import FeatureStatistics, extract_features, frechet_interval, load_extractor, to_uint8
from gaussnet.sampling import noise_of

LEVELS = (3.0, 5.0, 6.0, 8.0, 12.0)
NFES = (4, 5, 6, 7, 8, 9, 10, 12)
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "unipc", "deis")
BATCH = 128
RHOS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0, 10.0)
PARTS = ("rms", "rho", "overhead", "heun", "frechet")


def sample(
    model: Any, gaussian: GaussianDenoiser, x: Tensor, how: str, solver: str, nfe: int, level: float
) -> Tensor:
    """Images from x at sigma = 80 with exactly this many evaluations of the network."""
    method: Any = SOLVERS[solver]
    steps = (nfe + 1) // 2 if solver == "heun" else nfe
    options: dict[str, Any] = {}
    grid = karras_sigmas(steps)
    if how == "afs":
        grid = karras_sigmas(steps + 1)
        x, grid = afs(x, grid)
    elif how == "teleport":
        x, grid, history = teleport(gaussian, x, grid, sigma_skip=level, steps=steps, return_history=True)
        options = {"history": history} if "history" in inspect.signature(method).parameters else {}
    return method(model, x, grid, **options)


def in_batches(seeds: range, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """States at sigma = 80."""
    for start in range(seeds.start, seeds.stop, BATCH):
        yield 80 * noise_of(range(start, min(start + BATCH, seeds.stop)), shape)


def rms_table(model: BypassPrecond, gaussian: GaussianDenoiser, count: int) -> list[dict[str, Any]]:
    """RMS to the fine solution of every solver, start and NFE."""
    shape = tuple(model.event_shape)
    states = {"tune": torch.cat(list(in_batches(range(100_000, 100_000 + count // 4), shape)))}
    states["test"] = torch.cat(list(in_batches(range(count), shape)))
    fine = {
        name: torch.cat([heun(model, x, karras_sigmas(100)) for x in part.split(BATCH)])
        for name, part in states.items()
    }

    def rms(part: str, how: str, solver: str, nfe: int, level: float = 0.0) -> float:
        pieces = [sample(model, gaussian, x, how, solver, nfe, level) for x in states[part].split(BATCH)]
        return float((torch.cat(pieces) - fine[part]).double().square().mean().sqrt())

    rows: list[dict[str, Any]] = []
    print(
        "| solver | NFE | plain | AFS | teleport | level | teleport / plain |\n|---|---|---|---|---|---|---|"
    )
    for solver in MULTISTEP:
        for nfe in NFES:
            level = min(LEVELS, key=lambda level: rms("tune", "teleport", solver, nfe, level))
            row: dict[str, Any] = {"solver": solver, "NFE": nfe, "level": level}
            for how in ("plain", "afs", "teleport"):
                row[how] = rms("test", how, solver, nfe, level)
            row["ratio"] = row["teleport"] / row["plain"]
            rows.append(row)
            numbers = " | ".join(f"{row[how]:.4f}" for how in ("plain", "afs", "teleport"))
            print(f"| {solver} | {nfe} | {numbers} | {level:g} | {row['ratio']:.2f} |", flush=True)
    return rows


def rho_table(model: BypassPrecond, gaussian: GaussianDenoiser, count: int) -> None:
    """Prints the RMS by the spacing of the grid, over that of the plain solver on EDM's."""
    x = torch.cat(list(in_batches(range(100_000, 100_000 + count), tuple(model.event_shape))))
    fine = heun(model, x, karras_sigmas(100))

    def rms(images: Tensor) -> float:
        return float((images - fine).double().square().mean().sqrt())

    print("\n| solver | NFE | start | " + " | ".join(f"rho {rho:g}" for rho in RHOS) + " |")
    print("|---" * (3 + len(RHOS)) + "|")
    for solver in ("dpmpp_2m", "unipc"):
        method: Any = SOLVERS[solver]
        for nfe in (6, 8, 10):
            base = rms(method(model, x, karras_sigmas(nfe)))
            plain = [rms(method(model, x, karras_sigmas(nfe, rho=rho))) / base for rho in RHOS]
            print(f"| {solver} | {nfe} | 80 | " + " | ".join(f"{ratio:.2f}" for ratio in plain) + " |")
            for level in (5.0, 6.0, 8.0):
                ratios: list[float] = []
                for rho in RHOS:
                    start, grid, history = teleport(
                        gaussian,
                        x,
                        karras_sigmas(nfe),
                        sigma_skip=level,
                        steps=nfe,
                        rho=rho,
                        return_history=True,
                    )
                    ratios.append(rms(method(model, start, grid, history=history)) / base)
                cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"| {solver} | {nfe} | {level:g} | {cells} |", flush=True)


def fewer(rows: list[dict[str, Any]]) -> None:
    """Prints the NFE with which teleport reaches the best RMS without it."""
    print("\n| NFE without | best RMS without | by | NFE with teleport | RMS | by | fewer |")
    print("|---|---|---|---|---|---|---|")
    for nfe in NFES:
        best = min((row for row in rows if row["NFE"] == nfe), key=lambda row: row["plain"])
        reach = [row for row in rows if row["teleport"] <= best["plain"]]
        if not reach:
            continue
        ours = min(reach, key=lambda row: (row["NFE"], row["teleport"]))
        print(
            f"| {nfe} | {best['plain']:.4f} | {best['solver']} | {ours['NFE']} | {ours['teleport']:.4f} "
            f"| {ours['solver']} | {1 - ours['NFE'] / nfe:.0%} |"
        )


def frechet_table(
    model: BypassPrecond, gaussian: GaussianDenoiser, rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Prints Frechet distances of samples: plain skips, and the solvers that the RMS says are best."""
    extractor = load_extractor(options.features)
    images = open_images(options.mnist)
    pad = (model.event_shape[-1] - images.event_shape[-1]) // 2
    reference = FeatureStatistics.fit(extract_features(extractor, images.padded(pad).batches(512)))
    shape = tuple(model.event_shape)
    cases: list[tuple[str, str, int, float, int | None]] = []
    if "heun" in options.parts:
        cases += [("heun", "plain", 35, 0.0, None)]
        cases += [("heun", "skip", 35 - 2 * skip, 0.0, skip) for skip in options.skips]
    # 30% fewer, rounded to the better side
    for nfe, fewer_nfe in ((8, 5), (10, 7)) if "frechet" in options.parts else ():
        best = min((row for row in rows if row["NFE"] == nfe), key=lambda row: row["plain"])
        cases.append((best["solver"], "plain", nfe, 0.0, None))
        ours = min((row for row in rows if row["NFE"] == fewer_nfe), key=lambda row: row["teleport"])
        cases += [(ours["solver"], how, fewer_nfe, ours["level"], None) for how in ("afs", "teleport")]
    print("\n| solver | start | NFE | Frechet distance | 95% interval |\n|---|---|---|---|---|")
    for solver, how, nfe, level, skip in cases:
        features: list[Tensor] = []
        for x in in_batches(range(options.samples), shape):
            if skip is None:
                drawn = sample(model, gaussian, x, how, solver, nfe, level)
            else:
                drawn = heun(model, *teleport(gaussian, x, karras_sigmas(18), skip=skip))
            rounded = to_uint8(drawn).float() / 127.5 - 1
            features += list(extract_features(extractor, rounded))
        interval = frechet_interval(
            torch.cat(features), reference, draws=50, generator=torch.Generator().manual_seed(0)
        )
        start = how if skip is None else f"skip {skip}"
        bounds = f"{interval.low:.3f} to {interval.high:.3f}"
        print(f"| {solver} | {start} | {nfe} | {interval.value:.3f} | {bounds} |", flush=True)


def overhead(model: BypassPrecond, gaussian: GaussianDenoiser) -> None:
    """Prints what a step and a jump cost outside of the network."""
    x = 80 * torch.randn(BATCH, *model.event_shape)
    grid = karras_sigmas(18)
    level = torch.full((BATCH,), 5.0)

    def zero(x: Tensor, sigma: Tensor) -> Tensor:
        return x

    calls: dict[str, Any] = {
        "network": lambda: model(x, level),
        "jump": lambda: teleport(gaussian, x, grid, skip=5),
    }
    timed: tuple[str, ...] = ("heun", "dpmpp_2m", "unipc")
    for name in timed:
        method: Any = SOLVERS[name]
        calls[name] = lambda method=method: method(zero, x, grid)
    times = compare(calls, 7)
    steps = {name: times[name] / 18 / times["network"] for name in timed}
    told = ", ".join(f"{name} {share:.2%}" for name, share in steps.items())
    print(f"\nA step outside of the network, batch {BATCH}: {told} of an evaluation;")
    print(f"a jump takes {times['jump'] / times['network']:.1%} of one")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["rms", "overhead"])
    parser.add_argument("--samples", type=int, default=10_000, help="of Frechet distances")
    parser.add_argument("--skips", type=int, nargs="*", default=[5], help="of Heun's 18 steps")
    parser.add_argument("--mnist", help="folder of MNIST's files")
    parser.add_argument("--features", default="tests/fixtures/mnist_features")
    parser.add_argument("--out", type=Path, required=True, help="the RMS table as CSV")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = from_pretrained(options.model)
    assert isinstance(model, BypassPrecond)
    gaussian = model.gaussian
    assert isinstance(gaussian, GaussianDenoiser)
    torch.set_grad_enabled(False)
    closed = model.sigma_gate
    with count_nfe(model) as nfe:
        heun(model, 80 * torch.randn(1, *model.event_shape), karras_sigmas(18))
    print(
        f"sigma_gate {closed:.3g}: Heun's 35 evaluations are {nfe()} unasked. Below, the gate never closes.\n"
    )
    model.gate_tol = 0.0
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if "rms" in options.parts:
        rows = rms_table(model, gaussian, options.seeds)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        fewer(rows)
    elif "frechet" in options.parts:
        with options.out.open(newline="") as file:
            rows = [
                {name: cell if name == "solver" else float(cell) for name, cell in row.items()}
                | {"NFE": int(row["NFE"])}
                for row in csv.DictReader(file)
            ]
    if "rho" in options.parts:
        rho_table(model, gaussian, options.seeds // 4)
    if "overhead" in options.parts:
        overhead(model, gaussian)
    if {"heun", "frechet"} & set(options.parts):
        frechet_table(model, gaussian, rows, options)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
