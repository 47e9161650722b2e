"""Diffusers: its schedulers and pipelines begun by teleport, and its models as denoisers.

The states of a scheduler are alpha_t x, where x and the level s are those of
`gaussnet.integrations.diffusers_models`:

| schedulers                                     | levels            | alpha_t                              |
|------------------------------------------------|-------------------|--------------------------------------|
| DDIM, DDPM, PNDM                               | of alphas_cumprod | sqrt(alphas_cumprod)                 |
| DPMSolverMultistep, UniPCMultistep             | sigmas            | 1/sqrt(s^2 + 1); of flows: 1/(s + 1) |
| EulerDiscrete, EDMEuler, EDMDPMSolverMultistep | sigmas            | 1                                    |

and Eq. 18 of arXiv 2412.09726 moves them. The grid stays as it is, and the scheduler begins later on it:
`init_noise_sigma` belongs to the first of its states alone.

Latents are data like any other: fit the Gaussian to what the network denoises, such as
`vae.config.scaling_factor * vae.encode(images).latent_dist.sample()`, and its event shape is (4, H/8, W/8).
Pipelines that set the timesteps themselves, such as StableDiffusionPipeline, go on from a jump where their
scheduler takes custom ones (DPMSolverMultistep, EulerDiscrete without Karras' grid):

    x, timesteps = teleport_scheduler(pipe.scheduler, gaussian, None, 20, skip=6, batch_size=1)
    pipe.scheduler.set_timesteps(timesteps=timesteps.tolist())
    pipe(prompt, latents=x / pipe.scheduler.init_noise_sigma, timesteps=timesteps.tolist())

With guidance the Gaussian's flow is that of the unguided model, right at high noise where the two agree.
Written against diffusers 0.42.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.integrations.diffusers_models import DiffusersDenoiser, GaussnetUNet
from gaussnet.numerics import result_dtype
from gaussnet.schedules import DiscreteSchedule

diffusers: Any = import_module("diffusers")  # by name: a type checker would take this very file for it
randn_tensor: Any = import_module("diffusers.utils.torch_utils").randn_tensor

TABLE = (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler)
PRESERVING = (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
EXPLODING = (
    diffusers.EulerDiscreteScheduler,
    diffusers.EDMEulerScheduler,
    diffusers.EDMDPMSolverMultistepScheduler,
)
SUPPORTED = (*TABLE, *PRESERVING, *EXPLODING)
_ROUNDING = 1 + 1e-6  # sigmas are float32: a level that was read off the grid has to be found there

__all__ = ["DiffusersDenoiser", "GaussnetUNet", "scheduler_levels", "teleport_pipeline", "teleport_scheduler"]


def scheduler_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The grid of a scheduler whose timesteps are set: the table above.

    Args:
        scheduler: of one of the classes in that table.

    Returns:
        alpha_t and the noise level sigma_t/alpha_t of each step, float64, (n,). Timesteps that the scheduler
        visits several times (PNDM) count once.

    Raises:
        TypeError: if the scheduler's class is another one.
        ValueError: if its timesteps are not set, or the data has no share in its first state (zero terminal
            SNR): there is no noise level then.

    Example:
        >>> scheduler = diffusers.DDIMScheduler()
        >>> scheduler.set_timesteps(4)
        >>> alpha, level = scheduler_levels(scheduler)
        >>> torch.allclose(alpha, torch.rsqrt(level**2 + 1)), [round(sigma, 2) for sigma in level.tolist()]
        (True, [17.38, 3.44, 0.96, 0.01])
    """
    if not isinstance(scheduler, SUPPORTED):
        known = ", ".join(cls.__name__ for cls in SUPPORTED)
        raise TypeError(f"expected a scheduler that is one of {known}, got {type(scheduler).__name__}")
    if scheduler.num_inference_steps is None:
        raise ValueError(
            f"expected num_inference_steps, or a {type(scheduler).__name__} whose timesteps are set"
        )
    if isinstance(scheduler, TABLE):
        pndm = isinstance(scheduler, diffusers.PNDMScheduler)
        timesteps = (_pndm_steps(scheduler) if pndm else scheduler.timesteps).cpu()
        schedule = DiscreteSchedule(scheduler.alphas_cumprod)
        alpha = schedule.alpha(timesteps)
        return alpha, schedule.sigma(timesteps) / alpha
    sigma = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu")[: len(scheduler.timesteps)]
    if isinstance(scheduler, EXPLODING):
        return torch.ones_like(sigma), sigma
    if scheduler.config.get("use_flow_sigmas", False):
        return 1 - sigma, sigma / (1 - sigma)
    return torch.rsqrt(sigma**2 + 1), sigma


@torch.no_grad()
def teleport_scheduler(
    scheduler: Any,
    gaussian: GaussianDenoiser,
    latents: Tensor | None = None,
    num_inference_steps: int | None = None,
    *,
    skip: int | None = None,
    sigma_skip: float | None = None,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves the first state of a scheduler along the Gaussian's flow, and begins the scheduler there.

    Args:
        scheduler: it is set to begin at the new state; its grid stays. PNDM, whose timesteps depend on where
            it begins, gets new ones, and goes through its first steps again.
        gaussian: fitted to the data of the model that goes on from here.
        latents: the first state, (B, *event_shape), in the scheduler's own coordinates: unit noise times
            `scheduler.init_noise_sigma`. Default: such noise is drawn.
        num_inference_steps: to set the timesteps; default: they are set.
        skip: number of steps to drop, 0 <= skip < number of levels.
        sigma_skip: or the level to jump to: the lowest one on the grid that is not below it.
        batch_size: number of latents to draw.
        device: of the timesteps and drawn latents; default: that of the latents, else of the Gaussian.
        generator: draws the latents.

    Returns:
        The new state, in the scheduler's coordinates, dtype as before; and the timesteps that are left. Go on
        with `scheduler.step`; a pipeline that scales its latents by `init_noise_sigma`, or sets the timesteps
        again, undoes the jump.

    Raises:
        TypeError: if the scheduler is of another class than those above.
        ValueError: if not exactly one of skip and sigma_skip is given, it lies outside of the grid, the
            timesteps are not set, or too few are left for a PNDM with Runge-Kutta steps.

    Example:
        >>> scheduler = diffusers.DDIMScheduler()
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
        >>> x, timesteps = teleport_scheduler(scheduler, gaussian, torch.randn(1, 1, 2, 2), 20, skip=8)
        >>> len(timesteps), timesteps[0].item()  # 12 of 20 steps are left
        (12, 550)
    """
    if (skip is None) == (sigma_skip is None):
        raise ValueError(f"expected either skip or sigma_skip, got skip={skip} and sigma_skip={sigma_skip}")
    if device is None:
        device = gaussian.mean.device if latents is None else latents.device
    if num_inference_steps is not None and isinstance(scheduler, SUPPORTED):
        scheduler.set_timesteps(num_inference_steps, device=device)
    alpha, level = scheduler_levels(scheduler)
    if sigma_skip is not None:
        if not 0 < sigma_skip <= level[0] * _ROUNDING:
            raise ValueError(f"expected 0 < sigma_skip <= {level[0]:g}, the first level, got {sigma_skip}")
        skip = int((level * _ROUNDING >= sigma_skip).sum()) - 1
    assert skip is not None
    if not 0 <= skip < len(level):
        raise ValueError(f"expected 0 <= skip < {len(level)}, the number of steps, got {skip}")
    if latents is None:
        shape = (batch_size, *gaussian.event_shape)
        noise = randn_tensor(shape, generator, torch.device(device), result_dtype(gaussian.mean))
        x: Tensor = noise * scheduler.init_noise_sigma
    else:
        x = latents
    timesteps = _begin(scheduler, skip)
    if skip == 0:
        return x, timesteps
    start = x.to(result_dtype(x)) / float(alpha[0])
    moved = gaussian.flow(start, float(level[0]), float(level[skip]))  # Eq. 18
    return (float(alpha[skip]) * moved).to(x.dtype), timesteps


@torch.no_grad()
def teleport_pipeline(
    pipeline: Any,
    gaussian: GaussianDenoiser,
    batch_size: int = 1,
    num_inference_steps: int = 50,
    *,
    skip: int | None = None,
    sigma_skip: float | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
    **step_arguments: Any,
) -> Any:
    """Runs an unconditional pipeline of pixels or latents with the first steps teleported.

    With skip=0 these are the images of the pipeline itself, bit for bit.

    Args:
        pipeline: with a `unet` and a `scheduler`, such as DDIMPipeline or DDPMPipeline; and with a `vqvae` or
            `vae`, such as LDMPipeline, that decodes the latents over its scaling_factor.
        gaussian: fitted to the data of the unet: images in [-1, 1], or latents times the scaling_factor.
        batch_size: number of images.
        num_inference_steps: of the whole grid.
        skip: as in `teleport_scheduler`.
        sigma_skip: as in `teleport_scheduler`.
        generator: of the first noise, and of all later noise.
        output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W); the latter two in [0, 1].
        **step_arguments: for `scheduler.step`, such as eta.

    Returns:
        An ImagePipelineOutput.

    Raises:
        TypeError: if the scheduler is not supported, or its `step` does not take an argument.
        ValueError: as `teleport_scheduler`, or for an unknown output_type.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 0.25)
        >>> scheduler = diffusers.DDIMScheduler()
        >>> pipeline = diffusers.DDIMPipeline(GaussnetUNet(gaussian, scheduler), scheduler)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> teleport_pipeline(pipeline, gaussian, 2, 10, skip=4, output_type="pt").images.shape
        torch.Size([2, 1, 8, 8])
    """
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"expected output_type to be one of pil, np, pt, got {output_type!r}")
    unet, scheduler, device = pipeline.unet, pipeline.scheduler, pipeline._execution_device
    noise = randn_tensor((batch_size, *gaussian.event_shape), generator, device, unet.dtype)
    if isinstance(scheduler, SUPPORTED):
        scheduler.set_timesteps(num_inference_steps, device=device)  # init_noise_sigma may depend on it
    x, timesteps = teleport_scheduler(
        scheduler, gaussian, noise * scheduler.init_noise_sigma, skip=skip, sigma_skip=sigma_skip
    )
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generator
    for t in pipeline.progress_bar(timesteps):
        output = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, **step_arguments).prev_sample
    decoder = getattr(pipeline, "vqvae", getattr(pipeline, "vae", None))
    if decoder is not None:
        x = decoder.decode(x / decoder.config.scaling_factor).sample
    images = (x / 2 + 0.5).clamp(0, 1)
    if output_type != "pt":
        images = images.cpu().permute(0, 2, 3, 1).numpy()
    pipeline.maybe_free_model_hooks()
    return diffusers.ImagePipelineOutput(
        images=pipeline.numpy_to_pil(images) if output_type == "pil" else images
    )


def _begin(scheduler: Any, index: int) -> Tensor:
    """Makes the next call of `scheduler.step` the one at this step of the grid, without a history."""
    if isinstance(scheduler, diffusers.PNDMScheduler):
        return _begin_pndm(scheduler, _pndm_steps(scheduler)[index:])
    # What set_timesteps resets; it is not called again, since custom timesteps would be lost.
    for name, fresh in (("_step_index", None), ("lower_order_nums", 0), ("last_sample", None)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, fresh)
    if getattr(scheduler, "solver_p", None) is not None:  # the predictor that UniPC may be given
        _begin(scheduler.solver_p, index)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return scheduler.timesteps[index:]


def _pndm_steps(scheduler: Any) -> Tensor:
    """The timesteps u_0 > u_1 > ... of PNDM, each once."""
    timesteps = torch.as_tensor(scheduler.timesteps)
    if scheduler.config["skip_prk_steps"]:
        return torch.cat([timesteps[:2], timesteps[3:]])  # u_0, u_1, u_1, u_2, ...
    return torch.cat([timesteps[:12:4], timesteps[12:]])  # four stages of each of the three first steps


def _begin_pndm(scheduler: Any, steps: Tensor) -> Tensor:
    """Starts PNDM as `set_timesteps` would if its grid were `steps`.

    In the middle of its own timesteps it would take the stages of one step for those of another.
    """
    if scheduler.config["skip_prk_steps"]:
        stages, rest = steps[:0], torch.cat([steps[:2], steps[1:]])
    elif len(steps) < 4:
        raise ValueError(
            "expected at least 4 steps left of a PNDMScheduler, whose first 3 are Runge-Kutta steps, got "
            f"{len(steps)}; skip_prk_steps=True does without"
        )
    else:
        half = scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps // 2
        stages = torch.cat([torch.stack([a, b + half, b + half, b]) for a, b in pairwise(steps[:4])])
        rest = steps[3:]
    scheduler.prk_timesteps, scheduler.plms_timesteps = stages.cpu().numpy(), rest.cpu().numpy()
    scheduler.timesteps = torch.cat([stages, rest])
    scheduler.counter, scheduler.cur_model_output = 0, 0
    scheduler.ets, scheduler.cur_sample = [], None
    return scheduler.timesteps
