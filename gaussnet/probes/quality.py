"""What teleport saves of a sampling run, and what it does to the samples.

Jumping to the i-th level of a grid drops the i steps before it (Appendix A.7 of arXiv 2412.09726). Heun's
method takes 2n - 1 evaluations for n steps, so 2i fewer. A gated model (`BypassPrecond`) leaves its network
alone above sigma_gate by itself: a jump to a level above that saves calls, and no evaluation.

Samples are compared with data as distributions, in features (`gaussnet.metrics`), and with those of the whole
run from the same noise, image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser, GaussianDenoiser
from gaussnet.metrics import FeatureStatistics, extract_features, frechet_interval, kernel_distance
from gaussnet.metrics.features import rounded
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.samplers import ModelStatistics, count_nfe
from gaussnet.sampling import Jump, sample_seeds

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as usual


class SkippedRun(NamedTuple):
    """Samples of a run that began below the first level of its grid.

    Attributes:
        images: (n, *event_shape), float32, on the CPU, in the order of the seeds.
        sigma_skip: the level where it began.
        calls: of the denoiser by the solver for one image: the NFE of published tables. Of an adaptive
            solver, the mean over batches.
        evaluations: of the network within the denoiser; the same as calls where there is none.

    Example:
        >>> run = SkippedRun(torch.zeros(4, 1, 8, 8), sigma_skip=12.9, calls=25.0, evaluations=25.0)
        >>> 2 * 18 - 1 - run.calls  # saved, of 18 steps of Heun's method
        10.0
    """

    images: Tensor
    sigma_skip: float
    calls: float
    evaluations: float


@torch.no_grad()
def skipped_run(
    model: Denoiser,
    gaussian: GaussianDenoiser,
    seeds: Sequence[int],
    sigmas: Tensor,
    skip: int = 0,
    *,
    solver: str = "heun",
    regrid: bool = False,
    batch_size: int = 64,
    statistics: ModelStatistics | None = None,
) -> SkippedRun:
    """Samples after a jump over the first steps of a grid.

    Args:
        model: any denoiser of images.
        gaussian: whose flow is the jump.
        seeds: of the noise, one generator each.
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        skip: number of steps to drop, 0 <= skip < n; 0 is the whole run.
        solver: a name of `SOLVERS`; multistep solvers get the Gaussian's history.
        regrid: take n steps on a new grid from there, rather than those that are left.
        batch_size: images at a time.
        statistics: for dpm_v3.

    Returns:
        The samples, the level where they began, and the calls for one image.

    Raises:
        ValueError: if the skip is not as above, or there is no seed; or as `sample_seeds`.

    Example:
        >>> from gaussnet import karras_sigmas
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 4, 4), 0.25)
        >>> sigmas = karras_sigmas(18)
        >>> runs = [skipped_run(gaussian, gaussian, range(4), sigmas, skip=skip) for skip in (0, 5)]
        >>> [run.calls for run in runs], (runs[0].images - runs[1].images).abs().max().item() < 0.05
        ([35.0, 25.0], True)
    """
    if not 0 <= skip < len(sigmas) - 1:
        raise ValueError(f"expected 0 <= skip < {len(sigmas) - 1}, the number of steps, got {skip}")
    if not len(seeds):
        raise ValueError("expected at least one seed, got none")
    level = float(sigmas[skip])
    called = _Called(model)
    with count_nfe(called) as calls, count_nfe(model) as evaluations:
        batches = sample_seeds(
            cast("Denoiser", called),
            seeds,
            sigmas,
            solver=solver,
            jump=Jump(gaussian, level) if skip else None,
            regrid=regrid,
            batch_size=batch_size,
            statistics=statistics,
        )
        parts = [images.cpu() for _, images in batches]
    nfe = calls() / len(parts)
    # An analytic model may be the Gaussian of the jump, whose history is no evaluation of the run.
    within = evaluations() / len(parts) if isinstance(model, NetworkDenoiser) else nfe
    return SkippedRun(torch.cat(parts), level, nfe, within)


def features_of(extractor: nn.Module | None, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features of images.

    Args:
        extractor: of `load_extractor`, which gets images as a PNG holds them, rounded to 256 values; None
            for the pixels themselves, (n, C H W), neither rounded nor cut.
        images: (n, C, H, W), around [-1, 1].
        batch_size: images at a time.

    Returns:
        Tensor (n, F), float32, on the CPU.

    Raises:
        ValueError: as `extract_features`.

    Example:
        >>> images = torch.tensor([0.0, 0.5, 1.5]).reshape(3, 1, 1, 1)
        >>> features_of(None, images).T, features_of(nn.Flatten(), images).T  # as they are; as a PNG has them
        (tensor([[0.0000, 0.5000, 1.5000]]), tensor([[0.0039, 0.4980, 1.0000]]))
    """
    if extractor is None:
        return images.flatten(1).float().cpu()

    batches = (rounded(batch) for batch in images.split(batch_size))
    return torch.cat([part.cpu() for part in extract_features(extractor, batches, batch_size)])


def distances(
    features: Tensor, reference: Tensor, *, draws: int = 50, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Frechet and kernel distance of samples to data.

    Args:
        features: (N, F) of the samples.
        reference: (M, F) of the data, which count as they are.
        draws: of the bootstrap. Generators of one seed draw the same samples for equal N, so that runs from
            the same noise are compared in pairs.
        generator: draws the bootstrap's samples and the kernel distance's subsets.

    Returns:
        frechet, with its 95% interval low and high and its `bias`; kernel, the mean over 100 subsets of at
        most 1,000, and kernel_std, their standard deviation.

    Raises:
        ValueError: as `frechet_interval` and `kernel_distance`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> samples = torch.randn(200, 2, generator=generator)
        >>> found = distances(samples + 1, samples, draws=10, generator=generator)
        >>> round(found["frechet"], 3), found["low"] < 2 < found["high"]
        (2.0, True)
    """
    interval = frechet_interval(features, FeatureStatistics.fit(reference), draws=draws, generator=generator)
    kernel = kernel_distance(
        features,
        reference,
        subsets=SUBSETS,
        subset_size=min(SUBSET_SIZE, len(features), len(reference)),
        generator=generator,
    )
    return {
        "frechet": interval.value,
        "low": interval.low,
        "high": interval.high,
        "bias": interval.bias,
        "kernel": kernel.mean,
        "kernel_std": kernel.std,
    }


class _Called(nn.Module):
    """A denoiser within another module, so that calls and evaluations of a network are counted apart."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.event_shape = denoiser.event_shape
        if isinstance(denoiser, NetworkDenoiser):
            self.round_sigma = denoiser.round_sigma  # stochastic solvers ask for it

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.denoiser(x, sigma, class_labels)
