"""Moments: every kind of data, fold, class and mirror image, against NumPy on all samples at once."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from cases import randn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from gaussnet.fit import Moments, fit_class_moments, fit_moments, merge_all, streams

EVENT = (2, 3, 4)
COUNT = 53


def samples(seed: int = 0, count: int = COUNT) -> Tensor:
    return randn(count, *EVENT, seed=seed) * torch.linspace(0.5, 2, 4) + 3.0


def check(actual: Moments, data: Tensor, name: str, tolerance: float = 1e-12) -> None:
    """`actual` are the moments of `data`, by NumPy in float64."""
    flat = data.double().flatten(1).numpy()
    assert actual.count == len(data), name
    assert actual.event_shape == data.shape[1:], name
    assert actual.mean.dtype == actual.scatter.dtype == torch.float64, name
    expected = flat.mean(0)
    scale = float(np.abs(flat).max())
    np.testing.assert_allclose(actual.mean.numpy(), expected, rtol=0, atol=tolerance * scale, err_msg=name)
    scatter = (flat - expected).T @ (flat - expected)
    atol = tolerance * max(float(scatter.max()), 1e-300)
    np.testing.assert_allclose(actual.scatter.numpy(), scatter, rtol=0, atol=atol, err_msg=name)
    assert torch.equal(actual.scatter, actual.scatter.mT), f"{name}: not symmetric"


# Sources ------------------------------------------------------------------------------------------


def on_disk(data: Tensor, folder: Path) -> Path:
    np.save(folder / "data.npy", data.numpy())
    return folder / "data.npy"


def memory_map(data: Tensor, folder: Path) -> np.ndarray:
    mapped = np.memmap(folder / "data.bin", dtype=np.float64, mode="w+", shape=tuple(data.shape))
    mapped[:] = data.numpy()
    mapped.flush()
    return np.memmap(folder / "data.bin", dtype=np.float64, mode="r", shape=tuple(data.shape))


class Stream(IterableDataset[Tensor]):
    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data.split(10))


SOURCES: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda data, _: data,
    "strided tensor": lambda data, _: data.repeat_interleave(2, 0)[::2],
    "transposed tensor": lambda data, _: data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "tensor that requires grad": lambda data, _: data.clone().requires_grad_(),
    "array": lambda data, _: data.numpy(),
    "reversed array": lambda data, _: data.flip(-1).numpy()[..., ::-1],
    "big-endian array": lambda data, _: data.numpy().astype(">f8"),
    "memory map": memory_map,
    "np.load, mapped": lambda data, folder: np.load(on_disk(data, folder), mmap_mode="r"),
    "np.load, mapped for copying": lambda data, folder: np.load(on_disk(data, folder), mmap_mode="c"),
    "list of tensors": lambda data, _: list(data.split(7)),
    "list of arrays": lambda data, _: [part.numpy() for part in data.split(7)],
    "generator": lambda data, _: (part for part in data.split(7)),
    "generator of tuples": lambda data, _: ((part, "anything", 3) for part in data.split(7)),
    "batches of one": lambda data, _: (part for part in data.split(1)),
    "loader": lambda data, _: DataLoader(TensorDataset(data, torch.arange(len(data))), batch_size=10),
    "loader of images alone": lambda data, _: DataLoader(TensorDataset(data), batch_size=10),
    "loader of a stream": lambda data, _: DataLoader(Stream(data), batch_size=None),
    "stream": lambda data, _: Stream(data),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_moments(source: str, tmp_path: Path) -> None:
    data = samples()
    given = SOURCES[source](data, tmp_path)
    check(merge_all(fit_moments(given)), data, source)
    for k, fold in enumerate(fit_moments(SOURCES[source](data, tmp_path), folds=3)):
        check(fold, data[k::3], f"{source}, fold {k}")


@pytest.mark.parametrize("source", ["tensor", "array", "np.load, mapped for copying", "list of tensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_data_are_not_touched(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    data = samples().to(dtype)
    given = SOURCES[source](data, tmp_path)
    before = [torch.as_tensor(part).clone() for part in given]
    for mirror in (False, True):
        fit_moments(given, folds=2, mirror=mirror)
    for part, old in zip(given, before, strict=True):
        assert torch.equal(torch.as_tensor(part), old), source


@pytest.mark.parametrize("chunk", [1, 24, 100, 24 * 17])
def test_arrays_are_cut_anywhere(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    data, groups = samples(), torch.arange(COUNT) // 2
    check(merge_all(fit_moments(data)), data, f"{chunk}")
    for k, fold in enumerate(fit_moments(data.numpy(), folds=3)):
        check(fold, data[k::3], f"{chunk}, fold {k}")
    for k, fold in enumerate(fit_moments(data, folds=3, groups=groups)):
        check(fold, data[groups % 3 == k], f"{chunk}, groups of fold {k}")
    labels = torch.arange(COUNT) % 5 // 2
    for k, found in fit_class_moments(data, labels).items():
        check(merge_all(found), data[labels == k], f"{chunk}, class {k}")


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint16", "int64", "bool"])
@pytest.mark.parametrize("as_array", [False, True])
def test_integers(kind: str, as_array: bool) -> None:
    numbers = np.random.default_rng(0).integers(0, 2 if kind == "bool" else 120, (COUNT, *EVENT))
    array = numbers.astype(kind)
    data = array if as_array else torch.from_numpy(array)
    found = merge_all(fit_moments(data))
    assert found.dtype == torch.float32
    check(found, torch.from_numpy(numbers), kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floats_are_accumulated_in_float64(dtype: torch.dtype) -> None:
    data = samples().to(dtype)
    found = merge_all(fit_moments(data))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    check(found, data, str(dtype))
    assert merge_all(fit_moments([samples().to(dtype), samples().half()])).dtype == found.dtype


@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 7, COUNT])
def test_a_large_common_mean_costs_no_digits(offset: float, dtype: torch.dtype, batch: int) -> None:
    data = (samples() + offset).to(dtype)
    found = merge_all(fit_moments(iter(data.split(batch)), folds=2))
    flat = data.double().flatten(1).numpy()
    expected = np.cov(flat.T, bias=True)
    # What float64 leaves of digits in the data: its 1e-16 of the offset, relative to deviations of 1.
    atol = 1e-14 * abs(offset) * expected.max()
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(found.mean.numpy(), flat.mean(0), rtol=1e-14)


def images_of_8_bits(count: int = 40) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] as float32, and what their rounded values stand for, in float64."""
    levels = torch.randint(0, 256, (count, *EVENT), generator=torch.Generator().manual_seed(0))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    return (levels.float() / 127.5 - 1), levels.double() / 127.5 - 1


def test_images_of_8_bits_are_exact() -> None:
    rounded, exact = images_of_8_bits(2100)  # beyond what a float32 product may hold at a time
    for k, fold in enumerate(fit_moments(rounded, folds=2)):
        check(fold, exact[k::2], f"fold {k}", tolerance=1e-14)
    extreme = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(2000, 1)
    check(merge_all(fit_moments(extreme)), extreme, "black and white", tolerance=1e-14)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_equal_images_of_8_bits_vary_by_exactly_nothing(count: int) -> None:
    for level in range(256):
        image = torch.full((count, 3), level / 127.5 - 1)
        found = merge_all(fit_moments(image, folds=2))
        assert float(found.scatter.abs().max()) < 1e-28, f"level {level}"


def test_streams_may_turn_from_8_bits_to_any_values_and_back() -> None:
    rounded, _ = images_of_8_bits()
    other = samples(count=30).float()
    for parts in ([rounded, other, rounded], [other, rounded, other]):
        check(merge_all(fit_moments(iter(parts))), torch.cat(parts), "mixed", tolerance=1e-7)


def test_empty_batches_are_passed_over() -> None:
    data = samples()
    nothing = torch.empty(0, *EVENT)
    stream = [nothing, data[:20], nothing, nothing, data[20:], nothing]
    for k, fold in enumerate(fit_moments(iter(stream), folds=3)):
        check(fold, data[k::3], f"fold {k}")
    labels = torch.arange(COUNT) % 3
    pairs = [(nothing, labels[:0]), (data[:20], labels[:20]), (nothing, labels[:0]), (data[20:], labels[20:])]
    for k, found in fit_class_moments(iter(pairs)).items():
        check(merge_all(found), data[labels == k], f"class {k}")


# Folds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [1, 2, 3, 5, COUNT, COUNT + 10])
def test_folds_merge_to_the_whole(folds: int) -> None:
    data = samples()
    found = fit_moments(iter(data.split(9)), folds)
    assert [fold.count for fold in found] == [len(data[k::folds]) for k in range(min(folds, COUNT))]
    check(merge_all(found), data, f"{folds}")


@pytest.mark.parametrize("folds", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_groups_share_a_fold(folds: int, kind: str) -> None:
    data = samples()
    names = np.random.default_rng(1).choice([-70, 3, 4, 900, 10**12], COUNT)
    order = {name: i for i, name in enumerate(sorted(set(names.tolist())))}
    expected = torch.tensor([order[name] % folds for name in names.tolist()])
    groups = {"tensor": torch.from_numpy(names), "array": names, "list": names.tolist()}[kind]
    found = fit_moments(data, folds, groups)
    assert len(found) == folds
    for k, fold in enumerate(found):
        check(fold, data[expected == k], f"fold {k}")


@pytest.mark.parametrize("size", [1, 7, COUNT])
@pytest.mark.parametrize("mirror", [False, True])
def test_groups_of_a_stream_are_those_of_its_samples(size: int, mirror: bool) -> None:
    data, groups = samples(), torch.arange(COUNT) * 7 % 11
    expected = fit_moments(data, 3, groups, mirror=mirror)
    batches = data.split(size)
    loader = DataLoader(TensorDataset(data, groups), batch_size=size)
    for name, stream in {"list": list(batches), "generator": (b for b in batches), "loader": loader}.items():
        found = fit_moments(stream, 3, groups, mirror=mirror)
        assert [fold.count for fold in found] == [fold.count for fold in expected], name
        for fold, other in zip(found, expected, strict=True):
            torch.testing.assert_close(fold.mean, other.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(fold.scatter, other.scatter, rtol=1e-10, atol=1e-8)


def test_folds_without_a_group_are_left_out() -> None:
    groups = torch.tensor([5] * 20 + [9] * 33)
    found = fit_moments(samples(), 4, groups)
    assert [fold.count for fold in found] == [20, 33]


def test_moments_of_other_shapes_do_not_merge() -> None:
    first, second = (merge_all(fit_moments(randn(5, *shape))) for shape in ((2, 3), (6,)))
    with pytest.raises(ValueError, match=r"samples of one shape, got \(2, 3\) and \(6,\)"):
        first.merge(second)


def test_merging_adds_what_the_means_differ_by() -> None:
    first, second = torch.zeros(3, 1, dtype=torch.float64), torch.full((1, 1), 4.0, dtype=torch.float64)
    merged = merge_all(fit_moments(first)).merge(merge_all(fit_moments(second)))
    assert (merged.count, merged.mean.item(), merged.scatter.item()) == (4, 1.0, 12.0)
    assert merged.covariance.item() == 3.0


# Classes ------------------------------------------------------------------------------------------


def classes() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).choice([7, 0, 3], COUNT, p=[0.6, 0.3, 0.1]))


CLASS_SOURCES: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "tensor": lambda data, labels: (data, labels),
    "array": lambda data, labels: (data.numpy(), labels.numpy()),
    "small integers": lambda data, labels: (data, labels.to(torch.uint8)),
    "unsigned array": lambda data, labels: (data.numpy(), labels.numpy().astype(np.uint16)),
    "loader": lambda data, labels: (DataLoader(TensorDataset(data, labels), batch_size=10), None),
    "generator": lambda data, labels: (zip(data.split(11), labels.split(11), strict=True), None),
    "more than labels": lambda data, labels: ([(data, labels.int(), "names")], None),
}


@pytest.mark.parametrize("source", CLASS_SOURCES)
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_class_moments(source: str, folds: int, mirror: bool) -> None:
    data, labels = samples(), classes()
    given, own = CLASS_SOURCES[source](data, labels)
    found = fit_class_moments(given, own, folds, mirror=mirror)
    assert list(found) == [0, 3, 7]

    def seen(part: Tensor) -> Tensor:
        return torch.cat([part, part.flip(-1)]) if mirror else part

    for k, parts in found.items():
        mine = data[labels == k]
        assert len(parts) == min(folds, len(mine))
        for fold, part in enumerate(parts):
            check(part, seen(mine[fold::folds]), f"class {k}, fold {fold}")
    check(merge_all(part for parts in found.values() for part in parts), seen(data), "all classes")


# Mirror images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(2, 3, 4), (1, 5), (1, 1, 3), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("folds", [1, 2])
def test_mirrored_moments_are_those_of_images_and_mirror_images(
    event_shape: tuple[int, ...], folds: int
) -> None:
    data = randn(COUNT, *event_shape) + torch.linspace(0, 2, event_shape[-1])
    for k, fold in enumerate(fit_moments(iter(data.split(10)), folds, mirror=True)):
        part = data[k::folds]
        check(fold, torch.cat([part, part.flip(-1)]), f"fold {k}")
    check(merge_all(fit_moments(data)).mirrored(), torch.cat([data, data.flip(-1)]), "mirrored")


def test_vectors_have_no_mirror_image_and_this_is_said_at_once() -> None:
    message = r"expected images to mirror, got samples of shape \(5,\)"
    with pytest.raises(ValueError, match=message):
        merge_all(fit_moments(randn(9, 5))).mirrored()
    for fit in (fit_moments, fit_class_moments):
        read: list[int] = []

        def batches(read: list[int] = read) -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(3):
                read.append(i)
                yield randn(4, 5), torch.zeros(4).long()

        with pytest.raises(ValueError, match=message):
            fit(batches(), mirror=True)
        assert read == [0], f"{fit.__name__} read on"


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", [0, 6, 7, 30, COUNT - 1])
def test_the_first_bad_sample_is_named(bad: float, dtype: torch.dtype, index: int) -> None:
    data = samples().to(dtype)
    data[index:, 1, 2, 3] = bad
    empty = torch.empty(0, *EVENT, dtype=dtype)
    labels = torch.zeros(COUNT).long()
    message = f"expected finite data, got NaN or infinite values in sample {index}$"
    for batches in ([data], data.split(7), [empty, *data.split(11)]):
        with pytest.raises(ValueError, match=message):
            fit_moments(iter(batches), folds=3)
    for given in (data, data.numpy()):
        with pytest.raises(ValueError, match=message):
            fit_class_moments(given, labels)


def test_bad_samples_beyond_the_first_thousands_are_named() -> None:
    data = torch.zeros(9000, 2, dtype=torch.float64)
    data[:, 0] = torch.arange(9000)
    data[8500, 1] = math.nan
    for given in (data, [data], [data[:3000], data[3000:]]):
        with pytest.raises(ValueError, match=r"in sample 8500$"):
            fit_moments(given)
    levels = images_of_8_bits(3000)[0]
    levels[2500, 1, 1, 1] = math.inf
    with pytest.raises(ValueError, match=r"in sample 2500$"):
        fit_moments(levels)


IMAGES, LABELS = samples(count=6), torch.zeros(6).long()
DATA_SET = cast("Any", TensorDataset(IMAGES))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_moments(iter([torch.empty(0, 3)])), ValueError, "at least one sample, got none"),
        (lambda: fit_moments(randn(4, 3), folds=0), ValueError, "folds >= 1, got 0"),
        (lambda: fit_class_moments(IMAGES, LABELS, folds=-1), ValueError, "folds >= 1, got -1"),
        (lambda: fit_moments([{"image": IMAGES}]), TypeError, "batches to be tensors or arrays.*got dict"),
        (lambda: fit_moments([()]), TypeError, "tuples that begin with one, got tuple"),
        (lambda: fit_moments([[IMAGES.tolist(), LABELS]]), TypeError, "got list"),
        (lambda: fit_moments([randn(4)]), ValueError, r"batches of shape \(n, \*event_shape\), got \(4,\)"),
        (lambda: fit_moments(np.zeros(4)), ValueError, r"data of shape \(N, \*event_shape\), got \(4,\)"),
        (lambda: fit_moments([IMAGES, IMAGES[:, :1]]), ValueError, r"got \(2, 3, 4\) and \(1, 3, 4\)"),
        (lambda: fit_moments(IMAGES + 0j), TypeError, "expected real numbers, got torch.complex128"),
        (lambda: fit_moments(IMAGES.numpy() + 0j), TypeError, "expected real numbers"),
        (
            lambda: fit_moments(DATA_SET),
            TypeError,
            "samples of a TensorDataset: use a DataLoader",
        ),
        (lambda: fit_moments([IMAGES], 2, LABELS[:4]), ValueError, "samples as groups, 4, got at least 6$"),
        (lambda: fit_moments([IMAGES], 2, torch.arange(9)), ValueError, "samples as groups, 9, got 6$"),
        (lambda: fit_moments([IMAGES], 2, LABELS[:, None]), ValueError, r"6 integers.*shape \(6, 1\)"),
        (lambda: fit_moments([IMAGES], 2, LABELS[0]), ValueError, r"1 integers.*shape \(\)"),
        (
            lambda: fit_moments(DataLoader(DATA_SET, 2, shuffle=True), 2, LABELS),
            ValueError,
            "samples in the order of their groups or labels, got a DataLoader that shuffles",
        ),
        (
            lambda: fit_moments(DataLoader(DATA_SET, 2, sampler=SubsetRandomSampler(range(6))), 2, LABELS),
            ValueError,
            "got a DataLoader that shuffles",
        ),
        (
            lambda: streams.subsample(DataLoader(DATA_SET, 2, shuffle=True), 3, LABELS),
            ValueError,
            "order of their groups or labels, got a DataLoader that shuffles",
        ),
        (lambda: fit_moments(IMAGES, 2, LABELS[:4]), ValueError, r"groups to be 6 integers.*shape \(4,\)"),
        (lambda: fit_moments(IMAGES, 2, LABELS.float()), ValueError, "6 integers.*torch.float32"),
        (lambda: fit_moments(IMAGES, all_processes=True), RuntimeError, "initialised torch.distributed"),
        (lambda: fit_class_moments(IMAGES), TypeError, "expected labels for a Tensor"),
        (lambda: fit_class_moments(IMAGES.numpy()), TypeError, "expected labels for a ndarray"),
        (lambda: fit_class_moments([IMAGES], LABELS), TypeError, "no labels beside a list"),
        (lambda: fit_class_moments([IMAGES]), TypeError, "integer labels for 6 samples, got NoneType"),
        (lambda: fit_class_moments([(IMAGES, [0] * 6)]), TypeError, "integer labels.*got list"),
        (lambda: fit_class_moments([(IMAGES, LABELS[:5])]), ValueError, r"each of 6 samples.*shape \(5,\)"),
        (lambda: fit_class_moments(IMAGES, LABELS[:5]), ValueError, r"each of 6 samples.*shape \(5,\)"),
        (lambda: fit_class_moments(IMAGES, LABELS.float()), ValueError, "got torch.float32"),
        (lambda: fit_class_moments(IMAGES, LABELS.bool()), ValueError, "got torch.bool"),
        (lambda: fit_class_moments(IMAGES, LABELS - 2), ValueError, "labels >= 0, got -2"),
        (lambda: fit_class_moments([]), ValueError, "at least one sample, got none"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
