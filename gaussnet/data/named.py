"""Data sets by name: torchvision's, the Hugging Face hub's, and scikit-learn's embedded digits."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from gaussnet.data.files import Files, ImageError
from gaussnet.data.folders import FolderReader
from gaussnet.data.images import Found, class_labels

log: logging.Logger = logging.getLogger(__name__)

TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "CelebA")


def open_digits() -> Found:
    """scikit-learn's digits: 1,797 scans of 8x8 pixels with 17 grey levels, x / 8 - 1."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), 0..16
    images = pixels.reshape(-1, 8, 8).astype(np.uint8)
    return Found(images, class_labels(labels, len(images), "digits"), scaling=(0, 16))


def open_torchvision(name: str, root: Path, split: str) -> Found:
    """A data set of torchvision, looked for below `root` and downloaded if it is not there.

    CelebA comes as its aligned 178x218 photographs, without labels (its attributes are no classes).
    """
    if name not in TORCHVISION:
        raise ValueError(f"torchvision:{name}: expected one of {', '.join(TORCHVISION)}")
    splits = ("train", "valid", "test", "all") if name == "CelebA" else ("train", "test")
    if split not in splits:
        raise ValueError(f"torchvision:{name}: expected split to be one of {splits}, got {split!r}")
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"torchvision:{name} needs torchvision: pip install torchvision") from error
    which: dict[str, Any] = {"split": split} if name == "CelebA" else {"train": split == "train"}
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision writes in place: of several processes, one downloads, and the others find it there.
        with FileLock(root / f".{name}.lock") if os.access(root, os.W_OK) else nullcontext():
            data: Any = getattr(datasets, name)(root, download=True, **which)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise FileNotFoundError(
            f"torchvision:{name} is not below {root} and cannot be downloaded: {error}"
        ) from error
    if name == "CelebA":
        folder = Path(data.root) / data.base_folder / "img_align_celeba"
        return Found(
            Files([str(folder / file) for file in data.filename], FolderReader(folder, data.filename))
        )
    images = np.asarray(data.data)  # (N, H, W) or (N, H, W, C)
    return Found(images, class_labels(data.targets, len(images), f"torchvision:{name}"))


class HubReader:
    """The encoded images of a column of a Hugging Face data set."""

    def __init__(self, data: Any, column: str, name: str) -> None:
        self.data = data
        self.column = column
        self.name = name

    def __call__(self, index: int) -> bytes:
        image = self.data[index][self.column]
        if image is not None and image.get("bytes") is not None:
            return image["bytes"]
        if image is not None and image.get("path") is not None:
            return Path(image["path"]).read_bytes()
        raise ImageError(f"{self.name}[{index}]: expected an image in column {self.column}, got none")


def open_hub(name: str, split: str) -> Found:
    """A data set of the Hugging Face hub, or a local path that `datasets.load_dataset` opens.

    It needs exactly one column of images. Labels are its column of type ClassLabel (the one named "label", if
    there are several), or an integer column "label".
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"hf:{name} needs the datasets library: pip install datasets") from error
    source = f"hf:{name}"
    try:
        data: Any = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"{source}: split {split!r} cannot be loaded: {error}") from error
    columns = [key for key, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(f"{source}: expected one column of images, got {columns} of {list(data.features)}")
    encoded = data.cast_column(columns[0], datasets.Image(decode=False))
    files = Files([f"{source}[{i}]" for i in range(len(data))], HubReader(encoded, columns[0], source))
    column = _label_column(data, datasets.ClassLabel)
    return Found(files, None if column is None else class_labels(list(data[column]), len(data), source))


def _label_column(data: Any, class_label: type) -> str | None:
    classes = [key for key, kind in data.features.items() if isinstance(kind, class_label)]
    if "int" in str(getattr(data.features.get("label"), "dtype", "")):
        return "label"
    if len(classes) > 1:
        log.warning("no labels: expected one column of classes, got %s", classes)
    return classes[0] if len(classes) == 1 else None
