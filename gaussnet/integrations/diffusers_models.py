"""Diffusers: its models as denoisers, and denoisers as its models.

With noise level s = sigma_t/alpha_t and x = x_t/alpha_t, every network F of diffusers makes a denoiser

    D(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, label(s)),        F = (D - c_skip x) / c_out

|                   | c_in            | c_skip          | c_out               | label                      |
|-------------------|-----------------|-----------------|---------------------|----------------------------|
| VP, epsilon       | 1/sqrt(s^2 + 1) | 1               | -s                  | t: the table's level is s  |
| VP, v_prediction  | 1/sqrt(s^2 + 1) | 1/(s^2 + 1)     | -s/sqrt(s^2 + 1)    | t                          |
| VP, sample        | 1/sqrt(s^2 + 1) | 0               | 1                   | t                          |
| EDM, epsilon      | 1/sqrt(s^2 + d) | d/(s^2 + d)     | s sqrt(d/(s^2 + d)) | ln(s)/4                    |
| EDM, v_prediction | 1/sqrt(s^2 + d) | d/(s^2 + d)     | minus the above     | ln(s)/4                    |

with d = sigma_data^2. Written against diffusers 0.42.

References: Karras et al. 2022, arXiv 2206.00364, Table 1; Salimans and Ho 2022, arXiv 2202.00512 (v).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser
from gaussnet.hub import build, describe
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.numerics import Sigma, as_sigma, expand_as_event, known_true, result_dtype
from gaussnet.schedules import DiscreteSchedule

try:  # by name: a type checker would take the module beside this one for it
    diffusers: Any = import_module("diffusers")
    UNet2DOutput: Any = import_module("diffusers.models.unets.unet_2d").UNet2DOutput
except ImportError as _error:
    raise ImportError("gaussnet.integrations.diffusers needs: pip install 'gaussnet[diffusers]'") from _error

if TYPE_CHECKING:  # submodules, which the module beside this one has none of
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin
else:
    ConfigMixin, ModelMixin = diffusers.ConfigMixin, diffusers.ModelMixin

Process = Any  # a scheduler, its alphas_cumprod, or the sigma_data of EDM: diffusers has no common type


class Parametrisation:
    """What a network predicts: the table above.

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
        self.prediction_type: str = prediction_type or config.get("prediction_type", "epsilon")
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
        self.log_label: bool = log_label or self.schedule is None
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

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 0.25)
        >>> scheduler = diffusers.DDIMScheduler()
        >>> model = DiffusersDenoiser(GaussnetUNet(gaussian, scheduler), scheduler)  # there and back again
        >>> x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(model(x, sigma=1.0), gaussian(x, sigma=1.0), atol=1e-5)
        True
    """

    encoder_hidden_states: Tensor | None
    sigma_min: float
    sigma_max: float

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
        self.parametrisation: Parametrisation = Parametrisation(scheduler, prediction_type)
        if event_shape is None:
            event_shape = _unet_shape(unet)
        self._event_shape = torch.Size(event_shape)
        self.model = unet
        self.round_timesteps: bool = round_timesteps and not self.parametrisation.log_label
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
        if label.is_floating_point():  # embedded in float32, whatever the network is in: bfloat16 has 8 bits
            label = label.to(torch.promote_types(dtype, torch.float32))
        extra: dict[str, Tensor] = {}
        if self.encoder_hidden_states is not None:
            extra["encoder_hidden_states"] = self.encoder_hidden_states.to(dtype).expand(len(x), -1, -1)
        if class_labels is not None and getattr(self.model, "class_embedding", None) is not None:
            rows = class_labels.ndim > len(batch_shape)
            if rows and known_true((class_labels.count_nonzero(-1) != 1).any()):  # argmax would be some class
                raise ValueError(
                    "expected one class in each row of class_labels, got rows with none or several: "
                    "networks of diffusers know no zeros for no class"
                )
            extra["class_labels"] = class_labels.argmax(-1) if rows else class_labels
        output = self.model((c_in * x).to(dtype), label, **extra).sample.to(x.dtype)
        return c_skip * x + c_out * output[:, : x.shape[1]]


class GaussnetUNet(ModelMixin, ConfigMixin):
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

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> scheduler = diffusers.DDIMScheduler()
        >>> unet = GaussnetUNet(GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 0.25), scheduler)
        >>> unet.config.sample_size, unet(torch.randn(2, 1, 8, 8), timestep=500).sample.shape  # the noise
        (8, torch.Size([2, 1, 8, 8]))
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
        self.parametrisation: Parametrisation = Parametrisation(scheduler, prediction_type, log_label)
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


def _unet_shape(unet: nn.Module) -> tuple[int, ...]:
    config = getattr(unet, "config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        raise ValueError(
            f"expected event_shape for {type(unet).__name__}, whose config lacks in_channels or sample_size"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)
