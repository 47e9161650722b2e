"""`gaussnet sample`: images by seeds, as PNG files or one npz.

    gaussnet sample MODEL --solver unipc --steps 8 --teleport auto --seeds 0-63 --out DIR
    gaussnet sample MODEL --solver dpm_v3 --statistics FILE.safetensors --statistics-from DATA --out DIR
    accelerate launch --no_python gaussnet sample MODEL --seeds 0-49999 --out DIR

Only what a folder lacks is drawn, so that the same command resumes; processes share the seeds. `sample.json`
tells what a folder's images were drawn with, all that decides an image of a seed: others are refused there.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gaussnet.data import open_images
from gaussnet.denoisers import Denoiser, GaussianDenoiser, GuidedDenoiser
from gaussnet.experiments.setting import fitting
from gaussnet.hub import from_pretrained
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.processes import Processes
from gaussnet.sample_settings import (
    SETTINGS_NAME,
    check_settings,
    keep_settings,
    measured_settings,
    settings_of,
)
from gaussnet.samplers import (
    SOLVERS,
    ModelStatistics,
    compute_ems,
    log_snr_sigmas,
    model_sigmas,
)
from gaussnet.sampling import Jump, choose_jump, one_hot, parse_seeds, sample_seeds

STATISTICS_SAMPLES, STATISTICS_LEVELS = 1024, 60
JUMP_STATES = 16  # on which the level of a jump is measured

log: logging.Logger = logging.getLogger(__name__)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Draws images. A seed gives the same image whatever the batch size or the number of processes. Seeds "
        "whose files lie in the folder already are left out, so that the same command resumes. Another model "
        "or other settings than those of its sample.json are an error: they need another --out."
    )
    parser.add_argument("model", help="a folder that save_pretrained wrote, or a hub repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG files, or a file NAME.npz")
    parser.add_argument("--seeds", default="0-63", help="such as 0-49999 or 1,5,9 (default %(default)s)")
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="heun", help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=18, help="levels above 0 (default %(default)s)")
    parser.add_argument(
        "--sigma-min",
        type=float,
        default=0.002,
        help="last level above 0, or the network's lowest if that is higher (default %(default)s)",
    )
    parser.add_argument(
        "--sigma-max",
        type=float,
        default=80.0,
        help="first level, or the network's highest if that is lower (default %(default)s)",
    )
    parser.add_argument("--rho", type=float, default=7.0, help="of EDM's grid (default %(default)g)")
    parser.add_argument(
        "--teleport",
        default="none",
        metavar="none|auto|SIGMA",
        help="jump to a level in closed form, then take all steps from there; auto: a level by the model's "
        "gate, or measured on it with --classes and --guidance (default %(default)s)",
    )
    parser.add_argument("--plain-skip", action="store_true", help="drop steps before the jump: no new grid")
    parser.add_argument("--gaussian", help="a saved Gaussian for teleport, if the model has none of its own")
    parser.add_argument("--classes", help="class of each seed in turn, such as 3 or 0-9")
    parser.add_argument("--guidance", type=float, default=1.0, help="needs --classes (default: none)")
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE.safetensors", help="of the model, which dpm_v3 needs"
    )
    parser.add_argument(
        "--statistics-from",
        metavar="DATA",
        help="images to compute them from if there is no such file, which is written then: they take "
        f"{4 * STATISTICS_LEVELS} evaluations of {STATISTICS_SAMPLES} images",
    )
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="the first 64 images in one picture")
    parser.set_defaults(run=run_sample)


def run_sample(options: argparse.Namespace) -> None:
    """Samples what is missing."""
    # Not joined: a share of the seeds is all that they need, and one may end, or fail, before the others.
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    seeds = parse_seeds(options.seeds)
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name} >= 1, got {getattr(options, name)}")
    single = options.out.suffix == ".npz"
    if single and processes.world > 1:
        raise ValueError(f"expected a folder for {processes.world} processes, got {options.out}")
    if (options.out.is_file() and not single) or (single and options.out.is_dir()):
        raise ValueError(f"expected --out to be a folder or NAME.npz, got {options.out}")
    if options.guidance != 1 and options.classes is None:
        raise ValueError(f"expected --classes with --guidance {options.guidance:g}, got none")
    _check_statistics(options)
    device = processes.device(options.device)
    model = from_pretrained(options.model).eval()
    _check_images(model)
    settings: dict[str, Any] = {}
    if not single:
        settings = settings_of(options, model)
        check_settings(options.out, settings)  # before what takes long
    model = model.to(device)
    sigmas = model_sigmas(model, options.steps, options.sigma_min, options.sigma_max, options.rho)
    classes = _classes(options, model, seeds)
    jump = _jump(options, model, sigmas, device)
    statistics = None
    if options.statistics is not None:
        statistics = _statistics(options, model, sigmas, device)
    if not single:
        settings |= measured_settings(options, jump)
        check_settings(options.out, settings)
    for path in (options.out, options.grid):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    left = seeds[processes.rank :: processes.world]
    places = torch.arange(len(seeds))[processes.rank :: processes.world]
    if not single:
        options.out.mkdir(parents=True, exist_ok=True)
        missing = [i for i, seed in enumerate(left) if not _file(options.out, seed).is_file()]
        if processes.first and len(missing) < len(left) and not (options.out / SETTINGS_NAME).exists():
            what = f"images but no {SETTINGS_NAME}"
            log.warning("%s has %s: they are taken to be of this model and these settings", options.out, what)
        left, places = [left[i] for i in missing], places[missing]
    label_dim = getattr(model.model, "label_dim", 0) if isinstance(model, NetworkDenoiser) else 0
    if processes.first and label_dim and classes is None:
        log.warning("no class is told to this network of %d classes: --classes chooses them", label_dim)
    drawn: dict[int, np.ndarray] = {}
    bar = tqdm(total=len(left), unit="image", disable=None if processes.first else True)
    batches = sample_seeds(
        model,
        left,
        sigmas,
        solver=options.solver,
        jump=jump,
        regrid=not options.plain_skip,
        batch_size=options.batch,
        class_labels=None if classes is None else classes[places],
        guidance=options.guidance,
        statistics=statistics,
    )
    keeps = processes.first and not single
    for mine, images in batches:
        if keeps:  # with an image, and not for settings that give none
            keep_settings(options.out, settings)
        for seed, pixels in zip(mine, to_pixels(images), strict=True):
            if single:
                drawn[seed] = pixels
            else:
                _save(_file(options.out, seed), pixels)
        bar.update(len(mine))
    bar.close()
    if keeps:
        keep_settings(options.out, settings)
    if single:
        aside = options.out.with_name(options.out.name + ".partial.npz")
        np.savez(aside, images=np.stack([drawn[seed] for seed in seeds]), seeds=np.array(seeds))
        aside.replace(options.out)
    shown: list[int] = []
    if options.grid is not None and processes.first:
        shown = [seed for seed in seeds[:64] if seed in drawn or _file(options.out, seed).is_file()]
        tiles = [drawn[seed] if single else np.array(Image.open(_file(options.out, seed))) for seed in shown]
        picture(tiles, options.grid)
    if processes.first:
        where = "" if jump is None else f", after a jump to sigma {jump.sigma_skip:.3g}"
        if options.grid is not None and len(shown) < len(seeds[:64]):
            log.warning(
                "%s shows %d of %d images: other processes are not done; the same command draws it again",
                options.grid,
                len(shown),
                len(seeds[:64]),
            )
        told = (
            f"{len(left)} images of {len(seeds)} seeds by {options.solver} in {len(sigmas) - 1} steps{where}"
        )
        print(f"{told}: {options.out}")


def to_pixels(images: Tensor) -> list[np.ndarray]:
    """Images (B, C, H, W) in [-1, 1] as arrays (H, W) or (H, W, 3), uint8, rounded as EDM does."""
    pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
    return [image[..., 0] if image.shape[-1] == 1 else image for image in pixels]


def picture(tiles: list[np.ndarray], path: Path) -> None:
    """Saves images next to each other, eight in a row."""
    columns = min(8, len(tiles))
    blank = np.full_like(tiles[0], 255)
    tiles = tiles + [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def _classes(options: argparse.Namespace, model: Denoiser, seeds: Sequence[int]) -> Tensor | None:
    """The label of each seed: the classes in turn, whatever other seeds there are."""
    if options.classes is None:
        return None
    known = parse_seeds(options.classes, "classes")
    return one_hot(model, [known[seed % len(known)] for seed in seeds])


def _jump(options: argparse.Namespace, model: Denoiser, sigmas: Tensor, device: torch.device) -> Jump | None:
    if options.teleport == "none":
        for name in ("plain_skip", "gaussian"):
            if getattr(options, name):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is an option of jumps: expected --teleport auto or a level")
        return None
    gaussian = None
    if options.gaussian is not None:
        gaussian = from_pretrained(options.gaussian)
        if not isinstance(gaussian, GaussianDenoiser):
            raise ValueError(f"expected --gaussian to be a GaussianDenoiser, got a {type(gaussian).__name__}")
        gaussian = gaussian.to(device)
    level = None
    if options.teleport != "auto":
        try:
            level = float(options.teleport)
        except ValueError:
            raise ValueError(f"expected --teleport none, auto or a level, got {options.teleport!r}") from None
        if not 0 < level < float(sigmas[0]):
            highest = f"the first level, {float(sigmas[0]):g}"
            raise ValueError(f"expected a level of --teleport above 0 and below {highest}, got {level:g}")
    # Not the seeds that are drawn: with others, the same folder would get images of another jump.
    states = range(JUMP_STATES)
    labels = _classes(options, model, states)
    jump = choose_jump(model, gaussian, level, sigmas, states, class_labels=labels, guidance=options.guidance)
    if not jump.sigma_skip < float(sigmas[0]):
        log.warning("no jump: the Gaussian stands in for the model from sigma %.3g up only", jump.sigma_skip)
        return None
    return jump


def _check_statistics(options: argparse.Namespace) -> None:
    """Raises an error unless statistics are given where they are needed, and only there."""
    if options.solver == "dpm_v3" and options.statistics is None:
        raise ValueError("dpm_v3: expected --statistics FILE.safetensors, got none")
    if options.solver != "dpm_v3" and options.statistics is not None:
        raise ValueError(f"expected --statistics with dpm_v3 alone, got it with {options.solver}")
    if options.statistics_from is not None and options.statistics is None:
        raise ValueError(
            "expected --statistics FILE.safetensors to keep what --statistics-from makes, got none"
        )
    if options.statistics is not None and options.statistics.suffix != ".safetensors":
        raise ValueError(f"expected --statistics FILE.safetensors, got {options.statistics}")
    if options.statistics is not None and not options.statistics.exists() and options.statistics_from is None:
        raise FileNotFoundError(
            f"no file {options.statistics}: --statistics-from DATA computes and writes it"
        )


def _statistics(
    options: argparse.Namespace, model: Denoiser, sigmas: Tensor, device: torch.device
) -> ModelStatistics:
    """Those of the file, or of the model at data, which are then kept there.

    They span the levels of the sampler. Of a model that samples with classes they are at data with theirs.
    """
    path: Path = options.statistics
    if path.exists():
        return ModelStatistics.load(path)
    data = fitting(open_images(options.statistics_from), tuple(model.event_shape))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data), generator=generator)[:STATISTICS_SAMPLES]
    images, labels = data[chosen]
    classes = None
    if options.classes is not None:
        if data.labels is None:
            raise ValueError(f"--classes: expected class labels in {data.name}, for the statistics, got none")
        classes = one_hot(model, labels.tolist()).to(device)
    statistics = compute_ems(
        model if options.guidance == 1 else GuidedDenoiser(model, model, options.guidance),
        data.to_float(images).to(device),
        log_snr_sigmas(STATISTICS_LEVELS, float(sigmas[-2]), float(sigmas[0])),
        n=STATISTICS_SAMPLES,
        batch_size=options.batch,
        generator=generator,
        class_labels=classes,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    statistics.save(aside)
    aside.replace(path)
    return statistics


def _check_images(model: Denoiser) -> None:
    shape = tuple(model.event_shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"expected a model of images of 1 or 3 channels, got one of {shape}")


def _file(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def _save(path: Path, pixels: np.ndarray) -> None:
    """Writes a PNG that is whole or absent."""
    aside = path.with_suffix(".partial")
    Image.fromarray(pixels).save(aside, format="PNG")
    aside.replace(path)
