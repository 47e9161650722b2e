"""Arrays and named data sets: .npy, .npz, IDX, scaling, digits, torchvision, the Hugging Face hub."""

import gzip
import io
import logging
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gaussnet.data import ImageData, ImageError, open_images
from gaussnet.data.arrays import open_npz

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 3, 5, 7), dtype=np.uint8)  # (N, C, H, W)
FLOATS = RNG.uniform(-1, 1, (6, 3, 5, 7))
LABELS = np.array([2, 0, 1, 1, 0, 2])


def save(path: Path, array: np.ndarray, **more: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, images=array, **more)
    else:
        np.save(path, array)
    return path


# Layouts and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("fortran", [False, True])
def test_layouts_are_told_by_the_axis_of_channels(tmp_path: Path, suffix: str, fortran: bool) -> None:
    channels_last = BYTES.transpose(0, 2, 3, 1)
    for case, array, expected in (
        ("NCHW", BYTES, BYTES),
        ("NHWC", channels_last, BYTES),
        ("NHW", BYTES[:, 0], BYTES[:, :1]),
        ("one channel last", channels_last[..., :1], BYTES[:, :1]),
    ):
        array = np.asfortranarray(array) if fortran else np.ascontiguousarray(array)
        data = open_images(save(tmp_path / f"{case}.{suffix}", array))
        assert data.event_shape == expected.shape[1:], case
        assert np.array_equal(data.raw(range(6)), expected), case
        assert np.array_equal(data.raw([5, 2]), expected[[5, 2]]), case
        assert data.raw(range(6)).is_contiguous(), case
        assert data.labels is None
        assert data.scaling == "uint8 / 127.5 - 1"


def test_a_layout_that_cannot_be_told_has_to_be_said(tmp_path: Path) -> None:
    for shape in ((6, 3, 5, 2), (6, 16, 8, 8)):
        array = RNG.integers(0, 256, shape, dtype=np.uint8)
        path = save(tmp_path / "x.npy", array)
        with pytest.raises(
            ValueError, match=r'x\.npy: expected layout="NCHW" or "NHWC" for images of shape \(6'
        ):
            open_images(path)
        assert np.array_equal(open_images(path, layout="NCHW").raw(range(6)), array)
        last = open_images(path, layout="NHWC").raw(range(6))
        assert np.array_equal(last, array.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"no layout for images of shape \(N, H, W\)"):
        open_images(save(tmp_path / "x.npy", BYTES[:, 0]), layout="NCHW")
    with pytest.raises(
        ValueError, match="expected no resolution, since this is not a set of image files, got 4"
    ):
        open_images(save(tmp_path / "x.npy", BYTES), resolution=4)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "longdouble"])
def test_floats_keep_their_values(tmp_path: Path, dtype: str) -> None:
    array = FLOATS.astype(dtype)
    data = open_images(save(tmp_path / "x.npy", array))
    assert np.array_equal(data.raw(range(6)), array.astype(np.float64))
    assert data.tensor().dtype == torch.float32
    assert np.array_equal(data.tensor(), array.astype(np.float32)), "as they are"
    assert data.scaling == {"f2": "float16", "f4": "float32"}.get(dtype[1:], "float64")


def test_other_integers_need_a_scaling_and_masks_do_not(tmp_path: Path) -> None:
    for dtype in (">i2", "uint16", "int64"):
        path = save(tmp_path / "x.npy", BYTES.astype(dtype))
        with pytest.raises(ValueError, match=r"x\.npy: expected uint8 or floats, got u?int"):
            open_images(path)
        data = open_images(path, scaling=(0, 255))
        assert torch.equal(data.tensor(), torch.from_numpy(BYTES).float() / 127.5 - 1), dtype
    mask = BYTES > 127
    data = open_images(save(tmp_path / "x.npy", mask))
    assert np.array_equal(data.tensor(), 2.0 * mask - 1)
    assert data.raw([0]).dtype == torch.uint8
    for array in (BYTES.astype(complex), BYTES.astype(str)):
        with pytest.raises(ValueError, match=r"x\.npy: expected an array of numbers, got"):
            open_images(save(tmp_path / "x.npy", array))


def test_npy_files_are_mapped_and_not_read(tmp_path: Path) -> None:
    data = open_images(save(tmp_path / "x.npy", BYTES.transpose(0, 2, 3, 1)))
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="r+")
    array[4] = 77
    array.flush()
    assert bool((data.raw([4]) == 77).all())
    message = pickle.dumps(data)
    assert len(message) < BYTES.nbytes + 1500, "processes map the file for themselves"
    assert b"memmap" not in message
    assert torch.equal(pickle.loads(message).raw(range(6)), data.raw(range(6)))


def test_npz_files_may_have_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for images, labels in (("images", "labels"), ("x", "y"), ("arr_0", "y")):
        np.savez_compressed(path, **{images: BYTES, labels: LABELS})
        data = open_images(path)
        assert np.array_equal(data.raw(range(6)), BYTES)
        assert data.labels is not None
        assert data.labels.tolist() == LABELS.tolist(), labels
    for labels, message in (
        (LABELS[:5], r"6 integer labels, one an image, got int64 of shape \(5,\)"),
        (LABELS - 1, "labels >= 0, got -1 for image 1"),
        (LABELS / 2, "got float64"),
        (LABELS[:, None], r"got int64 of shape \(6, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"x\.npz: expected .*{message}"):
            open_images(save(path, BYTES, labels=labels))


def test_arrays_that_are_not_images_are_named(tmp_path: Path) -> None:
    for suffix in ("npy", "npz"):
        path = tmp_path / f"x.{suffix}"
        for array in (np.array(3.0), BYTES[0, 0], BYTES[None], BYTES[:0]):
            with pytest.raises(
                ValueError, match=rf"x\.{suffix}: expected images of shape \(N, H, W\).*, got \("
            ):
                open_images(save(path, array))
        objects = np.empty(3, dtype=object)
        np.save(path, objects) if suffix == "npy" else np.savez(path, images=objects)
        with pytest.raises(ValueError, match=rf"x\.{suffix}: expected a \.{suffix}"):
            open_images(path)
        whole = save(path, BYTES).read_bytes()
        for content in (b"", b"\x93NUM", whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"x\.{suffix}: expected a \.{suffix}"):
                open_images(path)
    save(tmp_path / "y.npy", BYTES).rename(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"y\.npz: expected a \.npz file of arrays .* single array"):
        open_images(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", pictures=BYTES)
    with pytest.raises(ValueError, match=r"named one of \('images', 'x', 'arr_0'\), got \['pictures'\]"):
        open_images(tmp_path / "z.npz")


# Scaling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0), (-3.0, 5.0), (2.0, 4.0)], ids=str
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_scaling_takes_its_range_to_minus_one_and_one(low: float, high: float, dtype: str) -> None:
    stored = torch.from_numpy((low + (high - low) * (FLOATS + 1) / 2).astype(dtype))
    stored[0, 0, 0, :2] = torch.tensor([low, high])
    data = ImageData(stored, scaling=(low, high))
    values = data.tensor()
    expected = 2 * (stored.double() - low) / (high - low) - 1
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=5e-7)
    assert values[0, 0, 0, :2].tolist() == [-1, 1]
    assert data.to_float(stored[0, 0]).shape == (5, 7)


def test_scalings_are_written_as_formulas() -> None:
    cases: list[tuple[Any, str]] = [
        ((-1, 1), "float64"),
        ((0, 1), "float64 / 0.5 - 1"),
        ((0, 16), "float64 / 8 - 1"),
        ((-3, 1), "float64 / 2 + 0.5"),
        ("none", "float64"),
    ]
    for pair, formula in cases:
        assert ImageData(torch.full((2, 1, 2, 2), 0.5).double(), scaling=pair).scaling == formula


@pytest.mark.parametrize(
    ("low", "high", "taken"),
    [
        (-1, 1, True),
        (-0.6, 0.2, True),
        (-1.0001, 1.0001, True),
        (0, 1, False),
        (-0.02, 1, False),  # interpolated values of [0, 1]
        (-1.2, 1, False),
        (-1, 1.2, False),
        (0, 255, False),
    ],
    ids=str,
)
def test_floats_are_taken_as_they_are_only_if_there_is_no_doubt(low: float, high: float, taken: bool) -> None:
    array = np.linspace(low, high, 6 * 8 * 8).reshape(6, 1, 8, 8)
    if taken:
        assert torch.equal(ImageData(torch.from_numpy(array)).tensor(), torch.from_numpy(array).float())
        return
    message = rf"mine: expected uint8, or floats in \[-1, 1\].* got float64 from {low:g} to {high:g}; say"
    with pytest.raises(ValueError, match=message):
        ImageData(torch.from_numpy(array), name="mine")


def test_values_as_they_are_need_only_be_finite() -> None:
    latents = torch.randn(6, 4, 8, 8) * 3
    data = ImageData(latents, scaling="none")
    assert torch.equal(data.tensor(), latents)
    latents[3, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="latents, image 3: expected finite values, got"):
        ImageData(latents, scaling="none", name="latents").tensor()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("value", [1.5, -1.5, np.nan, np.inf, -np.inf])
def test_bad_values_are_named_or_skipped(
    tmp_path: Path, value: float, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.repeat(FLOATS, 20, axis=0)  # more images than are looked at to tell their range
    array[[50, 51], 1, 2, 3] = value
    labels = np.arange(120)
    path = save(tmp_path / f"x.{suffix}", array, labels=labels)
    data = open_images(path, scaling=(-1, 1))
    assert len(data.raw(range(50))) == 50
    with pytest.raises(ValueError, match=rf"x\.{suffix}, image 50: expected values in \[-1, 1\], got "):
        data.raw([3, 50, 4])
    with pytest.raises(ValueError, match="image 50:"):
        data.tensor()
    with caplog.at_level(logging.WARNING):
        data = open_images(path, on_error="skip", scaling=(-1, 1))
    assert (len(data), data.skipped, data.scaling) == (118, 2, "float64")
    kept = np.delete(np.arange(120), [50, 51])
    assert np.array_equal(data.raw(range(118)), array[kept])
    if suffix == "npz":
        assert data.labels is not None
        assert data.labels.tolist() == kept.tolist()
    lines = [record.getMessage() for record in caplog.records]
    assert [f"skipping {path}, image {i}" in " ".join(lines) for i in (49, 50, 51)] == [False, True, True]
    assert f"{path}: skipped 2 images of 120" in lines


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_where_all_can_be_used_nothing_is_skipped(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / f"x.{suffix}", FLOATS)
    with caplog.at_level(logging.WARNING):
        data = open_images(path, on_error="skip")
    assert (len(data), data.skipped) == (6, 0)
    assert data.tensor().equal(open_images(path).tensor())
    assert not caplog.records


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        open_npz(tmp_path / "gone.npz")


def test_frames_need_a_black() -> None:
    known, unknown = (
        ImageData(torch.from_numpy(BYTES), name="mine"),
        ImageData(torch.from_numpy(FLOATS), scaling="none", name="mine"),
    )
    for data, pixels in ((known, -1), (unknown, 2)):
        with pytest.raises(
            ValueError, match=f"mine: expected pixels >= 0 and a range with a black, got {pixels}"
        ):
            data.padded(pixels)
    assert unknown.padded(0) is unknown
    framed = known.padded(2).tensor()
    assert framed[..., 2:-2, 2:-2].equal(known.tensor())
    assert framed[..., :2, :].eq(-1).all()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", FLOATS + 5)
    with pytest.raises(ValueError, match=r"none of its 6 images can be used; .*image 0: expected values in"):
        open_images(path, scaling=(0, 1), on_error="skip")
    with pytest.raises(ValueError, match="got float64 from nan to nan"):
        open_images(save(path, np.full((2, 4, 4), np.nan)))


def test_bytes_out_of_a_given_range_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"image 2: expected values in \[0, 16\], got 17 to 17"):
        ImageData(
            torch.tensor([15, 16, 17]).byte().view(3, 1, 1, 1).expand(3, 1, 1, 2), scaling=(0, 16)
        ).tensor()
    with pytest.raises(ValueError, match="image 1:"):
        ImageData(torch.tensor([[[[1]]], [[[9]]]]).byte(), scaling=(0, 8)).raw([-1])
    assert not caplog.records
    ImageData(torch.ones(3, 1, 2, 2).byte(), name="masks")
    assert "masks: uint8 values of 0 and 1 are read as 0..255" in caplog.text


# IDX ----------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray | None, packed: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    suffix, pack = (".gz", gzip.compress) if packed else ("", bytes)
    path = folder / f"{prefix}-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(images)))
    if labels is not None:
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels.astype(np.uint8))))
    return path


GREY = BYTES[:, 0]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_files_are_read_with_their_labels(tmp_path: Path, packed: bool) -> None:
    path = write_idx(tmp_path, "train", GREY, LABELS, packed)
    write_idx(tmp_path, "t10k", GREY[:2], LABELS[3:5], packed)
    for source, split, images, labels in (
        (path, None, GREY, LABELS),
        (tmp_path, None, GREY, LABELS),
        (tmp_path, "train", GREY, LABELS),
        (tmp_path, "test", GREY[:2], LABELS[3:5]),
    ):
        data = open_images(source, split=split)
        assert np.array_equal(data.raw(range(len(data)))[:, 0], images), (source, split)
        assert data.labels is not None
        assert data.labels.tolist() == labels.tolist()
        assert data.event_shape == (1, 5, 7)
        assert data.name == (str(source) if split is None else f"{source} ({split})")


def test_idx_labels_may_be_missing_or_otherwise_packed(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "emnist-train", GREY, None, packed=True)
    assert open_images(path).labels is None
    (tmp_path / "emnist-train-labels-idx1-ubyte").write_bytes(idx(LABELS.astype(np.uint8)))
    labels = open_images(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()
    (tmp_path / "emnist-train-images-idx3-ubyte").write_bytes(idx(GREY[::-1]))
    assert np.array_equal(open_images(tmp_path).raw([0])[0, 0], GREY[-1]), (
        "the same file twice: as it is unpacked"
    )
    (tmp_path / "emnist-train-labels-idx1-ubyte").write_bytes(idx(LABELS[1:].astype(np.uint8)))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte: expected 6 integer labels, .* of shape \(5,\)"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"one file of images for split='test', got \['emnist-train-images"):
        open_images(tmp_path, split="test")
    write_idx(tmp_path, "other-train", GREY, None, packed=False)
    with pytest.raises(ValueError, match="one file of images for split='train', got"):
        open_images(tmp_path)


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    content = idx(GREY)
    huge = struct.pack(">HBB3I", 0, 8, 3, *3 * (2**32 - 1,)) + bytes(100)
    cases = {
        "empty": (b"", r"expected magic number 0x00000803, got 0x$"),
        "labels": (idx(LABELS.astype(np.uint8)), "expected magic number 0x00000803, got 0x00000801"),
        "floats": (b"\0\0\x0d\3" + content[4:], "got 0x00000d03"),
        "cut": (content[:-1], r"expected 210 values for its shape \(6, 5, 7\), got 209 values"),
        "longer": (content + b"\0", r"expected 210 values for its shape \(6, 5, 7\), got more"),
        "huge": (huge, "of more values than it can hold"),
    }
    for packed in (False, True):
        path = tmp_path / f"x-images-idx3-ubyte{'.gz' if packed else ''}"
        for damaged, message in cases.values():
            path.write_bytes(gzip.compress(damaged) if packed else damaged)
            with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
                open_images(path)
    for damaged in (gzip.compress(content)[:-20], b"no gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name}: expected an IDX file of 3 dimension"):
            open_images(path)


# By name ------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    data = open_images("digits")
    assert torch.equal(data.tensor()[:, 0], torch.tensor(digits.images, dtype=torch.float32) / 8 - 1)
    assert data.labels is not None
    assert data.labels.tolist() == digits.target.tolist()
    assert (data.scaling, data.name) == ("uint8 / 8 - 1", "digits")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert len(open_images("digits")) == 1797
    for folder in ("./digits", Path("digits")):
        with pytest.raises(ValueError, match="digits: expected images"):
            open_images(folder)
    with pytest.raises(ValueError, match="expected no split"):
        open_images("digits", split="test")


def test_torchvision_mnist_is_read_below_its_root(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    for folder in ("MNIST", "FashionMNIST"):
        write_idx(tmp_path / folder / "raw", "train", GREY, LABELS, packed=False)
        write_idx(tmp_path / folder / "raw", "t10k", GREY[:2], LABELS[:2], packed=False)
        train = open_images(f"torchvision:{folder}", root=tmp_path)
        assert np.array_equal(train.raw(range(6))[:, 0], GREY)
        assert train.labels is not None
        assert train.labels.tolist() == LABELS.tolist()
        test = open_images(f"torchvision:{folder}", root=tmp_path, split="test")
        assert (len(test), test.name) == (2, f"torchvision:{folder} (test)")


def test_torchvision_cifar_and_celeba_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    made: list[tuple[Any, ...]] = []

    class CIFAR10:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            made.append((root, train, download))
            self.data, self.targets = BYTES.transpose(0, 2, 3, 1), LABELS.tolist()

    class CelebA:
        base_folder = "celeba"

        def __init__(self, root: Path, split: str, download: bool) -> None:
            made.append((root, split, download))
            self.root, self.filename = root, ["2.jpg", "1.jpg"]
            folder = Path(root, "celeba", "img_align_celeba")
            folder.mkdir(parents=True)
            for name, image in zip(self.filename, (GREY[2], GREY[1]), strict=True):
                Image.fromarray(image).save(folder / name, "PNG")

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    monkeypatch.setattr(datasets, "CelebA", CelebA)
    data = open_images("torchvision:CIFAR10", root=tmp_path, split="test")
    assert np.array_equal(data.raw(range(6)), BYTES)
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    faces = open_images("torchvision:CelebA", root=tmp_path, split="valid", resolution=5)
    assert faces.labels is None
    assert np.array_equal(faces.raw([0, 1])[:, 0], GREY[[2, 1]][:, :, 1:6])
    assert made == [(tmp_path, False, True), (tmp_path, "valid", True)]


def test_torchvision_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    with pytest.raises(ValueError, match="torchvision:Nothing: expected one of MNIST, "):
        open_images("torchvision:Nothing")
    with pytest.raises(ValueError, match=r"torchvision:MNIST: expected split to be one of .*, got 'valid'"):
        open_images("torchvision:MNIST", split="valid")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    message = rf"torchvision:CIFAR10 is not below {tmp_path} and cannot be downloaded: Name or service"
    with pytest.raises(FileNotFoundError, match=message):
        open_images("torchvision:CIFAR10", root=tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision:MNIST needs torchvision: pip install torchvision"):
        open_images("torchvision:MNIST")


# The hub, by a stand-in for the datasets library --------------------------------------------------


class _Image:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class _ClassLabel:
    dtype = "int64"


class _HubData:
    """What is used of datasets.Dataset."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows = features, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]

    def cast_column(self, column: str, feature: _Image) -> "_HubData":
        assert not feature.decode
        return _HubData({**self.features, column: feature}, self.rows)


def hub(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], rows: list[dict[str, Any]]) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(name: str, split: str) -> _HubData:
        calls.append((name, split))
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist on the Hub")
        return _HubData(features, rows)

    module = SimpleNamespace(Image=_Image, ClassLabel=_ClassLabel, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def row(i: int, **labels: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(GREY[i]).save(buffer, "PNG")
    return {"img": {"bytes": buffer.getvalue(), "path": None}, **labels}


def test_hub_data_are_decoded_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, label=label, id=9) for i, label in enumerate(LABELS.tolist())]
    path = tmp_path / "0.png"
    path.write_bytes(rows[0]["img"]["bytes"])
    rows[0]["img"] = {"bytes": None, "path": str(path)}
    features = {"img": _Image(), "label": _ClassLabel(), "id": SimpleNamespace(dtype="int64")}
    calls = hub(monkeypatch, features, rows)
    data = open_images("hf:some/mnist", split="train[:6]")
    assert calls == [("some/mnist", "train[:6]")]
    assert np.array_equal(data.raw(range(6))[:, 0], GREY)
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    rows[3]["img"] = None
    with pytest.raises(ImageError, match=r"hf:some/mnist\[3\]: expected an image in column img, got none"):
        open_images("hf:some/mnist")
    rows[3]["img"] = {"bytes": b"?", "path": None}
    with pytest.raises(ImageError, match=r"hf:some/mnist\[3\]: cannot be decoded"):
        open_images("hf:some/mnist")
    assert open_images("hf:some/mnist", on_error="skip").skipped == 1
    assert calls[-1] == ("some/mnist", "train")


@pytest.mark.parametrize(
    ("features", "column"),
    [
        ({"fine": _ClassLabel()}, "fine"),
        ({"fine": _ClassLabel(), "coarse": _ClassLabel()}, None),
        ({"coarse": _ClassLabel(), "label": _ClassLabel()}, "label"),
        ({"label": SimpleNamespace(dtype="uint8")}, "label"),
        ({"label": SimpleNamespace(dtype="string")}, None),
        ({}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_hub_labels_come_from_one_column(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], column: str | None
) -> None:
    rows = [row(i, **{key: i + (key == column) for key in features}) for i in range(3)]
    hub(monkeypatch, {"img": _Image(), **features}, rows)
    labels = open_images("hf:x").labels
    assert (None if labels is None else labels.tolist()) == (None if column is None else [1, 2, 3])


def test_the_hub_fails_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"a": _Image(), "b": _Image()}, [row(0)])
    with pytest.raises(ValueError, match=r"hf:x: expected one column of images, got \['a', 'b'\]"):
        open_images("hf:x")
    with pytest.raises(
        FileNotFoundError, match=r"hf:missing: split 'train' cannot be loaded: .*doesn't exist"
    ):
        open_images("hf:missing")
    hub(monkeypatch, {"img": _Image(), "label": _ClassLabel()}, [row(i, label=-1) for i in range(2)])
    with pytest.raises(ValueError, match="hf:x: expected labels >= 0, got -1 for image 0"):
        open_images("hf:x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hf:x needs the datasets library: pip install datasets"):
        open_images("hf:x")
