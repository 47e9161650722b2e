"""Comparing denoisers: how much of what one does is explained by another.

    unexplained(a, b) = ||a - b||^2 / ||a||^2                                    (Eq. 28 of arXiv 2412.09726)

per query, uncentred, for scores (the paper's) or for denoised images. While a network trains, its distance
to simple scores falls and rises again: it learns the Gaussian first, and then leaves it (Fig. 12 there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PAPER_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 80.0)


def unexplained_variance(target: Tensor, approx: Tensor) -> Tensor:
    """The share of `target` that `approx` does not explain (Eq. 28), per query.

    Args:
        target: (B, *event_shape), not zero.
        approx: of the same shape.

    Returns:
        Tensor of shape (B,): 0 where both agree, 1 for approx = 0.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> unexplained_variance(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([0.6400])
    """
    if target.shape != approx.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(target.shape)} and {tuple(approx.shape)}"
        )
    residual = (target - approx).flatten(1).square().sum(1)
    return residual / target.flatten(1).square().sum(1)


class ScoreProbe:
    """Compares denoisers with fixed references at fixed noisy queries.

    What the references say is computed once; a probe of a model costs one evaluation per noise level.

    Args:
        references: name -> analytic denoiser.
        data: clean samples to noise, (Q, *event_shape). Zeros make the queries N(0, sigma^2 I).
        sigmas: noise levels; default: those of the paper.
        generator: draws the noise, one draw for all levels.

    Raises:
        ValueError: if there is no reference or no query.
    """

    def __init__(
        self,
        references: Mapping[str, nn.Module],
        data: Tensor,
        sigmas: Sequence[float] = PAPER_SIGMAS,
        generator: torch.Generator | None = None,
    ) -> None:
        if not references or not len(data):
            raise ValueError(f"expected references and queries, got {len(references)} and {len(data)}")
        device = generator.device if generator is not None else data.device
        noise = torch.randn(data.shape, generator=generator, dtype=data.dtype, device=device).to(data.device)
        self.sigmas = tuple(sigmas)
        self.queries = {sigma: data + sigma * noise for sigma in self.sigmas}
        with torch.no_grad():
            self.denoised = {
                name: {sigma: reference(x, sigma) for sigma, x in self.queries.items()}
                for name, reference in references.items()
            }

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row for each noise level, reference and quantity ("score" or "denoiser").

        Returns:
            Rows with sigma, reference, quantity, mean and std (over queries) of the unexplained variance of
            the model, and the number of queries.
        """
        rows: list[dict[str, Any]] = []
        for sigma, x in self.queries.items():
            denoised = model(x, sigma)
            for name, by_sigma in self.denoised.items():
                approx = by_sigma[sigma]
                # Of the scores, sigma^2 cancels: s = (D - x)/sigma^2 (Eq. 4).
                pairs = {"score": (denoised - x, approx - x), "denoiser": (denoised, approx)}
                for quantity, (target, approximation) in pairs.items():
                    unexplained = unexplained_variance(target, approximation).double()
                    rows.append(
                        {
                            "sigma": sigma,
                            "reference": name,
                            "quantity": quantity,
                            "mean": float(unexplained.mean()),
                            "std": float(unexplained.std(correction=0)),
                            "queries": len(unexplained),
                        }
                    )
        return rows
