"""Do cross-validated eigenvalues predict the error of a Gaussian fitted to few images?

    python benchmarks/few_images.py --emoji ZIP [--mnist FOLDER]

Fits Gaussians to 3,266 colour emoji at 32x32 (D = 3,072) and prints the mean squared denoising error per
pixel on held-out ones, with the error that each Gaussian predicts of itself in brackets. Blocks of 40
neighbours in the file, among which variants of one image lie, are held out, and left out, together.

Then, for these emoji and with --mnist for 300, 3,000 and 10,000 digits: by how much less closed forms err on
the images that they are fitted to than on held-out ones, and that those of five folds (`CrossFit`) do not.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import Record, parser
from torch import Tensor

from gaussnet import CrossFit, GaussianDenoiser, MarginalDenoiser, open_images
from gaussnet.fit import fit_covariance

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
BLOCK = 40
QUERIES = 2000


def load(path: Path) -> Tensor:
    """All images of a zip of PNGs, averaged over 2x2 pixels: (N, 3, 32, 32) in [-1, 1]."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(pixels, 2)


def leaks(
    name: str, train: Tensor, heldout: Tensor, groups: Tensor | None, record: Record
) -> Iterator[list[str]]:
    """Rows of errors on training images over those on held-out ones, of the fit to all and of folds."""

    def fit(kept: Tensor) -> MarginalDenoiser:
        own = None if groups is None else groups[kept]
        return MarginalDenoiser.fit(train[kept], GaussianDenoiser.fit(train[kept], groups=own))

    whole, cross = fit(torch.arange(len(train))), CrossFit.fit(fit, len(train), groups=groups)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(train), generator=generator)  # files are sorted
    index = order.repeat(-(-QUERIES // len(train)))[:QUERIES]  # few images, more noise
    noises = [torch.randn(len(images), *train.shape[1:], generator=generator) for images in (index, heldout)]
    ratios: dict[str, list[float]] = {}
    for sigma in SIGMAS:
        seen, unseen = train[index] + sigma * noises[0], heldout + sigma * noises[1]
        new = {"D_gauss": whole.gaussian(unseen, sigma), "D_m": whole(unseen, sigma)}
        own = {"D_gauss": whole.gaussian(seen, sigma), "D_m": whole(seen, sigma)}
        folds: dict[str, Tensor] = dict(zip(("D_gauss", "D_m"), cross(seen, sigma, index), strict=True))
        for form, denoised in new.items():
            expected = (denoised - heldout).square().mean()
            for fitted, found in ((f"{form}, fitted to all", own), (f"{form}, of folds", folds)):
                error = (found[form] - train[index]).square().mean()
                ratios.setdefault(fitted, []).append(float(error / expected))
    for fitted, row in ratios.items():
        record.number(f"{name}, {fitted}: least error on training images over held-out", min(row))
        yield [name, fitted, *(f"{ratio:.2f}" for ratio in row)]


def sets(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Names, training and held-out images, and groups."""
    images = load(options.emoji)
    block = torch.arange(len(images)) // BLOCK
    held = block % 7 == 6
    yield f"{int((~held).sum())} emoji", images[~held], images[held], block[~held]
    if options.mnist is not None:
        digits = open_images(options.mnist)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        heldout = digits.subset(order[-QUERIES:]).tensor()
        for count in (300, 3000, 10_000):
            yield f"{count} of MNIST", digits.subset(order[:count]).tensor(), heldout, None


def main() -> None:
    """Prints the tables."""
    made = parser(__doc__)
    made.add_argument("--emoji", type=Path, required=True, help="a zip of 64x64 PNGs")
    made.add_argument("--mnist", help="folder of MNIST's files")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    _, train, heldout, groups = next(sets(record.options))
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

    record.text("Error on training images over that on held-out ones, by sigma:\n")
    leaking = (row for part in sets(record.options) for row in leaks(*part, record))
    record.table(["images", "closed form", *map(str, SIGMAS)], leaking)
    record.close()


if __name__ == "__main__":
    main()
