"""Is fitting as fast as scikit-learn's PCA, and as exact as float64?

    python benchmarks/fitting.py [--mnist FOLDER] [--emoji ZIP] [--repeats 5]

Dense: mean, covariance and all eigenvectors of MNIST's 60,000 training images (D = 784), against
PCA(svd_solver="covariance_eigh") on the same float32 array, and on a float64 copy, which it needs for the
same accuracy. Krylov: 512 axes of 3,786 emoji (D = 12,288), against PCA(512, svd_solver="randomized"). Runs
are interleaved in one process; the ratio is that of the medians. In place of data that are not given come as
many random 8-bit images of the same shape, with the spectrum of photographs. Cosine: the peak memory of a
process that fits 128 images of 3 x 512 x 512 in the cosine basis, in one pass over batches of 8.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Record, parser
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from timing import compare
from torch import Tensor

from gaussnet.data import ImageData, open_images
from gaussnet.fit import fit_covariance

RANK = 512
COSINE = """
import pathlib, re, resource, sys, torch
from gaussnet import GaussianDenoiser

generator = torch.Generator().manual_seed(0)
batches = (torch.randint(256, (8, 3, 512, 512), dtype=torch.uint8, generator=generator) for _ in range(16))
gaussian = GaussianDenoiser.fit((batch / 127.5 - 1 for batch in batches), basis="cosine")
gaussian(torch.zeros(1, 3, 512, 512), 0.5)
status = pathlib.Path("/proc/self/status")
if status.exists():  # Linux counts the peak of the process that started this one into ru_maxrss
    peak = 2**10 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
print(peak / 2**30)
"""


def pixels(record: Record, option: str, count: int, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
    """A name, and (N, D) pixels in [-1, 1]: of the data that the option names, or random ones."""
    path, limit = getattr(record.options, option), record.options.images or count
    if path is None:
        data = ImageData(natural_images(min(count, limit), shape, torch.Generator().manual_seed(0)))
    else:
        data = open_images(path)
    x = data.tensor().flatten(1)[:limit]
    return f"{option if path else 'random images'}, {len(x)} x {x.shape[1]}", x


def natural_images(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """8-bit noise whose amplitude falls as one over the frequency."""
    down, across = torch.fft.fftfreq(shape[1])[:, None], torch.fft.rfftfreq(shape[2])
    frequency = torch.hypot(down, across).clamp(min=1 / shape[2])
    parts: list[Tensor] = []
    for part in torch.arange(count).split(1000):
        noise = torch.fft.rfft2(torch.randn(len(part), *shape, generator=generator)) / frequency
        smooth = torch.fft.irfft2(noise, s=shape[1:])
        parts.append((127.5 + 50 * smooth / smooth.std()).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def results_of(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and the last result of each call."""
    results: dict[str, Any] = {}

    def keep(name: str) -> None:
        results[name] = calls[name]()

    return compare({name: lambda name=name: keep(name) for name in calls}, repeats), results


def eigenvalue_error(eigvals: np.ndarray, exact: np.ndarray) -> float:
    """The largest relative error over the top half of the spectrum."""
    half = len(exact) // 2
    return float(np.abs(eigvals[:half] / exact[:half] - 1).max())


def left_out(samples: Tensor, axes: Tensor) -> float:
    """Share of the variance outside of orthonormal axes."""
    centred = samples.double() - samples.double().mean(0)
    return 1 - float((centred @ axes.double()).square().sum() / centred.square().sum())


def dense(record: Record) -> None:
    """All eigenvectors, against the eigendecomposition of the covariance."""
    name, x = pixels(record, "mnist", 60_000, (1, 28, 28))
    single = x.numpy()
    double = single.astype(np.float64)
    calls: dict[str, Callable[[], Any]] = {
        "gaussnet": lambda: fit_covariance(x, shrinkage="none"),
        "scikit-learn, float32": lambda: PCA(svd_solver="covariance_eigh").fit(single),
        "scikit-learn, float64": lambda: PCA(svd_solver="covariance_eigh").fit(double),
    }
    times, results = results_of(calls, record.options.repeats)
    exact = np.linalg.eigvalsh(np.cov(double.T, bias=True))[::-1]
    scale = (len(x) - 1) / len(x)  # scikit-learn divides by N - 1
    spectra = {label: results[label].explained_variance_ * scale for label in calls if label != "gaussnet"}
    spectra["gaussnet"] = results["gaussnet"].covariance.eigvals.double().numpy()  # as stored: float32
    error = {label: eigenvalue_error(spectra[label], exact) for label in calls}
    relative = {label: times[label] / times["gaussnet"] for label in calls}
    record.table(
        [name, "time over gaussnet", "relative error of the top half of the spectrum"],
        ([label, f"{relative[label]:.2f}", f"{error[label]:.1e}"] for label in calls),
    )
    other = "scikit-learn, float64"
    record.number(
        f"fit to {name}, all axes: times faster",
        relative[other],
        ">= 1",
        "scikit-learn in float64, covariance_eigh",
        headline=True,
    )
    record.number(f"fit to {name}: eigenvalue error", error["gaussnet"], "<= 1e-6", "float64")


def krylov(record: Record) -> None:
    """The first axes, against a randomised decomposition."""
    name, x = pixels(record, "emoji", 3786, (3, 64, 64))
    rank = min(RANK, len(x) // 4)
    single = x.numpy()
    calls: dict[str, Callable[[], Any]] = {
        "gaussnet": lambda: fit_covariance(x, rank, shrinkage="none", solver="krylov"),
        "scikit-learn, randomized": lambda: PCA(rank, svd_solver="randomized", random_state=0).fit(single),
    }
    times, results = results_of(calls, record.options.repeats)
    theirs = torch.from_numpy(results["scikit-learn, randomized"].components_.T.copy())
    left = {
        "gaussnet": left_out(x, results["gaussnet"].covariance.eigvecs),
        "scikit-learn, randomized": left_out(x, theirs),
    }
    best = left_out(x, fit_covariance(x, rank, shrinkage="none", solver="gram").covariance.eigvecs)
    relative = {label: times[label] / times["gaussnet"] for label in calls}
    record.table(
        [f"{name}, rank {rank}", "time over gaussnet", "variance left out, over the least possible"],
        ([label, f"{relative[label]:.2f}", f"{left[label] / best - 1:+.2%}"] for label in calls),
    )
    other = "scikit-learn, randomized"
    record.number(
        f"fit to {name}, {rank} axes: times faster", relative[other], ">= 1.5", other, headline=True
    )
    record.number(
        f"fit to {name}, {rank} axes: variance left out", left["gaussnet"] / left[other], "<= 1", other
    )


def cosine(record: Record) -> None:
    """Peak memory of a process of its own."""
    command = [sys.executable, "-c", COSINE]
    peak = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    record.number("fit to 3 x 512 x 512, cosine basis: peak memory", peak, "<= 2", unit="GB", headline=True)
    record.text(f"Fit to 128 images of 3 x 512 x 512 in the cosine basis: {peak:.2f} GB at the peak")


def main() -> None:
    """Prints all."""
    made = parser(__doc__)
    made.add_argument("--mnist", type=Path, help="folder of MNIST's files")
    made.add_argument("--emoji", type=Path, help="a zip of 64x64 PNGs")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--images", type=int, help="at most, for a quick look")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    with threadpool_limits(record.options.threads):  # scikit-learn's
        dense(record)
        krylov(record)
    cosine(record)
    record.close()


if __name__ == "__main__":
    main()
