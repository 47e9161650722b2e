"""The sampling trajectory of a Gaussian, in closed form.

For x_t ~ N(alpha_t x_0, sigma_t^2 I) the probability-flow ODE of Gaussian data separates along the
eigenvectors u_k. With c_k = u_k^T (x_T - alpha_T mu) and the variances v_t(lam) = sigma_t^2 + lam alpha_t^2,

    x_t    = alpha_t mu + sum_k psi(t, lam_k) c_k u_k       psi = sqrt(v_t / v_T)               (Eq. 15, 18)
    D(x_t) =         mu + sum_k  xi(t, lam_k) c_k u_k       xi = alpha_t lam / sqrt(v_t v_T)    (Eq. 16, 20)

(directions outside of the eigenvectors have lam = tail). A feature of variance lam emerges fastest, in log t,
about where sigma_t = alpha_t sqrt(lam): its critical period. A perturbation at time t reaches the sample
scaled by sqrt(lam / v_t) (Eq. 23). If alpha_t^2 + sigma_t^2 = 1, the trajectory is nearly a rotation in the
plane of x_0 and x_T,

    x_t = alpha_t x_0 + sigma_t x_T + sum_k J(t, lam_k) c_k u_k + O(alpha_T)                    (Eq. 22, 108)
    J   = sqrt(v_t) - alpha_t sqrt(lam) - sigma_t,    -min(sigma_t, alpha_t sqrt(lam)) < J <= 0     (Eq. 104)

Reference: arXiv 2412.09726, Sec. 3 and D.1-D.4. The constant 2 - sqrt(2) of Eq. 107 is |J| / sigma_t where
sigma_t = alpha_t sqrt(lam), and no bound for all t: where lam is large, |J| comes near to 1 (0.96 at 1e4).
The squared bound printed in Eq. 22 rests on it, and lacks the factor 4 of D.4.2 besides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.numerics import result_dtype
from gaussnet.schedules import EDMSchedule, Schedule, Time, derivative

_TINY = torch.finfo(torch.float64).tiny  # keeps 0 / 0, where neither data nor noise vary, from NaN


class GaussianFlow:
    """The probability-flow ODE of a Gaussian from time T to any other, for any schedule.

    Args:
        gaussian: mean and covariance of the data.
        schedule: the forward process; default: EDM, where time is the noise level.

    Example:
        >>> flow = GaussianFlow(GaussianDenoiser.isotropic(torch.zeros(1), 1.0))
        >>> x = flow.state(torch.tensor([[80.0]]), 80.0, 0.0)  # the sample that 80 leads to
        >>> round(x.item(), 4)
        0.9999
    """

    def __init__(self, gaussian: GaussianDenoiser, schedule: Schedule | None = None) -> None:
        self.gaussian = gaussian
        self.schedule: Schedule = EDMSchedule() if schedule is None else schedule

    def psi(self, t: Time, start: Time, lam: Tensor | float) -> Tensor:
        """The state's coefficient along an eigenvector relative to its start (Eq. 15, 18); float64."""
        return torch.sqrt(self._variance(t, lam) / self._variance(start, lam))

    def xi(self, t: Time, start: Time, lam: Tensor | float) -> Tensor:
        """The denoised image's coefficient relative to the state's start (Eq. 16, 20); float64."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        scale = torch.sqrt(self._variance(t, lam) * self._variance(start, lam))
        return self.schedule.alpha(t) * lam / scale.clamp_min(_TINY)  # 0 where nothing varies

    def rate(
        self, coefficient: Callable[[Time, Time, Tensor | float], Tensor], t: Time, start: Time, lam: Tensor
    ) -> Tensor:
        """d/dt of `self.psi` or `self.xi`, exact by forward differentiation of the schedule."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return derivative(lambda time: coefficient(time, start, lam), t)[1]

    def critical_time(self, lam: Tensor | float) -> Tensor:
        """The centre of a feature's critical period: where sigma_t = alpha_t sqrt(lam); shape of lam."""
        return self.schedule.time(torch.sqrt(torch.as_tensor(lam, dtype=torch.float64)))

    def state(self, x: Tensor, start: Time, t: Time) -> Tensor:
        """x_t from x at time `start`: Eq. 15, 18; with t = 0 the map from noise to sample, Eq. 17, 21.

        Args:
            x: states at time `start`, (*batch, *event_shape).
            start: their time; where noise is positive.
            t: the time to go to.

        Returns:
            States at time t, of the shape of `x`, in its dtype, but at least float32.
        """
        (alpha_from, level_from), (alpha_to, level_to) = self._scaled(start), self._scaled(t)
        return alpha_to * self.gaussian.flow(x.to(result_dtype(x)) / alpha_from, level_from, level_to)

    def denoised(self, x: Tensor, start: Time, t: Time) -> Tensor:
        """D(x_t) along the trajectory from x at time `start`: Eq. 16, 20."""
        alpha, level = self._scaled(t)
        return self.gaussian(self.state(x, start, t) / alpha, level)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """dx/dt of the probability-flow ODE at (x, t) (Eq. 61-63), through the score of the Gaussian."""
        x, time = x.to(result_dtype(x)), torch.as_tensor(t, dtype=torch.float64)
        alpha, alpha_dot = derivative(self.schedule.alpha, time)
        sigma, sigma_dot = derivative(self.schedule.sigma, time)
        level = sigma / alpha
        level_dot = (sigma_dot - level * alpha_dot) / alpha
        score = self.gaussian.score(x / float(alpha), float(level))
        return float(alpha_dot / alpha) * x - float(alpha * level_dot * level) * score

    def gain(self, t: Time, lam: Tensor | float) -> Tensor:
        """By how much a perturbation along an eigenvector at time t is scaled in the sample (Eq. 23)."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        variance = self._variance(t, lam)
        return torch.where(variance > 0, torch.sqrt(lam / variance.clamp_min(_TINY)), 1)

    def propagate(self, perturbation: Tensor, t: Time) -> Tensor:
        """What a perturbation of x_t becomes in the sample (Eq. 23); shape of `perturbation`."""
        covariance = self.gaussian.covariance
        dim = covariance.dim
        flat = perturbation.double().reshape(-1, dim)
        changed = covariance.apply(lambda lam: self.gain(t, lam).to(lam.device), flat)
        return changed.reshape(perturbation.shape).to(perturbation.dtype)

    def rotation(self, x: Tensor, start: Time, t: Time) -> Tensor:
        """The rotation in the plane of x_T and x_0 that approximates x_t: Eq. 103 without its remainder.

        With alpha_T = 0 this is alpha_t x_0 + sigma_t x_T (Eq. 22).
        """
        x = x.to(result_dtype(x))
        x_0 = self.state(x, start, self.schedule.time(0.0))
        ratio = float(self.schedule.sigma(t) / self.schedule.sigma(start))
        along = float(self.schedule.alpha(t) - self.schedule.alpha(start) * ratio)
        return along * x_0 + ratio * x

    def rotation_remainder(self, t: Time, lam: Tensor | float) -> Tensor:
        """J(t, lam), what the rotation formula misses along an eigenvector (Eq. 104), for alpha_T = 0."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        root = torch.sqrt(self._variance(t, lam))
        # Eq. 105: the same as root - alpha sqrt(lam) - sigma, without its cancellation.
        return -2 * sigma * alpha * lam.sqrt() / (root + alpha * lam.sqrt() + sigma).clamp_min(_TINY)

    def rotation_bound(self, t: Time, lam: Tensor | float) -> Tensor:
        """A bound of |J(t, lam)|, below 1 at all times: min(sigma_t, alpha_t sqrt(lam))."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return torch.minimum(self.schedule.sigma(t), self.schedule.alpha(t) * lam.sqrt())

    def _variance(self, t: Time, lam: Tensor | float) -> Tensor:
        """v_t(lam) = sigma_t^2 + lam alpha_t^2."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return self.schedule.sigma(t) ** 2 + lam * self.schedule.alpha(t) ** 2

    def _scaled(self, t: Time) -> tuple[float, float]:
        """alpha_t and the noise level sigma_t / alpha_t."""
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return alpha, sigma / alpha
