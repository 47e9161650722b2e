"""The trajectories of a latent pipeline of diffusers, and teleport in its latents. Fig. 5, Eq. 18, 22."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gaussnet.data.arrays import MappedArray
from gaussnet.denoisers import GaussianDenoiser
from gaussnet.experiments.running import Reading, Row
from gaussnet.experiments.setting import Setting
from gaussnet.experiments.shared import in_words, numbers, quartiles, ranges
from gaussnet.plots.latent import latent
from gaussnet.probes.geometry import scheduler_states, trajectory_rows

SOURCE = "Fig. 5, Eq. 18, 22, B.2"
NEEDS_DATA = False  # latents can come from a file
DEFAULT_MODEL = "gaussian"  # with --pipeline, there is no other
ASKS_CLASSES = True  # a pipeline is asked with its prompt, and may be none that `Setting` loads
SEEDS_A_UNIT = 8
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


class Latents(NamedTuple):
    """What sampling in latents needs.

    Attributes:
        predict: what the network says of a scaled state (B, C, H, W) at a timestep.
        scheduler: of diffusers.
        gaussian: fitted to latents.
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    scheduler: Any
    gaussian: GaussianDenoiser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--pipeline",
        metavar="PATH",
        help="a pipeline of diffusers with a VAE; default: what --model diffusers:PATH names",
    )
    parser.add_argument(
        "--latents",
        metavar="FILE.npy",
        help="scaled latents (N, C, H, W) to fit; default: --data are encoded",
    )
    parser.add_argument("--prompt", help="of a conditional pipeline (default: empty)")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none, as is the default")
    parser.add_argument(
        "--scheduler",
        choices=[*SCHEDULERS, "own"],
        default="ddim",
        help="in place of the pipeline's (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=32, help="trajectories (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the scheduler (default %(default)s)")
    parser.add_argument(
        "--skips",
        type=int,
        nargs="+",
        default=[1, 2, 5, 10, 15, 20, 25, 30],
        metavar="N",
        help="first steps that teleport replaces (default: 1 to 30)",
    )


def units(setting: Setting, options: argparse.Namespace) -> list[str]:
    """Trajectories in groups."""
    if options.seeds < 1 or options.steps < 2:
        raise ValueError(f"expected seeds >= 1 and steps >= 2, got {options.seeds} and {options.steps}")
    if not 0 <= min(options.skips) <= max(options.skips) < options.steps:
        raise ValueError(f"expected skips from 0 to {options.steps - 1}, got {options.skips}")
    if options.latents is None and setting.data is None:
        raise ValueError("expected images to encode (--data) or a file of latents (--latents), got neither")
    if options.latents is not None and setting.data is not None:
        raise ValueError(
            "expected images to encode (--data) or a file of latents (--latents), got "
            f"{setting.data.name} and {options.latents}"
        )
    _path(setting, options)
    return [f"seeds={seeds}" for seeds in ranges(options.seeds, SEEDS_A_UNIT)]


@torch.no_grad()
def measure(setting: Setting, options: argparse.Namespace, unit: str) -> list[Row]:
    """The rows of a group: its trajectories, and where teleported ones end."""
    seeds = numbers(unit.removeprefix("seeds="))
    work = _prepared(setting, options)
    shape = (1, *work.gaussian.event_shape)
    noise = torch.cat([torch.randn(shape, generator=setting.generator("latent", seed)) for seed in seeds])
    return latent_rows(work, noise.to(setting.device), options.steps, options.skips, seeds)


def draw(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Three panels: rotation, deviation from the Gaussian, teleport."""
    return latent(rows)


def read(rows: Sequence[Row], options: argparse.Namespace) -> Reading:
    """What teleport changes by skip; how flat and how Gaussian trajectories are."""
    jumps = [row for row in rows if row["kind"] == "teleport"]
    table: list[Row] = []
    for skip in sorted({row["skip"] for row in jumps}):
        own = [row for row in jumps if row["skip"] == skip]
        low, middle, high = quartiles(row["rms"] for row in own)
        table.append(
            {
                "skip": skip,
                "sigma": own[0]["sigma"],
                "evaluations": own[0]["evaluations"],
                "RMS to plain": middle,
                "quartiles": f"{low:.3g} to {high:.3g}",
            }
        )
    paths = [row for row in rows if row["kind"] == "geometry"]
    shares = [in_words(quartiles(row[name] for row in paths)) for name in ("pc2", "pc3")]
    missed, bound = (np.median([row[name] for row in paths]) for name in ("rotation_error", "rotation_bound"))
    last = min(row["sigma"] for row in rows if row["kind"] == "state")
    ends = [row["deviation"] for row in rows if row["kind"] == "state" and row["sigma"] == last]
    text = (
        f"Root mean square per dimension between teleported and plain last latents (median over {len(paths)} "
        f"trajectories). In variance-preserving coordinates 2 principal components have {shares[0]} of a "
        f"trajectory's variance, 3 have {shares[1]}. The rotation formula misses at most {missed:.3g} of a "
        f"state's length (median of the largest errors; the latent Gaussian's bound: {bound:.3g}). The last "
        f"latents deviate from the Gaussian's by {np.median(ends):.3g} per dimension."
    )
    return Reading(table, text)


@torch.no_grad()
def latent_rows(
    work: Latents, noise: Tensor, steps: int, skips: Sequence[int], seeds: Sequence[int]
) -> list[Row]:
    """The geometry of a scheduler's trajectories, and how far teleported ones end from them.

    Args:
        work: network, scheduler and Gaussian.
        noise: standard normal, (B, C, H, W).
        steps: of the scheduler.
        skips: numbers of first steps that teleport replaces.
        seeds: B numbers for the trajectories.

    Returns:
        The rows of `gaussnet.probes.geometry.trajectory_rows`, and one of the kind "teleport" for each skip
        and trajectory: skip, sigma (the level jumped to), evaluations (left), and rms, the root mean square
        per dimension between the teleported and the plain last latents.

    Raises:
        TypeError: if the scheduler is not one that can be teleported.
        ValueError: if it visits timesteps twice, as PNDM does: then these are not the states of a trajectory.
    """
    from gaussnet.integrations.diffusers import scheduler_levels, teleport_scheduler

    predict, scheduler, gaussian = work
    scheduler.set_timesteps(steps, device=noise.device)
    alpha, level = scheduler_levels(scheduler)
    start = noise * scheduler.init_noise_sigma

    def states(skip: int) -> Tensor:
        x, timesteps = teleport_scheduler(scheduler, gaussian, start, skip=skip)
        if len(timesteps) != len(level) - skip:
            raise ValueError(
                f"expected a scheduler that visits each timestep once, got {type(scheduler).__name__}"
            )
        return scheduler_states(predict, scheduler, x, timesteps)

    plain = states(0)
    last_alpha, last_level = _last(scheduler, float(alpha[0]))
    scales = torch.cat([alpha, alpha.new_tensor([last_alpha])])
    levels = torch.cat([level, level.new_tensor([last_level])])
    x = plain.double() / scales.to(plain.device).reshape(-1, *(1,) * noise.ndim)
    rows = trajectory_rows(gaussian, x, levels, seeds)
    for skip in skips:
        apart = (states(skip)[-1] - plain[-1]).double().flatten(1).square().mean(1).sqrt().tolist()
        found = {"skip": skip, "sigma": float(level[skip]), "evaluations": len(level) - skip}
        rows += [
            {"kind": "teleport", "seed": seed, **found, "rms": rms}
            for seed, rms in zip(seeds, apart, strict=True)
        ]
    return rows


# Parts ------------------------------------------------------------------------------------------------

_kept: dict[str, Latents] = {}  # of the last setting: units share the pipeline and the fit


def _prepared(setting: Setting, options: argparse.Namespace) -> Latents:
    key = json.dumps([setting.identity, vars(options), str(setting.device)], sort_keys=True, default=str)
    if key not in _kept:
        _kept.clear()
        pipeline = open_pipeline(_path(setting, options)).to(setting.device)
        scheduler = scheduler_of(pipeline, options.scheduler)
        fitted = encoded(pipeline, setting) if options.latents is None else load_latents(options.latents)
        channels = pipeline.unet.config["in_channels"]
        if fitted.shape[1] != channels:
            raise ValueError(f"expected latents of {channels} channels, got shape {tuple(fitted.shape)}")
        gaussian = GaussianDenoiser.fit(fitted, shrinkage=setting.shrinkage).to(setting.device)
        predict = predictor(pipeline, options.prompt, options.guidance, setting.batch)
        _kept[key] = Latents(predict, scheduler, gaussian)
    return _kept[key]


def _path(setting: Setting, options: argparse.Namespace) -> str:
    name = setting.model_name
    if options.pipeline is None and not name.startswith("diffusers:"):
        raise ValueError(f"expected --pipeline PATH or --model diffusers:PATH, got --model {name}")
    return options.pipeline or name.removeprefix("diffusers:")


def open_pipeline(path: str) -> Any:
    """A pipeline of diffusers with a VAE, from a folder or the hub.

    Raises:
        ImportError: if diffusers is not installed.
        ValueError: if it has no VAE or no UNet.
    """
    from gaussnet.integrations.diffusers import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
    if _coder(pipeline) is None or getattr(pipeline, "unet", None) is None:
        raise ValueError(
            f"expected a pipeline with a VAE and a UNet, such as LDMPipeline or StableDiffusionPipeline, got "
            f"{type(pipeline).__name__} in {path}"
        )
    return pipeline


def scheduler_of(pipeline: Any, name: str) -> Any:
    """A scheduler for the process of a pipeline: one of `SCHEDULERS`, or its "own".

    Raises:
        ValueError: if another one is asked for a process that DDPM's schedulers do not know.
    """
    from gaussnet.integrations.diffusers import diffusers

    own = pipeline.scheduler
    if name == "own":
        return own
    if not hasattr(own, "alphas_cumprod"):
        raise ValueError(f"expected --scheduler own for a pipeline with {type(own).__name__}, got {name!r}")
    # Latents are not confined to [-1, 1], which a config that says nothing of clipping would mean.
    extra = {"clip_sample": False} if name == "ddim" else {}
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config, **extra)


def predictor(
    pipeline: Any, prompt: str | None, guidance: float, batch_size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The UNet as a function of scaled state and timestep, under a prompt if it takes one.

    Raises:
        ValueError: for a prompt or guidance that the pipeline has no use for, or one whose prompts are more
            than one embedding.
    """
    conditions: list[tuple[float, dict[str, Tensor]]] = [(1.0, {})]
    if hasattr(pipeline, "encode_prompt"):
        embeds = pipeline.encode_prompt(prompt or "", pipeline.device, 1, guidance != 1)
        if len(embeds) != 2:
            raise ValueError(
                f"expected a pipeline whose prompts are one embedding, got {type(pipeline).__name__}"
            )
        # classifier-free guidance: g D(x | prompt) + (1 - g) D(x), with the empty prompt in the latter
        weights = [guidance, 1 - guidance] if guidance != 1 else [1.0]
        conditions = [
            (weight, {"encoder_hidden_states": embed}) for weight, embed in zip(weights, embeds, strict=False)
        ]
    elif prompt is not None or guidance != 1:
        raise ValueError(f"expected no prompt and no guidance for a {type(pipeline).__name__}")

    def one(x: Tensor, t: Tensor) -> Tensor:
        outputs = [
            weight
            * pipeline.unet(x, t, **{key: value.expand(len(x), -1, -1) for key, value in told.items()}).sample
            for weight, told in conditions
        ]
        return torch.stack(outputs).sum(0)[:, : x.shape[1]]  # further channels are learned variances

    return lambda x, t: torch.cat([one(part, t) for part in x.split(batch_size)])


@torch.no_grad()
def encoded(pipeline: Any, setting: Setting) -> Tensor:
    """The latents of the images that references are fitted to, scaled as the UNet has them, (N, C, H, W).

    Raises:
        ValueError: if the images do not have the channels of the VAE.
    """
    coder = _coder(pipeline)
    images, _ = setting.fitted
    if images.shape[1] != coder.config["in_channels"]:
        raise ValueError(
            f"expected images of {coder.config['in_channels']} channels, those of the VAE, got shape "
            f"{tuple(images.shape[1:])}"
        )
    generator, latents = setting.generator("encode"), list[Tensor]()
    for part in images.split(setting.batch):
        found = coder.encode(part.to(setting.device, coder.dtype))
        drawn = found.latent_dist.sample(generator) if hasattr(found, "latent_dist") else found.latents
        latents.append(drawn.float().cpu())
    shift, scale = coder.config.get("shift_factor") or 0.0, coder.config["scaling_factor"]
    return (torch.cat(latents) - shift) * scale


def load_latents(path: str | Path) -> Tensor:
    """Latents of a file, (N, C, H, W), float32.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not such an array.
    """
    latents = MappedArray(Path(path)).array
    if latents.ndim != 4 or not np.issubdtype(latents.dtype, np.floating):
        raise ValueError(f"{path}: expected floats (N, C, H, W), got {latents.dtype} {latents.shape}")
    return torch.from_numpy(latents.astype(np.float32))


def _coder(pipeline: Any) -> Any:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


def _last(scheduler: Any, first_alpha: float) -> tuple[float, float]:
    """Scale and level at which a scheduler ends: 0, or the first of its table."""
    if hasattr(scheduler, "sigmas"):
        level = float(scheduler.sigmas[-1])
    else:
        share = float(scheduler.final_alpha_cumprod)
        level = ((1 - share) / share) ** 0.5
    exploding = first_alpha == 1
    return (1.0 if exploding else (1 + level**2) ** -0.5), level
