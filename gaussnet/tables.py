"""Functions of the noise level that were measured: tables over log sigma, interpolated.

Between two levels values are linear in log sigma; beyond the ends they are constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from gaussnet.numerics import Sigma, as_sigma, check_floating, pick


class LevelTable(nn.Module):
    """A table over log sigma.

    Args:
        sigmas: increasing noise levels, shape (n,), n >= 2.
        values: the values at these levels, shape (n, *columns).

    Raises:
        TypeError: if the values are not floating-point.
        ValueError: if the table is malformed.
    """

    log_sigma: Tensor
    values: Tensor

    def __init__(self, sigmas: Tensor, values: Tensor) -> None:
        super().__init__()
        check_floating(values=values)
        if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas.shape != values.shape[:1]:
            raise ValueError(
                "expected sigmas of shape (n,), n >= 2, and values of shape (n, ...), "
                f"got {tuple(sigmas.shape)} and {tuple(values.shape)}"
            )
        if not bool((sigmas[0] > 0) & (sigmas.diff() > 0).all() & torch.isfinite(sigmas[-1])):
            raise ValueError(f"expected increasing positive sigmas, got {sigmas.tolist()}")
        self.register_buffer("log_sigma", torch.log(sigmas))
        self.register_buffer("values", values)

    def forward(self, sigma: Sigma) -> Tensor:
        """The values at sigma, of shape (*sigma.shape, *columns)."""
        shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
        log_sigma = torch.log(as_sigma(sigma, self.values, shape, self.values.dtype))
        right = torch.searchsorted(self.log_sigma, log_sigma.contiguous()).clamp(1, len(self.log_sigma) - 1)
        x0, x1 = pick(self.log_sigma, right - 1), pick(self.log_sigma, right)
        share = ((log_sigma - x0) / (x1 - x0).clamp_min(torch.finfo(x0.dtype).tiny)).clamp(0, 1)
        share = share.reshape(share.shape + (1,) * (self.values.ndim - 1))
        return torch.lerp(pick(self.values, right - 1), pick(self.values, right), share)

    def to_arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs."""
        return {"shape": list(self.values.shape)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """A table of the same size, of zeros."""
        values = torch.zeros(arguments["shape"])
        return cls(torch.arange(1.0, len(values) + 1), values)

    def extra_repr(self) -> str:
        """The number of levels."""
        return f"size={len(self.values)}"
