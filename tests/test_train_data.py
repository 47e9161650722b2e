"""The data of a run: a fixed split, and an order that is a pure function of (seed, step)."""

import pytest
import torch

from train.config import ConfigError, DataConfig
from train.data import batch_indices, generator_for, load_data


def test_digits_are_split_once_and_for_all() -> None:
    data = load_data(DataConfig())
    assert data.train.shape == (1438, 1, 8, 8)
    assert data.heldout.shape == (359, 1, 8, 8)
    assert (data.train.min(), data.train.max()) == (-1, 1)
    again = load_data(DataConfig())
    assert torch.equal(data.train, again.train)
    assert torch.equal(data.heldout, again.heldout)
    other = load_data(DataConfig(split_seed=1))
    assert not torch.equal(data.heldout, other.heldout)
    # Together they are the whole set, each image once.
    everything = torch.cat([data.train, data.heldout]).flatten(1)
    reference = torch.cat([other.train, other.heldout]).flatten(1)
    assert torch.equal(torch.unique(everything, dim=0), torch.unique(reference, dim=0))
    assert len(everything) == len(reference) == 1797


def test_unknown_data_and_empty_splits_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"data\.name: expected one of digits, got 'mnits'"):
        load_data(DataConfig(name="mnits"))
    with pytest.raises(ConfigError, match=r"data\.heldout"):
        load_data(DataConfig(heldout=1e-5))


@pytest.mark.parametrize("batch", [3, 10, 25])
def test_batches_walk_through_shuffled_epochs(batch: int) -> None:
    count, steps = 10, 30
    stream = torch.cat([batch_indices(count, batch, step, seed=0) for step in range(steps)])
    epochs = stream[: len(stream) // count * count].reshape(-1, count)
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand_as(epochs)), (
        "an epoch repeats an image"
    )
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1, "every epoch has the same order"
    assert torch.equal(batch_indices(count, batch, 7, seed=0), stream[7 * batch : 8 * batch])
    assert not torch.equal(batch_indices(count, batch, 7, seed=1), stream[7 * batch : 8 * batch])


def test_generators_differ_by_every_part_of_their_key() -> None:
    keys = [(0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "dropout", 1), (0, "noise", 1, 1)]
    draws = [torch.randn(4, generator=generator_for(*key)) for key in keys]
    for i, first in enumerate(draws):
        assert torch.equal(first, torch.randn(4, generator=generator_for(*keys[i])))
        for other in draws[:i]:
            assert not torch.equal(first, other)
