"""Start states for images of which some pixels are known.

A Gaussian conditioned on known pixels y of the clean image, exactly or with noise of standard deviation eta,
is again Gaussian. With K for the known pixels,

    E[x_0 | y]   = mu + Sigma_:K S^-1 (y - mu_K),        S = Sigma_KK + eta^2 I,
    Cov[x_0 | y] = Sigma - Sigma_:K S^-1 Sigma_K:,

and a draw needs neither: any draw x_0 of the Gaussian, moved to agree with y, is one (Matheron's rule),

    x_0 + Sigma_:K S^-1 (y - x_0K - eta n).

With sigma n added it is a state of the diffusion at that level, of the images that agree with y. For a low
rank, S^-1 takes r dimensions only (Woodbury): with a = tail + eta^2, U_K the known rows of U and
C = diag(lam) - tail I,

    S^-1 = [I - U_K (a I + C U_K^T U_K)^-1 C U_K^T] / a.

Reference: Doucet 2010, "A note on efficient conditional simulation of Gaussian distributions".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.denoisers import GaussianDenoiser
from gaussnet.numerics import full_precision, wide_dtype
from gaussnet.samplers.teleport import grid_from

_RESOLVED = 1e-12  # least eigenvalue of S that is told from 0, relative to the largest


@torch.no_grad()
def inpainting_start(
    gaussian: GaussianDenoiser,
    known: Tensor,
    mask: Tensor,
    sigmas: Tensor,
    sigma_skip: float,
    *,
    observation_noise: float = 0.0,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """States at sigma_skip of images with known pixels, in place of a sampler's first steps.

    They are draws of N(E[x_0 | y], Cov[x_0 | y] + sigma_skip^2 I): where a pixel is known exactly, its value
    plus noise. The sampler that goes on has to keep to the known pixels by its own means, such as a denoiser
    whose output has them put in.

    Args:
        gaussian: fitted to the data of the model that goes on from here.
        known: the images, (B, *event_shape); entries that are not known are ignored.
        mask: True where a pixel is known, boolean, of a shape that broadcasts to event_shape.
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        sigma_skip: the level of the states, which need not be on the grid; levels below it are kept.
        observation_noise: eta, standard deviation of the noise in `known`. Some is needed where the Gaussian
            takes known pixels for nearly dependent on each other, and they are not.
        steps: a new grid of this many levels from there down, as in `teleport`.
        generator: draws images and noise, on the device of the Gaussian.

    Returns:
        States (B, *event_shape) in the dtype of the Gaussian, at least float32, and the grid from there on.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if a shape does not fit, a known pixel is not finite, observation_noise is negative or
            not finite, or as in `teleport`.

    Example:
        >>> from gaussnet import karras_sigmas
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), var=1.0)
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> x, sigmas = inpainting_start(gaussian, torch.ones(5, 1, 2, 2), mask, karras_sigmas(18), 8.0)
        >>> x.shape, round(sigmas[0].item(), 1)
        (torch.Size([5, 1, 2, 2]), 8.0)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"expected a boolean mask, got {mask.dtype}")
    shape = gaussian.event_shape
    if known.ndim != len(shape) + 1 or known.shape[1:] != shape:
        raise ValueError(
            f"expected known of shape (B, {', '.join(map(str, shape))}), got {tuple(known.shape)}"
        )
    try:
        mask = mask.expand(shape).flatten().to(gaussian.mean.device)
    except RuntimeError:
        raise ValueError(
            f"expected a mask that broadcasts to {tuple(shape)}, got shape {tuple(mask.shape)}"
        ) from None
    if not 0 <= observation_noise < math.inf:
        raise ValueError(f"expected a finite observation_noise >= 0, got {observation_noise}")
    rest = grid_from(sigmas, sigma_skip, steps)
    prior = gaussian.sample(len(known), 0.0, generator)
    wide = wide_dtype(prior.device)
    y = known.to(prior.device, wide).flatten(1)[:, mask]
    if not bool(y.isfinite().all()):
        raise ValueError(f"expected finite known pixels, got {int((~y.isfinite()).sum())} others")

    def noise(count: int) -> Tensor:
        shape = (len(y), count)
        return torch.randn(shape, generator=generator, dtype=prior.dtype, device=prior.device).to(wide)

    x = prior.to(wide).flatten(1)
    missing = y - x[:, mask] - observation_noise * noise(y.shape[1])
    x = x + regress(gaussian.covariance, mask, missing, observation_noise)
    if observation_noise == 0:
        x[:, mask] = y  # what is left is rounding
    x = x + sigma_skip * noise(x.shape[1])
    return x.reshape(known.shape).to(prior.dtype), rest


def regress(covariance: Covariance, mask: Tensor, missing: Tensor, observation_noise: float = 0.0) -> Tensor:
    """Sigma_:K S^-1 v: what deviations v (B, k) of the known pixels say about all of them, (B, D)."""
    eigvecs, lam = covariance.eigvecs.to(missing.dtype), covariance.eigvals.to(missing.dtype)
    tail = float(covariance.tail)
    rows, excess = eigvecs[mask], lam - tail  # U_K and C
    unit = tail + observation_noise**2
    with full_precision(missing.device.type):
        if covariance.rank < len(rows) and unit > _RESOLVED * max(lam.tolist(), default=0.0):
            gram = rows.mT @ rows
            eye = torch.eye(len(lam), dtype=gram.dtype, device=gram.device)
            # U_K^T S^-1 = (unit I + U_K^T U_K C)^-1 U_K^T: S^-1 v first would lose what is small in it.
            inner = excess[:, None] * torch.linalg.solve(unit * eye + gram * excess, (missing @ rows).mT)
            spread = inner.mT @ eigvecs.mT
            solved = (missing - inner.mT @ rows.mT) / unit
        else:
            dense = (rows * excess) @ rows.mT
            dense.diagonal().add_(unit)
            # Pixels that never vary make S singular: they tell nothing.
            solved = missing @ torch.linalg.pinv(dense, rtol=_RESOLVED, hermitian=True)
            spread = (solved @ rows * excess) @ eigvecs.mT
    spread[:, mask] += tail * solved
    return spread
