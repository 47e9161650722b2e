"""What does a Gaussian a class know that one of all does not, and what does it borrow from the others?

    python benchmarks/classes.py [--mnist FOLDER] [--images 20000] [--steps 800]

Closed forms are fitted to MNIST, or else to the digits, and print their root mean squared error on held-out
images, each denoised for its class: one Gaussian with marginals, and one a class with marginals, of which
each covariance is its own, that of all classes about their own means, or its own with so many samples of that
(in parts of the number of dimensions: `prior`). Below, by how much less they err on images that they saw.

Then small networks are trained on the digits, with the labels of a tenth of the images dropped, or of none:
EDM's and one around a Gaussian a class. Their mean squared errors on held-out digits, for the class and
without one, are told as parts of that of EDM with dropped labels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from results import Record, parser
from torch import Tensor

from gaussnet import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser, from_pretrained
from gaussnet.data import open_images
from train.configfile import load_config
from train.data import load_data

HERE = Path(__file__).parent
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)
PRIORS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 1e9)
HELDOUT = 2000
NETWORKS = {"EDM": "precond=edm", "a Gaussian a class": "bypass.gaussian=classes"}


def closed_forms(record: Record) -> None:
    """Errors of one Gaussian and of one a class, over priors."""
    source = open_images(record.options.mnist or "digits")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    count = min(HELDOUT, len(source) // 5)
    raw, labels = source[order]
    images = source.to_float(raw)
    heldout, own = images[:count], labels[:count]
    train, classes = (part[count:][: record.options.images] for part in (images, labels))
    dim = train[0].numel()
    record.text(f"{len(train)} training and {count} held-out images of {source.name}, D = {dim}\n")
    noise = torch.randn(heldout.shape, generator=torch.Generator().manual_seed(1))
    leaks: list[list[str]] = []

    def errors(denoiser: Denoiser, clean: Tensor, known: Tensor) -> Tensor:
        found = [denoiser(clean + s * noise[: len(clean)], s, known) - clean for s in SIGMAS]
        return torch.stack([part.square().mean().sqrt() for part in found])

    def rows() -> Iterator[list[str]]:
        one = MarginalDenoiser.fit(train, GaussianDenoiser.fit(train))
        reference = errors(one, heldout, own)
        for prior in (None, *PRIORS):
            name, denoiser = "one Gaussian", one
            if prior is not None:
                told = f"{prior:g} D" if prior < 1e6 else "only what classes share"
                name = f"a class, prior {told}"
                mixture = GaussianMixtureDenoiser.fit(train, labels=classes, prior=prior * dim)
                denoiser = MarginalDenoiser.fit(train, mixture, labels=classes)
            found = errors(denoiser, heldout, own)
            seen = errors(denoiser, train[:count], classes[:count])
            leaks.append([name, *(f"{ratio:.3f}" for ratio in (seen / found).tolist())])
            if prior == 0.5:
                worst = float((found / reference).max())
                record.number("a class, prior D/2: worst error over that of one Gaussian", worst, "<= 1")
            yield [name, *(f"{value:.4f}" for value in found.tolist())]

    head = ["", *(f"{s:g}" for s in SIGMAS)]
    record.table(head, rows())
    record.text("On images that they were fitted to, over that on held-out ones:\n")
    record.table(head, leaks)


def trained(record: Record, folder: Path) -> None:
    """Errors of networks for the class and without one, with dropped labels and all."""
    errors: dict[tuple[str, float, str], Tensor] = {}
    for dropped in (0.1, 0.0):
        for name, key in NETWORKS.items():
            out = folder / f"{key}-{dropped:g}"
            keys = [
                *("data.source=digits", "data.heldout=0.2", "data.labels=true", "fit.folds=null"),
                *(
                    "bypass.centre=null",
                    "network.arguments.channel_mult=[1,2]",
                    f"loss.label_dropout={dropped}",
                ),
                *("train.lr=0.004", f"train.steps={record.options.steps}", f"out={out}", key),
            ]
            command = [sys.executable, "-m", "train", str(HERE / "bypass_ablation.yaml"), *keys]
            subprocess.run(command, check=True, capture_output=True)
            errors |= {(name, dropped, told): error for told, error in measured(out).items()}
    reference = {told: errors["EDM", 0.1, told] for told in ("its class", "no class")}
    record.text(
        f"Mean squared errors after {record.options.steps} steps over those of EDM with dropped labels:\n"
    )

    def rows() -> Iterator[list[str]]:
        for (name, dropped, told), error in errors.items():
            ratios = error / reference[told]
            where = f"{name}, {dropped:.0%} dropped, {told}"
            if name != "EDM":
                record.number(f"{where}: worst over EDM with dropped labels", float(ratios.max()), "<= 1.01")
            yield [where, *(f"{ratio:.3f}" for ratio in ratios.tolist())]

    record.table(["digits", *(f"{s:g}" for s in SIGMAS)], rows())


def measured(folder: Path) -> dict[str, Tensor]:
    """Mean squared errors of a run's model on held-out digits, with eight noises each."""
    config = load_config(folder / "config.yaml", [])
    data, model = load_data(config.data), from_pretrained(folder)
    raw, labels = data.heldout[torch.arange(len(data.heldout))]
    clean = data.heldout.to_float(raw).repeat(8, 1, 1, 1)
    known = torch.nn.functional.one_hot(labels, data.n_classes).repeat(8, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return {
        told: torch.stack([(model(clean + s * noise, s, rows) - clean).square().mean() for s in SIGMAS])
        for told, rows in (("its class", known), ("no class", torch.zeros_like(known)))
    }


@torch.no_grad()
def main() -> None:
    """Prints the tables."""
    made = parser(__doc__)
    made.add_argument("--mnist", help="folder of MNIST's files")
    made.add_argument("--images", type=int, default=20_000, help="to fit closed forms to, at most")
    made.add_argument("--steps", type=int, default=800, help="of each training")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    closed_forms(record)
    with TemporaryDirectory() as folder:
        trained(record, Path(folder))
    record.close()


if __name__ == "__main__":
    main()
