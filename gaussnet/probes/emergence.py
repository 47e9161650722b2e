"""When features emerge while a denoiser samples, and what perturbations become: Fig. 3, Eq. 18-23.

Along an eigenvector u_k of the data's covariance the Gaussian's sampling is one function of the level s. From
x_T at S, in variance-preserving coordinates (alpha = 1/sqrt(1 + s^2), v(s) = alpha^2 (s^2 + lam)),

    u_k^T (x_t - alpha_t mu)  = psi u_k^T (x_T - alpha_T mu)     psi = sqrt(v(s) / v(S))             (Eq. 18)
    u_k^T (D(x_t) - mu)       = xi  u_k^T (x_T - alpha_T mu)      xi = alpha lam / sqrt(v(s) v(S))   (Eq. 20)

so that D(x_t) has got the share sqrt((lam + e^2) / (lam + s^2)) of what it has at the last level e: a share
p where s^2 = (lam + e^2)/p^2 - lam. For e = 0 and p = 1/sqrt(2) that is s = sqrt(lam), the critical level.
A change of x_t reaches the sample times sqrt(lam / (lam + s^2)) in EDM's coordinates (Eq. 23).

Here the same numbers are measured on any denoiser. With the Gaussian itself they agree to the accuracy of
the solver, which ends on D(x, e) in place of x at 0: an error of e^2/(2 lam).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.flow import GaussianFlow
from gaussnet.numerics import expand_as_event, wide_dtype
from gaussnet.probes.scores import log_spaced
from gaussnet.probes.trajectories import Trajectory
from gaussnet.samplers import Solver, heun
from gaussnet.schedules import VPSchedule, derivative

CRITICAL_SHARES = (0.25, 2**-0.5, 0.9)
"""Of the final projection: where a feature's critical period begins, its centre, its end."""


class Features(NamedTuple):
    """Some eigenvectors of a covariance.

    Attributes:
        ranks: 1 for the largest eigenvalue, (F,).
        eigvals: their eigenvalues, float64, (F,).
        eigvecs: (D, F), float64.
        mean: of the data, (D,), float64.
    """

    ranks: list[int]
    eigvals: Tensor
    eigvecs: Tensor
    mean: Tensor

    def project(self, images: Tensor) -> Tensor:
        """u_k^T (images - mean): from (n, B, *event_shape) to (n, B, F), float64."""
        return (images.to(self.mean).flatten(2) - self.mean) @ self.eigvecs

    def directions(self, event_shape: Sequence[int]) -> Tensor:
        """The eigenvectors as images, (F, *event_shape)."""
        return self.eigvecs.mT.reshape(-1, *event_shape)


class Course(NamedTuple):
    """The closed form at each level and feature, (n, F), float64.

    Attributes:
        psi: of the state (Eq. 18).
        xi: of the denoised image (Eq. 20).
        rate: minus the derivative of xi with respect to ln s: how fast a feature emerges.
        gain: of a perturbation (Eq. 23), in EDM's coordinates.
    """

    psi: Tensor
    xi: Tensor
    rate: Tensor
    gain: Tensor


def select_features(gaussian: GaussianDenoiser, count: int, sigma_min: float) -> Features:
    """About `count` eigenvectors, evenly spaced in the logarithm of their rank.

    Only features whose critical level sqrt(lam) is at least 10 sigma_min, so that their critical period lies
    within the levels and the last step costs them less than 0.5%.

    Args:
        gaussian: mean and covariance of the data.
        count: of features, >= 2; where ranks round to the same, fewer come out.
        sigma_min: lowest level of sampling above 0, in units of the data.

    Returns:
        Ranks, eigenvalues and eigenvectors of the features, and the mean.

    Raises:
        ValueError: if count < 2, or fewer than two features vary that much.

    Example:
        >>> from gaussnet import Covariance
        >>> covariance = Covariance(torch.eye(3), torch.tensor([4.0, 1.0, 0.25]))
        >>> gaussian = GaussianDenoiser(torch.zeros(3), covariance)
        >>> features = select_features(gaussian, count=2, sigma_min=0.01)
        >>> features.ranks, features.eigvals
        ([1, 3], tensor([4.0000, 0.2500], dtype=torch.float64))
    """
    if count < 2:
        raise ValueError(f"expected at least 2 features, got {count}")
    covariance = gaussian.covariance
    order = covariance.eigvals.argsort(descending=True)
    known = int((covariance.eigvals.sqrt() >= 10 * sigma_min).sum())
    if known < 2:
        raise ValueError(
            f"expected at least two eigenvalues >= (10 sigma_min)^2 = {(10 * sigma_min) ** 2:g}, got {known}"
        )
    chosen = log_spaced(known - 1, count - 1)
    wide = wide_dtype(order.device)
    return Features(
        [place + 1 for place in chosen],
        covariance.eigvals[order[chosen]].to(wide),
        covariance.eigvecs[:, order[chosen]].to(wide),
        gaussian.mean.flatten().to(wide),
    )


def feature_course(eigvals: Tensor, levels: Tensor, start: float) -> Course:
    """The closed form of what features do (Fig. 3 B to E), from x_T at the level `start`.

    Args:
        eigvals: variances of the data along the features, (F,).
        levels: > 0, (n,), in EDM's coordinates.
        start: the level S.

    Returns:
        Each coefficient at each level, (n, F), float64, on the CPU.

    Example:
        >>> course = feature_course(torch.tensor([1.0]), levels=torch.tensor([80.0, 1.0]), start=80.0)
        >>> course.psi[0].item(), round(course.gain[1].item(), 4)  # at the start; at sqrt(lam)
        (1.0, 0.7071)
    """
    point = GaussianDenoiser.isotropic(torch.zeros(1), 0.0)  # the coefficients depend on eigvals alone
    edm, vp = GaussianFlow(point), GaussianFlow(point, VPSchedule())
    lam, s = eigvals.cpu().double(), levels.cpu().double()[:, None]
    time, start_time = vp.schedule.time(s), vp.schedule.time(start)

    def xi(log_level: Tensor) -> Tensor:
        return vp.xi(vp.schedule.time(log_level.exp()), start_time, lam)

    value, slope = derivative(xi, s.log())
    return Course(vp.psi(time, start_time, lam), value, -slope, edm.gain(s, lam))  # Eq. 18, 20, 23


def measured_course(path: Trajectory, features: Features) -> tuple[Tensor, Tensor]:
    """Psi and xi of a denoiser: projections of states and denoised images on that of x_T, by least squares.

    Args:
        path: of `solver_trajectory`, of B trajectories.
        features: to project on.

    Returns:
        psi (n, F) and xi (n, F) at all levels but the last, in variance-preserving coordinates, float64.
    """
    scale = torch.rsqrt(1 + path.levels[:-1] ** 2).to(features.mean)[:, None]
    state, denoised = features.project(path.x[:-1]), features.project(path.denoised)  # (n, B, F)
    start = state[0]
    total = start.square().sum(0)
    psi, xi = ((start * part).sum(1) / total for part in (state, denoised))
    return psi * scale / scale[0], xi / scale[0]


def emergence(path: Trajectory, features: Features) -> Tensor:
    """The projection of D(x_t) on each eigenvector as a share of its last value.

    Args:
        path: of `solver_trajectory`.
        features: to project on.

    Returns:
        Tensor (n, B, F), float64: 1 at the last level, and everywhere if the last value is 0.
    """
    projected = features.project(path.denoised)
    last = projected[-1]
    return torch.where(last == 0, 1, projected / last.where(last != 0, 1))


def emergence_level(shares: Tensor, levels: Tensor, share: float) -> Tensor:
    """The level at which a feature has first got a share of its last value, on the way down.

    Args:
        shares: of `emergence`, (n, *batch).
        levels: > 0, (n,).
        share: in (0, 1].

    Returns:
        Tensor (*batch), float64: interpolated linearly in ln s; levels[0] where it is reached there, and
        levels[-1] where it never is.

    Raises:
        ValueError: if `share` is not in (0, 1].

    Example:
        >>> shares = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        >>> emergence_level(shares, levels=torch.tensor([100.0, 10.0, 1.0]), share=0.75)  # half-way in log
        tensor([3.1623], dtype=torch.float64)
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], got {share}")
    there = shares >= share
    there[-1] = True
    after = there.int().argmax(0)
    before = (after - 1).clamp_min(0)
    logs = levels.to(shares).log()
    high, low = (shares.gather(0, place[None])[0] for place in (before, after))
    step = torch.where(low > high, (share - high) / (low - high).where(low > high, 1), 0).clamp(0, 1)
    step = torch.where(low < share, 1, step)  # it never is: the last level
    return torch.lerp(logs[before], logs[after], step).exp()


def predicted_emergence_level(eigvals: Tensor, share: float, levels: Tensor) -> Tensor:
    """The closed form of `emergence_level` on a grid of levels: (F,), float64."""
    lam, end = eigvals.cpu().double(), float(levels[-1])
    square = lam * (1 / share**2 - 1) + (end / share) ** 2  # of s, where (lam + e^2)/(lam + s^2) = share^2
    return square.sqrt().clamp_max(float(levels[0]))


@torch.no_grad()
def perturbation_gains(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    features: Features,
    size: float = 0.05,
    *,
    batch_size: int | None = None,
    solver: Solver = heun,
) -> tuple[Tensor, Tensor]:
    """What becomes of small changes of a state along eigenvectors (Eq. 23), by central differences.

    Args:
        denoiser: any denoiser.
        x: states at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        features: the eigenvectors.
        size: of the change, in standard deviations of the state along the eigenvector, sqrt(lam + s^2).
        batch_size: states that are solved at a time; default: all.
        solver: of `gaussnet.samplers`.

    Returns:
        The gain, u_k^T of the sample's change per change of the state, and the length of what changes across
        u_k, per change of the state: both (F, B), float64. For a Gaussian they are sqrt(lam / (lam + s^2))
        and 0.

    Raises:
        ValueError: if size <= 0, or the grid does not decrease to 0.

    Example:
        >>> from gaussnet import Covariance, karras_sigmas
        >>> covariance = Covariance(torch.eye(3), torch.tensor([4.0, 1.0, 0.25]))
        >>> gaussian = GaussianDenoiser(torch.zeros(3), covariance)
        >>> features, x = select_features(gaussian, count=2, sigma_min=0.01), torch.zeros(1, 3)
        >>> gain, across = perturbation_gains(gaussian, x, karras_sigmas(40, 0.01, 2.0), features)
        >>> gain.flatten().round(decimals=2)  # sqrt(4/(4 + 2^2)), sqrt(0.25/(0.25 + 2^2))
        tensor([0.7100, 0.2400], dtype=torch.float64)
    """
    if not size > 0:
        raise ValueError(f"expected size > 0, got {size}")
    steps = size * (features.eigvals + float(sigmas[0]) ** 2).sqrt()  # (F,)
    event = x.shape[1:]
    moves = expand_as_event(steps, len(event)) * features.directions(event)  # (F, *event)
    signs = expand_as_event(moves.new_tensor([1, -1]), x.ndim + 1)  # two ends, then F, B
    moved = (x.to(moves) + signs * moves[:, None]).to(x).flatten(0, 2)  # (2 F B, *event)
    parts = moved.split(batch_size or len(moved))
    ends = torch.cat([solver(denoiser, part, sigmas) for part in parts]).to(moves)
    plus, minus = ends.reshape(2, len(steps), len(x), -1)
    change = (plus - minus) / (2 * steps[:, None, None])  # (F, B, D)
    gain = torch.einsum("fbd,df->fb", change, features.eigvecs)
    across = change - gain[..., None] * features.eigvecs.mT[:, None]
    return gain, across.norm(dim=-1)
