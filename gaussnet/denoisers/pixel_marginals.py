"""What each pixel's own distribution adds to the Gaussian denoiser.

Pixels are no Gaussians: backgrounds are exactly white, strokes exactly black, and 8-bit images have 256
levels. The Gaussian denoiser D takes each for N(mu_i, Sigma_ii), and returns N(D_i, v_i) with

    v_i = [Sigma s^2 (Sigma + s^2 I)^-1]_ii.                                                            (1)

Divided by the assumed prior, this is what all pixels together say of this one: a Gaussian likelihood, of
precision eta_i about the estimate that it alone would give. Multiplied by the true prior p_i it gives

    eta_i = 1/v_i - 1/Sigma_ii,     h_i = (D_i - mu_i)/Sigma_ii                                         (2)
    D_m(x)_i = E[z],   z ~ p_i(z) exp(h_i (z - D_i) - eta_i (z - D_i)^2/2)                              (3)

(numbered here; written about D_i, so that nothing large cancels). It is one step of expectation propagation
(Minka 2001), of the same form as in vector approximate message passing (Rangan et al., arXiv 1610.03082):
exact if the data are Gaussian, and exact if their pixels are independent; in between closed, but no posterior
mean of any one prior. Each p_i is a mixture of K normals about levels c_k that all pixels share, of which it
has its own weights. Of a normal of width w and c = c_k - D_i the integrals in (3) are

    log evidence = [h c + w h^2/2 - eta c^2/2]/(1 + w eta) - log(1 + w eta)/2                           (4)
    mean         = D_i + (c + w h)/(1 + w eta).                                                         (5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.fit.streams import Data, batches, check_mirror, check_shape, process_cat, process_sum, subsample
from gaussnet.hub import register
from gaussnet.numerics import Sigma, as_sigma, check_event, compute_dtype, result_dtype

_POOLED = 2**22  # values from which levels are chosen
_CACHED = 2**16  # numbers in an array
_HELD = 2**26


@register
class Marginals(nn.Module):
    """Each pixel's own distribution, as a mixture of normals about levels that all pixels share.

    Args:
        levels: values c_k that pixels can have, shape (K,).
        widths: variance about each level, >= 0, shape (K,).
        log_weights: logarithms of each pixel's share of each level, (*event_shape, K).

    Raises:
        ValueError: if shapes do not fit, or values are not finite.

    Example:
        >>> marginals = Marginals.fit(torch.tensor([[-1.0], [1.0], [1.0]]), prior=0.0)
        >>> marginals.levels, marginals.log_weights.exp()
        (tensor([-1.,  1.]), tensor([[0.3333, 0.6667]]))
    """

    levels: Tensor
    widths: Tensor
    log_weights: Tensor

    def __init__(self, levels: Tensor, widths: Tensor, log_weights: Tensor) -> None:
        super().__init__()
        if levels.ndim != 1 or not len(levels) or widths.shape != levels.shape:
            raise ValueError(
                "expected levels and widths of one shape (K,), "
                f"got {tuple(levels.shape)} and {tuple(widths.shape)}"
            )
        if log_weights.ndim < 2 or log_weights.shape[-1:] != levels.shape:
            raise ValueError(
                f"expected log_weights of shape (*event_shape, {len(levels)}), got {tuple(log_weights.shape)}"
            )
        good = torch.isfinite(levels) & torch.isfinite(widths) & (widths >= 0)
        if not bool(good.all()):
            raise ValueError(
                f"expected finite levels and finite widths >= 0, got {int((~good).sum())} others"
            )
        if not bool((log_weights < 1e-3).all()):  # -inf: this pixel never has that level
            raise ValueError("expected logarithms of shares, got values above 0, or NaN")
        self.register_buffer("levels", levels)
        self.register_buffer("widths", widths)
        self.register_buffer("log_weights", log_weights)

    @classmethod
    def fit(
        cls,
        data: Data,
        n_levels: int = 32,
        prior: float = 10.0,
        generator: torch.Generator | None = None,
        *,
        mirror: bool = False,
        all_processes: bool = False,
    ) -> Self:
        """Counts, pixel by pixel, in one pass.

        Half of the levels are bins of equal mass of all pixels' values, half of equal width; a value that
        many pixels have, such as that of a background, is a level of its own, of width 0.

        Args:
            data: (N, *event_shape), or an iterable of batches, as for `GaussianDenoiser.fit`.
            n_levels: about how many levels; there are fewer where bins are empty or coincide.
            prior: so many samples of all pixels' distribution are added to each pixel's own, which keeps
                values possible that it has not had yet.
            generator: draws the samples that levels are chosen from, where there are very many.
            mirror: count each sample's mirror image, too.
            all_processes: as for `GaussianDenoiser.fit`.

        Raises:
            TypeError: if the data are neither an array nor an iterable of batches, or one that can be gone
                through only once.
            ValueError: for non-finite data, fewer than 4 levels, a negative prior, or vectors to mirror.
        """
        found = count_levels(data, n_levels, prior, generator, mirror=mirror, all_processes=all_processes)
        return cls(*found)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one sample."""
        return self.log_weights.shape[:-1]

    def refine(self, gaussian: GaussianDenoiser, denoised: Tensor, sigma: Sigma) -> Tensor:
        """D_m from what the Gaussian has made of x, which is all of x that it depends on.

        Args:
            gaussian: of the same data.
            denoised: gaussian(x, sigma), (*batch, *event_shape).
            sigma: its noise level.

        Returns:
            Tensor of the shape of `denoised`.

        Raises:
            TypeError: if `denoised` is not a floating-point tensor.
            ValueError: if a shape does not fit, or sigma is not finite and positive.
        """
        batch_shape = check_event(denoised, self.event_shape, type(self).__name__)
        dim, dtype = self.event_shape.numel(), compute_dtype(denoised, gaussian.mean)
        variance = as_sigma(sigma, denoised, batch_shape, dtype).reshape(-1, 1) ** 2  # (B, 1) or (1, 1)

        def variances(lam: Tensor) -> Tensor:
            return torch.cat([lam * (variance / (lam + variance)), lam * (lam / (lam + variance))])

        left, explained = gaussian.covariance.diagonal(variances, dtype).chunk(2)  # (1)
        v = gaussian.variance.to(dtype)
        # A pixel that hardly varies says little, and divided by its variance, rounding would say much.
        left, assumed = left.clamp_min(1e-12 * v), (left + explained).clamp_min(1e-4 * v)
        d = denoised.to(dtype).reshape(-1, dim)
        eta = (explained / (left * assumed)).expand_as(d)  # (2), without a difference
        h = (d - gaussian.mean.to(dtype).flatten()) / assumed  # (2)
        size = len(d)
        if not torch.compiler.is_compiling():  # compiled, nothing of size K is written
            # On CPU, in parts that stay in cache: 5 times faster. Elsewhere, in parts that memory holds.
            most = _CACHED if d.device.type == "cpu" else _HELD
            size = max(1, most // (dim * len(self.levels)))
        pieces = zip(d.split(size), eta.split(size), h.split(size), strict=True)
        shift = torch.cat([self._shift(*piece) for piece in pieces])
        return (d + shift).reshape(denoised.shape).to(result_dtype(denoised))

    def _shift(self, d: Tensor, eta: Tensor, h: Tensor) -> Tensor:
        """E[z] - D of (3), all of shape (n, D)."""
        c = self.levels.to(d.dtype) - d[..., None]  # (n, D, K)
        w, eta, h = self.widths.to(d.dtype), eta[..., None], h[..., None]
        shrink = torch.reciprocal(1 + w * eta)
        evidence = (c * torch.addcmul(h, eta, c, value=-0.5) + w * (h**2 / 2)) * shrink  # (4)
        log_weights = self.log_weights.to(d.dtype).flatten(0, -2) + torch.log(shrink) / 2
        means = torch.addcmul(c, w, h) * shrink  # (5)
        return (torch.softmax(evidence + log_weights, -1) * means).sum(-1)

    def to_arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs."""
        return {"event_shape": list(self.event_shape), "n_levels": len(self.levels)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Of the same size, with zeros."""
        levels = torch.zeros(arguments["n_levels"])
        return cls(levels, levels.clone(), torch.zeros(*arguments["event_shape"], len(levels)))

    def extra_repr(self) -> str:
        """The number of levels."""
        return f"levels={len(self.levels)}"


def count_levels(
    data: Data,
    n_levels: int = 32,
    prior: float = 10.0,
    generator: torch.Generator | None = None,
    component_of: Callable[[int, Tensor, Any], Tensor] | None = None,
    n_components: int = 1,
    *,
    mirror: bool = False,
    all_processes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (K,), widths (K,) and the logarithms of each pixel's shares (*event_shape, K).

    Arguments and errors are those of `Marginals.fit`. With `component_of`, which tells the component of each
    sample of a batch, of the number of the first one, the batch and its labels, shares are of the samples of
    each of `n_components`, (n_components, *event_shape, K), and `prior` samples of the pixel in all of them.
    """
    if n_levels < 4 or not 0 <= prior < math.inf:
        raise ValueError(f"expected n_levels >= 4 and a finite prior >= 0, got {n_levels} and {prior}")
    if not isinstance(data, (Tensor, np.ndarray)) and iter(data) is data:
        raise TypeError(f"expected data that can be gone through several times, got a {type(data).__name__}")
    first, _ = next(batches(data), (None, None))
    if first is None:
        raise ValueError("expected at least one batch of samples, got none")
    event_shape = first.shape[1:]
    if mirror:
        check_mirror(event_shape)
    dim = event_shape.numel()
    drawn, _ = subsample(data, max(2, _POOLED // dim), None, generator)
    pooled = drawn.double().flatten().cpu()
    if all_processes:
        pooled = process_cat(pooled)
    if not bool(torch.isfinite(pooled).all()):
        raise ValueError(
            f"expected finite data, got {int((~torch.isfinite(pooled)).sum())} non-finite values"
        )
    edges = _edges(pooled, n_levels)
    # About a value of each level: a large mean costs no digits, and a single value is not rounded.
    pilots = edges.scatter_reduce(0, _bins(pooled, edges), pooled, "amax", include_self=False)
    offset = torch.arange(dim) * len(edges)
    size = dim * len(edges)
    counts = torch.zeros(n_components * size, dtype=torch.float64)
    sums = torch.zeros(3, len(edges), dtype=torch.float64)  # of 1, z, z^2, z about its pilot
    start = 0
    for batch, labels in batches(data):
        check_shape(batch, event_shape)
        values = batch.flatten(1).cpu().to(torch.float64, copy=True).contiguous()
        bins = _bins(values, edges)
        places = bins + offset
        if component_of is not None:
            places += size * component_of(start, batch, labels).cpu()[:, None]
        start += len(batch)
        counts += torch.bincount(places.flatten(), minlength=len(counts))
        values -= pilots[bins]
        for power in range(3):
            sums[power] += torch.bincount(bins.flatten(), values.flatten() ** power, len(edges))
    if all_processes:
        counts, sums = process_sum(counts), process_sum(sums)
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("expected finite data, got non-finite values")
    counts = counts.reshape(n_components, *event_shape, -1)
    if mirror:
        counts = (counts + counts.flip(-2)) / 2
    kept = sums[0] > 0
    number, total, squares = sums[:, kept]
    centres = total / number
    widths = squares / number - centres**2
    widths[widths < 1e-12 * pooled.var(correction=0)] = 0  # rounding of a single value
    counts = counts[..., kept]
    shares = counts.sum(0) + prior * number / number.sum()  # of each pixel, in all samples
    if component_of is not None:
        own = counts.sum(-1, keepdim=True)
        every = shares / shares.sum(-1, keepdim=True)
        shares = torch.where(own + prior > 0, counts + prior * every, every)
    log_weights = torch.log(shares / shares.sum(-1, keepdim=True))
    dtype = torch.promote_types(torch.float32, first.dtype)
    return (pilots[kept] + centres).to(dtype), widths.to(dtype), log_weights.to(dtype)


def _bins(values: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(values, edges).clamp_max(len(edges) - 1)


def _edges(values: Tensor, count: int) -> Tensor:
    """Upper edges of bins, closed above: of equal mass and of equal width, and of frequent values alone."""
    ordered = values.sort().values
    half = max(1, count // 2)
    places = (torch.arange(1, half + 1, dtype=torch.float64) * len(ordered) / half).ceil().long() - 1
    mass = ordered[places]
    values_hit, hits = mass.unique_consecutive(return_counts=True)
    frequent = values_hit[hits > 1]
    width = torch.linspace(float(ordered[0]), float(ordered[-1]), count - half + 1, dtype=values.dtype)[1:]
    below = torch.nextafter(frequent, torch.full_like(frequent, -torch.inf))
    edges = torch.cat([values_hit, width, below]).unique()
    return edges[edges >= ordered[0]]
