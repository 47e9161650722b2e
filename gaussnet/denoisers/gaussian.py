"""The Gaussian denoiser: closed form for score, denoiser, density and probability-flow ODE.

For data with mean mu and covariance Sigma, at noise level s (arXiv 2412.09726):

    s(x, s)   = -(Sigma + s^2 I)^-1 (x - mu)                                            (Eq. 5)
    D(x, s)   = mu + Sigma (Sigma + s^2 I)^-1 (x - mu)                                  (Eq. 6, 12, 13)
    x(s1)     = mu + [(Sigma + s1^2 I) (Sigma + s0^2 I)^-1]^(1/2) (x(s0) - mu)          (Eq. 15)
    e(s)^2    = tr[Sigma s^2 (Sigma + s^2 I)^-1] / D

The last is its mean squared error per dimension on any data with these two moments, Gaussian or not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.covariance import CosineCovariance, Covariance
from gaussnet.denoisers.base import Denoiser
from gaussnet.fit import Data, fit_covariance
from gaussnet.hub import record
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    check_floating,
    compute_dtype,
    level_dtype,
    result_dtype,
    wide_dtype,
)

_TINY = torch.finfo(torch.float32).tiny  # keeps 0 * (0 / 0) at sigma = 0 from being NaN

log: logging.Logger = logging.getLogger(__name__)


class GaussianDenoiser(Denoiser):
    """The optimal denoiser of N(mean, covariance), and the best affine denoiser of any such data.

    Args:
        mean: shape (*event_shape).
        covariance: over the D = prod(event_shape) flattened dimensions.

    Raises:
        TypeError: if the mean is not floating-point.
        ValueError: if the covariance has another number of dimensions than the mean, or the mean is
            not finite.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), var=1.0)
        >>> gaussian(torch.ones(1, 1, 2, 2), sigma=1.0).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    mean: Tensor

    def __init__(self, mean: Tensor, covariance: Covariance) -> None:
        super().__init__()
        check_floating(mean=mean)
        if mean.ndim == 0:
            raise ValueError("expected a mean of shape (*event_shape), got a 0-d tensor")
        if mean.numel() != covariance.dim:
            raise ValueError(
                f"expected a covariance of {mean.numel()} dimensions for a mean of shape "
                f"{tuple(mean.shape)}, got {covariance.dim}"
            )
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"expected a finite mean, got {int((~torch.isfinite(mean)).sum())} non-finite values"
            )
        self.register_buffer("mean", mean)
        self.covariance = covariance

    @classmethod
    def isotropic(cls, mean: Tensor, var: Sigma) -> Self:
        """N(mean, var I); with var = 0 its score is the paper's isotropic one, (mu - x)/s^2 (Eq. 29).

        Args:
            mean: shape (*event_shape).
            var: variance of each dimension, >= 0, in squared data units, a number or 0-d.

        Raises:
            TypeError: if the mean is not floating-point.
            ValueError: if the mean is not finite, or the variance negative or not finite.
        """
        check_floating(mean=mean)
        eigvecs = mean.new_zeros(mean.numel(), 0)
        return cls(mean, Covariance(eigvecs, mean.new_zeros(0), tail=var))

    @classmethod
    def fit(
        cls,
        data: Data,
        rank: int | float | None = None,
        shrinkage: str = "cv",
        solver: str = "auto",
        groups: Tensor | None = None,
        *,
        tail: str = "mean",
        basis: str = "eigen",
        mirror: bool = False,
        select: str | None = None,
        all_processes: bool = False,
    ) -> Self:
        """Fits mean and covariance to data.

        Args:
            data: (N, *event_shape), a tensor, array or memory map; or an iterable of such batches, or of
                tuples that begin with one, such as a DataLoader.
            rank: number of eigenvectors to keep, or, as a number in (0, 1), the share of the variance that
                they explain. Default: all that the data determine.
            shrinkage: "cv" measures the eigenvalues on left-out folds, so that the denoiser predicts its
                own error on new data; "none" keeps the sample eigenvalues (covariance over N); "ledoit-wolf",
                "oas" and "remap" are others, see `gaussnet.fit.shrinkage`.
            solver: "dense" costs D^3, "gram" N^3 and needs an array, "krylov" finds `rank` axes of a large
                array; default: the cheapest.
            groups: integers (N,), in the order of the data: cross-validation keeps the samples of a group,
                such as variants of one image, together.
            tail: variance along the axes that are left out: their "mean", or "zero".
            basis: "eigen", or "cosine" for images too large for eigenvectors.
            mirror: fit to mirror images (x-flips), too.
            select: "heldout" chooses rank and shrinkage by the denoising error on a held-out fifth of an
                array; the table is logged, and kept in `provenance`.
            all_processes: each process of `torch.distributed` holds its own share of the data; all get the
                fit to all of them.

        Raises:
            TypeError: if something that needs an array gets an iterable.
            ValueError: for fewer than two samples, non-finite or constant data, an unknown option, a rank out
                of range, or groups that are not one a sample.
        """
        options: dict[str, Any] = {
            "rank": rank,
            "shrinkage": shrinkage,
            "solver": solver,
            "tail": tail,
            "basis": basis,
            "mirror": mirror,
            "select": select,
        }
        fitted = fit_covariance(data, groups=groups, all_processes=all_processes, **options)
        gaussian = cls(fitted.mean, fitted.covariance)
        facts = {"size": fitted.count, "event_shape": list(fitted.mean.shape)}
        provenance = record(facts, {**options, "grouped": groups is not None})
        if fitted.selection is not None:
            provenance["selection"] = fitted.selection.table()
            log.info("rank and shrinkage by held-out error:\n%s", provenance["selection"])
        gaussian.provenance = provenance
        return gaussian

    @property
    def event_shape(self) -> torch.Size:
        return self.mean.shape

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        shrunk = self.filter(lambda lam, level: lam / (lam + level**2), x, sigma)  # Eq. 12, 13
        return (self.mean + shrunk).to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        # Wide: where sigma^2 is small, 1/(lam + sigma^2) turns the rounding of U^T u into an error.
        wide = wide_dtype(x.device)
        score = self.filter(lambda lam, level: -1 / (lam + level**2), x, sigma, wide)  # Eq. 5
        return score.to(result_dtype(x))

    def filter(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Sigma,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """f(Sigma, sigma) (x - mu): what every formula of this class is, for some f.

        Args:
            f: element-wise function of eigenvalues (r,) or (1,) and the level (*batch, 1) or (1,).
            x: noisy samples, (*batch, *event_shape).
            sigma: noise level.
            dtype: to compute in, at least; default: that of `x` and the buffers, at least float32.

        Returns:
            Tensor of the shape of `x`, in the dtype of the computation.

        Raises:
            TypeError: if `x` is not a floating-point tensor.
            ValueError: if a shape does not fit, or sigma is not finite and positive.
        """
        u, level = self._centre(x, sigma, dtype)
        return self.covariance.apply(lambda lam: f(lam, level), u).reshape(x.shape)

    def log_prob(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """Log p(x; sigma) of N(mu, Sigma + sigma^2 I), (*batch,); arguments and errors as in `forward`."""
        u, level = self._centre(x, sigma, wide_dtype(x.device))
        mahalanobis = (u * self.covariance.apply(lambda lam: 1 / (lam + level**2), u)).sum(-1)
        logdet = self.covariance.trace(lambda lam: torch.log(lam + level**2), u.dtype)
        dim = self.covariance.dim
        return (-0.5 * (mahalanobis + logdet + dim * math.log(2 * math.pi))).to(result_dtype(x))

    def flow(self, x: Tensor, sigma_from: Sigma, sigma_to: Sigma) -> Tensor:
        """Solves the probability-flow ODE from one noise level to another in closed form (Eq. 15).

        Args:
            x: state at `sigma_from`, shape (*batch, *event_shape).
            sigma_from: its noise level, > 0: a number, 0-d or one per sample.
            sigma_to: the level to reach, >= 0, above or below.

        Returns:
            The state at `sigma_to`, of the shape of `x`, in its dtype, but at least float32.

        Raises:
            TypeError: if `x` is not a floating-point tensor.
            ValueError: if a shape does not fit, or a level is out of its range or not finite.
        """
        # Wide: upwards, sigma_to / sigma_from amplifies the rounding of U^T u where lam is small.
        u, start = self._centre(x, sigma_from, wide_dtype(x.device))
        batch_shape = tuple(u.shape[:-1])
        end = as_sigma(sigma_to, x, batch_shape, u.dtype, zero_ok=True)[..., None]
        moved = self.covariance.apply(lambda lam: torch.sqrt((lam + end**2) / (lam + start**2)), u)
        return (self.mean + moved.reshape(x.shape)).to(result_dtype(x))

    def sample(self, n: int, sigma: Sigma = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Draws `n` samples of N(mu, Sigma + sigma^2 I); shape (n, *event_shape).

        With sigma > 0 these are states of the diffusion at that noise level: a "warm start" of a sampler.

        Args:
            n: number of samples.
            sigma: noise level, >= 0: a number, 0-d or (n,).
            generator: draws them, on the device of the Gaussian.

        Raises:
            ValueError: if sigma has another shape, is negative or not finite.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        noise = torch.randn(n, self.covariance.dim, generator=generator, dtype=dtype, device=self.mean.device)
        level = as_sigma(sigma, noise, (n,), dtype, zero_ok=True)[..., None]
        draws = self.covariance.apply(lambda lam: torch.sqrt(lam + level**2), noise)
        return self.mean.to(dtype) + draws.reshape(n, *self.event_shape)

    def bayes_error(self, sigma: Sigma) -> Tensor:
        """e(sigma)^2, the mean squared denoising error per dimension; shape of `sigma`.

        Exact for any data with this mean and covariance, since it depends on second moments only.

        Args:
            sigma: noise levels >= 0, of any shape.

        Raises:
            ValueError: if a level is negative or not finite.
        """
        dtype = level_dtype(sigma, self.mean)
        shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
        level = as_sigma(sigma, self.mean, shape, dtype, zero_ok=True)[..., None]
        error = self.covariance.trace(lambda lam: lam * (level**2 / (lam + level**2).clamp_min(_TINY)), dtype)
        return error / self.covariance.dim

    def posterior_variance(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        u, level = self._centre(x, sigma)
        variance = level**2
        diagonal = self.covariance.diagonal(lambda lam: lam * (variance / (lam + variance)), u.dtype)
        return diagonal.expand_as(u).reshape(x.shape).to(result_dtype(x))

    @property
    def variance(self) -> Tensor:
        """tr(Sigma) / D, the mean variance per dimension; 0-d. Its square root is EDM's sigma_data."""
        return self.covariance.trace(lambda lam: lam) / self.covariance.dim

    def to_arguments(self) -> dict[str, Any]:
        basis = "cosine" if isinstance(self.covariance, CosineCovariance) else "eigen"
        return {"event_shape": list(self.event_shape), "rank": self.covariance.rank, "basis": basis}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        mean, rank = torch.zeros(arguments["event_shape"]), arguments["rank"]
        if arguments.get("basis") == "cosine":
            return cls(mean, CosineCovariance(torch.ones_like(mean), torch.eye(len(mean))))
        return cls(mean, Covariance(torch.zeros(mean.numel(), rank), torch.ones(rank), tail=1.0))

    def _centre(self, x: Tensor, sigma: Sigma, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """X - mu as (*batch, D), and sigma as (*batch, 1) or (1,), in the dtype to compute in."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = torch.promote_types(compute_dtype(x, self.mean), dtype or torch.float32)
        level = as_sigma(sigma, x, batch_shape, dtype)[..., None]
        u = x.to(dtype) - self.mean.to(dtype)
        return u.reshape(*batch_shape, self.covariance.dim), level
