"""Forward processes x_t ~ N(alpha_t x_0, sigma_t^2 I), and how they map to noise levels.

Dividing by alpha_t turns each of them into the same process in EDM's form, with state x_t / alpha_t and noise
level sigma_t / alpha_t: one conversion, not a second set of formulas (Sec. 2.1, D.2 of arXiv 2412.09726).

Table 7 there compares the notations of papers by the moments of the process and by its steps,

    x_t ~ N(A_t x_0, B_t I),    dx = -C_t x dt + D_t dW:

| schedule               | A_t           | B_t            | C_t                  | D_t                      |
|------------------------|---------------|----------------|----------------------|--------------------------|
| EDM                    | 1             | sigma(t)^2     | 0                    |                          |
| VP-SDE                 | exp(-b(t)/2)  | 1 - exp(-b(t)) | beta(t)/2            | sqrt(beta(t))            |
| DDPM                   | sqrt(acp_t)   | 1 - acp_t      | 1 - sqrt(1 - beta_t) | sqrt(beta_t)             |
| DDIM, Stable Diffusion | sqrt(acp_t)   | 1 - acp_t      | 1 - a_t              | sqrt(B_t - a_t^2 B_{t-1})|

with b(t) = int_0^t beta, a_t = A_t/A_{t-1}, and acp the `alphas_cumprod` of diffusers, which is alpha^2 here.
(The last two rows agree for the step x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) n.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from gaussnet.numerics import wide_dtype

Time = float | Tensor


class Schedule(ABC):
    """A forward process. Times are numbers or tensors; results are float64 tensors of their shape."""

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """The scale of the data, A_t."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """The noise beside the scaled data, the root of B_t."""

    @abstractmethod
    def time(self, noise_level: Time) -> Tensor:
        """The time at which sigma_t / alpha_t is `noise_level`."""


class EDMSchedule(Schedule):
    """alpha_t = 1, sigma_t = t: time is the noise level. arXiv 2206.00364."""

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(_as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return _as_time(t)

    def time(self, noise_level: Time) -> Tensor:
        return _as_time(noise_level)


class VPSchedule(Schedule):
    """The variance-preserving SDE with beta(t) = beta_min + beta_d t, t in [0, 1]. arXiv 2011.13456.

    Args:
        beta_min: beta(0).
        beta_d: beta(1) - beta(0).

    Raises:
        ValueError: if beta_min < 0 or beta_d <= 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_d: float = 19.9) -> None:
        if beta_min < 0 or beta_d <= 0:
            raise ValueError(f"expected beta_min >= 0 and beta_d > 0, got {beta_min} and {beta_d}")
        self.beta_min = beta_min
        self.beta_d = beta_d

    def beta(self, t: Time) -> Tensor:
        """The rate of noising, twice C_t and the square of D_t."""
        return self.beta_min + self.beta_d * _as_time(t)

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def time(self, noise_level: Time) -> Tensor:
        integral = torch.log1p(_as_time(noise_level) ** 2)  # (sigma/alpha)^2 = exp(b) - 1
        # The smaller root of beta_d t^2 / 2 + beta_min t = integral, without cancellation.
        sum_of_roots = self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.beta_d * integral)
        return 2 * integral / sum_of_roots.clamp_min(torch.finfo(integral.dtype).tiny)  # of beta_min = 0: 0/0

    def _integral(self, t: Time) -> Tensor:
        t = _as_time(t)
        return t * (self.beta_min + 0.5 * self.beta_d * t)


class DiscreteSchedule(Schedule):
    """A table of alpha_t at t = 0 .. n - 1, as DDPM, DDIM and Stable Diffusion have it.

    Between table entries log(sigma/alpha) is interpolated linearly, as k-diffusion's adapters do.

    Args:
        alphas_cumprod: alpha_t^2, decreasing within (0, 1), shape (n,): as diffusers' schedulers have it.

    Raises:
        ValueError: if the table does not decrease within (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"expected alphas_cumprod of shape (n,), n >= 2, got {tuple(table.shape)}")
        if not bool((table.diff() < 0).all() & (table[0] < 1) & (table[-1] > 0)):
            raise ValueError(
                "expected alphas_cumprod to decrease within (0, 1), got a table from "
                f"{table[0].item():g} to {table[-1].item():g}"
            )
        self.alphas_cumprod = table
        self.log_levels: Tensor = 0.5 * (torch.log1p(-table) - torch.log(table))  # log(sigma/alpha), rising

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiscreteSchedule:
        """From the variances beta_t of the steps: alpha_t^2 is the running product of 1 - beta_t."""
        return cls(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64, device="cpu"), 0))

    def alpha(self, t: Time) -> Tensor:
        return torch.sigmoid(-2 * self._log_level(t)).sqrt()

    def sigma(self, t: Time) -> Tensor:
        return torch.sigmoid(2 * self._log_level(t)).sqrt()

    def time(self, noise_level: Time) -> Tensor:
        log_level = torch.log(_as_time(noise_level))
        return _interpolate(log_level, self.log_levels, torch.arange(len(self.log_levels)).double())

    def step(self, t: int) -> tuple[float, float]:
        """C_t and D_t of Table 7 for the step from t - 1 to t, t >= 1."""
        alpha = self.alphas_cumprod[t - 1 : t + 1].sqrt()
        variance = 1 - self.alphas_cumprod[t - 1 : t + 1]
        ratio = alpha[1] / alpha[0]
        return float(1 - ratio), float((variance[1] - ratio**2 * variance[0]).sqrt())

    def _log_level(self, t: Time) -> Tensor:
        return _interpolate(_as_time(t), torch.arange(len(self.log_levels)).double(), self.log_levels)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """A function of time and its time derivative, exact by forward differentiation."""
    return cast("tuple[Tensor, Tensor]", torch.func.jvp(function, (t,), (torch.ones_like(t),)))


def _as_time(t: Time) -> Tensor:
    device = t.device if isinstance(t, Tensor) else torch.device("cpu")
    return torch.as_tensor(t, dtype=wide_dtype(device))


def _interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, and linear beyond the ends."""
    right = torch.searchsorted(nodes, x.detach().contiguous()).clamp(1, len(nodes) - 1)
    share = (x - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    return torch.lerp(values[right - 1], values[right], share)
