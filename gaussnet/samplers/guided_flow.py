"""The flow of a guided Gaussian: a linear ODE in a few dimensions, and a closed form in all others.

Between two Gaussians D_w = D_u + w (D_c - D_u) is affine in x at every level. With K = s^2 (Sigma + s^2 I)^-1
for each of them, so that x - D = K (x - mu), and y = x - mu_u, the probability-flow ODE is

    dy/dlog s = x - D_w = [(1 - w) K_u + w K_c] y - w K_c (mu_c - mu_u).                       (1)

The two K do not commute, but both are multiples s^2/(tail + s^2) of the identity outside of the span of
U_c, U_u and mu_c - mu_u. There

    y(s1) = [(s1^2 + tail_u)/(s0^2 + tail_u)]^((1 - w)/2) [(s1^2 + tail_c)/(s0^2 + tail_c)]^(w/2) y(s0)   (2)

and inside, with an orthonormal basis Q of r_c + r_u + 1 columns, (1) is solved once for all samples: its
fundamental matrix and the trajectory of y = 0, numbers of the levels alone. A jump is two products with Q.

Reference: arXiv 2412.09726, Eq. 14 and 15, of which w = 0 and 1 are the case; guidance by Ho and Salimans
2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.numerics import check_event, full_precision, result_dtype, wide_dtype

Flow = Callable[[Tensor, float, float], Tensor]
"""From a state, its level and another level to the state there."""


def few_dimensions(cond: GaussianDenoiser, uncond: GaussianDenoiser) -> bool:
    """Whether the axes of two Gaussians leave dimensions over, so that `guided_flow` has a use."""
    return cond.covariance.rank + uncond.covariance.rank + 2 < cond.covariance.dim


def guided_flow(cond: GaussianDenoiser, uncond: GaussianDenoiser, w: float) -> Flow:
    """The trajectory of the guided denoiser of two Gaussians.

    Costs a QR decomposition of (D, q), q = r_c + r_u + 1, here, and about 4 q^3 operations a hundred times,
    on the host, for each new pair of levels.

    Args:
        cond: the conditional Gaussian.
        uncond: the unconditional one.
        w: guidance scale.

    Returns:
        The function (x, sigma_from, sigma_to) to the state at sigma_to, of the shape of x, with an error of
        about 1e-9 of its norm. It raises a ValueError for levels that are not positive.

    Raises:
        ValueError: if `few_dimensions` are not left over.
    """
    if not few_dimensions(cond, uncond):
        ranks = f"{cond.covariance.rank} + {uncond.covariance.rank}"
        raise ValueError(f"expected ranks that add to less than {cond.covariance.dim} - 2, got {ranks}")
    device = uncond.mean.device
    wide = wide_dtype(device)
    centre = uncond.mean.to(wide).flatten()
    offset = cond.mean.to(wide).flatten() - centre
    axes = [cond.covariance.eigvecs.to(wide), uncond.covariance.eigvecs.to(wide), offset[:, None]]
    with full_precision(device.type):
        basis = torch.linalg.qr(torch.cat(axes, 1)).Q  # (D, q), also where its columns depend on each other
        v_cond, v_uncond, shift = ((basis.mT @ part).cpu().double().numpy() for part in axes)
    parts = [
        (weight, v, gaussian.covariance.eigvals.cpu().double().numpy(), float(gaussian.covariance.tail), own)
        for weight, v, gaussian, own in ((w, v_cond, cond, shift), (1 - w, v_uncond, uncond, 0.0))
    ]  # own: the mean, about mu_u
    size = basis.shape[1]

    def rates(log_s: float, flat: np.ndarray) -> np.ndarray:
        """Eq. 1 in the basis, of the fundamental matrix and, in the last column, the trajectory of y = 0."""
        y = flat.reshape(size, size + 1)
        variance = math.exp(2 * log_s)
        rate = np.zeros_like(y)
        for weight, v, lam, tail, own in parts:
            off = y.copy()
            off[:, -1:] -= own
            outside = variance / (tail + variance)
            inside = (variance / (lam + variance) - outside)[:, None]
            rate += weight * (outside * off + v @ (inside * (v.T @ off)))
        return rate.ravel()

    @cache
    def solved(sigma_from: float, sigma_to: float) -> tuple[float, Tensor, Tensor]:
        """The factor of Eq. 2, the fundamental matrix less it, transposed, and the trajectory of y = 0."""
        if not (0 < sigma_from < math.inf and 0 < sigma_to < math.inf):
            raise ValueError(f"expected finite levels > 0, got {sigma_from} and {sigma_to}")
        span, initial = (math.log(sigma_from), math.log(sigma_to)), np.eye(size, size + 1)
        factor = math.prod(
            ((sigma_to**2 + tail) / (sigma_from**2 + tail)) ** (weight / 2) for weight, _, _, tail, _ in parts
        )
        if sigma_from != sigma_to:
            from scipy.integrate import solve_ivp  # here: SciPy takes long to import

            solution = solve_ivp(rates, span, initial.ravel(), method="DOP853", rtol=1e-9, atol=1e-11)
            initial = solution.y[:, -1].reshape(size, size + 1)
        matrix, path = initial[:, :-1] - factor * np.eye(size), initial[:, -1]
        return factor, torch.from_numpy(matrix.T.copy()), torch.from_numpy(path.copy())

    def move(x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        batch_shape = check_event(x, uncond.event_shape, "guided_flow")
        factor, matrix, path = solved(float(sigma_from), float(sigma_to))
        dtype = wide_dtype(x.device)
        y = x.to(dtype).reshape(*batch_shape, centre.numel()) - centre.to(x.device, dtype)
        q = basis.to(x.device, dtype)
        with full_precision(x.device.type):
            inside = (y @ q) @ matrix.to(x.device, dtype) + path.to(x.device, dtype)
            moved = centre.to(x.device, dtype) + factor * y + inside @ q.mT  # Eq. 2, corrected inside
        return moved.reshape(x.shape).to(result_dtype(x))

    return move
