"""The gate: how much of the Gaussian's error a network can remove, at each noise level, from data alone.

The Gaussian denoiser errs by e(s)^2 per dimension. Part of this is noise that nobody can remove: the
posterior variance of the data. By the Pythagorean identity of conditional means, what is left is

    E||D_delta(x, s) - D_gauss(x, s)||^2 / D  =  e(s)^2 - (Bayes error of the data),

with D_delta the exact denoiser of the data set. The gate is the square root of its share,

    g(s)^2 = E||D_delta - D_gauss||^2 / (D e(s)^2)   in [0, 1].

A network whose output is multiplied by g is silent where there is nothing to learn: at high noise g vanishes,
the model is exactly Gaussian, and teleporting down to there is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaussnet.denoisers import DeltaDenoiser, GaussianDenoiser
from gaussnet.hub import register
from gaussnet.numerics import Sigma, as_sigma


@register
class Gate(nn.Module):
    """A table of g over log sigma, interpolated linearly and constant beyond its ends.

    Args:
        sigmas: increasing noise levels, shape (n,), n >= 2.
        values: g at these levels, within [0, 1], shape (n,).

    Raises:
        ValueError: if the table is malformed.
    """

    log_sigma: Tensor
    values: Tensor

    def __init__(self, sigmas: Tensor, values: Tensor) -> None:
        super().__init__()
        if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas.shape != values.shape:
            raise ValueError(
                "expected sigmas and values of one shape (n,), n >= 2, "
                f"got {tuple(sigmas.shape)} and {tuple(values.shape)}"
            )
        if not bool((sigmas[0] > 0) & (sigmas.diff() > 0).all() & torch.isfinite(sigmas[-1])):
            raise ValueError(f"expected increasing positive sigmas, got {sigmas.tolist()}")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"expected gate values within [0, 1], got {values.tolist()}")
        self.register_buffer("log_sigma", torch.log(sigmas))
        self.register_buffer("values", values)

    @classmethod
    def fit(
        cls,
        gaussian: GaussianDenoiser,
        data: Tensor,
        sigmas: Sequence[float] | Tensor | None = None,
        n_queries: int = 1024,
        generator: torch.Generator | None = None,
    ) -> Gate:
        """Measures the gate on noised data.

        Args:
            gaussian: the base that the network corrects.
            data: the training set, (N, *event_shape).
            sigmas: increasing noise levels of the table; default: 25 from 0.05 to 100, evenly in log.
            n_queries: data points noised at each level, at most N.
            generator: draws the points and the noise.

        Returns:
            The gate, on the device of `data`.
        """
        if sigmas is None:
            sigmas = torch.logspace(-1.3, 2, 25, dtype=torch.float64)
        levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        delta = DeltaDenoiser(data)
        picked = torch.randperm(len(data), generator=generator, device=_device(generator))[:n_queries]
        clean = data[picked.to(data.device)]
        noise = torch.randn(clean.shape, generator=generator, device=_device(generator)).to(clean)
        ratios: list[float] = []
        with torch.no_grad():
            for sigma in levels.tolist():
                x = clean + sigma * noise
                gain = (delta(x, sigma) - gaussian(x, sigma)).square().mean()
                ratios.append(float(gain / gaussian.bayes_error(sigma)))
        values = torch.tensor(ratios, dtype=torch.float64).clamp(0, 1).sqrt()
        # The share falls with the noise; sampling error must not make it rise again.
        values = values.cummin(0).values
        return cls(levels.to(gaussian.mean), values.to(gaussian.mean))

    def forward(self, sigma: Sigma) -> Tensor:
        """g(sigma), of the shape of `sigma`."""
        shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
        log_sigma = torch.log(as_sigma(sigma, self.values, shape, self.values.dtype))
        right = torch.searchsorted(self.log_sigma, log_sigma.contiguous()).clamp(1, len(self.log_sigma) - 1)
        x0, x1 = self.log_sigma[right - 1], self.log_sigma[right]
        share = ((log_sigma - x0) / (x1 - x0)).clamp(0, 1)
        return torch.lerp(self.values[right - 1], self.values[right], share)

    def to_arguments(self) -> dict[str, Any]:
        return {"size": len(self.values)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Gate:
        size = arguments["size"]
        return cls(torch.arange(1.0, size + 1), torch.zeros(size))

    def extra_repr(self) -> str:
        return f"size={len(self.values)}"


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
