"""Operations and bytes of what gaussnet computes, and what follows for ImageNet-512 on a node of GPUs.

The counts here stand beside the measured exponents of `scaling.py`; with --plan, it turns them into the
tables of docs/planning.md by stated rates. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from results import Record

EIGH = 12  # time of a float64 eigendecomposition over that of D^3 operations: six products of matrices (D, D)
INNER = 1.25  # operations of x^T x over N D^2: of its symmetric half little more than that is computed
PASS = 30  # operations that take as long as passing over one number in memory
LEVELS = 25  # of a gate


# Counts -------------------------------------------------------------------------------------------


def moments_bytes(count: int, dim: int, folds: int = 1) -> float:
    """The sums and a product, or their results and a difference; rows in float64."""
    return 8.0 * max(
        (2 * folds + 1) * dim**2, (folds + 1) * dim**2 + min(count, 1024) * dim, min(count, 4096) * dim
    )


def fit_bytes(dim: int, folds: int = 3) -> float:
    """A dense fit from few chunks: 5 D^2 numbers in float64 without folds, 12 with three."""
    return 8.0 * (7 * folds + 3) / 2 * dim**2


def cosine_bytes(count: int, dim: int) -> float:
    """A chunk in float64, its transform, and that of the chunk before."""
    chunk = min(count * dim, 2**22)
    return 8.0 * max(2 * chunk, chunk + 2 * min(chunk, count * dim - chunk))


def cosine_work(dim: int, channels: int, size: int) -> float:
    """A 2-D DCT of a square image, and the products of its channels."""
    return dim * (4.0 * size + 2 * channels)


def gram_work(count: int, dim: int) -> float:
    """X X^T, U = X^T V and its QR; four eigendecompositions, three of them of two thirds."""
    return (INNER + 2 + 4) * count**2 * dim + (1 + 3 * 8 / 27) * EIGH * count**3


def gram_bytes(count: int, dim: int) -> float:
    """Samples and axes with copies, the Gram matrix with its eigenvectors."""
    return 8.0 * (4 * count * dim + 3 * count**2)


def krylov_space(rank: int, block: int) -> int:
    """Directions of the basis when it is full; see `gaussnet.fit.krylov`."""
    return max(5 * rank // 2, rank + 4 * block, 256)


def krylov_work(count: int, dim: int, rank: int, directions: int | None = None) -> float:
    """Products with the samples there and back, and the basis made orthogonal."""
    size = directions or krylov_space(rank, min(64, max(8, rank // 8)))
    return 4.0 * count * dim * size + 8 * min(count, dim) * size**2 + EIGH * size**3


def krylov_bytes(count: int, dim: int, rank: int) -> float:
    """Samples that are kept, twice more while they are prepared; or beside them the axes in float64."""
    return max(12.0 * count * dim, 4.0 * count * dim + axes_bytes(rank, dim, 1))


def axes_bytes(rank: int, dim: int, folds: int = 3) -> float:
    """Beside the samples, the axes in float64, twice; with folds, also those of a fold."""
    return 8.0 * (2 if folds == 1 else 4) * rank * dim


def gate_bytes(queries: int, dim: int) -> float:
    """Beside the data: noised queries, what both denoisers make of them, and work arrays in float64."""
    return 65.0 * queries * dim


def gaussian_work(dim: int, rank: int | None, size: int, channels: int = 3) -> float:
    """A Gaussian denoiser, an image: two products with U, or two transforms (rank None)."""
    return 4.0 * rank * dim if rank else 4.0 * (channels + 2 * size) * dim


def mixture_work(dim: int, components: int, rank: int) -> float:
    """A mixture denoiser, an image: two products with all U, three with the means."""
    return 4.0 * components * rank * dim + 6.0 * components * dim


# Planning -----------------------------------------------------------------------------------------


def given(default: float, text: str) -> Any:
    """A field with a default and what it means."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Assumptions:
    """What a plan rests on: data and machine."""

    images: float = given(1e7, "images, N")
    gpus: float = given(8, "GPUs, a process each")
    batch: float = given(32, "images a GPU, in training and sampling")
    bandwidth: float = given(3.35, "TB/s of a GPU's memory")
    fp64: float = given(67, "TFLOP/s a GPU, float64 matrix products: moments, jumps")
    fp32: float = given(67, "TFLOP/s a GPU, float32 without TF32: analytic layers, gate")
    bf16: float = given(989, "TFLOP/s a GPU, bfloat16: the network")
    products: float = given(0.6, "share of bandwidth, fp64 and fp32 that is reached")
    mfu: float = given(0.4, "share of bf16 that the network reaches")
    cpu: float = given(2, "TFLOP/s in float64 that all CPU cores reach, twice that in float32")
    eigh: float = given(15, "an eigendecomposition, in products of matrices (D, D)")
    disk: float = given(5, "GB/s from disk")
    decode: float = given(10_000, "compressed images of 3x512x512 that all CPU cores decode in a second")
    compressed: float = given(0.1, "MB of such an image on disk")


@dataclass(frozen=True)
class Target:
    """A kind of data, a network for it, and options of gaussnet that fit into 80 GB."""

    shape: tuple[int, int, int]
    network: str
    gflop: float  # one evaluation for one image
    parameters: float
    rank: int  # of a low-rank basis
    krylov_images: int
    max_data: int  # fit.max_data
    gate_queries: int  # fit.gate_queries
    probe_queries: int  # probe.queries
    components: int
    mixture_rank: int

    @property
    def dim(self) -> int:
        """D."""
        return math.prod(self.shape)


# Counted by torch on the networks of gaussnet (tests/test_scaling.py).
PIXELS = Target((3, 512, 512), "ADM", 3963, 559e6, 1024, 16_384, 4096, 128, 32, 10, 16)
LATENTS = Target((4, 64, 64), "DiT-XL/2", 1049, 676e6, 2048, 65_536, 65_536, 1024, 128, 100, 64)
DENSE = 32_768  # D up to which there is a dense fit


def prefixed(value: float, unit: str) -> str:
    """Bytes or operations with three digits: 1.07 GB."""
    place = max(0, min(6, int(math.log10(max(value, 1)) // 3)))
    return f"{value / 1000**place:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][place]}{unit}"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for limit, scale, unit in ((0.1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / scale:.2g} {unit}"
    return f"{seconds / 86_400:.3g} days"


class Rates:
    """Operations and bytes a second that are reached: of one GPU but for `cpu`."""

    def __init__(self, a: Assumptions) -> None:
        self.wide, self.narrow, self.moved = (
            1e12 * a.products * rate for rate in (a.fp64, a.fp32, a.bandwidth)
        )
        self.network, self.cpu, self.disk = 1e12 * a.mfu * a.bf16, 1e12 * a.cpu, 1e9 * a.disk


byte = partial(prefixed, unit="B")
flop = partial(prefixed, unit="FLOP")


def fitting(a: Assumptions, t: Target) -> dict[str, str]:
    """The pass over all images, and the solvers."""
    rate, dim, dense = Rates(a), t.dim, t.dim <= DENSE
    stored = a.images * (4 * dim if dense else 1e6 * a.compressed)
    reading = max(stored / rate.disk, 0 if dense else a.images / a.decode)
    cosine, moments = a.images * cosine_work(dim, t.shape[0], t.shape[1]), a.images * INNER * dim**2
    solver = a.eigh * 2 * dim**3 / rate.cpu
    count, block = t.krylov_images, 4 * min(64, max(8, t.rank // 8))  # from disk: wider blocks
    space = krylov_space(t.rank, block)
    directions = 2 * space - t.rank - max(t.rank // 5, block // 2)  # with one restart
    passes = 4 + math.ceil(directions / block) * (2 if dim > count else 1)
    read, krylov = 4.0 * passes * count * dim, krylov_work(count, dim, t.rank, directions)
    none = "does not exist"

    def both(work: float) -> str:
        return f"{duration(work / (a.gpus * rate.wide))}; {duration(work / rate.cpu)}"

    return {
        "reading all images once": f"{byte(stored)}, {duration(reading)}",
        "cosine: the pass": flop(cosine),
        "cosine: its time on all GPUs; on all CPU cores": both(cosine),
        "cosine: the sums": byte(8.0 * t.shape[0] * dim),
        "dense: the covariance, float64": byte(8.0 * dim**2),
        "dense: the pass": flop(moments) if dense else none,
        "dense: its time on all GPUs; on all CPU cores": both(moments) if dense else none,
        'dense: memory a process, shrinkage="none"; "cv"': (
            f"{byte(fit_bytes(dim, 1))}; {byte(fit_bytes(dim))}" if dense else none
        ),
        "dense: eigendecomposition on all CPU cores; in all processes at once": (
            f"{duration(solver)}; {duration(a.gpus * solver)}" if dense else none
        ),
        "gram, from fit.max_data images: memory": byte(gram_bytes(t.max_data, dim)),
        "krylov: rank; images": f"{t.rank:,}; {count:,}",
        'krylov: passes over them, shrinkage="none"; "cv"': f"{passes}; {3 * passes}",
        'krylov: read from disk, "cv"': f"{byte(3 * read)}, {duration(3 * read / rate.disk)}",
        'krylov: operations, "cv"; on all CPU cores': (
            f"{flop(3 * krylov)}; {duration(3 * krylov / (2 * rate.cpu))}"
        ),
        'krylov: memory, "none"; "cv"': "; ".join(byte(axes_bytes(t.rank, dim, folds)) for folds in (1, 3)),
    }


def training(a: Assumptions, t: Target) -> tuple[dict[str, str], dict[str, str]]:
    """What each basis costs in a training step, and in sampling."""
    rate, dim, forward = Rates(a), t.dim, 1e9 * t.gflop
    evaluation = forward * a.batch / rate.network
    step = 3 * evaluation
    train = {
        "network; parameters": f"{t.network}; {t.parameters / 1e6:.0f} M",
        "network: an evaluation; a step, an image": f"{flop(forward)}; {flop(3 * forward)}",
        "a step; an epoch": f"{duration(step)}; {duration(a.images / (a.gpus * a.batch) * step)}",
        "low rank: rank": f"{t.rank:,}",
    }
    sample = {"an evaluation of the network, a batch": duration(evaluation)}
    for name, rank in (("full rank", dim if dim <= DENSE else 0), ("low rank", t.rank), ("cosine", None)):
        if rank == 0:
            rows = ("basis and mean", "operations; of a step's", "time, of a step's", "checkpoint; model")
            train |= {f"{name}: {row}": "does not exist" for row in rows}
            sample |= {
                f"{name}: {row}": "does not exist" for row in ("a jump, of an evaluation", "its memory")
            }
            continue
        held, work = 4.0 * dim * (1 + (rank or 1)), gaussian_work(dim, rank, t.shape[1], t.shape[0])
        elementwise = 20 * 4 * a.batch * dim / rate.moved  # base, inputs, c_out F: some 20 passes
        ours = max(a.batch * work / rate.narrow, 2 * held / rate.moved) + elementwise
        # A jump is in float64: U is read, written and read again, for both products.
        jump = a.batch * work / rate.wide + (40.0 * dim * (rank or 0) + 100 * a.batch * dim) / rate.moved
        memory = 8.0 * dim * (rank or 0) + (24 if rank else 48) * a.batch * dim
        train[f"{name}: basis and mean"] = byte(held)
        train[f"{name}: operations; of a step's"] = f"{flop(work)}; {work / (3 * forward):.3%}"
        train[f"{name}: time, of a step's"] = f"{ours / step:.2%}"
        train[f"{name}: checkpoint; model"] = (
            f"{byte(16 * t.parameters + held)}; {byte(4 * t.parameters + held)}"
        )
        sample[f"{name}: a jump, of an evaluation"] = f"{jump / evaluation:.2%}"
        sample[f"{name}: its memory"] = byte(memory)
    return train, sample


def looking(a: Assumptions, t: Target) -> dict[str, str]:
    """Gate, probes, mixtures."""
    rate, dim, forward = Rates(a), t.dim, 1e9 * t.gflop
    questions = 16 * 2 * t.probe_queries  # levels, kinds
    mixture = mixture_work(dim, t.components, t.mixture_rank)
    evaluations = 32 * math.log2(80 / 5)  # of Runge-Kutta from sigma = 80 to 5, in float64
    return {
        "delta denoiser of all images": byte(4.0 * a.images * dim),
        "fit.max_data": f"{t.max_data:,}",
        "delta denoiser of these": byte(4.0 * t.max_data * dim),
        "fit.gate_queries": f"{t.gate_queries:,}",
        "gate: memory besides": byte(gate_bytes(t.gate_queries, dim)),
        "gate: operations; time on all GPUs": (
            f"{flop(LEVELS * t.gate_queries * 4.0 * t.max_data * dim)}; "
            f"{duration(LEVELS * t.gate_queries * 4.0 * t.max_data * dim / (a.gpus * rate.narrow))}"
        ),
        "probe.queries": f"{t.probe_queries}",
        "probes: answers of 4 references, a GPU": byte(4.0 * questions * 4 * dim / a.gpus),
        "probes: two networks, each time": duration(2 * questions * forward / (a.gpus * rate.network)),
        "mixture: components; rank": f"{t.components}; {t.mixture_rank}",
        "mixture: buffers": byte(4.0 * dim * t.components * (t.mixture_rank + 1)),
        "mixture: operations; of an evaluation's": f"{flop(mixture)}; {mixture / forward:.3%}",
        "mixture: teleport from 80 to 5, in evaluations": (
            f"{evaluations * mixture / rate.wide / (forward / rate.network):.2g}"
        ),
        "one Gaussian a class, 1,000 classes, as one pass": byte(3.0 * 1000 * 8 * dim**2),
    }


def predict(a: Assumptions, t: Target) -> dict[str, dict[str, str]]:
    """Table -> quantity -> what it is for this target."""
    train, sample = training(a, t)
    return {
        "Fit": fitting(a, t),
        "Training": train,
        "Sampling": sample,
        "Gate, probes, mixtures": looking(a, t),
    }


def plan(a: Assumptions, record: Record) -> None:
    """Prints the tables of docs/planning.md."""
    record.text("## Assumptions\n")
    lines = [[f"--{one.name}", f"{getattr(a, one.name):,g}", one.metadata["help"]] for one in fields(a)]
    record.table(["option", "assumed", "meaning"], lines)
    pixels, latents = predict(a, PIXELS), predict(a, LATENTS)
    for name in pixels:
        record.text(f"## {name}\n")
        rows = [[key, value, latents[name][key]] for key, value in pixels[name].items()]
        record.table(["", *("x".join(map(str, t.shape)) for t in (PIXELS, LATENTS))], rows)
