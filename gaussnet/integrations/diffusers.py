"""Diffusers: its models as denoisers, denoisers as its models, and its schedulers begun by teleport.

With noise level s = sigma_t/alpha_t and x = x_t/alpha_t, every network F of diffusers makes a denoiser

    D(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, label(s)),        F = (D - c_skip x) / c_out

|                   | c_in            | c_skip          | c_out               | label                      |
|-------------------|-----------------|-----------------|---------------------|----------------------------|
| VP, epsilon       | 1/sqrt(s^2 + 1) | 1               | -s                  | t: the table's level is s  |
| VP, v_prediction  | 1/sqrt(s^2 + 1) | 1/(s^2 + 1)     | -s/sqrt(s^2 + 1)    | t                          |
| VP, sample        | 1/sqrt(s^2 + 1) | 0               | 1                   | t                          |
| EDM, epsilon      | 1/sqrt(s^2 + d) | d/(s^2 + d)     | s sqrt(d/(s^2 + d)) | ln(s)/4                    |
| EDM, v_prediction | 1/sqrt(s^2 + d) | d/(s^2 + d)     | minus the above     | ln(s)/4                    |

with d = sigma_data^2. The states of a scheduler are alpha_t x, with its own alpha_t:

| schedulers                                     | levels            | alpha_t                              |
|------------------------------------------------|-------------------|--------------------------------------|
| DDIM, DDPM, PNDM                               | of alphas_cumprod | sqrt(alphas_cumprod)                 |
| DPMSolverMultistep, UniPCMultistep             | sigmas            | 1/sqrt(s^2 + 1); of flows: 1/(s + 1) |
| EulerDiscrete, EDMEuler, EDMDPMSolverMultistep | sigmas            | 1                                    |

and Eq. 18 of arXiv 2412.09726 moves them. The grid stays as it is, and the scheduler begins later on it:
`init_noise_sigma` belongs to the first of its states alone. Written against diffusers 0.42.

References: Karras et al. 2022, arXiv 2206.00364, Table 1; Salimans and Ho 2022, arXiv 2202.00512 (v).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser, GaussianDenoiser
from gaussnet.hub import build, describe
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.numerics import Sigma, as_sigma, expand_as_event, result_dtype
from gaussnet.schedules import DiscreteSchedule

try:  # by name: a type checker would take this very file for it
    diffusers: Any = import_module("diffusers")
    UNet2DOutput: Any = import_module("diffusers.models.unets.unet_2d").UNet2DOutput
    randn_tensor: Any = import_module("diffusers.utils.torch_utils").randn_tensor
except ImportError as error:
    raise ImportError("gaussnet.integrations.diffusers needs: pip install 'gaussnet[diffusers]'") from error

TABLE = (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler)
PRESERVING = (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
EXPLODING = (
    diffusers.EulerDiscreteScheduler,
    diffusers.EDMEulerScheduler,
    diffusers.EDMDPMSolverMultistepScheduler,
)
SUPPORTED = (*TABLE, *PRESERVING, *EXPLODING)
_ROUNDING = 1 + 1e-6  # sigmas are float32: a level that was read off the grid has to be found there

Process = Any  # a scheduler, its alphas_cumprod, or the sigma_data of EDM: diffusers has no common type


class Parametrisation:
    """What a network predicts: the first table above.

    Args:
        scheduler: of diffusers; or alphas_cumprod, (n,); or a number, EDM's sigma_data.
        prediction_type: "epsilon", "v_prediction" or, but for EDM, "sample". Default: the scheduler's own,
            else "epsilon".
        log_label: whether the label is ln(s)/4; default: for EDM, and Euler's continuous v_prediction.

    Raises:
        TypeError: if `scheduler` is none of these.
        ValueError: if the table, sigma_data or prediction_type is none that exists.
    """

    def __init__(
        self, scheduler: Process, prediction_type: str | None = None, log_label: bool | None = None
    ) -> None:
        config = getattr(scheduler, "config", {})
        self.prediction_type = prediction_type or config.get("prediction_type", "epsilon")
        continuous = config.get("timestep_type") == "continuous"
        if log_label is None:
            log_label = continuous and config.get("prediction_type") == "v_prediction"
        self.sigma_data: float | None = None
        self.schedule: DiscreteSchedule | None = None
        if "sigma_data" in config or isinstance(scheduler, int | float):
            self.sigma_data = float(config.get("sigma_data", scheduler))
            if not 0 < self.sigma_data < math.inf:
                raise ValueError(f"expected a finite sigma_data > 0, got {self.sigma_data}")
        else:
            table = getattr(scheduler, "alphas_cumprod", scheduler)
            if not isinstance(table, Tensor | Sequence) or isinstance(table, str):
                raise TypeError(
                    "expected a diffusers scheduler with alphas_cumprod or sigma_data, a table of "
                    f"alphas_cumprod, or sigma_data itself, got {type(scheduler).__name__}"
                )
            self.schedule = DiscreteSchedule(torch.as_tensor(table))
        self.log_label = log_label or self.schedule is None
        kind, known = "EDM", ("epsilon", "v_prediction")
        if self.schedule is not None:
            kind, known = "VP", (*known, "sample")
        if self.prediction_type not in known:
            raise ValueError(
                f"expected prediction_type for {kind} to be one of {', '.join(known)}, "
                f"got {self.prediction_type!r}"
            )

    def coefficients(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip and c_out, of the shape of `level`."""
        d = 1.0 if self.sigma_data is None else self.sigma_data**2
        c_in = torch.rsqrt(level**2 + d)
        if self.prediction_type == "sample":
            return c_in, torch.zeros_like(level), torch.ones_like(level)
        if self.prediction_type == "epsilon" and self.schedule is not None:
            return c_in, torch.ones_like(level), -level
        sign = 1 if self.prediction_type == "epsilon" else -1
        return c_in, d * c_in**2, sign * math.sqrt(d) * level * c_in

    def label(self, level: Tensor) -> Tensor:
        """How the network is told the level: EDM's, or a time within the table, float64."""
        if self.schedule is None or self.log_label:
            return torch.log(level) / 4
        time = self.schedule.time(level.detach().cpu())
        return time.clamp(0, len(self.schedule.log_levels) - 1).to(level.device)

    def level(self, label: Tensor) -> Tensor:
        """The inverse of `label`; float64."""
        label = label.detach().cpu().double()
        if self.schedule is None or self.log_label:
            return torch.exp(4 * label)
        return self.schedule.sigma(label) / self.schedule.alpha(label)

    def to_config(self) -> list[float] | float | None:
        """What builds an equal one, for JSON."""
        return self.sigma_data if self.schedule is None else self.schedule.alphas_cumprod.tolist()


class DiffusersDenoiser(NetworkDenoiser):
    """A UNet of diffusers as a denoiser, in EDM's coordinates.

    Args:
        unet: a UNet2DModel, or a conditional one with fixed `encoder_hidden_states`. Of its output, the
            first `in_channels` channels are used: further ones are learned variances.
        scheduler: that it was trained for; or alphas_cumprod, (n,); or a number, EDM's sigma_data.
        prediction_type: "epsilon", "v_prediction" or "sample"; default: the scheduler's, else "epsilon".
        encoder_hidden_states: the condition of every sample, (L, D) or (1, L, D).
        round_timesteps: tell the network the nearest whole timestep, in place of an interpolated one.
        event_shape: shape of one sample; default: from the config of `unet`.

    Raises:
        TypeError: if `scheduler` is none of these.
        ValueError: if the table or prediction_type is none that exists, or there is no event_shape.
    """

    encoder_hidden_states: Tensor | None

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Process,
        prediction_type: str | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        round_timesteps: bool = False,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.parametrisation = Parametrisation(scheduler, prediction_type)
        if event_shape is None:
            event_shape = _unet_shape(unet)
        self._event_shape = torch.Size(event_shape)
        self.model = unet
        self.round_timesteps = round_timesteps and not self.parametrisation.log_label
        if encoder_hidden_states is not None and encoder_hidden_states.ndim == 2:
            encoder_hidden_states = encoder_hidden_states[None]
        self.register_buffer("encoder_hidden_states", encoder_hidden_states, persistent=False)
        schedule, config = self.parametrisation.schedule, getattr(scheduler, "config", {})
        if schedule is not None:
            self.sigma_min, self.sigma_max = schedule.log_levels[[0, -1]].exp().tolist()
        elif "sigma_min" in config:
            self.sigma_min, self.sigma_max = config["sigma_min"], config["sigma_max"]

    @property
    def event_shape(self) -> torch.Size:
        return self._event_shape

    def round_sigma(self, sigma: Sigma | Sequence[float]) -> Tensor:
        """As for every network; with `round_timesteps`, the levels of the nearest whole timesteps."""
        level = super().round_sigma(sigma)
        if not self.round_timesteps:
            return level
        known = self.parametrisation.label(level.clamp_min(self.sigma_min)).round()
        return torch.where(level == 0, level, self.parametrisation.level(known).to(level))

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        batch_shape = self._batch_shape(x)
        x = x.to(result_dtype(x))
        level = as_sigma(sigma, x, batch_shape, x.dtype).expand(batch_shape)
        c_in, c_skip, c_out = (
            expand_as_event(c, x.ndim - 1) for c in self.parametrisation.coefficients(level)
        )
        label = self.parametrisation.label(level)
        if self.round_timesteps:
            label = label.round().long()
        dtype = getattr(self.model, "dtype", x.dtype)
        label = label.to(dtype) if label.is_floating_point() else label
        extra: dict[str, Tensor] = {}
        if self.encoder_hidden_states is not None:
            extra["encoder_hidden_states"] = self.encoder_hidden_states.to(dtype).expand(len(x), -1, -1)
        if class_labels is not None and getattr(self.model, "class_embedding", None) is not None:
            rows = class_labels.ndim > len(batch_shape)
            extra["class_labels"] = class_labels.argmax(-1) if rows else class_labels
        output = self.model((c_in * x).to(dtype), label, **extra).sample.to(x.dtype)
        return c_skip * x + c_out * output[:, : x.shape[1]]


class GaussnetUNet(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A denoiser as a model of diffusers, for its schedulers and pipelines.

    Saved and loaded by diffusers' `save_pretrained` and `from_pretrained` (with low_cpu_mem_usage=False),
    if the denoiser itself can be saved.

    Args:
        denoiser: in EDM's coordinates; or its description, as `gaussnet.hub.describe` gives it.
        scheduler: for which the model is; or alphas_cumprod, (n,); or a number, EDM's sigma_data.
        prediction_type: what to predict; default: what the scheduler expects, else "epsilon".
        log_label: whether timesteps are ln(s)/4; default: for EDM, and Euler's continuous v_prediction.

    Raises:
        TypeError: if `scheduler` is none of these.
        ValueError: if the table or prediction_type is none that exists.
    """

    config_name = "config.json"

    def __init__(
        self,
        denoiser: Denoiser | Mapping[str, Any],
        scheduler: Process,
        prediction_type: str | None = None,
        log_label: bool | None = None,
    ) -> None:
        super().__init__()
        self.model: Denoiser = build(denoiser) if isinstance(denoiser, Mapping) else denoiser
        self.parametrisation = Parametrisation(scheduler, prediction_type, log_label)
        shape = self.model.event_shape
        self.register_to_config(
            denoiser=describe(self.model) if hasattr(self.model, "to_arguments") else None,
            scheduler=self.parametrisation.to_config(),
            prediction_type=self.parametrisation.prediction_type,
            log_label=self.parametrisation.log_label,
            in_channels=shape[0],
            out_channels=shape[0],
            sample_size=shape[1] if len(set(shape[1:])) == 1 else list(shape[1:]),
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """F at a timestep, as UNet2DModel has it.

        Args:
            sample: what the scheduler's `scale_model_input` gives, (B, C, H, W).
            timestep: of the scheduler, one for all or one per sample.
            class_labels: as of the denoiser.
            return_dict: whether to return a UNet2DOutput in place of a tuple.

        Returns:
            The prediction, of shape and dtype of `sample`.
        """
        dtype = result_dtype(sample)
        label = torch.as_tensor(timestep).flatten()
        level = self.parametrisation.level(label).to(sample.device, dtype).expand(len(sample))
        c_in, c_skip, c_out = (
            expand_as_event(c, sample.ndim - 1) for c in self.parametrisation.coefficients(level)
        )
        x = sample.to(dtype) / c_in
        output = ((self.model(x, level, class_labels) - c_skip * x) / c_out).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def scheduler_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The grid of a scheduler whose timesteps are set: the second table above.

    Args:
        scheduler: of one of the classes in that table.

    Returns:
        alpha_t and the noise level sigma_t/alpha_t of each step, float64, (n,). Timesteps that the scheduler
        visits several times (PNDM) count once.

    Raises:
        TypeError: if the scheduler's class is another one.
        ValueError: if its timesteps are not set, or the data has no share in its first state (zero terminal
            SNR): there is no noise level then.
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
    """Runs an unconditional pipeline of pixels with the first steps teleported.

    With skip=0 these are the images of the pipeline itself, bit for bit.

    Args:
        pipeline: with a `unet` and a `scheduler`, such as DDIMPipeline or DDPMPipeline.
        gaussian: fitted to the data of the unet, in [-1, 1].
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
    images = (x / 2 + 0.5).clamp(0, 1)
    if output_type != "pt":
        images = images.cpu().permute(0, 2, 3, 1).numpy()
    pipeline.maybe_free_model_hooks()
    return diffusers.ImagePipelineOutput(
        images=pipeline.numpy_to_pil(images) if output_type == "pil" else images
    )


def _unet_shape(unet: nn.Module) -> tuple[int, ...]:
    config = getattr(unet, "config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        raise ValueError(
            f"expected event_shape for {type(unet).__name__}, whose config lacks in_channels or sample_size"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


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
