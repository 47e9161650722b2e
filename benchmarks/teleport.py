"""What does teleport save? Distances to the fine solution and Frechet distances, at equal evaluations.

    python benchmarks/teleport.py [--model FOLDER] [--seeds 512] [--parts rms rho]
    python benchmarks/teleport.py --model FOLDER --mnist FOLDER --parts rms heun frechet [--samples 10000]

The model is a trained bypass model: by default that of `make demo`, runs/digits; for Frechet distances, a run
of configs/mnist_mini_edm.yaml. Its gate is kept, but never closed, so that the rivals pay for every step, as
with any other model. For each solver and number of evaluations (NFE):

    plain      from sigma_max
    afs        the first step free, with the score of a unit Gaussian
    teleport   a jump, all steps on a new grid from there, multistep solvers with the Gaussian history

The level of the jump is chosen by the RMS on 64 other seeds, among 3, 5, 6, 8 and 12. RMS
is per pixel to a 100-step Heun solution from the same noise. Frechet distances are between --samples samples
and the training images, in the features of `benchmarks/mnist_features.py`, with bootstrap intervals: of Heun
with plain skips, and at 8 and 10 evaluations of the solver with the lowest RMS without teleport, against the
one with the lowest RMS with it at 5 and 7.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from results import Record, parser
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
TUNING = 64  # seeds
BATCH = 128
RHOS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0, 10.0)
PARTS = ("rms", "rho", "heun", "frechet")
DIGITS = Path(__file__).parent.parent / "runs" / "digits"
FEATURES = Path(__file__).parent.parent / "tests" / "fixtures" / "mnist_features"


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


def rms_rows(
    record: Record, model: BypassPrecond, gaussian: GaussianDenoiser, rows: list[dict[str, Any]]
) -> Iterator[list[str]]:
    """RMS to the fine solution of every solver, start and NFE; appended to the rows."""
    shape, count = tuple(model.event_shape), record.options.seeds
    states = {"tune": torch.cat(list(in_batches(range(100_000, 100_000 + TUNING), shape)))}
    states["test"] = torch.cat(list(in_batches(range(count), shape)))
    fine = {
        name: torch.cat([heun(model, x, karras_sigmas(100)) for x in part.split(BATCH)])
        for name, part in states.items()
    }

    def rms(part: str, how: str, solver: str, nfe: int, level: float = 0.0) -> float:
        pieces = [sample(model, gaussian, x, how, solver, nfe, level) for x in states[part].split(BATCH)]
        return float((torch.cat(pieces) - fine[part]).double().square().mean().sqrt())

    for solver in record.options.solvers:
        for nfe in record.options.nfes:
            level = min(LEVELS, key=lambda level: rms("tune", "teleport", solver, nfe, level))
            row: dict[str, Any] = {"solver": solver, "NFE": nfe, "level": level}
            for how in ("plain", "afs", "teleport"):
                row[how] = rms("test", how, solver, nfe, level)
                record.number(f"RMS of {solver} at NFE {nfe}, {how}", row[how])
            rows.append(row)
            cells = [f"{row[how]:.4f}" for how in ("plain", "afs", "teleport")]
            yield [solver, str(nfe), *cells, f"{level:g}", f"{row['teleport'] / row['plain']:.2f}"]


def promises(record: Record, rows: list[dict[str, Any]], of: str) -> None:
    """How far the RMS with teleport lies below those without, of a model that is called so."""
    for solver in ("dpmpp_2m", "unipc"):
        ratios = {row["NFE"]: row["teleport"] / row["plain"] for row in rows if row["solver"] == solver}
        asked = [ratios[nfe] for nfe in (6, 8, 10) if nfe in ratios]
        if asked:
            record.number(
                f"RMS of {solver} with teleport, the worst of 6, 8 and 10 evaluations",
                max(asked),
                "<= 0.6",
                f"without teleport; {of}",
                headline=solver == "unipc",
            )
    beaten = [row["teleport"] / row["afs"] for row in rows if 5 <= row["NFE"] <= 12]
    if beaten:
        name = "RMS with teleport, the worst of 5 to 12 evaluations and all solvers"
        record.number(name, max(beaten), "<= 1", f"the first step free (AFS); {of}")


def rho_rows(model: BypassPrecond, gaussian: GaussianDenoiser, count: int) -> Iterator[list[str]]:
    """The RMS by the spacing of the grid, over that of the plain solver on EDM's."""
    x = torch.cat(list(in_batches(range(100_000, 100_000 + count), tuple(model.event_shape))))
    fine = heun(model, x, karras_sigmas(100))

    def rms(images: Tensor) -> float:
        return float((images - fine).double().square().mean().sqrt())

    for solver in ("dpmpp_2m", "unipc"):
        method: Any = SOLVERS[solver]
        for nfe in (6, 8, 10):
            base = rms(method(model, x, karras_sigmas(nfe)))
            plain = [rms(method(model, x, karras_sigmas(nfe, rho=rho))) / base for rho in RHOS]
            yield [solver, str(nfe), "80", *(f"{ratio:.2f}" for ratio in plain)]
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
                yield [solver, str(nfe), f"{level:g}", *(f"{ratio:.2f}" for ratio in ratios)]


def fewer(record: Record, rows: list[dict[str, Any]], of: str) -> Iterator[list[str]]:
    """The NFE with which teleport reaches the best RMS without it."""
    against, least = f"the best solver without; {of}", 100.0

    def asked(nfe: int) -> str:
        return ">= 30" if nfe >= 6 else ""

    for nfe in record.options.nfes:
        best = min((row for row in rows if row["NFE"] == nfe), key=lambda row: row["plain"])
        reach = [row for row in rows if row["teleport"] <= best["plain"]]
        without = [str(nfe), f"{best['plain']:.4f}", best["solver"]]
        if not reach:  # of the numbers of evaluations that were tried
            least = 0.0 if nfe >= 6 else least
            record.number(
                f"evaluations saved by teleport, of {nfe} at equal RMS", 0.0, asked(nfe), against, unit="%"
            )
            yield [*without, "-", "-", "-", "none"]
            continue
        ours = min(reach, key=lambda row: (row["NFE"], row["teleport"]))
        saved = record.number(
            f"evaluations saved by teleport, of {nfe} at equal RMS",
            100 * (1 - ours["NFE"] / nfe),
            asked(nfe),
            against,
            unit="%",
        )
        least = min(least, saved) if nfe >= 6 else least
        yield [*without, str(ours["NFE"]), f"{ours['teleport']:.4f}", ours["solver"], f"{saved:.0f}%"]
    if max(record.options.nfes) >= 6:
        what = f"evaluations saved by teleport at equal RMS, the least of 6 to {max(record.options.nfes)}"
        record.number(what, least, ">= 30", against, unit="%", headline=True)


def cases_of(options: Any, rows: list[dict[str, Any]]) -> list[tuple[str, str, int, float, int | None]]:
    """Solver, start, NFE, level of the jump and steps skipped of what Frechet distances are measured of."""
    cases: list[tuple[str, str, int, float, int | None]] = []
    if "heun" in options.parts:
        cases += [("heun", "plain", 35, 0.0, None)]
        cases += [("heun", f"skip {skip}", 35 - 2 * skip, 0.0, skip) for skip in options.skips]
    # 30% fewer, rounded to the better side
    for nfe, fewer_nfe in ((8, 5), (10, 7)) if "frechet" in options.parts else ():
        best = min((row for row in rows if row["NFE"] == nfe), key=lambda row: row["plain"])
        cases.append((best["solver"], "plain", nfe, 0.0, None))
        ours = min((row for row in rows if row["NFE"] == fewer_nfe), key=lambda row: row["teleport"])
        cases += [(ours["solver"], how, fewer_nfe, ours["level"], None) for how in ("afs", "teleport")]
    return cases


def frechet_rows(
    record: Record, model: BypassPrecond, gaussian: GaussianDenoiser, rows: list[dict[str, Any]]
) -> Iterator[list[str]]:
    """Frechet distances of samples: plain skips, and the solvers that the RMS says are best."""
    options = record.options
    extractor = load_extractor(FEATURES)
    images = open_images(options.mnist)
    pad = (model.event_shape[-1] - images.event_shape[-1]) // 2
    reference = FeatureStatistics.fit(extract_features(extractor, images.padded(pad).batches(512)))
    shape = tuple(model.event_shape)
    found: dict[tuple[str, int], float] = {}
    for solver, how, nfe, level, skip in cases_of(options, rows):
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
        found[how, nfe] = record.number(f"Frechet distance of {solver}, {how}, NFE {nfe}", interval.value)
        bounds = f"{interval.low:.3f} to {interval.high:.3f}"
        yield [solver, how, str(nfe), f"{interval.value:.3f}", bounds]
    compare_frechet(record, found)


def compare_frechet(record: Record, found: Mapping[tuple[str, int], float]) -> None:
    """How far teleport changes the Frechet distances, by start and NFE."""
    if "heun" in record.options.parts:
        for skip in record.options.skips:
            change = 100 * abs(found[f"skip {skip}", 35 - 2 * skip] / found["plain", 35] - 1)
            record.number(
                f"change of the Frechet distance by skipping {skip} of Heun's 18 steps",
                change,
                "<= 3" if skip == 5 else "",
                f"no skip; {record.options.samples} samples",
                unit="%",
                headline=skip == 5,
            )
    if "frechet" in record.options.parts:
        for nfe, fewer_nfe in ((8, 5), (10, 7)):
            record.number(
                f"Frechet distance of {fewer_nfe} evaluations with teleport",
                found["teleport", fewer_nfe] / found["plain", nfe],
                "<= 1",
                f"{nfe} evaluations without",
            )


def main() -> None:
    """Prints the tables."""
    made = parser(__doc__)
    made.add_argument("--model", default=DIGITS, help="folder of a trained bypass model")
    made.add_argument("--mnist", help="folder of MNIST's files, for Frechet distances")
    made.add_argument("--seeds", type=int, default=512)
    made.add_argument("--solvers", nargs="+", choices=MULTISTEP, default=MULTISTEP)
    made.add_argument("--nfes", nargs="+", type=int, default=NFES)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=["rms"])
    made.add_argument("--samples", type=int, default=10_000, help="of Frechet distances")
    made.add_argument("--skips", type=int, nargs="*", default=[5], help="of Heun's 18 steps")
    options = made.parse_args()
    if "frechet" in options.parts and not ("rms" in options.parts and {5, 7, 8, 10} <= set(options.nfes)):
        made.error("the part frechet needs rms at 5, 7, 8 and 10 evaluations")
    record = Record(options)
    torch.set_num_threads(options.threads)
    model = from_pretrained(options.model)
    assert isinstance(model, BypassPrecond)
    gaussian = model.gaussian
    assert isinstance(gaussian, GaussianDenoiser)
    torch.set_grad_enabled(False)
    with count_nfe(model) as nfe:
        heun(model, 80 * torch.randn(1, *model.event_shape), karras_sigmas(18))
    size = " x ".join(map(str, model.event_shape))
    record.text(f"Images of {size}, {options.seeds} seeds. sigma_gate is {model.sigma_gate:.3g}: Heun's 35")
    record.text(f"evaluations are {nfe()} unasked. Below, the gate never closes.\n")
    model.gate_tol = 0.0
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if "rms" in options.parts:
        head = ["solver", "NFE", "plain", "AFS", "teleport", "level", "teleport / plain"]
        record.table(head, rms_rows(record, model, gaussian, rows))
        promises(record, rows, f"a model of {size}")
        head = ["NFE without", "best RMS without", "by", "NFE with teleport", "RMS", "by", "fewer"]
        record.table(head, fewer(record, rows, f"a model of {size}"))
    if "rho" in options.parts:
        head = ["solver", "NFE", "start", *(f"rho {rho:g}" for rho in RHOS)]
        record.table(head, rho_rows(model, gaussian, options.seeds // 4))
    if {"heun", "frechet"} & set(options.parts):
        if options.mnist and gaussian.event_shape[0] == 1 and gaussian.event_shape[-1] >= 28:
            head = ["solver", "start", "NFE", "Frechet distance", "95% interval"]
            record.table(head, frechet_rows(record, model, gaussian, rows))
        else:
            record.text("Left out: Frechet distances, which need --mnist, and a --model of its images.\n")
    record.text(f"{time.perf_counter() - began:.0f} s")
    record.close()


if __name__ == "__main__":
    main()
