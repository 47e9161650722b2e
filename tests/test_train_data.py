"""The data of a run: a fixed split, and an order that is a pure function of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gaussnet import open_images
from train.config import ConfigError, DataConfig
from train.data import StepSampler, batch_indices, fit_source, generator_for, load_data, loader


def test_digits_are_split_once_and_for_all() -> None:
    data = load_data(DataConfig(heldout=0.2))
    train, heldout = data.train.tensor(), data.heldout.tensor()
    assert (data.event_shape, data.n_classes) == ((1, 8, 8), 0)
    assert train.shape == (1438, 1, 8, 8)
    assert heldout.shape == (359, 1, 8, 8)
    assert (train.min(), train.max()) == (-1, 1)
    again = load_data(DataConfig(heldout=359))
    assert torch.equal(train, again.train.tensor())
    assert torch.equal(heldout, again.heldout.tensor())
    other = load_data(DataConfig(heldout=0.2, split_seed=1))
    assert not torch.equal(heldout, other.heldout.tensor())
    # Together they are the whole set, each image once.
    everything = torch.cat([train, heldout]).flatten(1)
    reference = torch.cat([other.train.tensor(), other.heldout.tensor()]).flatten(1)
    assert torch.equal(torch.unique(everything, dim=0), torch.unique(reference, dim=0))
    assert len(everything) == len(reference) == 1797


def test_classes_are_counted_where_asked_for() -> None:
    data = load_data(DataConfig(labels=True))
    assert data.n_classes == 10
    rows = data.one_hot(torch.tensor([3, 0]))
    assert rows is not None
    assert torch.equal(rows, torch.eye(10)[[3, 0]])
    assert load_data(DataConfig()).one_hot(torch.tensor([3])) is None


def test_frames_are_black() -> None:
    data = load_data(DataConfig(pad=2))
    assert data.event_shape == (1, 12, 12)
    images = data.train.tensor()
    assert torch.equal(images[..., 2:-2, 2:-2], load_data(DataConfig()).train.tensor())
    assert bool((images[..., :2] == -1).all() and (images[..., -2:, :] == -1).all())


def test_data_that_cannot_be_used_are_errors() -> None:
    for config, message in (
        (DataConfig(source="mnits"), r"data\.source: no file or folder mnits"),
        (
            DataConfig(heldout=1e-5),
            r"data\.heldout: expected images on both sides, got 0 held out: 1e-05 of",
        ),
        (DataConfig(heldout=1797), r"data\.heldout: .*got 1797 held out: 1797 of 1797"),
        (DataConfig(layout="NHW"), r"data\.source: .*layout"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_data(config)


def test_data_without_labels_have_no_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((5, 8, 8), np.uint8))
    with pytest.raises(ConfigError, match=r"data\.labels: expected a source with labels, got ImageData"):
        load_data(DataConfig(source=str(tmp_path / "images.npy"), labels=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_the_stream_of_every_process(workers: int) -> None:
    data = load_data(DataConfig(labels=True)).train
    sampler = StepSampler(len(data), 12, seed=3, first=5, steps=9, share=slice(4, 8))
    assert len(sampler) == 4
    steps = list(loader(data, sampler, workers, pin=False))
    assert len(steps) == 4
    for step, (raw, labels) in enumerate(steps, start=5):
        index = batch_indices(len(data), 12, step, 3)[4:8]
        assert torch.equal(raw, data.raw(index))
        assert raw.dtype == torch.uint8
        assert data.labels is not None
        assert torch.equal(labels, data.labels[index])


@pytest.mark.parametrize("world", [1, 3])
def test_shares_of_the_fit_are_the_data(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_data(DataConfig()).train
    whole = images.tensor()
    for limit in (0, 1 << 30):
        monkeypatch.setattr("train.data.IN_MEMORY", limit)
        for rank in range(world):
            source = fit_source(images, rank, world)
            for _ in range(2):
                share = source if isinstance(source, torch.Tensor) else torch.cat(list(source))
                assert torch.equal(share, whole[rank::world])


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


def grouped(tmp_path: Path, groups: np.ndarray) -> DataConfig:
    np.save(tmp_path / "groups.npy", groups)
    return DataConfig(groups=str(tmp_path / "groups.npy"), heldout=0.2)


def test_groups_are_held_out_whole(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(-20, 180, 1797)
    images = open_images("digits").tensor()
    data = load_data(grouped(tmp_path, numbers))
    assert data.groups is not None
    assert len(data.groups) == len(data.train)
    of_image = {image.numpy().tobytes(): int(group) for image, group in zip(images, numbers, strict=True)}
    train = [of_image[image.numpy().tobytes()] for image in data.train.tensor()]
    held = {of_image[image.numpy().tobytes()] for image in data.heldout.tensor()}
    assert train == data.groups.tolist()
    assert not held & set(train)
    assert len(data.train) + len(data.heldout) == 1797
    assert 359 <= len(data.heldout) < 359 + 30  # up to the end of a group


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(1797, dtype=int), r"data\.heldout: .*got 1797 held out: 0\.2 of 1797"),
        (np.zeros(5, dtype=int), r"expected 1797 integers in .*, one an image, got int64 of shape \(5,\)"),
        (np.zeros(1797), "got float64"),
    ],
    ids=["one group", "too few", "floats"],
)
def test_impossible_groups(tmp_path: Path, groups: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(grouped(tmp_path, groups))
    with pytest.raises(ConfigError, match=r"data\.groups: .*absent"):
        load_data(DataConfig(groups=str(tmp_path / "absent.npy")))


@pytest.mark.parametrize("kind", ["archive", "empty", "objects"])
def test_files_that_hold_no_groups(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.npy"
    with path.open("wb") as file:
        if kind == "archive":
            np.savez(file, groups=np.zeros(1797, int))
        elif kind == "objects":
            np.save(file, np.array([{}] * 1797))
    with pytest.raises(ConfigError, match=r"data\.groups: .*groups\.npy: expected a \.npy array of numbers"):
        load_data(DataConfig(groups=str(path)))
