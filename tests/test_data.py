"""Image files: EDM zips and folders, class folders, what is refused or skipped, modes, worker processes."""

import io
import json
import logging
import os
import pickle
import threading
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import gaussnet.data.files
import gaussnet.data.folders
from gaussnet.data import ImageData, ImageError, open_images
from gaussnet.data.files import decode
from gaussnet.data.folders import ZipReader
from gaussnet.data.named import open_torchvision

CACHES = pytest.mark.parametrize("cache", [0, 1 << 30], ids=["lazy", "cached"])


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def write(where: Path, files: Mapping[str, bytes]) -> Path:
    """As a zip or as a folder, by the name of `where`."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(content)
    return where


NAMES = [f"{i // 3:05d}/img{i:08d}.png" for i in range(7)]
IMAGES = pixels(0, 7, 4, 6, 3)  # (N, H, W, C)
LABELS = [3, 0, 1, 3, 2, 0, 3]


def edm(
    labels: Any = LABELS, images: np.ndarray = IMAGES, damaged: Mapping[int, bytes] = {}
) -> dict[str, bytes]:
    """The files of an EDM data set, with some images replaced by damaged ones."""
    if isinstance(labels, list):
        labels = [[name, label] for name, label in zip(NAMES, labels, strict=True)][::-1]
    files = {name: encode(image) for name, image in zip(NAMES, images, strict=True)}
    files |= {NAMES[i]: content for i, content in damaged.items()}
    return {**files, "dataset.json": json.dumps({"labels": labels}).encode()}


def reference(images: np.ndarray = IMAGES) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# What is read -------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("where", ["data.zip", "data"])
def test_edm_data_sets_are_read_as_written(tmp_path: Path, where: str, cache: int) -> None:
    data = open_images(write(tmp_path / where, edm()), cache=cache)
    assert (len(data), data.event_shape, data.skipped) == (7, (3, 4, 6), 0)
    assert data.name == str(tmp_path / where)
    assert data.labels is not None
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == LABELS, "labels go by name, in whatever order dataset.json has them"
    assert data.raw(range(7)).dtype == torch.uint8
    assert torch.equal(data.raw(range(7)), reference())
    assert torch.equal(data.raw([5, 0, -1]), reference()[[5, 0, 6]])
    assert data.raw([]).shape == (0, 3, 4, 6)
    assert data.scaling == "uint8 / 127.5 - 1"
    expected = (reference().double() / 127.5 - 1).float()
    torch.testing.assert_close(data.tensor(), expected, rtol=0, atol=6e-8)
    assert data.tensor().is_contiguous()
    assert [len(batch) for batch in data.batches(3)] == [3, 3, 1]
    assert torch.equal(torch.cat(list(data.batches(3))), data.tensor())
    assert "7 of 3 x 4 x 6, uint8 / 127.5 - 1, 4 classes" in repr(data)
    assert [path.name for path in tmp_path.iterdir()] == [where], "nothing is extracted"


def test_labels_may_be_null_and_images_grey(tmp_path: Path) -> None:
    files = edm(None, IMAGES[..., 0])
    data = open_images(write(tmp_path / "null.zip", files))
    assert data.labels is None
    assert torch.equal(data.raw(range(7)), reference()[:, :1])
    image, label = data[2]
    assert (image.shape, label.shape) == ((1, 4, 6), (0,))
    del files["dataset.json"]
    assert open_images(write(tmp_path / "none.zip", files)).labels is None
    both = write(tmp_path / "both", {**edm(), "train-images-idx3-ubyte": b"?"})
    assert len(open_images(both)) == 7, "dataset.json says what it is"


def test_images_are_decoded_once_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.zip", edm())
    decoded: list[str] = []

    def counting(encoded: bytes, name: str, *args: Any) -> np.ndarray:
        decoded.append(name)
        return decode(encoded, name, *args)

    monkeypatch.setattr(gaussnet.data.files, "decode", counting)
    size = IMAGES.size
    for cache, reads in ((size, 0), (size - 1, 7)):
        data = open_images(path, cache=cache)
        decoded.clear()
        data.raw(range(7))
        assert len(decoded) == reads, f"cache={cache}"


def test_class_folders_are_numbered_as_by_torchvision(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    names = ["b/2.png", "b/1.PNG", "a-b/x.png", "a/deep/er/3.png", "c d/1.bmp", "B/1.webp"]
    kinds = {".bmp": "BMP", ".webp": "WEBP"}
    files = {
        name: encode(pixels(i, 5, 5, 3), kinds.get(name[-4:], kinds.get(name[-5:], "PNG")))
        for i, name in enumerate(names)
    }
    junk = {"a/.hidden.png": b"", "__MACOSX/a/._1.png": b"", ".cache/x.png": b"", "a/notes.txt": b""}
    root = write(tmp_path / "data", {**files, **junk})
    data = open_images(root)
    expected = {
        str(Path(path).relative_to(root)): label
        for path, label in datasets.ImageFolder(str(write(tmp_path / "clean", files))).samples
        for root in [tmp_path / "clean"]
    }
    assert data.labels is not None
    assert dict(zip(sorted(names), data.labels.tolist(), strict=True)) == expected
    for i, name in enumerate(sorted(names)):
        truth = np.array(Image.open(io.BytesIO(files[name])).convert("RGB"))
        assert torch.equal(data.raw([i])[0], torch.from_numpy(truth).permute(2, 0, 1)), name
    write(root, {"loose.png": files["b/2.png"]})
    assert open_images(root).labels is None, "not every image lies in a subfolder"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", {"1.png": encode(IMAGES[0])})
    root = write(tmp_path / "data", {"a/1.png": encode(IMAGES[1])})
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to(root)
    data = open_images(root)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]
    (root / "b" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"2\.png: no such file"):
        open_images(root)


# What cannot be used ------------------------------------------------------------------------------

GOOD = encode(IMAGES[2])
BAD = {
    "truncated": (GOOD[:70], "cannot be decoded"),
    "empty": (b"", "not a png"),
    "another format": (encode(IMAGES[2], "GIF"), "not a png, jpeg, webp or bmp image"),
    "odd size": (encode(pixels(1, 5, 6, 3)), r"expected 3 x 4 x 6 .*, got 3 x 5 x 6$"),
    "odd channels": (encode(pixels(1, 4, 6)), r"expected 3 x 4 x 6 .*, got 1 x 4 x 6; mode="),
    "transparent": (encode(pixels(1, 4, 6, 4)), r"transparent pixels; mode="),
    "16 bits": (encode(pixels(1, 4, 6).astype(np.uint16)), "8 bits a channel, got Pillow mode I;16"),
}


@CACHES
@pytest.mark.parametrize("position", [0, 2, 6])
@pytest.mark.parametrize("what", BAD)
def test_bad_images_are_named_or_skipped(
    tmp_path: Path, what: str, position: int, cache: int, caplog: pytest.LogCaptureFixture
) -> None:
    content, message = BAD[what]
    path = write(tmp_path / "data.zip", edm(damaged={position: content}))
    with pytest.raises(ImageError, match=rf"{NAMES[position]}: .*{message}"):
        open_images(path, cache=cache).raw(range(7))
    with caplog.at_level(logging.WARNING):
        data = open_images(path, cache=cache, on_error="skip")
    kept = [i for i in range(7) if i != position]
    assert (len(data), data.skipped) == (6, 1)
    assert data.labels is not None
    assert data.labels.tolist() == [LABELS[i] for i in kept]
    assert torch.equal(data.raw(range(6)), reference()[kept])
    lines = [record.getMessage() for record in caplog.records]
    assert sum(f"skipping {path}/{NAMES[position]}: " in line for line in lines) == 1
    assert f"{path}: skipped 1 images of 7" in lines
    assert "1 skipped" in repr(data)


def test_every_bad_image_of_many_is_found(tmp_path: Path) -> None:
    # More images than are looked at for the shape, and than a thread decodes at a time.
    count, bad = 150, {7, 63, 64, 149}
    small = encode(pixels(0, 2, 2))
    root = tmp_path / "data"
    write(root, {f"{i % 3}/{i:03d}.png": b"" if i in bad else small for i in range(count)})
    data = open_images(root, on_error="skip")
    order = sorted(range(count), key=lambda i: f"{i % 3}/{i:03d}")
    assert (len(data), data.skipped) == (count - len(bad), len(bad))
    assert data.labels is not None
    assert data.labels.tolist() == [i % 3 for i in order if i not in bad]
    with pytest.raises(ImageError, match=r"0/063\.png"):  # the first in their order
        open_images(root)


def test_what_is_looked_at_is_complained_about_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "data.zip", edm(damaged={3: b""}))
    with pytest.raises(ImageError, match=NAMES[3]):
        open_images(path, cache=0)


def test_the_expected_shape_is_that_of_most_images(tmp_path: Path) -> None:
    odd = encode(pixels(1, 8, 8, 3))
    data = open_images(write(tmp_path / "data.zip", edm(damaged={0: odd, 1: odd})), on_error="skip")
    assert (data.event_shape, data.skipped) == ((3, 4, 6), 2)


def test_damaged_zip_members_are_named_or_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "data.zip", edm())
    content = bytearray(path.read_bytes())
    content[content.index(GOOD) + 60] ^= 255
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"data.zip/{NAMES[2]}: cannot be read: Bad CRC-32"):
        open_images(path)
    assert open_images(path, on_error="skip").skipped == 1


def test_a_failing_disk_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise OSError("Input/output error")

    archive = write(tmp_path / "data.zip", {"1.png": GOOD, "2.png": GOOD})
    folder = write(tmp_path / "data", {"1.png": GOOD, "2.png": GOOD})
    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    for path in (archive, folder):
        with pytest.raises(OSError, match="Input/output error"):
            open_images(path, on_error="skip")


def test_data_without_a_usable_image_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "data", {f"{i}.png": b"" for i in range(3)})
    with pytest.raises(ImageError, match=r"none of the 3 images looked at can be used; .*0\.png"):
        open_images(path, on_error="skip")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [23, 10])  # Pillow itself warns up to twice its limit, and raises beyond
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = write(tmp_path / "data.zip", edm())  # 4 x 6 = 24 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    assert len(open_images(path)) == 7
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=rf"{NAMES[0]}: refused, since it may be a decompression bomb"):
        open_images(path)


@pytest.mark.parametrize("where", ["data.zip", "data"])
def test_absurdly_large_files_are_not_even_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = write(tmp_path / where, edm(None, damaged={2: GOOD + bytes(1000)}))
    monkeypatch.setattr(gaussnet.data.folders, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match=rf"{NAMES[2]}: refused: \d+ bytes are more than 1000"):
        open_images(path)


# Modes --------------------------------------------------------------------------------------------

RGB = Image.fromarray(pixels(3, 4, 4, 3))
HALF = np.concatenate([pixels(3, 4, 4, 3), np.full((4, 4, 1), 128, np.uint8)], -1)
OPAQUE = Image.fromarray(np.concatenate([pixels(3, 4, 4, 3), np.full((4, 4, 1), 255, np.uint8)], -1))


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def decoded(image: Image.Image, mode: Any = None, kind: str = "PNG", **options: Any) -> np.ndarray:
    return decode(encode(image, kind, **options), "x", mode).transpose(1, 2, 0)


def test_images_without_a_mode_are_grey_or_rgb() -> None:
    assert np.array_equal(decoded(RGB), np.array(RGB))
    assert np.array_equal(decoded(RGB.convert("L"))[..., 0], np.array(RGB.convert("L")))
    bits = RGB.convert("1")
    assert np.array_equal(decoded(bits)[..., 0], 255 * np.array(bits, np.uint8))
    palette = RGB.quantize(5)
    assert palette.mode == "P"
    assert np.array_equal(decoded(palette), np.array(palette.convert("RGB"))), "palette"
    cmyk = encode(RGB.convert("CMYK"), "JPEG")
    assert decode(cmyk, "x").shape == (3, 4, 4)
    assert np.array_equal(
        decode(cmyk, "x").transpose(1, 2, 0), np.array(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    )


def test_opaque_alpha_is_left_out() -> None:
    assert np.array_equal(decoded(OPAQUE), np.array(RGB))
    grey = RGB.convert("L")
    with_alpha = grey.copy()
    with_alpha.putalpha(255)
    assert with_alpha.mode == "LA"
    assert np.array_equal(decoded(with_alpha)[..., 0], np.array(grey))


def test_transparency_is_never_dropped_silently() -> None:
    half = Image.fromarray(HALF)
    palette = RGB.quantize(5)
    grey = RGB.convert("L")
    grey.putalpha(7)
    first = int(np.array(palette)[0, 0])
    cases: list[tuple[Image.Image, dict[str, Any]]] = [
        (half, {}),
        (grey, {}),
        (palette, {"transparency": first}),
    ]
    for image, options in cases:
        with pytest.raises(ImageError, match='x: has transparent pixels; mode="RGB"'):
            decoded(image, **options)
        read = Image.open(io.BytesIO(encode(image, **options)))
        rgba = np.array(read.convert("RGBA"))
        assert rgba[0, 0, 3] < 255
        assert np.array_equal(decoded(image, "RGBA", **options), rgba), f"RGBA of {image.mode}"
        assert np.abs(decoded(image, "RGB", **options) - over_white(rgba)).max() <= 1, f"RGB of {image.mode}"
        luminance = over_white(rgba) @ [0.299, 0.587, 0.114]
        assert np.abs(decoded(image, "L", **options)[..., 0] - luminance).max() <= 2, f"L of {image.mode}"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_mode_converts_mixtures(tmp_path: Path, mode: Any) -> None:
    images = [RGB, RGB.convert("L"), RGB.quantize(5), OPAQUE, Image.fromarray(HALF)]
    path = write(tmp_path / "data", {f"{i}.png": encode(image) for i, image in enumerate(images)})
    data = open_images(path, mode=mode)
    assert (len(data), data.event_shape) == (5, (len(mode) if mode != "L" else 1, 4, 4))
    assert np.array_equal(data.raw([0])[0, 0], np.array(RGB.convert(mode)).reshape(4, 4, -1)[..., 0])
    assert np.array_equal(data.raw([1])[0, 0], np.array(RGB.convert("L"))), "grey keeps its values"
    with pytest.raises(ImageError, match="8 bits a channel"):
        decode(BAD["16 bits"][0], "x", mode)


def test_resolution_cuts_the_central_square_and_averages(tmp_path: Path) -> None:
    wide, tall = pixels(4, 4, 10, 3), pixels(5, 12, 4, 3)
    path = write(tmp_path / "data", {"0.png": encode(wide), "1.png": encode(tall)})
    data = open_images(path, resolution=4)
    assert np.array_equal(data.raw([0])[0].permute(1, 2, 0), wide[:, 3:7])
    assert np.array_equal(data.raw([1])[0].permute(1, 2, 0), tall[4:8])
    stripes = np.tile(np.array([0, 254], np.uint8), (64, 32))  # columns of 0 and 254
    image = decode(encode(stripes), "x", resolution=8)
    assert np.abs(image[0, :, 2:-2].astype(int) - 127).max() <= 2, "stripes have to be averaged, not sampled"


# Processes ----------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("where", ["data.zip", "data"])
def test_worker_processes_read_the_same(tmp_path: Path, where: str, cache: int) -> None:
    data = open_images(write(tmp_path / where, edm()), cache=cache)
    data.raw([3])  # the zip is open before the workers are forked
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, reference())
    assert labels.tolist() == LABELS
    batches = [[6, 0, 3], [1, 1]]
    whole = DataLoader(data, batch_size=None, sampler=batches, num_workers=1, multiprocessing_context="fork")
    for indices, (images, labels) in zip(batches, whole, strict=True):
        assert torch.equal(images, reference()[indices])
        assert labels.tolist() == [LABELS[i] for i in indices]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.raw(range(7)), reference())
    assert copy.labels.tolist() == LABELS


def test_unlabelled_images_collate(tmp_path: Path) -> None:
    data = open_images(write(tmp_path / "data.zip", edm(None)))
    images, labels = next(iter(DataLoader(data, batch_size=3)))
    assert (images.shape, labels.shape) == ((3, 3, 4, 6), (3, 0))
    assert data[[1, 2]][1].shape == (2, 0)


def test_every_process_opens_the_zip_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ZipReader(write(tmp_path / "data.zip", edm()), NAMES)
    assert reader(2) == GOOD
    parent = reader._zip
    assert reader(2) == GOOD
    assert reader._zip is parent, "one process opens it once"
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert reader(2) == GOOD
    assert parent is not None
    assert reader._zip is not None
    assert reader._zip[1] is not parent[1], "a forked process would share the position in the file"


# Errors -------------------------------------------------------------------------------------------


def labelled(first: Any) -> list[Any]:
    return [first, *([name, 0] for name in NAMES[1:])]


METADATA = {
    "no JSON": (b"{", "expected JSON"),
    "a list": (b"[]", r"expected \{\"labels\""),
    "labels no list": ({"labels": 3}, r"expected \{\"labels\""),
    "no pair": ({"labels": labelled([NAMES[0]])}, r"expected labels of the form \[name, label\]"),
    "negative": ({"labels": labelled([NAMES[0], -1])}, rf"integer label >= 0 for {NAMES[0]}, got -1"),
    "float": ({"labels": labelled([NAMES[0], 1.5])}, rf"integer label >= 0 for {NAMES[0]}, got 1\.5"),
    "bool": ({"labels": labelled([NAMES[0], True])}, rf"integer label >= 0 for {NAMES[0]}, got True"),
    "null": ({"labels": labelled([NAMES[0], None])}, rf"integer label >= 0 for {NAMES[0]}, got None"),
    "one-hot": (
        {"labels": labelled([NAMES[0], [0, 1]])},
        rf"integer label >= 0 for {NAMES[0]}, got \[0, 1\]",
    ),
    "too few": ({"labels": labelled([])[1:]}, rf"each of 7 images, got 6: {NAMES[0]} has no label"),
    "too many": (
        {"labels": [["gone.png", 0], *labelled([NAMES[0], 0])]},
        r"each of 7 images, got 8: gone\.png is no image",
    ),
    "twice": (
        {"labels": [[NAMES[1], 0], *labelled([NAMES[0], 0])]},
        rf"one label for {NAMES[1]}, got several",
    ),
}


@pytest.mark.parametrize("where", ["data.zip", "data"])
@pytest.mark.parametrize("what", METADATA)
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, what: str, where: str) -> None:
    content, message = METADATA[what]
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = write(tmp_path / where, {**edm(), "dataset.json": text})
    with pytest.raises(ValueError, match=rf"{where}/dataset\.json: .*{message}"):
        open_images(path, on_error="skip")


def test_sources_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder nowhere\.zip, and not one of torch"):
        open_images("nowhere.zip")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty: expected images \(.png, .*\) in the folder, got none"):
        open_images(empty)
    with pytest.raises(ValueError, match=r"expected images .* in the zip, got none"):
        open_images(write(tmp_path / "none.zip", {"readme.txt": b""}))
    (tmp_path / "data.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.tar: expected a folder, \.zip, \.npy, \.npz or"):
        open_images(tmp_path / "data.tar")
    (tmp_path / "not.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"not\.zip: expected a zip file"):
        open_images(tmp_path / "not.zip")
    nested = write(tmp_path / "nested.zip", {f"top/{name}": content for name, content in edm().items()})
    with pytest.raises(ValueError, match=r"expected dataset\.json at the root of the zip, got top/data"):
        open_images(nested)
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", GOOD)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", GOOD)
    with pytest.raises(ValueError, match=r"different names, got a\.png twice"):
        open_images(tmp_path / "twice.zip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, r"on_error to be one of \('raise', 'skip'\), got 'ignore'"),
        ({"mode": "P"}, "mode to be one of .*, got 'P'"),
        ({"layout": "CHW"}, "layout to be one of .*, got 'CHW'"),
        ({"layout": "NCHW"}, "expected no layout, since this is not an array, got 'NCHW'"),
        ({"split": "test"}, "expected no split, since this is not a source with splits, got 'test'"),
        ({"resolution": 0}, "resolution >= 1, got 0"),
        ({"scaling": (1, 0)}, r"scaling to be \(low, high\), low < high, or \"none\", got \(1, 0\)"),
        ({"scaling": "unit"}, "got 'unit'"),
    ],
    ids=str,
)
def test_options_without_effect_or_sense_are_errors(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(write(tmp_path / "data.zip", edm()), **options)


# ImageData ----------------------------------------------------------------------------------------


def test_subsets_keep_images_labels_and_scaling(tmp_path: Path) -> None:
    for cache in (0, 1 << 30):
        data = open_images(write(tmp_path / "data.zip", edm()), cache=cache, scaling=(0, 510))
        part = data.subset([4, 1, 6]).subset(torch.tensor([2, 0]))
        assert torch.equal(part.raw([0, 1]), reference()[[6, 4]])
        assert part.labels is not None
        assert part.labels.tolist() == [LABELS[6], LABELS[4]]
        assert part.scaling == data.scaling == "uint8 / 255 - 1"
        assert torch.equal(part.tensor(), data.tensor()[[6, 4]])


def test_indices_are_checked() -> None:
    data = ImageData(reference(), LABELS)
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"expected indices of 7 images, got {index}"):
            data.raw([0, index])
        with pytest.raises(IndexError):
            data[index]
    wrong: list[Any] = [[0.5], torch.ones(7, dtype=torch.bool), [[0, 1]]]
    for indices in wrong:
        with pytest.raises(TypeError, match="expected a sequence of integers, got"):
            data.raw(indices)
    with pytest.raises(ValueError, match="at least one image, got size 0"):
        next(data.batches(0))
    assert [label for _, label in data] == LABELS, "iteration ends with the last image"


@pytest.mark.parametrize(
    "part",
    [slice(0, 2), slice(None), slice(-3, None), slice(None, None, -2), slice(5, 99), slice(4, 2)],
    ids=str,
)
def test_slices_are_batches(part: slice) -> None:
    images, labels = ImageData(reference(), LABELS)[part]
    index = torch.arange(7).numpy()[part].tolist()
    assert images.equal(reference()[index])
    assert labels.tolist() == [LABELS[i] for i in index]
    assert ImageData(reference())[part][1].shape == (len(index), 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"7 integer labels, one an image, got int64 of shape \(2,\)"),
        ([0.0] * 7, "7 integer labels, one an image, got float64"),
        ([[0]] * 7, r"7 integer labels, one an image, got int64 of shape \(7, 1\)"),
        ([0, 0, -2, 0, 0, 0, 0], "labels >= 0, got -2 for image 2"),
    ],
)
def test_labels_of_arrays_are_checked(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"mine: expected {message}"):
        ImageData(reference(), labels, name="mine")


def test_images_have_to_be_images() -> None:
    with pytest.raises(ValueError, match=r"expected images \(N, C, H, W\), got \(7, 4, 6\)"):
        ImageData(reference()[:, 0])
    with pytest.raises(ValueError, match="at least one image, got none"):
        ImageData(reference()[:0])


def test_one_process_downloads_while_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    busy, seen = threading.Lock(), []

    class Slow:
        def __init__(self, root: Path, **_: Any) -> None:
            assert busy.acquire(blocking=False), "two at once"
            seen.append((root / "whole").exists())
            time.sleep(0.05)
            (root / "whole").touch()
            busy.release()
            self.data, self.targets = torch.zeros(4, 2, 2, dtype=torch.uint8), [0, 1, 2, 3]

    monkeypatch.setattr(datasets, "MNIST", Slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_torchvision("MNIST", tmp_path / "new", "train"), range(4)))
    assert seen == [False, True, True, True]
    assert len(found) == 4


def test_data_that_cannot_be_written_to_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    given = SimpleNamespace(data=torch.zeros(4, 2, 2, dtype=torch.uint8), targets=[0, 1, 2, 3])
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: given)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(open_torchvision("MNIST", tmp_path, "train").images) == 4
    assert not list(tmp_path.iterdir())
