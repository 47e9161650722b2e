"""The preconditionings before EDM: VP, VE and iDDPM, whose networks predict the noise.

With noise level s and a network F, all three leave the skip alone:

    D(x, s) = x + c_out(s) F(c_in(s) x, c_noise(s)),        loss weight = 1/c_out^2 = 1/s^2

|       | c_out | c_in            | c_noise                        | levels                        |
|-------|-------|-----------------|--------------------------------|-------------------------------|
| VP    | -s    | 1/sqrt(s^2 + 1) | (M - 1) t(s)                   | s(t), epsilon_t <= t <= 1     |
| VE    | s     | 1               | ln(s/2)                        | sigma_min <= s <= sigma_max   |
| iDDPM | -s    | 1/sqrt(s^2 + 1) | M - 1 - j, u_j nearest to s    | u_0 > u_1 > ... > u_(M-1) > 0 |

    VP      s(t)^2 + 1 = exp(beta_d t^2/2 + beta_min t),  t its inverse: the SDE of `gaussnet.schedules`
    iDDPM   u_M = 0,  u_(j-1)^2 + 1 = (u_j^2 + 1)/max(abar(j-1)/abar(j), C_1)
            abar(j) = sin^2(pi/2 j/(M (C_2 + 1)))

iDDPM numbers its steps from low noise to high, t = M - 1 - j: its betas are 1 - max(...), its abar the cosine
schedule with offset C_2, and 1 - C_1 its largest beta.

State dicts have the names of NVlabs/edm, whose own load strictly. As there, a level outside of sigma_min ..
sigma_max is no error: the formulas go on (iDDPM's label stays at its first or last), but the network was not
trained there. A grid that stays within:

    sigmas = model.round_sigma(karras_sigmas(18, max(0.002, model.sigma_min), min(80, model.sigma_max)))

References:
    Karras et al. 2022, arXiv 2206.00364, Table 1 and Appendix C.
    Song et al. 2021, arXiv 2011.13456 (VP, VE). Nichol and Dhariwal 2021, arXiv 2102.09672 (iDDPM).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from gaussnet.hub import build, describe
from gaussnet.network_denoiser import NetworkDenoiser, check_channels, image_shape
from gaussnet.numerics import Sigma, as_level, as_sigma, expand_as_event, result_dtype
from gaussnet.schedules import Time, VPSchedule


class NoisePrecond(NetworkDenoiser):
    """D = x + c_out F(c_in x, c_noise), the base class of this file. Untrained, it is the identity.

    Args:
        network: called as network(inputs, noise_labels, class_labels), with inputs (B, C, H, W) and
            noise_labels (B,); returns at least the C channels that are used.
        event_shape: shape of one sample; default: the network's `in_channels` and `img_resolution`.

    Raises:
        ValueError: if the network's channels do not fit, or there is no event_shape.
    """

    output_multiple = 1  # channels of the network's output for each of the image

    def __init__(self, network: nn.Module, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if event_shape is None:
            event_shape = image_shape(network)
        self._event_shape = torch.Size(event_shape)
        check_channels(network, self._event_shape, 1, self.output_multiple, type(self).__name__)
        self.model = network

    @property
    def event_shape(self) -> torch.Size:
        return self._event_shape

    def forward(
        self,
        x: Tensor,
        sigma: Sigma,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        batch_shape = self._batch_shape(x)
        x = x.to(result_dtype(x))
        level = as_sigma(sigma, x, batch_shape, x.dtype).expand(batch_shape)
        c_in, c_out = (
            expand_as_event(c, len(self.event_shape)) for c in (self.c_in(level), self.c_out(level))
        )
        output = self._evaluate(c_in * x, self.c_noise(level), class_labels, augment_labels)
        return x + c_out * output[:, : self.event_shape[0]]

    def c_out(self, sigma: Sigma) -> Tensor:
        """The scale of the network's output, here that of the noise that it predicts; shape of sigma."""
        return -as_level(sigma)

    def c_in(self, sigma: Sigma) -> Tensor:
        """The scale of the network's input: unit variance for data of unit variance; shape of sigma."""
        return torch.rsqrt(as_level(sigma) ** 2 + 1)

    @abstractmethod
    def c_noise(self, sigma: Sigma) -> Tensor:
        """The noise level as the network is told it; shape of sigma."""

    def weight(self, sigma: Sigma) -> Tensor:
        """The loss weight 1/c_out^2 of the squared denoising error; shape of sigma."""
        return self.c_out(sigma) ** -2

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        others = {name: value for name, value in arguments.items() if name != "network"}
        return cls(build(arguments["network"]), **others)


class VPPrecond(NoisePrecond):
    """The variance-preserving SDE, as of DDPM++ (arXiv 2011.13456): F is the noise, its label 999 t.

    Args:
        network: as in `NoisePrecond`, with as many input as output channels.
        beta_d: beta(1) - beta(0) of the SDE.
        beta_min: beta(0).
        M: number of steps of the discrete process that the labels count.
        epsilon_t: the earliest time of training, at sigma_min.
        event_shape: as in `NoisePrecond`.

    Raises:
        ValueError: if the network's channels do not fit, or a constant is out of its range.

    Example:
        >>> from gaussnet import MLP
        >>> model = VPPrecond(MLP(4, in_channels=1, out_channels=1, model_channels=8))
        >>> round(model.sigma_max, 1), round(model.c_noise(model.sigma_max).item(), 2)  # at t = 1
        (152.2, 999.0)
    """

    def __init__(
        self,
        network: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, event_shape)
        if not 0 < epsilon_t < 1:
            raise ValueError(f"expected 0 < epsilon_t < 1, got {epsilon_t}")
        self.schedule: VPSchedule = VPSchedule(beta_min, beta_d)
        self.M = _check_steps(M)
        self.epsilon_t = epsilon_t
        self.sigma_min: float = float(self.sigma(epsilon_t))
        self.sigma_max: float = float(self.sigma(1.0))

    def sigma(self, t: Time) -> Tensor:
        """The noise level at time t in [0, 1]; float64, of the shape of t."""
        return self.schedule.sigma(t) / self.schedule.alpha(t)

    def sigma_inv(self, sigma: Time) -> Tensor:
        """The time of a noise level; float64, of the shape of sigma."""
        return self.schedule.time(sigma)

    def c_noise(self, sigma: Sigma) -> Tensor:
        level = as_level(sigma)
        return (self.M - 1) * self.sigma_inv(level).to(level.dtype)

    def to_arguments(self) -> dict[str, Any]:
        return {
            "network": describe(self.model),
            "beta_d": self.schedule.beta_d,
            "beta_min": self.schedule.beta_min,
            "M": self.M,
            "epsilon_t": self.epsilon_t,
            "event_shape": list(self.event_shape),
        }


class VEPrecond(NoisePrecond):
    """The variance-exploding SDE, as of NCSN++ (arXiv 2011.13456): F is minus the noise, its input x itself.

    Args:
        network: as in `NoisePrecond`, with as many input as output channels.
        sigma_min: lowest level of training.
        sigma_max: highest level of training.
        event_shape: as in `NoisePrecond`.

    Raises:
        ValueError: if the network's channels do not fit, or not 0 < sigma_min < sigma_max.

    Example:
        >>> from gaussnet import MLP
        >>> model = VEPrecond(MLP(4, in_channels=1, out_channels=1, model_channels=8))
        >>> model.c_in(50.0).item(), model.c_out(50.0).item(), round(model.c_noise(50.0).item(), 3)  # ln(25)
        (1.0, 50.0, 3.219)
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, event_shape)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def c_out(self, sigma: Sigma) -> Tensor:
        return as_level(sigma)

    def c_in(self, sigma: Sigma) -> Tensor:
        return torch.ones_like(as_level(sigma))

    def c_noise(self, sigma: Sigma) -> Tensor:
        return torch.log(as_level(sigma) / 2)

    def to_arguments(self) -> dict[str, Any]:
        return {
            "network": describe(self.model),
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "event_shape": list(self.event_shape),
        }


class iDDPMPrecond(NoisePrecond):
    """Improved DDPM, as of ADM: F is the noise, its label the number of the nearest of M levels.

    Only the label is that of the nearest level; x is scaled by the level given, as in EDM.

    Args:
        network: as in `NoisePrecond`, with twice as many output as input channels: the noise, and an
            interpolation of variances that is not used.
        C_1: lower bound of the ratio of successive alpha_bar; 1 - C_1 is the largest beta.
        C_2: offset of the cosine schedule.
        M: number of levels.
        event_shape: as in `NoisePrecond`.

    Raises:
        ValueError: if the network's channels do not fit, or a constant is out of its range.

    Example:
        >>> from gaussnet import MLP
        >>> model = iDDPMPrecond(MLP(4, in_channels=1, out_channels=2, model_channels=8), M=10)
        >>> model.c_noise(model.sigma_max).item(), model.c_noise(model.sigma_min).item()
        (9.0, 0.0)
    """

    output_multiple = 2
    u: Tensor

    def __init__(
        self,
        network: nn.Module,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, event_shape)
        if not (0 < C_1 < 1 and 0 <= C_2 < math.inf):
            raise ValueError(f"expected 0 < C_1 < 1 and C_2 >= 0, got {C_1} and {C_2}")
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = _check_steps(M)
        self.register_buffer("u", _iddpm_levels(C_1, C_2, M).float())
        self.sigma_min: float = float(self.u[M - 1])
        self.sigma_max: float = float(self.u[0])

    def round_sigma(self, sigma: Sigma | Sequence[float]) -> Tensor:
        """The nearest of u_0 .. u_(M-1); arguments, result and errors as for every preconditioner.

        A grid finer than the table (with the defaults, EDM's of more than about 50 steps) gets equal levels.
        """
        level = super().round_sigma(sigma)
        nearest = self.u.to(level.device)[self._nearest(level)]
        return torch.where(level == 0, level, nearest.to(level.dtype))

    def c_noise(self, sigma: Sigma) -> Tensor:
        level = as_level(sigma)
        return (self.M - 1 - self._nearest(level)).to(level.dtype)

    def _nearest(self, level: Tensor) -> Tensor:
        """The index j < M of the level nearest to each, of the shape of `level`."""
        return (level[..., None] - self.u[: self.M].to(level.device)).abs().argmin(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # .bfloat16() must not round the table: its levels lie closer together than that.
        u = self.u
        super()._apply(fn, recurse)
        if self.u.dtype.itemsize < 4:
            self.u = u.to(self.u.device)
        return self

    def to_arguments(self) -> dict[str, Any]:
        return {
            "network": describe(self.model),
            "C_1": self.C_1,
            "C_2": self.C_2,
            "M": self.M,
            "event_shape": list(self.event_shape),
        }


def _iddpm_levels(C_1: float, C_2: float, M: int) -> Tensor:
    """u_0 .. u_M, in float64. With u_M = 0 the recursion is a running sum of ln(u_(j-1)^2 + 1)."""
    j = torch.arange(M + 1, dtype=torch.float64)
    alpha_bar = torch.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2
    steps = -torch.log((alpha_bar[:-1] / alpha_bar[1:]).clamp(min=C_1))  # (M,), from j - 1 = 0 up
    total = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
    return torch.sqrt(torch.expm1(total))


def _check_steps(M: int) -> int:
    if M < 2:
        raise ValueError(f"expected M >= 2 steps, got {M}")
    return M
