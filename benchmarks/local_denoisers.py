"""What do local posteriors of the data gain on held-out images, over the Gaussian and the delta denoiser?

    python benchmarks/local_denoisers.py

Fits to 1,200 of scikit-learn's digits (8x8, D = 64) and prints the mean squared denoising error per pixel on
120 others. Patch sizes are those of least error on a third set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from results import Record, parser
from sklearn.datasets import load_digits
from torch import Tensor

from gaussnet import DeltaDenoiser, Denoiser, GaussianDenoiser, MarginalDenoiser
from gaussnet.denoisers.patch import PatchDenoiser
from gaussnet.denoisers.pca_local import PCALocalDenoiser

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def load() -> Tensor:
    """All digits in a random order: (1797, 1, 8, 8) in [-1, 1]."""
    pixels, _ = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def rows(record: Record, denoisers: Mapping[str, Denoiser], test: Tensor) -> Iterator[list[str]]:
    """A row for each denoiser."""
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
    for name, denoiser in denoisers.items():
        start = time.perf_counter()
        cells: list[str] = []
        for sigma in SIGMAS:
            error = (denoiser(test + sigma * noise, sigma) - test).square().mean().item()
            record.number(f"{name}: error at sigma {sigma:g}", error)
            cells.append(f"{error:.5f}")
        milliseconds = 1e3 * (time.perf_counter() - start) / (len(SIGMAS) * len(test))
        yield [name, *cells, f"{milliseconds:.2f}"]


def main() -> None:
    """Prints the table."""
    record = Record(parser(__doc__).parse_args())
    torch.set_num_threads(record.options.threads)
    images = load()
    train, validation, test = images[:1200], images[1200:1300], images[-120:]
    gaussian = GaussianDenoiser.fit(train)
    generator = torch.Generator().manual_seed(2)
    ls = PatchDenoiser.fit(train, validation, SIGMAS, (1, 3, 5, 7, 9, 15), generator)
    els = PatchDenoiser.fit(train, validation[:16], SIGMAS, (1, 3, 5, 7), generator, equivariant=True)
    record.text(f"{len(train)} training and {len(test)} test images, D = 64.")
    record.text(f"Patch sizes: LS {ls.patch_sizes.tolist()}, ELS {els.patch_sizes.tolist()}.\n")
    denoisers: dict[str, Denoiser] = {
        "delta": DeltaDenoiser(train),
        "Gaussian": gaussian,
        "Gaussian with marginals": MarginalDenoiser.fit(train, gaussian),
        "patches, LS": ls,
        "patches, ELS": els,
    }
    for t in (0.005, 0.02, 0.05, 0.2):
        denoisers[f"PCA locality, t = {t}"] = PCALocalDenoiser(train, gaussian, t)
    head = ["sigma", *map(str, SIGMAS), "ms an image"]
    record.table(head, rows(record, denoisers, test))
    record.close()


if __name__ == "__main__":
    main()
