"""The Gaussian-mixture denoiser.

K components with weights pi_k, means mu_k, covariances Sigma_k, at noise level s (arXiv 2412.09726):

    w_k(x, s) = softmax_k(log pi_k + log N(x; mu_k, Sigma_k + s^2 I))                  (Eq. 8)
    D(x, s)   = sum_k w_k [mu_k + Sigma_k (Sigma_k + s^2 I)^-1 (x - mu_k)]             (Eq. 7)
    s(x, s)   = -sum_k w_k (Sigma_k + s^2 I)^-1 (x - mu_k)                             (Eq. 7, 35)

With z_k = U_k^T (x - mu_k), no B x K x D tensor is needed: all projections are one matrix product, the part
of ||x - mu_k||^2 outside of U_k comes from the expansion of the square, and a weighted sum of spectral
functions sum_k w_k f(Sigma_k) (x - mu_k) is one more product with [U_1 ... U_K].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor

from gaussnet.covariance import Covariance, SpectralFunction
from gaussnet.denoisers.base import Denoiser, class_index
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.fit import fit_covariance, kmeans_labels
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    compute_dtype,
    full_precision,
    result_dtype,
    wide_dtype,
)


class GaussianMixtureDenoiser(Denoiser):
    """The optimal denoiser of a mixture of Gaussians.

    Args:
        weights: positive, shape (K,); normalised here.
        means: (K, *event_shape).
        covariances: K of them, over the D flattened dimensions; their ranks may differ.
        class_labels: integer class of each component, shape (K,): with them, `class_labels` of a call
            restrict the mixture to the components of that class.

    Raises:
        ValueError: if the shapes do not fit, or a weight is not finite and positive.
    """

    weights: Tensor
    means: Tensor
    eigvecs: Tensor
    eigvals: Tensor
    ranks: Tensor
    tails: Tensor
    component_labels: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Sequence[Covariance],
        class_labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        if means.ndim < 2 or len(means) == 0 or not bool(torch.isfinite(means).all()):
            raise ValueError(
                f"expected finite means (K, *event_shape), K >= 1, got shape {tuple(means.shape)}"
            )
        count, dim = len(means), means[0].numel()
        if weights.shape != (count,) or len(covariances) != count:
            raise ValueError(
                f"expected {count} weights and covariances, one for each mean, "
                f"got {tuple(weights.shape)} and {len(covariances)}"
            )
        if any(covariance.dim != dim for covariance in covariances):
            dims = sorted({covariance.dim for covariance in covariances})
            raise ValueError(f"expected covariances of {dim} dimensions, as the means have, got {dims}")
        if not bool((torch.isfinite(weights) & (weights > 0)).all()):
            raise ValueError(f"expected finite weights > 0, got {weights.tolist()}")
        if class_labels is not None and class_labels.shape != (count,):
            raise ValueError(f"expected {count} class labels, got shape {tuple(class_labels.shape)}")
        ranks = torch.tensor([covariance.rank for covariance in covariances], device=means.device)
        rank = int(ranks.max())
        eigvecs = means.new_zeros(count, dim, rank)
        eigvals = means.new_zeros(count, rank)
        for k, covariance in enumerate(covariances):
            # Padding with zero vectors of the tail's variance changes neither trace nor log-determinant.
            eigvecs[k, :, : covariance.rank] = covariance.eigvecs
            eigvals[k] = covariance.tail
            eigvals[k, : covariance.rank] = covariance.eigvals
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("eigvecs", eigvecs)
        self.register_buffer("eigvals", eigvals)
        self.register_buffer("ranks", ranks)
        self.register_buffer("tails", torch.stack([covariance.tail for covariance in covariances]))
        self.register_buffer("component_labels", class_labels)

    @classmethod
    def fit(
        cls,
        data: Tensor,
        n_components: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
        shrinkage: str = "cv",
    ) -> Self:
        """Fits a mixture to clusters of the data (Eq. 41), or to its classes.

        Args:
            data: (N, *event_shape).
            n_components: number of k-means clusters; fewer come out where clusters have a single sample.
            rank: eigenvectors to keep for each component, at most; the others make its isotropic tail.
            seed: random state of the clustering.
            labels: integer classes of shape (N,), in place of `n_components`: one component a class.
            shrinkage: "cv" or "none", as in `GaussianDenoiser.fit`.

        Raises:
            ValueError: if not exactly one of `n_components` and `labels` is given, they do not fit the
                data, or a class has fewer than two samples.
        """
        if (n_components is None) == (labels is None):
            raise ValueError(
                "expected either n_components or labels, got " + ("both" if labels is not None else "none")
            )
        if rank is not None and rank < 1:
            raise ValueError(f"expected rank >= 1, got {rank}")
        if labels is not None and (labels.shape != data.shape[:1] or labels.is_floating_point()):
            raise ValueError(
                f"expected one integer label for each of {len(data)} samples, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not bool(torch.isfinite(data).all()):
            raise ValueError("expected finite data, got NaN or infinite values")
        data = data.to(result_dtype(data))
        groups = kmeans_labels(data, n_components, seed) if n_components is not None else labels
        assert groups is not None
        classes, counts = torch.unique(groups, return_counts=True)
        if int(counts.min()) < 2:
            single = classes[counts < 2].tolist()
            raise ValueError(f"expected at least 2 samples a component, got one in {single}")
        means: list[Tensor] = []
        covariances: list[Covariance] = []
        for group, count in zip(classes.tolist(), counts.tolist(), strict=True):
            allowed = min(count - 1, data[0].numel())
            component_rank = None if rank is None else min(rank, allowed)
            members = data[groups == group]
            if bool((members == members[0]).all()):  # a point: N(y, 0)
                means.append(members[0])
                covariances.append(GaussianDenoiser.isotropic(members[0], 0.0).covariance)
                continue
            event_shape, mean, covariance = fit_covariance(members, component_rank, shrinkage)
            means.append(mean.reshape(event_shape))
            covariances.append(covariance)
        stacked = torch.stack(means)
        return cls(counts.to(stacked.dtype), stacked, covariances, classes if labels is not None else None)

    @property
    def event_shape(self) -> torch.Size:
        return self.means.shape[1:]

    @property
    def n_components(self) -> int:
        """K, the number of components."""
        return len(self.weights)

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        flat, level = self._flatten(x, sigma)
        weights, z = self._posterior(flat, level, class_labels)
        shrunk = self._combine(lambda lam: lam / (lam + level[..., None] ** 2), weights, z, flat)
        denoised = weights @ self.means.to(flat.dtype).flatten(1) + shrunk  # Eq. 7
        return denoised.reshape(x.shape).to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        flat, level = self._flatten(x, sigma)
        weights, z = self._posterior(flat, level, class_labels)
        score = self._combine(lambda lam: -1 / (lam + level[..., None] ** 2), weights, z, flat)  # Eq. 35
        return score.reshape(x.shape).to(result_dtype(x))

    def responsibilities(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """w_k(x, sigma) of Eq. 8; shape (*batch, K)."""
        flat, level = self._flatten(x, sigma)
        return self._posterior(flat, level, class_labels)[0].to(result_dtype(x))

    def log_prob(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """Log p(x; sigma) of the mixture; shape (*batch,). With `class_labels`: of that class."""
        flat, level = self._flatten(x, sigma)
        logits, log_prior, _ = self._logits(flat, level, class_labels)
        log_prob = torch.logsumexp(logits, -1) - torch.logsumexp(log_prior, -1)
        return log_prob.to(result_dtype(x))

    def _flatten(self, x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """The flat x (*batch, D) and sigma (*batch, 1) or (1,); wide, since logits reach 1e6 at low noise."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = torch.promote_types(compute_dtype(x, self.means), wide_dtype(x.device))
        level = as_sigma(sigma, x, batch_shape, dtype)[..., None]
        return x.to(dtype).reshape(*batch_shape, self.event_shape.numel()), level

    def _logits(
        self, flat: Tensor, level: Tensor, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log pi_k + log N(x; mu_k, Sigma_k + s^2 I), log pi_k (-inf outside of the class), and z_k."""
        dtype = flat.dtype
        means = self.means.to(dtype).flatten(1)  # (K, D)
        centre = self.weights.to(dtype) @ means
        query, offsets = flat - centre, means - centre
        eigvals, tails = self.eigvals.to(dtype), self.tails.to(dtype)
        with full_precision(flat.device.type):
            basis = rearrange(self.eigvecs.to(dtype), "k d r -> d (k r)")
            z = rearrange(query @ basis, "... (k r) -> ... k r", k=self.n_components)
            z = z - torch.einsum("kd,kdr->kr", offsets, self.eigvecs.to(dtype))
            distance2 = (query**2).sum(-1, keepdim=True) - 2 * query @ offsets.mT + (offsets**2).sum(-1)
        residual2 = (distance2 - (z**2).sum(-1)).clamp_min(0)  # ||(I - U U^T)(x - mu_k)||^2, (*batch, K)
        dim, rank = self.eigvecs.shape[1:]
        # A full basis leaves nothing out; what the expansion leaves then is the rounding of U.
        residual2 = residual2 * (self.ranks < dim)
        variances = eigvals + level[..., None] ** 2  # (*batch or 1, K, r)
        outside = tails + level**2  # (*batch or 1, K)
        mahalanobis = (z**2 / variances).sum(-1) + residual2 / outside
        logdet = torch.log(variances).sum(-1) + (dim - rank) * torch.log(outside)
        log_prior = torch.log(self.weights.to(dtype))
        if class_labels is not None and self.component_labels is not None:
            labels = class_index(class_labels, tuple(flat.shape[:-1]), self.component_labels)
            other = self.component_labels != labels[..., None]
            log_prior = log_prior.expand(*other.shape).masked_fill(other, -math.inf)
        return log_prior - 0.5 * (mahalanobis + logdet + dim * math.log(2 * math.pi)), log_prior, z

    def _posterior(self, flat: Tensor, level: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, _, z = self._logits(flat, level, class_labels)
        return torch.softmax(logits, -1), z  # Eq. 8

    def _combine(self, f: SpectralFunction, weights: Tensor, z: Tensor, flat: Tensor) -> Tensor:
        """sum_k w_k f(Sigma_k) (x - mu_k); `f` takes the variances as (K, r) and (K, 1)."""
        dtype = flat.dtype
        # (*batch or 1, K, 1); a full basis leaves nothing out, where f(tail) would only magnify its rounding
        f_tail = f(self.tails.to(dtype)[:, None]) * (self.ranks < self.eigvecs.shape[1])[:, None]
        inside = weights[..., None] * (f(self.eigvals.to(dtype)) - f_tail) * z
        outside = weights * f_tail[..., 0]
        with full_precision(flat.device.type):
            basis = rearrange(self.eigvecs.to(dtype), "k d r -> (k r) d")
            means = self.means.to(dtype).flatten(1)
            combined = rearrange(inside, "... k r -> ... (k r)") @ basis
            return combined + outside.sum(-1, keepdim=True) * flat - outside @ means

    def to_arguments(self) -> dict[str, Any]:
        return {
            "event_shape": list(self.event_shape),
            "n_components": self.n_components,
            "rank": self.eigvecs.shape[-1],
            "labelled": self.component_labels is not None,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        count = arguments["n_components"]
        means = torch.zeros(count, *arguments["event_shape"])
        empty = Covariance(torch.zeros(means[0].numel(), arguments["rank"]), torch.zeros(arguments["rank"]))
        labels = torch.zeros(count, dtype=torch.long) if arguments["labelled"] else None
        return cls(torch.ones(count), means, [empty] * count, labels)
