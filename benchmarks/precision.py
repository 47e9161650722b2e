"""How far is float32 from float64, on points of the data manifold?

    python benchmarks/precision.py [--mnist FOLDER] [--queries 64] [--images 60000]

Relative errors of denoiser, score and gradient of the log density, the largest error of a responsibility, and
that of the delta denoiser against direct differences in float64, on MNIST or, without it, scikit-learn's
digits. The fits are the same, rounded to float32 in both.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator

import torch
from results import Record, parser
from torch import Tensor

from gaussnet import DeltaDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.data import open_images

SIGMAS = (0.002, 0.01, 0.05, 0.5, 5.0, 80.0)
KINDS = ("denoiser", "score", "gradient", "responsibilities")


def gradient(model: GaussianDenoiser | GaussianMixtureDenoiser, x: Tensor, sigma: float) -> Tensor:
    """The gradient of the log density."""
    return torch.func.grad(lambda x: model.log_prob(x, sigma).sum())(x)


def error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||."""
    return float((actual.double() - exact).norm() / exact.norm())


def brute_force(data: Tensor, x: Tensor, sigma: float) -> Tensor:
    """The delta denoiser by direct differences, in float64, a query at a time."""
    data = data.double().flatten(1)
    rows = [
        torch.softmax(-(data - row).square().sum(1) / (2 * sigma**2), 0) @ data
        for row in x.double().flatten(1)
    ]
    return torch.stack(rows).reshape(x.shape)


def measure(images: Tensor, options: Namespace) -> Iterator[tuple[float, str, dict[str, float]]]:
    """(sigma, denoiser, errors by what they are of)."""
    delta = DeltaDenoiser(images)
    models = {
        "Gaussian": GaussianDenoiser.fit(images),
        "mixture": GaussianMixtureDenoiser.fit(images, options.components, options.rank),
    }
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[: options.queries]
    for sigma in SIGMAS:
        x = images[chosen] + sigma * torch.randn(images[chosen].shape, generator=generator)
        for name, single in models.items():
            double = copy.deepcopy(single).double()
            errors = {
                "denoiser": error(single(x, sigma), double(x.double(), sigma)),
                "score": error(single.score(x, sigma), double.score(x.double(), sigma)),
                "gradient": error(gradient(single, x, sigma), gradient(double, x.double(), sigma)),
            }
            if isinstance(single, GaussianMixtureDenoiser) and isinstance(double, GaussianMixtureDenoiser):
                off = single.responsibilities(x, sigma) - double.responsibilities(x.double(), sigma)
                errors["responsibilities"] = float(off.abs().max())
            yield sigma, name, errors
        yield sigma, "delta", {"denoiser": error(delta(x, sigma), brute_force(images, x, sigma))}


def main() -> None:
    """Prints the table."""
    made = parser(__doc__)
    made.add_argument("--mnist", help="folder of MNIST's files")
    made.add_argument("--images", type=int, help="at most")
    made.add_argument("--components", type=int, help="of the mixture; 100 for MNIST, 10 for digits")
    made.add_argument("--rank", type=int, help="of its components; 64 for MNIST, 16 for digits")
    made.add_argument("--queries", type=int, default=64)
    options = made.parse_args()
    options.components = options.components or (100 if options.mnist else 10)
    options.rank = options.rank or (64 if options.mnist else 16)
    record = Record(options)
    torch.set_num_threads(options.threads)
    images = open_images(options.mnist or "digits").tensor()[: options.images]
    data = f"{len(images)} images of {'MNIST' if options.mnist else 'digits'}"
    record.text(f"{data}, {tuple(images.shape[1:])}, {options.queries} queries\n")

    largest: dict[tuple[str, str], float] = defaultdict(float)

    def rows() -> Iterator[list[str]]:
        for sigma, name, errors in measure(images, options):
            for of, value in errors.items():
                largest[name, of] = max(largest[name, of], value)
                if (sigma, of) == (SIGMAS[0], "responsibilities"):
                    record.number(f"responsibilities at sigma {sigma:g}, {data}: error", value, "<= 1e-3")
            cells = [f"{errors[of]:.0e}" if of in errors else "-" for of in KINDS]
            yield [f"{sigma:g}", name, *cells]

    record.table(["sigma", "of", *KINDS], rows())
    for (name, of), value in largest.items():
        if of != "responsibilities":
            against = "direct differences in float64" if name == "delta" else "float64"
            record.number(
                f"{name}, {of}, {data}: error of float32, the largest over sigma", value, "<= 1e-5", against
            )
    worst = max(value for (_, of), value in largest.items() if of != "responsibilities")
    record.number(f"error of float32, the largest on {data}", worst, "<= 1e-5", "float64", headline=True)
    record.close()


if __name__ == "__main__":
    main()
