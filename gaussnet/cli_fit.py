"""`gaussnet fit`: analytic denoisers from images.

    gaussnet fit DATA --out DIR
    gaussnet fit DATA --out DIR --components 20 --rank 256
    gaussnet fit DATA --out DIR --classes --marginals
    accelerate launch --no_python gaussnet fit DATA --out DIR

Large data are streamed for one Gaussian, whose fit processes share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from gaussnet.data import ImageData, open_images
from gaussnet.data.arrays import Layout, MappedArray
from gaussnet.data.files import Mode, OnError
from gaussnet.denoisers import (
    DeltaDenoiser,
    Denoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
)
from gaussnet.fit.spectrum import OPTIONS
from gaussnet.hub import CONFIG_NAME
from gaussnet.processes import joined_processes
from gaussnet.summary import summarise

IN_MEMORY = 2**32  # bytes of float32 images that are held at once; beyond, they are streamed
_BATCH = 512


def add_fit(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Fits a Gaussian (default), a mixture or the delta denoiser, and prints its spectrum. With "
        "--marginals, the former two are refined by what each pixel's own distribution tells."
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
    parser.add_argument(
        "--marginals", action="store_true", help="refine it by each pixel's distribution, in each component"
    )
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
        metavar="N",
        help="samples of the covariance that clusters or classes have in common, added to each (default: 0; "
        "with --marginals half as many as dimensions, but for --em-steps)",
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


def _fit(options: argparse.Namespace) -> None:
    expect_free(options.out, options.overwrite)
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
    base = _fitted_base(options, images, rank, world)
    if not options.marginals:
        return base
    assert isinstance(base, (GaussianDenoiser, GaussianMixtureDenoiser))
    alone = isinstance(base, GaussianDenoiser)
    return MarginalDenoiser.fit(
        _samples(_share(images, rank, world), stream=world > 1) if alone else images.tensor(),
        base,
        labels=images.labels if options.classes else None,
        generator=torch.Generator().manual_seed(options.seed),
        mirror=options.mirror,
        all_processes=world > 1,
    )


def _fitted_base(options: argparse.Namespace, images: ImageData, rank: int, world: int) -> Denoiser:
    mixture = options.components is not None or options.classes
    alone = not (mixture or options.delta)
    for name, default in (("solver", "auto"), ("basis", "eigen")):
        if not alone and getattr(options, name) != default:
            raise ValueError(f"--{name} is an option of one Gaussian, got {getattr(options, name)}")
    fits = {"rank": None, "shrinkage": "cv", "tail": "mean", "select": None, "groups": None, "mirror": False}
    fits["marginals"] = False
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
        return GaussianDenoiser.fit(
            _samples(_share(images, rank, world), stream=world > 1 or options.basis == "cosine"),
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
    pooled = options.marginals and not options.em_steps
    prior = options.prior
    if prior is None:
        prior = images.event_shape.numel() / 2 if pooled else 0.0
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
        prior=prior,
    )


def expect_free(folder: Path, overwrite: bool) -> None:
    """Raises a ValueError if a model lies in the folder, and may not be replaced, or it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected {folder} to be a folder, got a file")
    if (folder / CONFIG_NAME).exists() and not overwrite:
        held = "a model"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            held = f"a {json.loads((folder / CONFIG_NAME).read_text())['class_name']}"
        raise ValueError(f"{folder} holds {held}: choose another folder, or say --overwrite")


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


@dataclass(frozen=True)
class _Stream:
    """Batches of a data set, as often as they are asked for."""

    images: ImageData

    def __iter__(self) -> Iterator[Tensor]:
        return self.images.batches(min(_BATCH, max(1, 2**25 // self.images.event_shape.numel())))


def _share(images: ImageData, rank: int, world: int) -> ImageData:
    """The images that are this process's."""
    return images if world == 1 else images.subset(range(rank, len(images), world))


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
