r"""What a finite number of samples does to the Frechet distance: its bias, and its scatter.

The distance of N samples is too large, to leading order by an amount proportional to 1/N that depends on the
model. Chong and Forsyth (2020, arXiv 1911.07023) fit a line to the distances of subsets,

    FD_N = FD_inf + slope / N,

and report its end FD_inf. The bootstrap draws N of the N samples with replacement and tells how much FD_N
would scatter if samples were drawn anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaussnet.fit import Data
from gaussnet.metrics.frechet import FeatureStatistics, FrechetTarget
from gaussnet.metrics.samples import collect_features, permutation, resampled


class Extrapolated(NamedTuple):
    """The Frechet distance of infinitely many samples, and the line that it ends.

    Attributes:
        value: FD_inf. It has no bias to order 1/N, and may scatter below 0 where the distance is small.
        slope: of FD_N over 1/N.
        counts: sizes N of the subsets.
        distances: FD_N of each.

    Example:
        >>> line = Extrapolated(value=1.0, slope=50.0, counts=[50, 100], distances=[2.0, 1.5])
        >>> [line.value + line.slope / count for count in line.counts] == line.distances
        True
    """

    value: float
    slope: float
    counts: list[int]
    distances: list[float]


class Interval(NamedTuple):
    """A bootstrap interval of the Frechet distance at this number of samples.

    Attributes:
        value: FD_N.
        low: lower end of the interval of the expected FD_N.
        high: upper end.
        std: standard deviation of FD_N.
        bias: what FD_N has too much, by the bootstrap. Compare values at equal N, or `value - bias`.

    Example:
        >>> found = Interval(value=2.0, low=1.4, high=2.6, std=0.3, bias=0.5)
        >>> found.value - found.bias
        1.5
    """

    value: float
    low: float
    high: float
    std: float
    bias: float


def frechet_infinity(
    features: Data,
    reference: FeatureStatistics | Data,
    *,
    points: int = 15,
    min_count: int | None = None,
    generator: torch.Generator | None = None,
) -> Extrapolated:
    """The Frechet distance extrapolated to infinitely many samples.

    Args:
        features: (N, F) of the samples, or an iterable of batches; all are kept in memory.
        reference: statistics or features of the data, which count as they are: no bias of theirs is removed.
        points: subset sizes, evenly spaced from `min_count` to N; each is a new random subset.
        min_count: smallest size; default: N / 10, as 5,000 of 50,000 in the paper.
        generator: draws the subsets.

    Returns:
        The end of the line, its slope, and the distances that it was fitted to.

    Raises:
        TypeError: if the features are not tensors or arrays.
        ValueError: if they do not fit the reference, or points < 2, or min_count is not in [2, N).

    Example:
        >>> reference = FeatureStatistics(torch.zeros(2), torch.eye(2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(1000, 2, generator=generator)  # of the same distribution
        >>> line = frechet_infinity(features, reference, generator=generator)
        >>> line.slope > 0, abs(line.value) < line.distances[0]  # of few samples it is too large
        (True, True)
    """
    sample, target = _prepare(features, reference)
    total = len(sample)
    smallest = max(2, total // 10) if min_count is None else min_count
    if points < 2:
        raise ValueError(f"expected points >= 2, got {points}")
    if not 2 <= smallest < total:
        raise ValueError(f"expected 2 <= min_count < N = {total}, got {smallest}")
    counts = torch.linspace(smallest, total, points, dtype=torch.float64).round().long().unique()
    distances = torch.tensor(
        [target.distance(sample[permutation(total, generator)[:count]]) for count in counts.tolist()],
        dtype=torch.float64,
    )
    inverse = 1 / counts.double()
    centred = inverse - inverse.mean()
    slope = float((centred * distances).sum() / centred.square().sum())  # least squares
    value = float(distances.mean() - slope * inverse.mean())
    return Extrapolated(value, slope, counts.tolist(), distances.tolist())


def frechet_interval(
    features: Data,
    reference: FeatureStatistics | Data,
    *,
    draws: int = 100,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """The Frechet distance of N samples with a bootstrap interval of its expected value.

    With b the distances of the resampled sets, e = b - mean(b) tells how FD_N errs about its expected value;
    the interval is [FD_N - q_high(e), FD_N - q_low(e)].

    Args:
        features: (N, F) of the samples, or an iterable of batches; all are kept in memory.
        reference: statistics of the data, which stay fixed; or features, which are resampled, too.
        draws: resampled sets.
        level: probability that the interval is meant to hold.
        generator: draws the sets.

    Returns:
        The distance of all samples, its interval, scatter and bias, in squared units of the features.

    Raises:
        TypeError: if the features are not tensors or arrays.
        ValueError: if they do not fit the reference, or draws < 2, or level is not in (0, 1).

    Example:
        >>> reference = FeatureStatistics(torch.zeros(2), torch.eye(2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(1000, 2, generator=generator)  # of the same distribution
        >>> found = frechet_interval(features + 1, reference, draws=20, generator=generator)
        >>> found.low < 2.0 < found.high
        True
    """
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"expected draws >= 2 and 0 < level < 1, got {draws} and {level}")
    if not isinstance(reference, FeatureStatistics):
        reference = collect_features(reference)
    sample, target = _prepare(features, reference)
    value = target.distance(sample)
    distances = torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        if isinstance(reference, Tensor):
            target = FrechetTarget(FeatureStatistics.fit(resampled(reference, generator)))
        distances[draw] = target.distance(resampled(sample, generator))
    mean = float(distances.mean())
    tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=torch.float64)
    low, high = (value - (distances.quantile(tails) - mean)).tolist()
    return Interval(value, max(0.0, low), high, float(distances.std()), mean - value)


def _prepare(features: Data, reference: FeatureStatistics | Data) -> tuple[Tensor, FrechetTarget]:
    sample = collect_features(features)
    if not isinstance(reference, FeatureStatistics):
        reference = FeatureStatistics.fit(reference)
    if sample.shape[1:] != reference.mean.shape:
        raise ValueError(
            f"expected features of the reference's length {len(reference.mean)}, got {sample.shape[1]}"
        )
    if len(sample) < 2:
        raise ValueError("expected at least two samples, got 1")
    return sample, FrechetTarget(reference)
