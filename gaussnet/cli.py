"""The `gaussnet` command.

    gaussnet fit DATA --out DIR [--components K | --classes] [--rank R] ...
    gaussnet info MODEL
    gaussnet import-edm SNAPSHOT.pkl DIR
    gaussnet sample MODEL --out DIR [--solver S] [--steps N] [--teleport auto] [--seeds 0-63] ...
    gaussnet fid IMAGES --ref STATS.npz | --make-ref DATA --out STATS.npz
    gaussnet reproduce EXPERIMENT --model MODEL --data DATA --out DIR
    gaussnet watch RUN [--every SECONDS] [--once]
    gaussnet report RUN [--out FILE.html] [--open]

`fit`, `sample`, `fid` and `reproduce` under `accelerate launch --no_python` or `torchrun --no-python` share
their work between processes. Errors are one line on standard error, with exit status 2; nothing is written
then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from gaussnet.cli_fid import add_fid
from gaussnet.cli_reproduce import add_reproduce
from gaussnet.cli_sample import add_sample
from gaussnet.data import ImageData, open_images
from gaussnet.data.arrays import Layout, MappedArray
from gaussnet.data.files import Mode, OnError
from gaussnet.denoisers import DeltaDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.edm_import import import_edm
from gaussnet.fit.spectrum import OPTIONS
from gaussnet.hub import CONFIG_NAME, from_pretrained
from gaussnet.processes import joined_processes
from gaussnet.run_report import Run, watch, write_page
from gaussnet.run_report.folder import printable
from gaussnet.summary import summarise
from gaussnet.version import __version__

IN_MEMORY = 2**32  # bytes of float32 images that are held at once; beyond, they are streamed
_BATCH = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:  # of torch
        logging.info("where:", exc_info=error)
        text = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"gaussnet {options.command}: {text}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gaussnet", description="Analytic denoisers from the command line.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_fit(commands.add_parser("fit", help="fit an analytic denoiser to images, and save it"))
    info = commands.add_parser("info", help="print what a saved model is")
    info.add_argument("model", help="a folder that save_pretrained wrote, or a hub repository")
    info.set_defaults(run=_info)
    edm = commands.add_parser(
        "import-edm", help="convert a network snapshot of NVlabs/edm, executing nothing"
    )
    edm.add_argument("snapshot", type=Path, help="network-snapshot-*.pkl")
    edm.add_argument("out", type=Path, metavar="DIR", help="folder for the model")
    edm.add_argument("--overwrite", action="store_true", help="replace a model that lies there")
    edm.set_defaults(run=_import_edm)
    add_sample(commands.add_parser("sample", help="draw images from a saved model"))
    add_fid(commands.add_parser("fid", help="measure images against data or its statistics"))
    add_reproduce(commands.add_parser("reproduce", help="repeat an experiment of the paper on a model"))
    watching = commands.add_parser("watch", help="show how a training run is doing, until it is complete")
    watching.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    watching.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="between looks (default: %(default)g)"
    )
    watching.add_argument("--once", action="store_true", help="print one status, and write nothing")
    watching.set_defaults(run=_watch)
    report = commands.add_parser("report", help="write a training run's page, one HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="(default: RUN/report.html)")
    report.add_argument("--open", action="store_true", help="show it in a browser")
    report.set_defaults(run=_report)
    for command in commands.choices.values():
        command.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    return parser


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fits a Gaussian (default), a mixture or the delta denoiser, and prints its spectrum."
    )
    parser.add_argument(
        "data",
        help="EDM zip or folder, image folder, .npy, .npz, MNIST files, torchvision:NAME, hf:NAME, or digits",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that lies there")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--components", type=int, metavar="K", help="a mixture of K k-means clusters")
    kind.add_argument("--classes", action="store_true", help="a mixture of one component a class")
    kind.add_argument("--delta", action="store_true", help="the delta denoiser: stores the images themselves")
    fit = parser.add_argument_group("fit")
    fit.add_argument("--rank", type=_rank, metavar="R", help="axes to keep, or their share of the variance")
    fit.add_argument(
        "--shrinkage", choices=OPTIONS["shrinkage"], default="cv", help="eigenvalues (default: %(default)s)"
    )
    fit.add_argument(
        "--tail", choices=OPTIONS["tail"], default="mean", help="variance outside (default: %(default)s)"
    )
    fit.add_argument(
        "--solver", choices=OPTIONS["solver"], default="auto", help="of one Gaussian (default: %(default)s)"
    )
    fit.add_argument(
        "--basis", choices=OPTIONS["basis"], default="eigen", help="of one Gaussian (default: %(default)s)"
    )
    fit.add_argument("--select", choices=("heldout",), help="choose rank and shrinkage by held-out error")
    fit.add_argument("--mirror", action="store_true", help="count mirror images (x-flips), too")
    fit.add_argument(
        "--em-steps", type=int, default=0, help="of expectation maximisation from clusters (default: 0)"
    )
    fit.add_argument(
        "--prior",
        type=float,
        default=0.0,
        metavar="N",
        help="samples of the covariance that clusters or classes have in common, added to each (default: 0)",
    )
    fit.add_argument("--seed", type=int, default=0, help="of the clustering (default: 0)")
    fit.add_argument(
        "--groups", type=Path, metavar="FILE.npy", help="an integer an image: variants of one image share it"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--scaling", type=float, nargs=2, metavar=("LOW", "HIGH"), help="stored values that become -1 and 1"
    )
    data.add_argument("--unscaled", action="store_true", help="take stored values as they are, as of latents")
    data.add_argument("--layout", choices=get_args(Layout), help="of arrays")
    data.add_argument("--mode", choices=get_args(Mode), help="convert image files")
    data.add_argument("--resolution", type=int, help="cut and resize image files to this side")
    data.add_argument("--split", help="of MNIST's folders, torchvision and the hub")
    data.add_argument("--root", default="data", help="folder for downloads (default: %(default)s)")
    data.add_argument("--on-error", choices=get_args(OnError), default="raise", help="(default: %(default)s)")
    parser.set_defaults(run=_fit)


def _rank(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected an integer or a share in (0, 1), got {text!r}"
            ) from None


# Commands -----------------------------------------------------------------------------------------


def _fit(options: argparse.Namespace) -> None:
    _expect_free(options.out, options.overwrite)
    if options.scaling and options.unscaled:
        raise ValueError("expected either --scaling or --unscaled, got both")
    images = open_images(
        options.data,
        scaling="none" if options.unscaled else tuple(options.scaling) if options.scaling else None,
        layout=options.layout,
        mode=options.mode,
        resolution=options.resolution,
        split=options.split,
        root=options.root,
        on_error=options.on_error,
    )
    with joined_processes() as processes:
        model = _fitted(options, images, processes.rank, processes.world)
        if processes.first:
            data = {**model.provenance.get("data", {}), "name": images.name, "scaling": images.scaling}
            model.provenance = {**model.provenance, "data": {**data, "skipped": images.skipped}}
            model.save_pretrained(options.out)
            print(f"{images}\n\n{summarise(model)}\n\nsaved to {options.out}")


def _fitted(options: argparse.Namespace, images: ImageData, rank: int, world: int) -> Denoiser:
    mixture = options.components is not None or options.classes
    alone = not (mixture or options.delta)
    for name, default in (("solver", "auto"), ("basis", "eigen")):
        if not alone and getattr(options, name) != default:
            raise ValueError(f"--{name} is an option of one Gaussian, got {getattr(options, name)}")
    fits = {"rank": None, "shrinkage": "cv", "tail": "mean", "select": None, "groups": None, "mirror": False}
    for name, default in fits.items() if options.delta else ():
        if getattr(options, name) != default:
            raise ValueError(f"--{name} is an option of fits: --delta keeps the data as they are")
    if options.em_steps and options.components is None:
        got = ", got --classes, whose components would leave them" if options.classes else ""
        raise ValueError(f"--em-steps is an option of clusters: expected --components{got}")
    if options.prior and not mixture:
        raise ValueError("--prior is an option of mixtures: expected --components or --classes")
    if options.classes and images.labels is None:
        raise ValueError(f"--classes: {images.name} has no class labels")
    if world > 1 and not alone:
        raise ValueError("several processes share the fit of one Gaussian only: start one for a mixture")
    groups = None if options.groups is None else _groups(options.groups, len(images))
    if options.delta:
        return DeltaDenoiser(images.tensor(), images.labels)
    if alone:
        mine = images if world == 1 else images.subset(range(rank, len(images), world))
        return GaussianDenoiser.fit(
            _samples(mine, stream=world > 1 or options.basis == "cosine"),
            options.rank,
            options.shrinkage,
            options.solver,
            None if groups is None else groups[rank::world],
            tail=options.tail,
            basis=options.basis,
            mirror=options.mirror,
            select=options.select,
            all_processes=world > 1,
        )
    return GaussianMixtureDenoiser.fit(
        images.tensor(),
        options.components,
        options.rank,
        options.seed,
        images.labels if options.classes else None,
        options.shrinkage,
        groups=groups,
        tail=options.tail,
        mirror=options.mirror,
        select=options.select,
        em_steps=options.em_steps,
        prior=options.prior,
    )


def _info(options: argparse.Namespace) -> None:
    print(summarise(from_pretrained(options.model)))


def _import_edm(options: argparse.Namespace) -> None:
    _expect_free(options.out, options.overwrite)
    model = import_edm(options.snapshot)
    model.provenance = {"data": {"snapshot": options.snapshot.name}}
    model.save_pretrained(options.out)
    print(f"{summarise(model)}\n\nsaved to {options.out}")


def _watch(options: argparse.Namespace) -> None:
    if not options.every < 1e9:  # more than the system can sleep
        raise ValueError(f"expected --every of less than 1e9 seconds, got {options.every:g}")
    watch(options.folder, options.every, options.once)


def _report(options: argparse.Namespace) -> None:
    page = write_page(Run(options.folder), options.out)
    print(page)
    if options.open:
        webbrowser.open(page.resolve().as_uri())


# Parts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """Batches of a data set, as often as they are asked for."""

    images: ImageData

    def __iter__(self) -> Iterator[Tensor]:
        return self.images.batches(min(_BATCH, max(1, 2**25 // self.images.event_shape.numel())))


def _samples(images: ImageData, stream: bool) -> Tensor | _Stream:
    size = 4 * len(images) * images.event_shape.numel()
    return _Stream(images) if stream or size > IN_MEMORY else images.tensor()


def _groups(path: Path, count: int) -> Tensor:
    try:
        groups = torch.as_tensor(np.array(MappedArray(path).array))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--groups {path}: expected a .npy file of {count} integers ({error})") from error
    if groups.shape != (count,) or groups.is_floating_point():  # before it is shared by processes
        got = f"{groups.dtype} of shape {tuple(groups.shape)}"
        raise ValueError(f"--groups {path}: expected {count} integers, one an image, got {got}")
    return groups


def _expect_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected {folder} to be a folder, got a file")
    if (folder / CONFIG_NAME).exists() and not overwrite:
        held = "a model"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            held = f"a {json.loads((folder / CONFIG_NAME).read_text())['class_name']}"
        raise ValueError(f"{folder} holds {held}: choose another folder, or say --overwrite")


if __name__ == "__main__":
    sys.exit(main())
