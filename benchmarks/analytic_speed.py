"""What do the analytic denoisers cost over their bare matrix products?

    python benchmarks/analytic_speed.py [--repeats 15] [--threads 2]

Times a batch of 256 in float32, each denoiser in turn with the two matrix products that it cannot do without
(x with the basis or the data, coefficients back), in one process, and prints the ratio of the medians of
interleaved repetitions. The memory column is the peak of what a call allocates, measured by torch.profiler.
The mixture is compared, besides, with its formulas written out in (B, K, D) tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from results import Record, parser
from timing import Call, compare, peak_memory
from torch import Tensor

from gaussnet import Covariance, DeltaDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser

BATCH = 256


def gaussian(dim: int, generator: torch.Generator) -> GaussianDenoiser:
    """Full rank."""
    eigvecs = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return GaussianDenoiser(torch.zeros(dim), Covariance(eigvecs, torch.logspace(1, -3, dim)))


def mixture(count: int, dim: int, rank: int, generator: torch.Generator) -> GaussianMixtureDenoiser:
    """Components whose means lie as far apart as the samples of each."""
    parts = [
        Covariance(
            torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q, torch.logspace(1, -1, rank), 0.02
        )
        for _ in range(count)
    ]
    return GaussianMixtureDenoiser(torch.ones(count), torch.randn(count, dim, generator=generator) / 4, parts)


def written_out(model: GaussianMixtureDenoiser, x: Tensor, sigma: float) -> Tensor:
    """Eq. 7 and 8 as they stand, on (B, K, D) tensors."""
    variance, dim, rank = sigma**2, model.means.shape[1], model.eigvecs.shape[1]
    u = x[:, None] - model.means  # (B, K, D)
    z = torch.einsum("bkd,krd->bkr", u, model.eigvecs)
    inside, outside = model.eigvals + variance, model.tails + variance
    mahalanobis = (z**2 / inside).sum(-1) + ((u**2).sum(-1) - (z**2).sum(-1)) / outside
    logdet = inside.log().sum(-1) + (dim - rank) * outside.log()
    weights = torch.softmax(model.weights.log() - 0.5 * (mahalanobis + logdet), -1)
    f, f_tail = model.eigvals / inside, (model.tails / outside)[:, None]
    denoised = model.means + f_tail * u + torch.einsum("bkr,krd->bkd", (f - f_tail) * z, model.eigvecs)
    return torch.einsum("bk,bkd->bd", weights, denoised)


def ratios(record: Record) -> Iterator[list[str]]:
    """A row for each denoiser and kind of sigma."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, Denoiser, Tensor, str]] = []  # the last: what the ratio should reach
    dense = gaussian(3072, generator)
    cases.append(("Gaussian, D = r = 3072", dense, dense.covariance.eigvecs.mT, "<= 1.15"))
    many = mixture(100, 784, 64, generator)
    cases.append(("mixture, K = 100, D = 784, r = 64", many, many.eigvecs.flatten(0, 1), "<= 1.35"))
    for count, bound in ((15_000, ""), (60_000, "<= 1.6")):
        data = torch.randn(count, 784, generator=generator) / 2
        cases.append((f"delta, N = {count}, D = 784", DeltaDenoiser(data), data, bound))
    largest: dict[tuple[str, str], float] = {}
    for name, model, rows, bound in cases:
        dim = rows.shape[1]
        clean = model.data[:BATCH] if isinstance(model, DeltaDenoiser) else torch.randn(BATCH, dim) / 2
        coefficients = torch.rand(BATCH, len(rows), generator=generator)
        spread = torch.full((BATCH,), 0.5)
        for label, sigma in (("0.05", 0.05), ("0.5", 0.5), ("0.5, one per sample", spread), ("5", 5.0)):
            x = clean + torch.as_tensor(sigma).reshape(-1, 1) * torch.randn(BATCH, dim, generator=generator)
            calls: dict[str, Call] = {
                "bare": lambda x=x, rows=rows, back=coefficients: (x @ rows.mT, back @ rows),
                "ours": lambda model=model, x=x, sigma=sigma: model(x, sigma),
            }
            times = compare(calls, record.options.repeats)
            ratio = record.number(
                f"{name}, sigma {label}: time",
                times["ours"] / times["bare"],
                bound,
                "its two matrix products",
            )
            largest[name, bound] = max(largest.get((name, bound), 0.0), ratio)
            memory = peak_memory(calls["ours"])
            if name.startswith("delta, N = 60000"):
                record.number(f"{name}, sigma {label}: memory", memory, "<= 150", unit="MB")
            yield [name, label, f"{ratio:.2f}", f"{memory:.0f}"]
    for (name, bound), ratio in largest.items():
        if bound:
            what = f"{name}: time, the largest over sigma"
            record.number(what, ratio, bound, "its two matrix products", headline=True)


def against_formulas(record: Record) -> None:
    """The mixture, and its formulas in (B, K, D) tensors."""
    generator = torch.Generator().manual_seed(0)
    many = mixture(100, 784, 64, generator)
    x = torch.randn(BATCH, 784, generator=generator)
    calls: dict[str, Call] = {"written": lambda: written_out(many, x, 0.5), "ours": lambda: many(x, 0.5)}
    times = compare(calls, record.options.repeats)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    difference = (written_out(many, x, 0.5) - many(x, 0.5)).abs().max().item()
    assert math.isfinite(difference)
    against = "its formulas in (B, K, D) tensors"
    name = "mixture, K = 100, D = 784, r = 64"
    speed = record.number(
        f"{name}: times faster", times["written"] / times["ours"], ">= 10", against, headline=True
    )
    record.number(f"{name}: peak memory", memory["ours"] / memory["written"], "<= 0.2", against)
    record.text(
        f"Mixture against its formulas in (B, K, D) tensors: {speed:.1f} times faster, "
        f"{memory['written']:.0f} MB to {memory['ours']:.0f} MB, largest difference {difference:.1e}"
    )


def main() -> None:
    """Prints the table."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=15)
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    head = ["denoiser, batch 256", "sigma", "time over two bare products", "extra memory, MB"]
    record.table(head, ratios(record))
    against_formulas(record)
    record.close()


if __name__ == "__main__":
    main()
