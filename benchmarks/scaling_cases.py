"""What `scaling.py` measures: computations of gaussnet at a size, and what each is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from scaling_plan import (
    EIGH,
    INNER,
    PASS,
    cosine_bytes,
    fit_bytes,
    gaussian_work,
    gram_bytes,
    gram_work,
    krylov_bytes,
    krylov_work,
    moments_bytes,
)
from timing import Call
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gaussnet import (
    BypassPrecond,
    CosineCovariance,
    Covariance,
    DeltaDenoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    SongUNet,
)
from gaussnet.covariance import cosine_matrix
from gaussnet.fit import fit_covariance, fit_moments
from gaussnet.gate import SIGMAS

NETWORK: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [],
}
Setup = tuple[Call, Call]  # what is measured, and its bare operation


@dataclass(frozen=True)
class Case:
    """A computation at several sizes.

    Attributes:
        panel: of the figure.
        name: what it is, with all that does not vary.
        axis: what varies.
        sizes: its values; `--quick` leaves out the last one.
        make: size -> what is measured, and the bare operation.
        work: size -> operations, up to a factor.
        space: size -> bytes at once, up to a factor.
    """

    panel: str
    name: str
    axis: str
    sizes: Sequence[int]
    make: Callable[[int], Setup]
    work: Callable[[int], float]
    space: Callable[[int], float]


def cases() -> list[Case]:
    """All of them; sizes fit into 6 GB."""
    powers = [2**k for k in range(20)]
    squares = [3 * 4**k for k in range(10)]  # D of images of three channels, 2^k x 2^k
    n_of, d_of, r_of = "fit against N", "fit against D", "fit against r"
    by_d, by_r, by_b = "Gaussian against D", "Gaussian against r", "Gaussian against the batch"
    mixed, delta, step = "mixture, D = 768", "delta denoiser and gate, D = 768", "training step of the bypass"
    krylov: dict[str, Any] = {"solver": "krylov", "shrinkage": "none"}
    return [
        Case(n_of, "moments, D = 768", "N", powers[11:16], lambda n: moments_pass(n, 768), float,
             lambda n: moments_bytes(n, 768)),
        Case(n_of, "dense, cross-validated, D = 768", "N", powers[11:16],
             lambda n: fitting(n, 768, solver="dense"), lambda n: INNER * n * 768**2 + 4 * EIGH * 768**3,
             lambda n: fit_bytes(768)),
        Case(n_of, "gram, cross-validated, D = 3072", "N", powers[8:12],
             lambda n: fitting(n, 3072, solver="gram"), lambda n: gram_work(n, 3072),
             lambda n: gram_bytes(n, 3072)),
        Case(n_of, "krylov, r = 64, D = 1536", "N", powers[10:15],
             lambda n: fitting(n, 1536, rank=64, **krylov), lambda n: krylov_work(n, 1536, 64),
             lambda n: krylov_bytes(n, 1536, 64)),
        Case(n_of, "cosine, 3 x 32 x 32", "N", powers[9:14], lambda n: cosine_pass(n, 32), float,
             lambda n: cosine_bytes(n, 3072)),
        Case(d_of, "moments, N = 4096", "D", powers[8:12], lambda d: moments_pass(4096, d),
             lambda d: INNER * d * d + 10 * PASS * d, lambda d: moments_bytes(4096, d)),
        Case(d_of, "eigensolver of dense", "D", [512, 768, 1024, 1536, 2048], eigensolver, lambda d: d**3,
             lambda d: d * d),
        Case(d_of, "gram, cross-validated, N = 512", "D", powers[10:16],
             lambda d: fitting(512, d, solver="gram"), lambda d: gram_work(512, d),
             lambda d: gram_bytes(512, d)),
        Case(d_of, "krylov, r = 32, N = 1024", "D", powers[11:16],
             lambda d: fitting(1024, d, rank=32, **krylov), lambda d: krylov_work(1024, d, 32),
             lambda d: krylov_bytes(1024, d, 32)),
        Case(d_of, "cosine, N = 128", "D", squares[5:9], lambda d: cosine_pass(128, side(d)),
             lambda d: d * (4 * side(d) + 10 * PASS), lambda d: cosine_bytes(128, d)),
        Case(r_of, "krylov, N = D = 2048", "r", [128, 192, 256, 384],
             lambda r: fitting(2048, 2048, rank=r, **krylov), lambda r: krylov_work(2048, 2048, r),
             lambda r: krylov_bytes(2048, 2048, r)),
        Case(by_d, "full rank, batch 64", "D", powers[9:13], lambda d: denoising(d, d, 64),
             lambda d: d * d, float),
        Case(by_d, "flow, full rank, batch 64", "D", powers[9:13], lambda d: flowing(d, d, 64),
             lambda d: d * d, lambda d: d * (d + 3 * 64)),
        Case(by_d, "rank 64, batch 64", "D", powers[12:18], lambda d: denoising(d, 64, 64), float, float),
        Case(by_d, "cosine, batch 16", "D", squares[5:10], lambda d: denoising_cosine(side(d), 16),
             lambda d: d * (8 * side(d) + 10 * PASS), float),
        Case(by_r, "denoiser, D = 4096, batch 64", "r", powers[6:13], lambda r: denoising(4096, r, 64),
             lambda r: 4 * r + 10 * PASS, lambda r: r + 16_384),
        Case(by_r, "flow, D = 4096, batch 64", "r", powers[6:12], lambda r: flowing(4096, r, 64),
             lambda r: 4 * r + 10 * PASS, lambda r: r + 3 * 64),
        Case(by_b, "denoiser, D = r = 2048", "batch", powers[4:12], lambda b: denoising(2048, 2048, b),
             float, float),
        Case(by_b, "flow, D = r = 2048", "batch", powers[4:11], lambda b: flowing(2048, 2048, b),
             lambda b: b + PASS, lambda b: 2048 + 3 * b),
        Case(mixed, "K: r = 32, batch 256", "K", powers[4:10], lambda k: mixing(k, 32, 256), float,
             lambda k: max(48, k + 24)),
        Case(mixed, "r: K = 32, batch 64", "r", powers[3:9], lambda r: mixing(32, r, 64),
             lambda r: r + 10, lambda r: r + 61),
        Case(mixed, "batch: K = 32, r = 32", "batch", powers[5:12], lambda b: mixing(32, 32, b), float,
             float),
        Case(delta, "delta, batch 64", "N", powers[11:17], lambda n: attending(n, 64), float,
             lambda n: min(n, 10_922)),
        Case(delta, "gate, 128 queries, 5 levels", "N", powers[11:16], gating, float,
             lambda n: min(n, 10_922)),
        *(
            Case(step, f"{basis}, batch 16", "D", squares[3:7], partial(training, basis),
                 partial(step_work, basis), float)
            for basis in ("full rank", "rank 64", "cosine")
        ),
    ]  # fmt: skip


def normal(*shape: int) -> Tensor:
    """Standard normal, the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def samples(count: int, dim: int) -> Tensor:
    """Rows whose variances fall as those of images, about as k^-1.2."""
    return normal(count, dim) * torch.arange(1.0, dim + 1) ** -0.6


def side(dim: int) -> int:
    """Of square images of three channels."""
    return math.isqrt(dim // 3)


def moments_pass(count: int, dim: int) -> Setup:
    """Over x^T x in float64."""
    x = samples(count, dim)
    wide = x.double()
    return lambda: fit_moments(x), lambda: wide.mT @ wide


def fitting(count: int, dim: int, **options: Any) -> Setup:
    """Over the product that the solver rests on: x^T x or x x^T in float64, x^T x v in float32."""
    x = samples(count, dim)
    wide, v = x.double(), normal(dim, options.get("rank", 1))
    bare: dict[str, Call] = {
        "dense": lambda: wide.mT @ wide,
        "gram": lambda: wide @ wide.mT,
        "krylov": lambda: x.mT @ (x @ v),
    }
    return lambda: fit_covariance(x, **options), bare[options["solver"]]


def eigensolver(dim: int) -> Setup:
    """Over a product of two (D, D) matrices in float64."""
    x = samples(2 * dim, dim).double()
    covariance = x.mT @ x
    return lambda: torch.linalg.eigh(covariance), lambda: covariance @ covariance


def cosine_pass(count: int, size: int) -> Setup:
    """Over the transform itself in float64."""
    x, wide = normal(count, 3, size, size), normal(count, 3, size, size).double()
    c = cosine_matrix(size)
    return lambda: fit_covariance(x, basis="cosine"), lambda: c @ wide @ c.mT


def gaussian(dim: int, rank: int) -> GaussianDenoiser:
    """Of axes that are not orthogonal, which costs the same, and no decomposition to begin with."""
    return GaussianDenoiser(
        torch.zeros(dim), Covariance(normal(dim, rank) / dim**0.5, torch.logspace(1, -2, rank), 0.01)
    )


def denoising(dim: int, rank: int, batch: int) -> Setup:
    """Over the two products, in float32."""
    model, x = gaussian(dim, rank), normal(batch, dim)
    axes = model.covariance.eigvecs
    return lambda: model(x, 0.5), lambda: (x @ axes) @ axes.mT


def flowing(dim: int, rank: int, batch: int) -> Setup:
    """Over the two products, in float64."""
    model, x = gaussian(dim, rank), normal(batch, dim)
    axes, wide = model.covariance.eigvecs.double(), x.double()
    return lambda: model.flow(x, 80.0, 5.0), lambda: (wide @ axes) @ axes.mT


def denoising_cosine(size: int, batch: int) -> Setup:
    """Over the transform there and back, in float32."""
    model = GaussianDenoiser(
        torch.zeros(3, size, size), CosineCovariance(torch.ones(3, size, size), torch.eye(3))
    )
    x, c = normal(batch, 3, size, size), cosine_matrix(size).float()
    return lambda: model(x, 0.5), lambda: c.mT @ (c @ x @ c.mT) @ c


def mixing(count: int, rank: int, batch: int) -> Setup:
    """Over the two products."""
    one = gaussian(768, rank).covariance
    model = GaussianMixtureDenoiser(torch.ones(count), normal(count, 768) / 4, [one] * count)
    rows, x = model.eigvecs.flatten(0, 1), normal(batch, 768)
    return lambda: model(x, 0.5), lambda: (x @ rows.mT) @ rows


def attending(count: int, batch: int) -> Setup:
    """Over the two products."""
    data = samples(count, 768)
    model, x = DeltaDenoiser(data), data[:batch] + 0.5 * normal(batch, 768)
    return lambda: model(x, 0.5), lambda: (x @ data.mT) @ data


def gating(count: int) -> Setup:
    """Over the two products at each level."""
    data, model = samples(count, 768), gaussian(768, 64)
    x, levels = data[:128], SIGMAS[::5]
    generator = torch.Generator().manual_seed(0)
    ours = partial(Gate.fit, model, data, levels, 128, generator)
    return ours, lambda: [(x @ data.mT) @ data for _ in levels]


def wrapped(basis: str, dim: int) -> BypassPrecond:
    """A small U-Net in the bypass with gate, shown Gaussian and blended base; or in EDM's preconditioning."""
    event = (3, side(dim), side(dim))
    if basis == "edm":
        return EDMPrecond(SongUNet(event[1], 3, 3, **NETWORK))
    covariance = (
        CosineCovariance(torch.ones(event), torch.eye(3))
        if basis == "cosine"
        else gaussian(dim, dim if basis == "full rank" else 64).covariance
    )
    gate = Gate(torch.logspace(-1.3, 2, 25), torch.linspace(1, 0, 25))
    return BypassPrecond(
        SongUNet(event[1], 6, 3, **NETWORK), GaussianDenoiser(torch.zeros(event), covariance), gate
    )


def training(basis: str, dim: int) -> Setup:
    """Forward and backward pass over those of EDM."""
    clean = normal(16, 3, side(dim), side(dim))
    sigma = torch.exp(1.2 * normal(16) - 1.2)
    x = clean + sigma[:, None, None, None] * normal(16, *clean.shape[1:])

    def step(model: BypassPrecond) -> None:
        model.zero_grad(set_to_none=True)
        error = (model(x, sigma) - clean).square().flatten(1).mean(1)
        (model.weight(sigma) * error).mean().backward()

    return partial(step, wrapped(basis, dim).train()), partial(step, wrapped("edm", dim).train())


@cache
def network_work(size: int) -> int:
    """Of one evaluation of the small U-Net, an image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        SongUNet(size, 3, 3, **NETWORK)(torch.empty(1, 3, size, size), torch.empty(1), None)
    return counter.get_total_flops()


def step_work(basis: str, dim: int) -> float:
    """Three evaluations of the network, and the Gaussian."""
    rank = {"full rank": dim, "rank 64": 64}.get(basis)
    return 3 * network_work(side(dim)) + gaussian_work(dim, rank, side(dim))
