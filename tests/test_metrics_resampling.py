"""Bias and scatter of the Frechet distance, against what is known of Gaussian samples."""

import pytest
import torch
from cases import randn
from torch import Tensor

from gaussnet.metrics import FeatureStatistics, frechet_infinity, frechet_interval

DIM = 6
STANDARD = FeatureStatistics(torch.zeros(DIM), torch.eye(DIM))
SHIFT = 0.5
DISTANCE = DIM * SHIFT**2  # of N(SHIFT, I)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, seed: int = 0) -> Tensor:
    return randn(count, DIM, seed=seed) + SHIFT


def whitened(count: int, seed: int = 0) -> Tensor:
    """Samples whose own mean and covariance are exact."""
    x = randn(count, DIM, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / (count - 1))).mT


def test_the_line_has_the_known_slope() -> None:
    """With C_N = I + E: E FD_N = DIM / N + E|E|^2 / 4 + ..., where E|E|^2 is about DIM (DIM + 1) / N."""
    found = [
        frechet_infinity(randn(1000, DIM, seed=seed), STANDARD, points=5, generator=generator(seed))
        for seed in range(40)
    ]
    expected = DIM + DIM * (DIM + 1) / 4
    for known, measured in ((expected, [line.slope for line in found]), (0, [line.value for line in found])):
        values = torch.tensor(measured, dtype=torch.float64)
        error = float(values.std()) / len(found) ** 0.5
        assert float(values.mean()) == pytest.approx(known, abs=3 * error)
        assert error < 0.15 * expected * (1 if known else 1 / 1000)


def test_extrapolation_removes_the_bias() -> None:
    found = [
        frechet_infinity(samples(300, seed), STANDARD, min_count=60, generator=generator())
        for seed in range(25)
    ]
    plain = torch.tensor([line.distances[-1] for line in found]).double()
    ends = torch.tensor([line.value for line in found]).double()
    error = float(plain.std()) / len(found) ** 0.5
    bias = (DIM + DIM * (DIM + 1) / 4) / 300
    assert bias > 2 * error, "of no use: the noise hides the bias"
    assert float(plain.mean()) == pytest.approx(DISTANCE + bias, abs=3 * error)
    assert float(ends.mean()) == pytest.approx(DISTANCE, abs=3 * error)


def test_the_line_is_that_of_least_squares() -> None:
    x = samples(200)
    found = frechet_infinity(x, STANDARD, points=7, generator=generator())
    assert found.counts == [20, 50, 80, 110, 140, 170, 200]
    whole = FeatureStatistics.fit(x)
    assert found.distances[-1] == pytest.approx(whole.distance(STANDARD), rel=1e-12)
    design = torch.stack([torch.ones(7), 1 / torch.tensor(found.counts)], 1).double()
    line = torch.linalg.lstsq(design, torch.tensor(found.distances, dtype=torch.float64)).solution
    assert (found.value, found.slope) == pytest.approx(tuple(line.tolist()), rel=1e-6)
    again = frechet_infinity(iter(x.split(33)), STANDARD, points=7, generator=generator())
    assert again == found, "another draw by an equal generator"
    assert frechet_infinity(x, STANDARD, points=7, generator=generator(1)) != found


def test_features_as_the_reference() -> None:
    x, y = samples(100), randn(150, DIM, seed=1)
    by_features = frechet_infinity(x, y, generator=generator())
    assert by_features == frechet_infinity(x, FeatureStatistics.fit(y), generator=generator())


def test_the_interval_holds_as_often_as_it_says() -> None:
    level, repeats = 0.8, 50
    found = [
        frechet_interval(samples(100, seed), STANDARD, draws=30, level=level, generator=generator(seed))
        for seed in range(repeats)
    ]
    values = torch.tensor([interval.value for interval in found]).double()
    expected = float(values.mean())  # of FD_N
    held = sum(interval.low <= expected <= interval.high for interval in found) / repeats
    assert held == pytest.approx(level, abs=3 * (level * (1 - level) / repeats) ** 0.5 + 0.03)
    std = sum(interval.std for interval in found) / repeats
    assert std == pytest.approx(float(values.std()), rel=0.2)
    bias = sum(interval.bias for interval in found) / repeats
    assert bias == pytest.approx(expected - DISTANCE, rel=0.4)


def test_the_interval_is_the_mirrored_one() -> None:
    """Its ends are the quantiles of the resampled distances, mirrored at their mean."""
    x, count = samples(40), 50
    found = frechet_interval(x, STANDARD, draws=count, level=0.8, generator=generator(3))
    same, distances = generator(3), []
    for _ in range(count):
        drawn = x[torch.randint(40, (40,), generator=same)]
        distances.append(FeatureStatistics.fit(drawn).distance(STANDARD))
    drawn = torch.tensor(distances, dtype=torch.float64)
    assert found.value == pytest.approx(FeatureStatistics.fit(x).distance(STANDARD), rel=1e-12)
    assert found.low == pytest.approx(found.value + float(drawn.mean() - drawn.quantile(0.9)), rel=1e-9)
    assert found.high == pytest.approx(found.value + float(drawn.mean() - drawn.quantile(0.1)), rel=1e-9)
    assert found.std == pytest.approx(float(drawn.std()), rel=1e-9)
    assert found.bias == pytest.approx(float(drawn.mean()) - found.value, rel=1e-9)


def test_no_interval_reaches_below_zero() -> None:
    found = frechet_interval(whitened(40), STANDARD, draws=50, generator=generator())
    assert 0 <= found.value < 1e-12
    assert found.low == 0
    assert found.high > 0


def test_a_resampled_reference_widens_the_interval() -> None:
    x, reference = samples(200), whitened(50)
    fixed = frechet_interval(x, FeatureStatistics.fit(reference), draws=50, generator=generator())
    drawn = frechet_interval(x, reference, draws=50, generator=generator())
    assert drawn.value == pytest.approx(fixed.value, rel=1e-12)
    assert drawn.std > 1.5 * fixed.std
    assert drawn.bias > 1.5 * fixed.bias


def test_what_cannot_be_resampled() -> None:
    x = samples(20)
    with pytest.raises(ValueError, match="points >= 2, got 1"):
        frechet_infinity(x, STANDARD, points=1)
    for count in (1, 20):
        with pytest.raises(ValueError, match=f"2 <= min_count < N = 20, got {count}"):
            frechet_infinity(x, STANDARD, min_count=count)
    with pytest.raises(ValueError, match=r"draws >= 2 and 0 < level < 1, got 1 and 0\.95"):
        frechet_interval(x, STANDARD, draws=1)
    with pytest.raises(ValueError, match="0 < level < 1, got 10 and 95"):
        frechet_interval(x, STANDARD, draws=10, level=95)
    for measure in (frechet_infinity, frechet_interval):
        with pytest.raises(ValueError, match="the reference's length 6, got 5"):
            measure(x[:, :5], STANDARD)
        with pytest.raises(ValueError, match=r"features of shape \(N, F\), got \(20, 1, 6\)"):
            measure(x[:, None], STANDARD)
        with pytest.raises(ValueError, match="at least two samples"):
            measure(x[:1], STANDARD)
        with pytest.raises(ValueError, match="NaN or infinite values in sample 0"):
            measure(x / 0, STANDARD)
