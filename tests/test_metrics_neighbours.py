"""Precision, recall and memorisation against loops over all pairs, and on sets whose answers are known."""

import pytest
import torch
from cases import randn
from torch import Tensor

from gaussnet.metrics import memorisation, neighbours, precision_recall

DIM = 4


def covered_by_loops(x: Tensor, y: Tensor, k: int) -> float:
    """The share of x within the distance of some y to its k-th neighbour in y."""
    radii = [sorted(float((a - b).norm()) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    inside = [any(float((a - b).norm()) <= radius for b, radius in zip(y, radii, strict=True)) for a in x]
    return sum(inside) / len(x)


@pytest.mark.parametrize("entries", [2**24, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_equals_loops(k: int, dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ENTRIES", entries)
    real, generated = randn(40, DIM, dtype=dtype), (0.7 * randn(30, DIM, seed=1) + 0.5).to(dtype)
    expected = (covered_by_loops(generated, real, k), covered_by_loops(real, generated, k))
    assert expected[0] != expected[1]
    assert precision_recall(real, generated, k=k) == expected
    assert precision_recall(iter(real.split(7)), generated.numpy(), k=k) == expected


def test_far_from_the_origin() -> None:
    real, generated = randn(100, DIM), 0.7 * randn(100, DIM, seed=1) + 0.5
    expected = precision_recall(real, generated)
    assert 0 < expected.recall < expected.precision < 1
    assert precision_recall(real + 1e8, generated + 1e8) == expected


def test_equal_sets_cover_each_other() -> None:
    x = randn(300, DIM)
    assert precision_recall(x, x[torch.randperm(300)]) == (1.0, 1.0)


@pytest.mark.parametrize("k", [1, 3])
def test_copies_of_what_occurs_twice_lie_in_its_balls(k: int) -> None:
    once = randn(150, 64).abs()
    real = once.repeat(k + 1, 1)  # balls of radius 0
    assert precision_recall(real, once[:97].repeat(2, 1), k=k).precision == 1
    assert precision_recall(real, once[:97] + 1e-4, k=k).precision == 0


def test_disjoint_sets_do_not() -> None:
    x = randn(100, DIM)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_lost_modes_cost_recall_and_strays_precision() -> None:
    modes = torch.tensor([[0.0], [50.0]]).repeat_interleave(100, 0)
    real = randn(200, DIM) + modes
    one = randn(200, DIM, seed=1)
    lost = precision_recall(real, one)
    assert lost.precision > 0.8, lost
    assert 0.3 < lost.recall <= 0.5, lost
    stray = precision_recall(one, real)
    assert (stray.precision, stray.recall) == (lost.recall, lost.precision)


def test_features_that_have_no_manifold() -> None:
    x = randn(10, DIM)
    with pytest.raises(ValueError, match="features of one length, got 4 and 3"):
        precision_recall(x, x[:, :3])
    for k in (0, 10):
        with pytest.raises(ValueError, match=rf"1 <= k < min\(N, M\) = 10, got {k}"):
            precision_recall(x, randn(20, DIM), k=k)
    with pytest.raises(ValueError, match="NaN or infinite"):
        precision_recall(x / 0, x)


# Memorisation -------------------------------------------------------------------------------------

EVENT = (1, 6, 6)


def test_copies_are_memorised_and_fresh_samples_are_not() -> None:
    training = randn(300, *EVENT)
    order = torch.randperm(300)[:50]
    copies = memorisation(training[order] + 1e-3 * randn(50, *EVENT, seed=1), training)
    assert copies.share == 1.0
    assert copies.where.equal(order)
    expected = (1e-3 * randn(50, *EVENT, seed=1)).flatten(1).norm(dim=1)
    assert torch.allclose(copies.nearest, expected, rtol=1e-9, atol=0)
    assert memorisation(randn(50, *EVENT, seed=2), training).share == 0.0
    mixed = torch.cat([training[:30], randn(30, *EVENT, seed=2)])
    assert memorisation(mixed, training).share == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_distances_are_those_of_all_pairs(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_ENTRIES", 20)
    samples, training = randn(13, *EVENT, dtype=dtype), randn(40, *EVENT, seed=1, dtype=dtype)
    pairs = (samples[:, None].double() - training.double()).flatten(2).norm(dim=2)  # (13, 40)
    expected, where = pairs.topk(2, largest=False)
    found = memorisation(samples.split(5), [training[:0], *training.split(chunk)], ratio=0.9)
    assert torch.allclose(found.nearest, expected[:, 0], rtol=1e-12)
    assert torch.allclose(found.second, expected[:, 1], rtol=1e-12)
    assert found.where.equal(where[:, 0])
    share = float((expected[:, 0] < 0.9 * expected[:, 1]).double().mean())
    assert 0 < share < 1
    assert found.share == pytest.approx(share)


def test_small_distances_far_from_the_origin_keep_their_digits() -> None:
    training = randn(20, *EVENT) + 1e8
    found = memorisation(training[:5] + 1e-4, training)
    assert torch.allclose(found.nearest, torch.full((5,), 1e-4 * 6, dtype=torch.float64), rtol=1e-3)
    assert found.where.equal(torch.arange(5))
    assert found.share == 1.0


def test_the_threshold_is_a_third() -> None:
    training = torch.tensor([[0.0], [4.0]])
    samples = torch.tensor([[0.9], [1.1], [3.1], [2.9]])  # a third of the second distance is at 1 and 3
    found = memorisation(samples, training)
    assert found.share == 0.5
    assert torch.allclose(found.second, torch.tensor([[3.1], [2.9], [3.1], [2.9]]).flatten().double())
    assert memorisation(torch.zeros(1, 1), torch.zeros(2, 1)).share == 0.0, "an image that occurs twice"


def test_images_that_cannot_be_compared() -> None:
    x = randn(5, *EVENT)
    with pytest.raises(ValueError, match=r"training images of shape \(1, 6, 6\), got \(1, 6, 5\)"):
        memorisation(x, x[..., :5])
    with pytest.raises(ValueError, match="at least two training images, got 1"):
        memorisation(x, x[:1])
    with pytest.raises(ValueError, match="at least two training images, got 0"):
        memorisation(x, [])
    with pytest.raises(ValueError, match="NaN or infinite values in sample 6"):
        memorisation(x, [x, torch.cat([x[:1], x[:1] / 0])])
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match="0 < ratio <= 1"):
            memorisation(x, x, ratio=ratio)
