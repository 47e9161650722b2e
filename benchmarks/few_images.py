"""Do cross-validated eigenvalues predict the error of a Gaussian fitted to few images?

    python benchmarks/few_images.py --emoji ZIP

Fits Gaussians to 3,266 colour emoji at 32x32 (D = 3,072) and prints the mean squared denoising error per
pixel on held-out ones, with the error that each Gaussian predicts of itself in brackets. Blocks of 40
neighbours in the file, among which variants of one image lie, are held out, and left out, together.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import Record, parser
from torch import Tensor

from gaussnet import GaussianDenoiser, MarginalDenoiser
from gaussnet.fit import fit_covariance

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
BLOCK = 40


def load(path: Path) -> Tensor:
    """All images of a zip of PNGs, averaged over 2x2 pixels: (N, 3, 32, 32) in [-1, 1]."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(pixels, 2)


def main() -> None:
    """Prints the table."""
    made = parser(__doc__)
    made.add_argument("--emoji", type=Path, required=True, help="a zip of 64x64 PNGs")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    images = load(record.options.emoji)
    block = torch.arange(len(images)) // BLOCK
    held = block % 7 == 6
    train, heldout, groups = images[~held], images[held], block[~held]
    noise = torch.randn(heldout.shape, generator=torch.Generator().manual_seed(0))
    record.text(f"{len(train)} training and {len(heldout)} held-out images, D = {train[0].numel()}\n")

    mean, variance = train.mean(0), train.sub(train.mean(0)).square().mean()
    fitted: dict[str, GaussianDenoiser | MarginalDenoiser] = {
        "isotropic": GaussianDenoiser.isotropic(mean, variance),
        "sample eigenvalues": GaussianDenoiser.fit(train, shrinkage="none"),
        "rank 256, mean tail": GaussianDenoiser.fit(train, rank=256, shrinkage="none"),
        "Ledoit-Wolf": GaussianDenoiser.fit(train, shrinkage="ledoit-wolf"),
        "OAS": GaussianDenoiser.fit(train, shrinkage="oas"),
        "noise remap": GaussianDenoiser.fit(train, shrinkage="remap"),
        "cross-validated, ungrouped": GaussianDenoiser.fit(train),
        "cross-validated": (chosen := GaussianDenoiser.fit(train, groups=groups)),
        "the same, with marginals": MarginalDenoiser.fit(train, chosen),
    }
    sample = fit_covariance(train, shrinkage="none")
    coordinates = (heldout - sample.mean).flatten(1) @ sample.covariance.eigvecs
    sample.covariance.eigvals.copy_(coordinates.square().mean(0))
    fitted["oracle for the axes"] = GaussianDenoiser(sample.mean, sample.covariance)

    errors: dict[tuple[str, float], float] = {}

    def rows() -> Iterator[list[str]]:
        for name, gaussian in fitted.items():
            cells: list[str] = []
            for sigma in SIGMAS:
                error = (gaussian(heldout + sigma * noise, sigma) - heldout).square().mean().item()
                errors[name, sigma] = error
                known = isinstance(gaussian, GaussianDenoiser)
                cells.append(f"{error:.5f} ({gaussian.bayes_error(sigma):.5f})" if known else f"{error:.5f}")
            yield [name, *cells]

    record.table(["sigma", *map(str, SIGMAS)], rows())
    for sigma in SIGMAS:
        ours = errors["cross-validated", sigma]
        for other in ("sample eigenvalues", "oracle for the axes"):
            record.number(
                f"error at sigma {sigma:g}, cross-validated", ours / errors[other, sigma], against=other
            )
        record.number(
            f"error at sigma {sigma:g}, with marginals",
            errors["the same, with marginals", sigma] / ours,
            against="cross-validated",
        )
        predicted = float(chosen.bayes_error(sigma))
        record.number(f"error at sigma {sigma:g}, predicted", predicted / ours, against="measured")
    record.close()


if __name__ == "__main__":
    main()
