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
from torch.nn import functional

from gaussnet.covariance import Covariance, SpectralFunction
from gaussnet.denoisers.base import Denoiser
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.routing import possible_components, rows_by_component, sole_components, used_alone
from gaussnet.fit import Data, fit_mixture
from gaussnet.fit.streams import check_labels
from gaussnet.hub import record
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    check_floating,
    compute_dtype,
    full_precision,
    known_true,
    result_dtype,
    view,
    wide_dtype,
)

_RESOLVED = 0.1  # in logits: the denoised image then errs by less than 1e-5 up to some 500 dimensions


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

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> mixture = GaussianMixtureDenoiser.equal_isotropic(means, var=1.0)
        >>> mixture.responsibilities(torch.tensor([[1.0]]), sigma=1.0)
        tensor([[0.2689, 0.7311]])
    """

    weights: Tensor
    means: Tensor
    eigvecs: Tensor  # (K, r, D), in rows: one layout for both products
    eigvals: Tensor
    projections: Tensor  # (K, r), U_k^T (mu_k - c), as far as float32 products need it
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
        check_floating(means=means)
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
        class_labels = None if class_labels is None else check_labels(class_labels, count)
        ranks = torch.tensor([covariance.rank for covariance in covariances], device=means.device)
        rank = int(ranks.max())
        eigvecs = means.new_zeros(count, rank, dim)
        eigvals = means.new_zeros(count, rank)
        for k, covariance in enumerate(covariances):
            # Padding with zero vectors of the tail's variance changes neither trace nor log-determinant.
            eigvecs[k, : covariance.rank] = covariance.eigvecs.mT
            eigvals[k] = covariance.tail
            eigvals[k, : covariance.rank] = covariance.eigvals
        self.register_buffer("weights", (weights / weights.sum()).to(means))
        self.register_buffer("means", means)
        self.register_buffer("eigvecs", eigvecs)
        self.register_buffer("eigvals", eigvals)
        wide = wide_dtype(means.device)
        offsets = means.to(wide).flatten(1) - self._centre(wide)
        projections = torch.einsum("krd,kd->kr", eigvecs.to(wide), offsets)
        self.register_buffer("projections", projections.to(means.dtype))
        self.register_buffer("ranks", ranks)
        self.register_buffer("tails", torch.stack([covariance.tail.to(means) for covariance in covariances]))
        self.register_buffer("component_labels", class_labels)

    @classmethod
    def fit(
        cls,
        data: Data,
        n_components: int | None = None,
        rank: int | float | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
        shrinkage: str = "cv",
        *,
        groups: Tensor | None = None,
        tail: str = "mean",
        mirror: bool = False,
        select: str | None = None,
        em_steps: int = 0,
        prior: float = 0.0,
    ) -> Self:
        """Fits a mixture to clusters of the data (Eq. 41), or to its classes.

        Args:
            data: (N, *event_shape), or an iterable of batches. Without `n_components`, one of (images,
                labels), such as a DataLoader, is read once, and gives a component a class.
            n_components: number of k-means clusters; fewer come out where clusters have a single sample.
            rank: eigenvectors to keep for each component, at most, or the share of its variance that they
                explain; the others make its isotropic tail.
            seed: random state of the clustering.
            labels: integer classes of shape (N,), in place of `n_components`: one component a class.
            shrinkage: of each component's eigenvalues, as in `GaussianDenoiser.fit`.
            groups: integers (N,): cross-validation keeps the samples of a group together.
            tail: variance along the axes that are left out: their "mean", or "zero".
            mirror: fit to mirror images (x-flips), too.
            select: "heldout" chooses rank and shrinkage of each component.
            em_steps: steps of expectation maximisation from the clusters; classes take none. With
                shrinkage="none" its components are the result; otherwise each is fitted again to the samples
                that it is most responsible for.
            prior: so many samples of the covariance that all components have in common, about their own
                means, are added to each one's own. With marginals around the mixture, about half as
                many as there are dimensions are best; with shrinkage="none", a quarter, without them, too.

        Raises:
            TypeError: if groups, select or em_steps come with a stream of classes.
            ValueError: if not exactly one of `n_components` and classes is given, they do not fit the
                data, a class has fewer than two samples, em_steps come with labels or a prior, a rank by
                share with select or em_steps, or the prior is negative.
        """
        options: dict[str, Any] = {
            "n_components": n_components,
            "rank": rank,
            "seed": seed,
            "shrinkage": shrinkage,
            "tail": tail,
            "mirror": mirror,
            "select": select,
            "em_steps": em_steps,
            "prior": prior,
        }
        fitted = fit_mixture(data, labels=labels, groups=groups, **options)
        mixture = cls(fitted.weights, fitted.means, fitted.covariances, fitted.classes)
        size = round(float(fitted.weights.sum())) // (2 if mirror else 1)
        facts = {"size": size, "event_shape": list(mixture.event_shape)}
        provenance = record(facts, {**options, "grouped": groups is not None})
        if fitted.log_likelihood:
            provenance["log_likelihood"] = fitted.log_likelihood
        mixture.provenance = provenance
        return mixture

    @classmethod
    def equal_isotropic(cls, means: Tensor, var: Sigma, class_labels: Tensor | None = None) -> Self:
        """Equal components N(mu_k, var I) of means (K, *event_shape) (Eq. 138); with var = 0, the delta's."""
        flat = means.shape[1:].numel()
        one = Covariance(means.new_zeros(flat, 0), means.new_zeros(0), tail=var)
        return cls(means.new_ones(len(means)), means, [one] * len(means), class_labels)

    @property
    def event_shape(self) -> torch.Size:
        return self.means.shape[1:]

    @property
    def mean(self) -> Tensor:
        """The mean of the whole mixture, (*event_shape)."""
        return self._centre(self.means.dtype).reshape(self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The mean variance per dimension of the whole mixture; 0-d."""
        dim = self.event_shape.numel()
        inside = self.eigvals.sum(-1) + (dim - self.eigvals.shape[1]) * self.tails  # padded by the tail
        between = ((self.means - self.mean) ** 2).flatten(1).sum(-1)
        with full_precision(self.means.device.type):
            return self.weights @ (inside + between) / dim

    @property
    def n_components(self) -> int:
        """K, the number of components."""
        return len(self.weights)

    def component(self, k: int, rank: int | None = None) -> GaussianDenoiser:
        """The denoiser of component k alone, with the mixture's own buffers.

        Args:
            k: its number.
            rank: of its covariance, where it is known: else, on a GPU, the host waits for it.

        Raises:
            IndexError: if there is no such component.
        """
        if not 0 <= k < self.n_components:
            raise IndexError(f"expected a component from 0 to {self.n_components - 1}, got {k}")
        rank = int(self.ranks[k]) if rank is None else rank
        gaussian = view(GaussianDenoiser, mean=self.means[k])
        gaussian.covariance = view(
            Covariance,
            eigvecs=self.eigvecs[k, :rank].mT,
            eigvals=self.eigvals[k, :rank],
            tail=self.tails[k],
        )
        return gaussian

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        return self.with_weights(x, sigma, class_labels)[0]

    def with_weights(
        self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """D(x, sigma) and the weights (*batch, K) of the components in it; arguments, errors as in `forward`.

        These are the `responsibilities`, as precisely as D needs them.
        """
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        sole = sole_components(possible_components(class_labels, batch_shape, self.component_labels))
        if sole is not None:
            return self._by_class(x, sigma, sole), used_alone(sole, self.n_components).to(result_dtype(x))
        flat, level = self._flatten(x, sigma)
        fast = compute_dtype(x, self.means)
        if fast != flat.dtype and known_true(self._resolved(flat, level, fast)):
            flat = flat.to(fast)
        weights, z = self._posterior(flat, level, class_labels)
        variance = level[..., None].to(flat.dtype) ** 2
        shrunk = self._combine(lambda lam: lam / (lam + variance), weights, z, flat)
        with full_precision(x.device.type):
            denoised = weights @ self.means.to(flat.dtype).flatten(1) + shrunk  # Eq. 7
        return denoised.reshape(x.shape).to(result_dtype(x)), weights.to(result_dtype(x))

    def _by_class(self, x: Tensor, sigma: Sigma, sole: Tensor) -> Tensor:
        """The denoised `x`, each sample by its own component (*batch,) alone."""
        level = as_sigma(sigma, x, tuple(sole.shape), result_dtype(x)).expand(sole.shape).flatten()
        rows, ranks = x.reshape(-1, *self.event_shape), self.ranks.tolist()
        denoised = torch.zeros_like(rows, dtype=result_dtype(x))
        for k, mine in rows_by_component(used_alone(sole.flatten(), self.n_components)):
            denoised = denoised.index_add(0, mine, self.component(k, ranks[k])(rows[mine], level[mine]))
        return denoised.reshape(x.shape)

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        flat, level = self._flatten(x, sigma)
        weights, z = self._posterior(flat, level, class_labels)
        score = self._combine(lambda lam: -1 / (lam + level[..., None] ** 2), weights, z, flat)  # Eq. 35
        return score.reshape(x.shape).to(result_dtype(x))

    def responsibilities(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """w_k(x, sigma) of Eq. 8, (*batch, K); arguments and errors as in `forward`."""
        flat, level = self._flatten(x, sigma)
        possible = possible_components(class_labels, tuple(flat.shape[:-1]), self.component_labels)
        sole = sole_components(possible)
        if sole is not None:  # at no cost
            return used_alone(sole, self.n_components).to(result_dtype(x))
        return self._posterior(flat, level, class_labels)[0].to(result_dtype(x))

    def log_prob(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """Log p(x; sigma) of the mixture, or of the class, (*batch,); arguments, errors as in `forward`."""
        flat, level = self._flatten(x, sigma)
        logits, log_prior, _ = self._logits(flat, level, class_labels)
        log_prob = torch.logsumexp(logits, -1) - torch.logsumexp(log_prior, -1)
        return log_prob.to(result_dtype(x))

    def posterior_variance(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        # The law of total variance, one component at a time: sum_k w_k [diag C_k + (m_k - D)^2].
        flat, level = self._flatten(x, sigma)
        weights, _ = self._posterior(flat, level, class_labels)
        wide, level = flat.reshape(x.shape), level[..., 0]
        denoised = self(x, sigma, class_labels).to(flat.dtype)
        total = torch.zeros_like(flat)
        for k, rank in enumerate(self.ranks.tolist()):
            own = self.component(k, rank)
            spread = own.posterior_variance(wide, level) + (own(wide, level) - denoised) ** 2
            total = total + weights[..., k, None] * spread.reshape(flat.shape)
        return total.reshape(x.shape).to(result_dtype(x))

    def _flatten(self, x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """The flat x (*batch, D) and sigma (*batch, 1) or (1,); wide, since logits reach 1e6 at low noise."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = torch.promote_types(compute_dtype(x, self.means), wide_dtype(x.device))
        level = as_sigma(sigma, x, batch_shape, dtype)[..., None]
        return x.to(dtype).reshape(*batch_shape, self.event_shape.numel()), level

    def _resolved(self, flat: Tensor, level: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether products in `dtype` resolve the logits well enough for the denoiser.

        They round ||x - c||^2 by eps, which the smallest variance turns into an error of the logits. Where
        it is small, so is its effect: components that share a sample agree on where it belongs.
        """
        tails = torch.where(self.ranks < self.event_shape.numel(), self.tails, math.inf)
        least = torch.cat([self.eigvals.flatten(), tails]).min()
        distance2 = ((flat - self._centre(flat.dtype)) ** 2).sum(-1, keepdim=True)
        error = torch.finfo(dtype).eps * distance2 / (least + level**2)
        return (error < _RESOLVED).all()

    def _centre(self, dtype: torch.dtype) -> Tensor:
        with full_precision(self.means.device.type):
            return self.weights.to(dtype) @ self.means.to(dtype).flatten(1)

    def _logits(
        self, flat: Tensor, level: Tensor, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log pi_k + log N(x; mu_k, Sigma_k + s^2 I), log pi_k (-inf outside of the class), and z_k.

        The logits are wide, and so is ||x - mu_k||^2; z_k has the dtype of `flat`, and with it the
        products with U.
        """
        wide, dim, rank = level.dtype, self.event_shape.numel(), self.eigvecs.shape[1]
        centre = self._centre(wide)  # distances about a common centre lose no digits to a large mean
        query, offsets = flat.to(wide) - centre, self.means.to(wide).flatten(1) - centre
        eigvecs = self.eigvecs.to(flat.dtype)
        with full_precision(flat.device.type):
            own = self.projections
            if flat.dtype == wide or flat.dtype != own.dtype:  # such as of a model in half precision
                own = torch.einsum("krd,kd->kr", eigvecs, offsets.to(flat.dtype))
            basis = rearrange(eigvecs, "k r d -> (k r) d")
            z = functional.linear(query.to(flat.dtype), basis, -own.flatten())
            distance2 = (query**2).sum(-1, keepdim=True) - 2 * query @ offsets.mT + (offsets**2).sum(-1)
        z = rearrange(z, "... (k r) -> ... k r", k=self.n_components)
        # A full basis leaves nothing outside of it; what the expansion leaves then is the rounding of U.
        partial = (self.ranks < dim).to(wide)
        outside = self.tails.to(wide) + level**2  # (*batch or 1, K)
        variances = self.eigvals.to(flat.dtype) + level[..., None].to(flat.dtype) ** 2  # (*batch or 1, K, r)
        # ||U^T (x - mu)||^2 lies in the distance, too: its share is taken out again.
        excess = 1 / variances - (partial / outside)[..., None].to(flat.dtype)
        mahalanobis = _times(z**2, excess, wide).sum(-1, dtype=wide) + partial * distance2 / outside
        logdet = torch.log(variances).sum(-1, dtype=wide) + (dim - rank) * torch.log(outside)
        log_prior = torch.log(self.weights.to(wide))
        possible = possible_components(class_labels, tuple(flat.shape[:-1]), self.component_labels)
        if possible is not None:
            log_prior = log_prior.expand(*possible.shape).masked_fill(~possible, -math.inf)
        return log_prior - 0.5 * (mahalanobis + logdet + dim * math.log(2 * math.pi)), log_prior, z

    def _posterior(self, flat: Tensor, level: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, _, z = self._logits(flat, level, class_labels)
        weights = torch.softmax(logits, -1).to(flat.dtype)  # Eq. 8
        # Without weights of nothing, products with them meet no denormal numbers, which are slow.
        return torch.where(weights > torch.finfo(flat.dtype).tiny ** 0.5, weights, 0), z

    def _combine(self, f: SpectralFunction, weights: Tensor, z: Tensor, flat: Tensor) -> Tensor:
        """sum_k w_k f(Sigma_k) (x - mu_k); `f` takes the variances as (K, r) and (K, 1)."""
        dtype = flat.dtype
        # (*batch or 1, K, 1); a full basis leaves nothing out, where f(tail) would only magnify its rounding
        f_tail = f(self.tails.to(dtype)[:, None]) * (self.ranks < self.event_shape.numel())[:, None]
        inside = _times(weights[..., None] * z, f(self.eigvals.to(dtype)) - f_tail, wide_dtype(z.device))
        outside = weights * f_tail[..., 0]
        with full_precision(flat.device.type):
            combined = rearrange(inside, "... k r -> ... (k r)") @ rearrange(
                self.eigvecs.to(dtype), "k r d -> (k r) d"
            )
            means = self.means.to(dtype).flatten(1)
            return combined + outside.sum(-1, keepdim=True) * flat - outside @ means

    def to_arguments(self) -> dict[str, Any]:
        return {
            "event_shape": list(self.event_shape),
            "n_components": self.n_components,
            "rank": self.eigvecs.shape[1],
            "labelled": self.component_labels is not None,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        count = arguments["n_components"]
        means = torch.zeros(count, *arguments["event_shape"])
        rank = arguments["rank"]
        empty = Covariance(torch.zeros(means[0].numel(), rank), torch.ones(rank), tail=1.0)
        labels = torch.zeros(count, dtype=torch.long) if arguments["labelled"] else None
        return cls(torch.ones(count), means, [empty] * count, labels)


def _times(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Multiplies into `a`, where nothing else needs it: new arrays of this size cost time.

    Compiled graphs and transforms of torch.func compute in `wide`, and cannot write in place.
    """
    return a * b if a.dtype == wide or a.requires_grad or b.requires_grad else a.mul_(b)
