"""Arrays of images: .npy (memory-mapped), .npz, and the IDX files of MNIST. Pickled objects are refused."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from gaussnet.data.files import MAX_BYTES
from gaussnet.data.images import Found, Scaling, Store, class_labels

Layout = Literal["NHWC", "NCHW"]

_IMAGES, _LABELS = ("images", "x", "arr_0"), ("labels", "y")  # keys of a .npz, by precedence
_IDX_IMAGES = re.compile(r"images([-.])idx3-ubyte(\.gz)?$")
_INFLATION = 100  # of a compressed file that becomes large: images pack less, a bomb 1032 bytes into one
_SPLITS = {"train": "train", "test": "t10k"}  # of MNIST, by their names in file names


class MappedArray:
    """A store on a memory-mapped .npy file. Processes that it travels to map the file for themselves."""

    def __init__(self, path: Path, layout: Layout | None = None) -> None:
        self.path = path
        self.layout: Layout | None = layout
        self._array = self._map()

    def _map(self) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):  # of sizes that no file has, an error below
                return np.lib.format.open_memmap(self.path, mode="r")
        except OSError:
            raise
        except Exception as error:  # of a header: ValueError, EOFError, TokenError, OverflowError and others
            raise ValueError(f"{self.path}: expected a .npy array of numbers: {str(error)[:200]}") from error

    @property
    def array(self) -> np.ndarray:
        """The memory map."""
        return self._array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Tensor) -> Tensor:
        return as_images(self._array[index.numpy()], self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedArray, (self.path, self.layout)


def open_npy(path: Path) -> Found:
    """A .npy file, memory-mapped."""
    return Found(MappedArray(path))


def open_npz(path: Path) -> Found:
    """A .npz file with an array images, x or arr_0, and labels or y if there are labels; read into memory."""
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it holds a single array")
        with ZipFile(path) as archive:
            _expect_no_bomb(sum(info.file_size for info in archive.infolist()), path)
        with np.load(path, allow_pickle=False) as arrays:
            keys = list(arrays)
            images = next((_array(arrays, key) for key in _IMAGES if key in keys), None)
            labels = next((_array(arrays, key) for key in _LABELS if key in keys), None)
    except Exception as error:  # of zips and headers: BadZipFile, TokenError, zlib.error and others
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{path}: expected a .npz file of arrays of numbers: {str(error)[:200]}") from error
    if images is None:
        raise ValueError(f"{path}: expected an array named one of {_IMAGES}, got {keys}")
    return Found(images, None if labels is None else class_labels(labels, _length(images), str(path)))


def as_store(
    images: MappedArray | np.ndarray, layout: Layout | None, scaling: Scaling | None, name: str
) -> tuple[Store, Scaling | None]:
    """An array (N, H, W), (N, H, W, C) or (N, C, H, W) as a store.

    uint8 and floats keep their dtype, bool becomes uint8 of 0 and 1, other integers float32.

    Returns:
        The store, and its scaling.

    Raises:
        ValueError: if the array has another shape or dtype, or does not show which axis is that of channels.
    """
    array = images.array if isinstance(images, MappedArray) else images
    if array.dtype.kind in "iu" and array.dtype != np.uint8 and scaling is None:
        raise ValueError(
            f"{name}: expected uint8 or floats, got {array.dtype.name}; say by scaling=(low, high) which "
            "values become -1 and 1"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected an array of numbers, got {array.dtype.name}")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"{name}: expected images of shape (N, H, W), (N, H, W, C) or (N, C, H, W), got {array.shape}"
        )
    if array.ndim == 3 and layout is not None:
        raise ValueError(f"{name}: expected no layout for images of shape (N, H, W), got {layout!r}")
    if array.ndim == 4 and layout is None:
        first, last = array.shape[1] <= 4, array.shape[3] <= 4
        if first == last:
            raise ValueError(
                f'{name}: expected layout="NCHW" or "NHWC" for images of shape {array.shape}: channels can '
                "only be told if one axis, the second or the last, is at most 4 and the other is larger"
            )
        layout = "NCHW" if first else "NHWC"
    if array.dtype == np.bool_:
        scaling = scaling or (0, 1)
    if isinstance(images, MappedArray):
        return MappedArray(images.path, layout), scaling
    return as_images(images, layout), scaling


def as_images(array: np.ndarray, layout: Layout | None) -> Tensor:
    """A batch as a contiguous tensor (n, C, H, W)."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.float32)
    elif array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    images = torch.from_numpy(array)
    if images.ndim == 3:
        return images[:, None]
    return images.permute(0, 3, 1, 2).contiguous() if layout == "NHWC" else images


def open_idx(path: Path) -> Found:
    """An IDX file of images, gzipped or not, with the labels file beside it, if there is one."""
    images = read_idx(path, 3)
    beside = _IDX_IMAGES.sub(r"labels\g<1>idx1-ubyte", path.name)
    for labels in (path.with_name(beside), path.with_name(f"{beside}.gz")):
        if labels.is_file():
            return Found(images, class_labels(read_idx(labels, 1), len(images), str(labels)))
    return Found(images)


def idx_file(folder: Path, split: str | None) -> Path | None:
    """The file of a split's images ("train" by default, or "test") in a folder of IDX files, if there is any.

    Raises:
        ValueError: if there is not exactly one.
    """
    files = sorted((path for path in folder.iterdir() if is_idx(path)), reverse=True)
    found = {path.name.removesuffix(".gz"): path for path in files}  # one that is not gzipped goes first
    if not found:
        return None
    word = _SPLITS.get(split or "train", split or "train")
    chosen = [path for name, path in sorted(found.items()) if word in name or (split or "train") in name]
    if len(found) == 1 and split is None:
        chosen = list(found.values())
    if len(chosen) != 1:
        raise ValueError(
            f"{folder}: expected one file of images for split={split or 'train'!r}, got {sorted(found)}"
        )
    return chosen[0]


def is_idx(path: Path) -> bool:
    """Whether a file is named like an IDX file of images."""
    return bool(_IDX_IMAGES.search(path.name))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, type 8, ndim, then ndim big-endian 32-bit sizes, then the values.

    Raises:
        ValueError: if the file is anything else.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic, header = file.read(4), file.read(4 * ndim)
            if magic != bytes([0, 0, 8, ndim]) or len(header) < 4 * ndim:
                raise ValueError(f"expected magic number 0x{2048 + ndim:08x}, got 0x{magic.hex()}")
            shape = np.frombuffer(header, ">u4").tolist()
            if 0 in shape:  # the others may be any
                raise ValueError(f"its shape {tuple(shape)} is of no values")
            _expect_no_bomb(prod(shape), path)
            values = file.read(prod(shape) + 1)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected an IDX file of {ndim} dimension(s): {error}") from error
    if len(values) != prod(shape):
        got = f"{len(values)} values" if len(values) < prod(shape) else "more"
        raise ValueError(f"{path}: expected {prod(shape)} values for its shape {tuple(shape)}, got {got}")
    return np.frombuffer(bytearray(values), np.uint8).reshape(shape)


def _array(arrays: Mapping[str, Any], key: str) -> np.ndarray:
    array = arrays[key]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its member {key} is no .npy file")
    return array


def _expect_no_bomb(size: int, path: Path) -> None:
    """Raises a ValueError if a small file announces much."""
    if size > max(MAX_BYTES, _INFLATION * path.stat().st_size):
        raise ValueError(f"refused: {size} bytes, in so small a file, are of more values than it can hold")


def _length(array: np.ndarray) -> int:
    return len(array) if array.ndim else 0
