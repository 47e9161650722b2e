"""Pixels' own distributions around a mixture of Gaussians, such as of a Gaussian a class.

Given its component k, an image is one of a Gaussian, and what its pixels' distributions add is that of
`pixel_marginals`, with the distributions p_ki that pixel i has in component k. Components are as likely as
the mixture takes them to be (w_k, Eq. 8 of arXiv 2412.09726):

    D_m(x, s) = sum_k w_k(x, s) D_m^(k)(x, s).

Where a class has one component, its label leaves one term, and the others are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.mixture import GaussianMixtureDenoiser
from gaussnet.denoisers.pixel_marginals import Marginals, count_levels
from gaussnet.denoisers.routing import rows_by_component
from gaussnet.fit.streams import Data, as_tensor, check_labels, check_order
from gaussnet.hub import register
from gaussnet.numerics import Sigma, as_sigma, check_event, known_true, result_dtype, view

_NEAR = 0.1  # in standard deviations: the noise at which components tell samples apart
_ROWS = 1024


@register
class ComponentMarginals(nn.Module):
    """The distribution of each pixel in each component of a mixture, about levels that all of them share.

    Args:
        levels: as of `Marginals`, (K,).
        widths: as of `Marginals`, (K,).
        log_weights: logarithms of each pixel's share of each level, (n_components, *event_shape, K).

    Raises:
        ValueError: as of `Marginals`.

    Example:
        >>> coins, sides = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), torch.tensor([0, 0, 0, 1])
        >>> mixture = GaussianMixtureDenoiser.equal_isotropic(torch.tensor([[-0.3], [1.0]]), 1.0, sides[2:])
        >>> ComponentMarginals.fit(coins, mixture, sides, prior=0.0).log_weights.exp().squeeze()
        tensor([[0.6667, 0.3333],
                [0.0000, 1.0000]])
    """

    levels: Tensor
    widths: Tensor
    log_weights: Tensor

    def __init__(self, levels: Tensor, widths: Tensor, log_weights: Tensor) -> None:
        super().__init__()
        checked = Marginals(levels, widths, log_weights)
        if checked.log_weights.ndim < 3:
            raise ValueError(
                "expected log_weights of shape (n_components, *event_shape, K), "
                f"got {tuple(log_weights.shape)}"
            )
        self.register_buffer("levels", levels)
        self.register_buffer("widths", widths)
        self.register_buffer("log_weights", log_weights)

    @classmethod
    def fit(
        cls,
        data: Data,
        mixture: GaussianMixtureDenoiser,
        labels: Tensor | None = None,
        n_levels: int = 32,
        prior: float = 10.0,
        generator: torch.Generator | None = None,
        *,
        mirror: bool = False,
        all_processes: bool = False,
    ) -> Self:
        """Counts the values of each pixel in the samples of each component, in one pass.

        A sample counts for its likeliest component, among those of its class, where the mixture has classes.

        Args:
            data: as of `Marginals.fit`; with classes, an iterable of (images, labels) batches, or an array.
            mixture: of the same data.
            labels: integer classes (N,) of an array, or of a stream without any.
            n_levels: as of `Marginals.fit`.
            prior: so many samples of the distribution that the pixel has in all components are added to that
                of each.
            generator: as of `Marginals.fit`.
            mirror: as of `Marginals.fit`.
            all_processes: as of `Marginals.fit`.

        Raises:
            TypeError: as of `Marginals.fit`.
            ValueError: as of `Marginals.fit`, if a mixture of classes comes without labels, or these do not
                fit the data or the classes.
        """
        if labels is not None:
            check_order(data)
            count = len(data) if isinstance(data, (Tensor, np.ndarray)) else len(labels)
            labels = check_labels(labels, count)
        sigma, seen = _NEAR * float(mixture.variance) ** 0.5, 0

        def component_of(start: int, batch: Tensor, own: Any) -> Tensor:
            nonlocal seen
            classes, seen = own, start + len(batch)
            if labels is not None:
                classes = labels[start:seen]
            if mixture.component_labels is None:
                classes = None
            elif classes is None:
                raise ValueError("expected labels with a mixture of classes, got none")
            else:
                classes = check_labels(classes, len(batch)).to(mixture.means.device)
            found: list[Tensor] = []
            for rows in torch.arange(len(batch)).split(_ROWS):
                x = as_tensor(batch)[rows.to(batch.device)].to(mixture.means)
                mine = None if classes is None else classes[rows.to(classes.device)]
                found.append(mixture.responsibilities(x, sigma, mine).argmax(-1))
            return torch.cat(found)

        options: dict[str, Any] = {"mirror": mirror, "all_processes": all_processes}
        found = count_levels(data, n_levels, prior, generator, component_of, mixture.n_components, **options)
        if labels is not None and seen != len(labels):
            raise ValueError(f"expected a label for each of {seen} samples, got {len(labels)}")
        return cls(*found)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one sample."""
        return self.log_weights.shape[1:-1]

    @property
    def n_components(self) -> int:
        """The number of components."""
        return len(self.log_weights)

    def component(self, k: int) -> Marginals:
        """Those of component k, with the same buffers."""
        return view(Marginals, levels=self.levels, widths=self.widths, log_weights=self.log_weights[k])

    def refine(
        self,
        mixture: GaussianMixtureDenoiser,
        denoised: Tensor,
        x: Tensor,
        sigma: Sigma,
        weights: Tensor,
    ) -> Tensor:
        """D_m, of x and what the mixture has made of it.

        Args:
            mixture: of the same data.
            denoised: of mixture.with_weights(x, sigma), of the shape of `x`.
            x: noisy samples (*batch, *event_shape).
            sigma: their noise level.
            weights: of the components, of the same call, (*batch, n_components).

        Returns:
            Tensor of the shape of `x`.

        Raises:
            TypeError: if `x` is not a floating-point tensor.
            ValueError: if a shape does not fit, or sigma is not finite and positive.
        """
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        if weights.shape != (*batch_shape, self.n_components):
            raise ValueError(
                f"expected weights of shape {(*batch_shape, self.n_components)}, got {tuple(weights.shape)}"
            )
        level = as_sigma(sigma, x, batch_shape, result_dtype(x)).expand(batch_shape).reshape(-1)
        weights = weights.reshape(-1, self.n_components)
        x, denoised = (image.reshape(-1, *self.event_shape) for image in (x, denoised))
        total, ranks = torch.zeros_like(denoised), mixture.ranks.tolist()
        parts: list[tuple[int, Tensor, bool]] = []  # component, rows, and whether D_gauss is that of it alone
        if known_true(weights.sum() > 0):
            used = weights > torch.finfo(weights.dtype).eps
            sole = used.sum(1, keepdim=True) == 1
            parts += [(k, rows, True) for k, rows in rows_by_component(used & sole)]
            parts += [(k, rows, False) for k, rows in rows_by_component(used & ~sole)]
        else:  # nothing can be read: each sample with each component
            every = torch.arange(len(x), device=x.device)
            parts += [(k, every, False) for k in range(self.n_components)]
        for k, rows, sole in parts:
            own, s = mixture.component(k, ranks[k]), level[rows]
            d = denoised[rows] if sole else own(x[rows], s)
            share = weights[rows, k].reshape(-1, *[1] * len(self.event_shape))
            refined = share * self.component(k).refine(own, d, s)
            total = total.index_add(0, rows, refined.to(total))
        return total.reshape(*batch_shape, *self.event_shape)

    def to_arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs."""
        return {
            "event_shape": list(self.event_shape),
            "n_levels": len(self.levels),
            "n_components": self.n_components,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Of the same size, with zeros."""
        levels = torch.zeros(arguments["n_levels"])
        shape = (arguments["n_components"], *arguments["event_shape"], len(levels))
        return cls(levels, levels.clone(), torch.zeros(shape))

    def extra_repr(self) -> str:
        """The numbers of components and levels."""
        return f"components={self.n_components}, levels={len(self.levels)}"


def check_marginals(
    gaussian: GaussianDenoiser | GaussianMixtureDenoiser, marginals: Marginals | ComponentMarginals
) -> None:
    """Refuses marginals that are not of the components of what they are around.

    Raises:
        TypeError: if those of components come without a mixture, or a mixture without these.
        ValueError: if event shapes or numbers of components differ.
    """
    if isinstance(gaussian, GaussianMixtureDenoiser) != isinstance(marginals, ComponentMarginals):
        raise TypeError(
            "expected a GaussianDenoiser with Marginals, or a mixture with ComponentMarginals, "
            f"got a {type(gaussian).__name__} with {type(marginals).__name__}"
        )
    if gaussian.event_shape != marginals.event_shape:
        raise ValueError(
            "expected a Gaussian and marginals of one event shape, got "
            f"{tuple(gaussian.event_shape)} and {tuple(marginals.event_shape)}"
        )
    if isinstance(gaussian, GaussianMixtureDenoiser) and isinstance(marginals, ComponentMarginals):
        counts = gaussian.n_components, marginals.n_components
        if counts[0] != counts[1]:
            raise ValueError(f"expected marginals of {counts[0]} components, got those of {counts[1]}")


def denoise(
    gaussian: GaussianDenoiser | GaussianMixtureDenoiser,
    x: Tensor,
    sigma: Sigma,
    class_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """D_gauss of either, and of a mixture the weights of its components."""
    if isinstance(gaussian, GaussianMixtureDenoiser):
        return gaussian.with_weights(x, sigma, class_labels)
    return gaussian(x, sigma, class_labels), None


def refine(
    gaussian: GaussianDenoiser | GaussianMixtureDenoiser,
    marginals: Marginals | ComponentMarginals,
    denoised: Tensor,
    x: Tensor,
    sigma: Sigma,
    weights: Tensor | None = None,
) -> Tensor:
    """D_m of either, from what `denoise` has made of x."""
    if isinstance(marginals, ComponentMarginals):
        assert isinstance(gaussian, GaussianMixtureDenoiser)
        assert weights is not None
        return marginals.refine(gaussian, denoised, x, sigma, weights)
    assert isinstance(gaussian, GaussianDenoiser)
    return marginals.refine(gaussian, denoised, sigma)
