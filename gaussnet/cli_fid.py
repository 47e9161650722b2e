"""`gaussnet fid`: distances of images to reference statistics, or to data, by the protocol of EDM.

    gaussnet fid SAMPLES --ref cifar10-32x32.npz
    gaussnet fid SAMPLES --data DATA --features DIR --num 10000 --out fid.json
    gaussnet fid --make-ref DATA --out STATS.npz
    accelerate launch --no_python gaussnet fid SAMPLES --ref STATS.npz

Images are rounded to uint8, and FID is the Frechet distance of 50,000 of them, seeds 0-49999 as `gaussnet
sample --seeds 0-49999` writes them, to the mean and covariance of the data's features.

References: Heusel et al. 2017, arXiv 1706.08500; Karras et al. 2022, arXiv 2206.00364, Appendix F.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaussnet.data import ImageData, open_images
from gaussnet.experiments.setting import fitting
from gaussnet.metrics import (
    FeatureStatistics,
    frechet_infinity,
    kernel_distance,
    load_extractor,
    memorisation,
    precision_recall,
)
from gaussnet.probes.quality import SUBSET_SIZE, features_of
from gaussnet.processes import Processes, joined_processes

PROTOCOL = 50_000  # images of published FIDs
LEAST = 4  # images that have three neighbours each


def add_fid(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Measures images against reference statistics (FID), or, with --data, against images: FID, its limit "
        "for infinitely many images, kernel distance, precision, recall and memorised share. Or makes the "
        "statistics. Processes of accelerate or torchrun share the work."
    )
    parser.add_argument(
        "images", nargs="?", help="the folder or npz of `gaussnet sample`, or what `gaussnet fit` takes"
    )
    parser.add_argument("--ref", type=Path, metavar="STATS.npz", help="mu and sigma, as EDM publishes them")
    parser.add_argument("--data", help="images to compare with; without --ref also for FID")
    parser.add_argument("--make-ref", metavar="DATA", help="write the statistics of images to --out")
    parser.add_argument(
        "--num", type=int, help=f"images, the first by name (default: {PROTOCOL}; of --make-ref, all)"
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="inception, timm:NAME, or the folder of a classifier (default %(default)s)",
    )
    parser.add_argument("--weights", type=Path, help="file of the weights of inception or of the timm model")
    parser.add_argument("--split", help="of --data or --make-ref, if they have some")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the results, or STATS.npz")
    parser.add_argument("--seed", type=int, default=0, help="of subsets (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images at a time (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.set_defaults(run=run_fid)


def run_fid(options: argparse.Namespace) -> None:
    """Measures, or makes statistics."""
    _check(options)
    out: Path | None = options.out
    # Before the extractor, which may be a long download.
    ref = None if options.ref is None else FeatureStatistics.load(options.ref)
    images = _first(options.make_ref or options.images, options)
    data = None
    if options.data is not None:
        data = _padded(open_images(options.data, split=options.split), images)
        if min(len(images), len(data)) < LEAST:
            got = f"{len(images)} and {len(data)}"
            raise ValueError(f"--data: expected at least {LEAST} images of both for recall, got {got}")
    with joined_processes() as processes:
        device = processes.device(options.device)
        extractor = load_extractor(options.features, options.weights).to(device)
        if out is not None:  # what can be refused was, and no features are lost yet
            out.parent.mkdir(parents=True, exist_ok=True)
        if options.make_ref is not None:
            assert out is not None
            statistics = _statistics(extractor, images, options.batch, processes)
            if processes.first:
                aside = out.with_name(f"{out.name}.partial.npz")
                statistics.save(aside)
                aside.replace(out)
                print(f"{out}: {len(statistics.mean)} {options.features} features of {images}")
            return
        results = {"images": options.images, "count": len(images), "features": options.features}
        if data is None:
            assert ref is not None
            found = {"fid": _statistics(extractor, images, options.batch, processes).distance(ref)}
        else:
            generated = _features(extractor, images, options.batch, processes)
            real = _features(extractor, data, options.batch, processes)
            if not processes.first:
                return
            found = _measured(generated, real, ref, options.seed)
            found["memorised"] = memorisation(images.tensor(), data.tensor()).share
        if processes.first:
            results |= {"ref": None if ref is None else str(options.ref), "data": options.data, **found}
            print(_told(results))
            if out is not None:
                aside = out.with_name(f"{out.name}.partial")
                aside.write_text(json.dumps(results, indent=2) + "\n")
                aside.replace(out)


def _check(options: argparse.Namespace) -> None:
    """Raises a ValueError if the options do not go together."""
    if (options.images is None) == (options.make_ref is None):
        raise ValueError("expected either IMAGES or --make-ref DATA, got both or neither")
    given = [name for name in ("ref", "data") if getattr(options, name) is not None]
    if options.make_ref is not None:
        if given:
            raise ValueError(f"--make-ref: expected no --{given[0]}, got {getattr(options, given[0])}")
        if options.out is None or options.out.suffix != ".npz":
            raise ValueError(f"--make-ref: expected --out STATS.npz, got {options.out}")
    elif not given:
        raise ValueError("expected --ref STATS.npz or --data DATA to compare with, got neither")
    if options.out is not None and options.out.is_dir():
        raise ValueError(f"expected --out to be a file, got the folder {options.out}")
    if options.split is not None and options.make_ref is None and options.data is None:
        raise ValueError(f"expected --split with --data or --make-ref, got {options.split}")
    for name in ("num", "batch"):
        least = 2 if name == "num" else 1
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"expected --{name} >= {least}, got {value}")


def _first(source: str, options: argparse.Namespace) -> ImageData:
    """The images of the protocol: exactly as many as were asked for.

    Raises:
        ValueError: if there are fewer, with the first seed that is missing.
    """
    making = options.make_ref is not None
    images = open_images(source, split=options.split if making else None)
    count = options.num or (len(images) if making else PROTOCOL)
    if len(images) < count:
        hint = "" if options.num else f"; --num {len(images)} takes these, whose FID compares with no other"
        raise ValueError(f"expected {count} images, got {len(images)} in {source}{_missing(source)}{hint}")
    return images if len(images) == count else images.subset(range(count))


def _missing(source: str) -> str:
    """Which seed's file a folder lacks, if its files are named by seeds."""
    names = sorted(path.stem for path in Path(source).rglob("*.png")) if Path(source).is_dir() else []
    if not names or not all(name.isdigit() for name in names):
        return ""
    seeds = {int(name) for name in names}
    first = next(seed for seed in range(min(seeds), max(seeds) + 2) if seed not in seeds)
    return f", which has no seed {first}"


def _padded(data: ImageData, images: ImageData) -> ImageData:
    """The data in the frame that samples of a padded model have.

    Raises:
        ValueError: if their shapes differ by more than that.
    """
    try:
        return fitting(data, tuple(images.event_shape))
    except ValueError:
        shapes = f"{tuple(data.event_shape)} and {tuple(images.event_shape)}"
        raise ValueError(f"expected --data and images of one shape, got {shapes}") from None


def _features(extractor: nn.Module, images: ImageData, batch: int, processes: Processes) -> Tensor:
    """Features (N, F) of all images, in their order, in every process."""
    parts = processes.gather([_share(extractor, images, batch, processes)])
    features = torch.empty(len(images), parts[0].shape[1])
    for rank, part in enumerate(parts):
        features[rank :: processes.world] = part
    return features


def _statistics(
    extractor: nn.Module, images: ImageData, batch: int, processes: Processes
) -> FeatureStatistics:
    """Mean and covariance of the features of all images."""
    features = _share(extractor, images, batch, processes)
    return FeatureStatistics.fit(features, all_processes=processes.world > 1)


def _share(extractor: nn.Module, images: ImageData, batch: int, processes: Processes) -> Tensor:
    """The features of this process's images."""
    mine = images.subset(range(processes.rank, len(images), processes.world))
    return torch.cat([features_of(extractor, part, batch) for part in mine.batches(batch)])


def _measured(generated: Tensor, real: Tensor, ref: FeatureStatistics | None, seed: int) -> dict[str, float]:
    """What features of images and of data tell."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    target = ref or FeatureStatistics.fit(real)
    size = min(SUBSET_SIZE, len(generated), len(real))
    kernel = kernel_distance(generated, real, subset_size=size, generator=generator())
    manifold = precision_recall(real, generated)
    return {
        "fid": FeatureStatistics.fit(generated).distance(target),
        "fid_infinity": frechet_infinity(generated, target, generator=generator()).value,
        "kid": kernel.mean,
        "kid_std": kernel.std,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def _told(results: dict[str, Any]) -> str:
    own = results["features"] == "inception"  # FID and KID are names of distances in these features
    distance = "FID" if own else "Frechet distance"
    names = {
        "fid": distance,
        "fid_infinity": f"{distance}, N -> infinity",
        "kid": "KID" if own else "kernel distance",
        "precision": "precision",
        "recall": "recall",
        "memorised": "memorised share",
    }
    lines = [
        f"{label:<30} {results[name]:.5g}" + (f" +- {results['kid_std']:.2g}" if name == "kid" else "")
        for name, label in names.items()
        if name in results
    ]
    against = results["ref"] or results["data"]
    told = f"{results['count']} images of {results['images']} against {against}, by {results['features']}"
    return "\n".join([told, *lines])
