"""`gaussnet sample`: images by seeds, as PNG files or one npz, resumable and shared by processes.

gaussnet sample MODEL --solver unipc --steps 8 --teleport auto --seeds 0-63 --out DIR
accelerate launch --no_python gaussnet sample MODEL --seeds 0-49999 --out DIR
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gaussnet.denoisers import Denoiser, GaussianDenoiser
from gaussnet.hub import from_pretrained
from gaussnet.samplers import SOLVERS, karras_sigmas
from gaussnet.sampling import Jump, choose_jump, one_hot, parse_seeds, sample_seeds


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Draws images. A seed gives the same image whatever the batch size or the number of processes. Seeds "
        "whose files lie in the folder already are left out, so that the same command resumes."
    )
    parser.add_argument("model", help="a folder that save_pretrained wrote, or a hub repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG files, or a file NAME.npz")
    parser.add_argument("--seeds", default="0-63", help="such as 0-49999 or 1,5,9 (default %(default)s)")
    parser.add_argument(
        "--solver", choices=sorted(set(SOLVERS) - {"dpm_v3"}), default="heun", help="(default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=18, help="levels above 0 (default %(default)s)")
    parser.add_argument("--sigma-min", type=float, default=0.002)
    parser.add_argument("--sigma-max", type=float, default=80.0)
    parser.add_argument("--rho", type=float, default=7.0)
    parser.add_argument(
        "--teleport",
        default="none",
        metavar="none|auto|SIGMA",
        help="jump to a level in closed form, then take all steps from there; auto: a level by the model's "
        "gate, or measured on it (default %(default)s)",
    )
    parser.add_argument("--plain-skip", action="store_true", help="drop steps before the jump: no new grid")
    parser.add_argument("--gaussian", help="a saved Gaussian for teleport, if the model has none of its own")
    parser.add_argument("--classes", help="class of each seed in turn, such as 3 or 0-9")
    parser.add_argument("--guidance", type=float, default=1.0, help="needs --classes (default: none)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="the first 64 images in one picture")
    parser.set_defaults(run=run_sample)


def run_sample(options: argparse.Namespace) -> None:
    """Samples what is missing."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    seeds = parse_seeds(options.seeds)
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name} >= 1, got {getattr(options, name)}")
    single = options.out.suffix == ".npz"
    if single and world > 1:
        raise ValueError(f"expected a folder for {world} processes, got {options.out}")
    if (options.out.is_file() and not single) or (single and options.out.is_dir()):
        raise ValueError(f"expected --out to be a folder or NAME.npz, got {options.out}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    model = from_pretrained(options.model).to(device).eval()
    _check_images(model)
    sigmas = karras_sigmas(options.steps, options.sigma_min, options.sigma_max, options.rho)
    jump = _jump(options, model, sigmas, device)
    classes = None
    if options.classes is not None:
        known = parse_seeds(options.classes)
        classes = one_hot(model, [known[seed % len(known)] for seed in seeds])
    left = seeds[rank::world]
    places = torch.arange(len(seeds))[rank::world]
    if not single:
        options.out.mkdir(parents=True, exist_ok=True)
        missing = [i for i, seed in enumerate(left) if not _file(options.out, seed).is_file()]
        left, places = [left[i] for i in missing], places[missing]
    drawn: dict[int, np.ndarray] = {}
    bar = tqdm(total=len(left), unit="image", disable=None if rank == 0 else True)
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
    )
    for mine, images in batches:
        for seed, pixels in zip(mine, to_pixels(images), strict=True):
            if single:
                drawn[seed] = pixels
            else:
                _save(_file(options.out, seed), pixels)
        bar.update(len(mine))
    bar.close()
    if single:
        aside = options.out.with_name(options.out.name + ".partial.npz")
        np.savez(aside, images=np.stack([drawn[seed] for seed in seeds]), seeds=np.array(seeds))
        aside.replace(options.out)
    if options.grid is not None and rank == 0:
        shown = [seed for seed in seeds[:64] if seed in drawn or _file(options.out, seed).is_file()]
        tiles = [drawn[seed] if single else np.array(Image.open(_file(options.out, seed))) for seed in shown]
        picture(tiles, options.grid)
    if rank == 0:
        where = "" if jump is None else f", after a jump to sigma {jump.sigma_skip:.3g}"
        told = f"{len(left)} images of {len(seeds)} seeds by {options.solver} in {options.steps} steps{where}"
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


def _jump(options: argparse.Namespace, model: Denoiser, sigmas: Tensor, device: torch.device) -> Jump | None:
    if options.teleport == "none":
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
    return choose_jump(model, gaussian, level, sigmas)


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
