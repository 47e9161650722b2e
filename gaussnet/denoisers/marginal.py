"""The Gaussian denoiser, corrected by what each pixel's own distribution is known to be.

`pixel_marginals` has the mathematics. Around a mixture, it holds of each component, and the estimates of
components are averaged by their responsibilities: `component_marginals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.base import Denoiser
from gaussnet.denoisers.component_marginals import ComponentMarginals, check_marginals, denoise, refine
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.mixture import GaussianMixtureDenoiser
from gaussnet.denoisers.pixel_marginals import Marginals
from gaussnet.fit.streams import Data
from gaussnet.hub import build, describe
from gaussnet.numerics import Sigma, check_event, result_dtype, wide_dtype


class MarginalDenoiser(Denoiser):
    """The Gaussian denoiser, refined pixel by pixel with the pixel's own distribution.

    Args:
        gaussian: of the data; or a mixture, such as of a Gaussian a class.
        marginals: of the same data; `ComponentMarginals` of a mixture.

    Raises:
        TypeError: if marginals of components come without a mixture, or a mixture without these.
        ValueError: if the two have different event shapes, or numbers of components.

    Example:
        >>> coins = torch.tensor([[-1.0], [1.0]])
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> MarginalDenoiser(gaussian, Marginals.fit(coins))(torch.tensor([[0.5]]), sigma=1.0)  # tanh(0.5)
        tensor([[0.4621]])
    """

    def __init__(
        self, gaussian: GaussianDenoiser | GaussianMixtureDenoiser, marginals: Marginals | ComponentMarginals
    ) -> None:
        super().__init__()
        check_marginals(gaussian, marginals)
        if not float(gaussian.variance) > 0:
            raise ValueError("expected a Gaussian with variance, got none")
        self.gaussian = gaussian
        self.marginals = marginals

    @classmethod
    def fit(
        cls,
        data: Data,
        gaussian: GaussianDenoiser | GaussianMixtureDenoiser | None = None,
        *,
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> Self:
        """Fits the marginals to the data, and the Gaussian, unless one is given.

        Args:
            data: (N, *event_shape), or an iterable of batches that can be gone through several times.
            gaussian: default: `GaussianDenoiser.fit(data)`, `mirror` and `all_processes` as of marginals.
            labels: integer classes (N,) of an array, for a mixture of classes.
            **arguments: of `Marginals.fit`.

        Raises:
            TypeError: as of the two fits.
            ValueError: as of the two fits, if event shapes differ, or for labels without a mixture.
        """
        if gaussian is None:
            shared = {name: arguments[name] for name in ("mirror", "all_processes") if name in arguments}
            gaussian = GaussianDenoiser.fit(data, **shared)
        if isinstance(gaussian, GaussianMixtureDenoiser):
            marginals = ComponentMarginals.fit(data, gaussian, labels, **arguments)
        elif labels is None:
            marginals = Marginals.fit(data, **arguments)
        else:
            raise ValueError("expected a mixture of classes with labels, got a GaussianDenoiser")
        refined = cls(gaussian, marginals.to(gaussian.mean))
        own = {name: arguments[name] for name in ("n_levels", "prior", "mirror") if name in arguments}
        refined.provenance = {**gaussian.provenance, "marginals": own}
        return refined

    @property
    def event_shape(self) -> torch.Size:
        return self.gaussian.event_shape

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        return self.closed_forms(x, sigma, class_labels)[1]

    def closed_forms(
        self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """D_gauss and D_m: arguments and errors as of `forward`."""
        check_event(x, self.event_shape, type(self).__name__)
        denoised, weights = denoise(self.gaussian, x, sigma, class_labels)
        return denoised, refine(self.gaussian, self.marginals, denoised, x, sigma, weights)

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        check_event(x, self.event_shape, type(self).__name__)
        # Wide: where sigma is small, D - x is what the digits of float32 do not hold.
        return super().score(x.to(wide_dtype(x.device)), sigma, class_labels).to(result_dtype(x))

    def to_arguments(self) -> dict[str, Any]:
        return {"gaussian": describe(self.gaussian), "marginals": describe(self.marginals)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(build(arguments["gaussian"]), build(arguments["marginals"]))
