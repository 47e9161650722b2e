"""EDM's preconditioning is the bypass of N(0, sigma_data^2 I), which this is written as.

Of `gaussnet.precond`, with mu = 0, v = sigma_data^2, and one eigenvalue:

    c_skip = v/(v + s^2),   c_in = 1/sqrt(v + s^2),   c_out = s sigma_data/sqrt(v + s^2),   c_noise = ln(s)/4.

Reference: Karras et al. 2022, arXiv 2206.00364, Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import nn

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.hub import build, describe
from gaussnet.network_denoiser import image_shape, range_arguments
from gaussnet.precond import BypassPrecond


class EDMPrecond(BypassPrecond):
    """EDM's preconditioning: the bypass of N(0, sigma_data^2 I).

    Args:
        network: as in `BypassPrecond`, with as many input as output channels.
        sigma_data: assumed standard deviation of the data.
        event_shape: shape of one sample; default: the network's `in_channels` and `img_resolution`.
        sigma_min: lowest level that the network was made for.
        sigma_max: highest level that the network was made for.

    Raises:
        ValueError: if sigma_data is not positive, or the network's channels do not fit.

    Example:
        >>> from gaussnet import MLP
        >>> model = EDMPrecond(MLP(4, in_channels=1, out_channels=1, model_channels=8), sigma_data=0.5)
        >>> x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(model(x, sigma=0.5), x / 2)  # c_skip x: the untrained network is 0
        True
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        event_shape: tuple[int, ...] | None = None,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"expected a finite sigma_data > 0, got {sigma_data}")
        if event_shape is None:
            event_shape = image_shape(network)
        gaussian = GaussianDenoiser.isotropic(torch.zeros(event_shape), sigma_data**2)
        super().__init__(
            network, gaussian, show_gaussian=False, base="gaussian", sigma_min=sigma_min, sigma_max=sigma_max
        )
        self.sigma_data = sigma_data
        # sigma_data says it all: without these, state dicts are those of EDM, key by key.
        for module in (gaussian, gaussian.covariance):
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)

    @classmethod
    def fit(cls, *_: Any, **__: Any) -> NoReturn:
        """Not of EDM's, which fits nothing.

        Raises:
            TypeError: always; the message names what does.
        """
        raise TypeError("EDMPrecond fits nothing but takes sigma_data; BypassPrecond.fit fits closed forms")

    @classmethod
    def from_edm(cls, *_: Any, **__: Any) -> NoReturn:
        """Not of EDM's own.

        Raises:
            TypeError: always; the message names what it is of.
        """
        raise TypeError("expected BypassPrecond.from_edm: an EDM model with a gate is not EDM's")

    def to_arguments(self) -> dict[str, Any]:
        return {
            "network": describe(self.model),
            "sigma_data": self.sigma_data,
            "event_shape": list(self.event_shape),
            **range_arguments(self),
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(
            build(arguments["network"]),
            arguments["sigma_data"],
            tuple(arguments["event_shape"]),
            arguments["sigma_min"],
            arguments["sigma_max"] or math.inf,
        )
