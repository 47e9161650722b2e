"""The error of a denoiser, measured on held-out data: for bases of the bypass that have no closed form.

Of the base D_b = D + w (D_iso - D), blended with the isotropic skip by any share w, the squared error per
dimension is a quadratic function of three moments of e = D(x, s) - x_0 and e_iso = D_iso(x, s) - x_0:

    E||D_b - x_0||^2 / D = (1 - w)^2 E e^2 + 2 w (1 - w) E e e_iso + w^2 E e_iso^2.

It is the same with any other denoiser in place of D_iso, and least at w = E e (e - e_iso) / E (e - e_iso)^2.

The table holds them in units of v s^2/(v + s^2), the isotropic denoiser's own error, of which they are
smooth fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.fit.streams import Data, subsample
from gaussnet.hub import register
from gaussnet.tables import LevelTable

_NUMBERS = 2**21  # at a level, of which a mean square is known well enough
_TINY = torch.finfo(torch.float32).tiny
# The least error that is told, in those units: of pixels with few values, marginals make none at low noise,
# and a loss weight of 1/0 would not be finite. So c_out is at least 1% of the isotropic denoiser's.
_LEAST = 1e-4


@register
class MeasuredError(LevelTable):
    """A table of E e^2, E e e_iso, E e_iso^2 over log sigma, each over v s^2/(v + s^2).

    Args:
        sigmas: increasing noise levels, shape (n,), n >= 2.
        values: the three moments at these levels, shape (n, 3).
        other: the class of the denoiser that the base was blended with, by name; "" if it is not known.

    Raises:
        TypeError: if the values are not floating-point.
        ValueError: if the table is malformed.

    Example:
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> heldout = 2 * torch.randn(2000, 1, generator=generator)  # of other variance than expected
        >>> error, one = MeasuredError.fit(gaussian, heldout, generator=generator), torch.ones(())
        >>> measured = error.error(one, 0 * one, gaussian.variance)  # (1 - f)^2 4 + f^2 with f = 1/2
        >>> abs(measured.item() - 1.25) < 0.1
        True
    """

    def __init__(self, sigmas: Tensor, values: Tensor, other: str = "") -> None:
        super().__init__(sigmas, values)
        self.other = other
        if values.ndim != 2 or values.shape[1] != 3 or not bool(torch.isfinite(values).all()):
            raise ValueError(f"expected finite values of shape (n, 3), got {tuple(values.shape)}")

    @classmethod
    def fit(
        cls,
        denoiser: GaussianDenoiser | GaussianMixtureDenoiser,
        heldout: Data,
        sigmas: Sequence[float] | Tensor | None = None,
        n_queries: int | None = None,
        generator: torch.Generator | None = None,
        *,
        labels: Tensor | None = None,
        other: Denoiser | None = None,
    ) -> MeasuredError:
        """Measures a denoiser on noised data that it was not fitted to.

        Args:
            denoiser: the base.
            heldout: samples (n, *event_shape), or an iterable of batches.
            sigmas: increasing noise levels of the table; default: 31 from 0.002 to 100, evenly in log.
            n_queries: noised samples at each level; default: 2048, of more than 1024 dimensions fewer, down
                to 256. Fewer samples get several noises each.
            generator: draws samples and noise.
            labels: integer classes (n,), for a denoiser with classes.
            other: what the base is blended with; default: the isotropic denoiser of the same mean and
                variance.

        Returns:
            The table, on the device of `denoiser`.

        Raises:
            TypeError: if the data are neither an array nor an iterable of batches.
            ValueError: if they do not fit the denoiser.
        """
        if sigmas is None:
            sigmas = torch.logspace(-2.7, 2, 31, dtype=torch.float64)
        levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        buffer = next(denoiser.buffers())
        if n_queries is None:
            n_queries = min(2048, max(256, _NUMBERS // denoiser.event_shape.numel()))
        clean, classes = subsample(heldout, n_queries, labels, generator)
        repeats = -(-n_queries // len(clean))
        wide = torch.promote_types(clean.dtype, torch.float32)  # half precision would round the noise
        clean = clean.to(buffer.device, wide).repeat(repeats, *(1,) * (clean.ndim - 1))
        own = None if classes is None else classes.to(buffer.device).repeat(repeats)
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(clean.shape, generator=generator, device=device).to(clean)
        if other is None:
            other = GaussianDenoiser.isotropic(denoiser.mean, denoiser.variance)
        elif other.event_shape != denoiser.event_shape:
            shapes = f"{tuple(denoiser.event_shape)} and {tuple(other.event_shape)}"
            raise ValueError(f"expected two denoisers of one event shape, got {shapes}")
        variance = float(denoiser.variance)
        rows: list[list[float]] = []
        with torch.no_grad():
            for sigma in levels.tolist():
                x = clean + sigma * noise
                e = (denoiser(x, sigma, own) - clean).double()
                e_other = (other(x, sigma, own) - clean).double()
                unit = variance * sigma**2 / (variance + sigma**2)
                rows.append(
                    [float((a * b).mean()) / unit for a, b in ((e, e), (e, e_other), (e_other, e_other))]
                )
        table = torch.tensor(rows, dtype=torch.float64)
        return cls(levels.to(buffer), table.to(buffer), type(other).__name__)

    def error(self, sigma: Tensor, share: Tensor, variance: Tensor) -> Tensor:
        """The mean squared error per dimension of a base of which `share` is the other; shape of sigma.

        At least 1e-4 of the isotropic denoiser's own error, v s^2/(v + s^2): its inverse weighs a loss.
        """
        own, cross, other = self(sigma).to(sigma.dtype).unbind(-1)
        unit = variance * sigma**2 / (variance + sigma**2)
        moment = (1 - share) ** 2 * own + 2 * share * (1 - share) * cross + share**2 * other
        return unit * moment.clamp_min(_LEAST)

    def best_share(self, sigma: Tensor) -> Tensor:
        """The share in [0, 1] of the other denoiser with the least error; shape of sigma."""
        own, cross, other = self(sigma).to(sigma.dtype).unbind(-1)
        difference = own - 2 * cross + other
        return ((own - cross) / difference.clamp_min(_TINY)).clamp(0, 1)

    def to_arguments(self) -> dict[str, Any]:
        return {**super().to_arguments(), "other": self.other}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        table = super().from_arguments(arguments)
        table.other = arguments.get("other", "")  # older tables do not tell
        return table
