"""From one string to an `ImageData`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from gaussnet.data.arrays import Layout, as_store, idx_file, is_idx, open_idx, open_npy, open_npz
from gaussnet.data.files import Files, Mode, OnError, load
from gaussnet.data.folders import METADATA, open_folder, open_zip
from gaussnet.data.images import Found, ImageData, Scaling
from gaussnet.data.named import TORCHVISION, open_digits, open_hub, open_torchvision

log: logging.Logger = logging.getLogger(__name__)

_SUFFIXES: dict[str, Callable[[Path], Found]] = {".zip": open_zip, ".npy": open_npy, ".npz": open_npz}


def open_images(
    source: str | Path,
    *,
    scaling: Scaling | None = None,
    layout: Layout | None = None,
    mode: Mode | None = None,
    resolution: int | None = None,
    split: str | None = None,
    root: str | Path = "data",
    on_error: OnError = "raise",
    cache: int = 2 << 30,
) -> ImageData:
    """Opens a data set of images of one shape.

    | source | what is opened |
    |---|---|
    | `NAME.zip`, a folder with dataset.json | an EDM data set |
    | a folder | its images (png, jpg, jpeg, webp, bmp), with classes if all lie in subfolders |
    | `NAME.npy` | (N, H, W), (N, H, W, C) or (N, C, H, W), memory-mapped |
    | `NAME.npz` | the same as images, x or arr_0; labels or y |
    | `...-images-idx3-ubyte[.gz]`, or a folder of them | MNIST's files |
    | `torchvision:MNIST`, `:CIFAR10`, `:CelebA`, ... | downloaded into `root` |
    | `hf:NAME` | a data set of the Hugging Face hub; needs `pip install datasets` |
    | `digits` | scikit-learn's 8x8 digits (a folder of that name: `./digits`) |

    Args:
        source: as above.
        scaling: the stored values (low, high) that become -1 and 1, or "none"; see `ImageData`.
        layout: of arrays; needed unless exactly one of their axes can be that of 1 to 4 channels.
        mode: "L", "RGB" or "RGBA" converts image files; by default they have to agree, without transparency
            (see `gaussnet.data.files`).
        resolution: cut the central square of image files and resize it (antialiased) to this side.
        split: of MNIST's folders, torchvision and the hub; "train" by default.
        root: folder for downloads.
        on_error: "skip" leaves out image files that are an error by themselves (corrupt, of another shape
            than most, transparent), and images in arrays with values not finite or out of range. Each is
            logged, they are counted in `skipped`, and labels stay aligned. It reads all the data once.
        cache: bytes up to which image files are decoded at once and kept in memory, as uint8. Beyond, they
            are decoded each time they are read, and a bad one is an error only then; so it is in arrays.

    Returns:
        The images, with labels where the source has them.

    Raises:
        FileNotFoundError: if there is no such file, folder or name, or it cannot be downloaded.
        ImportError: if torchvision or datasets is needed and missing.
        ValueError: if the data are not as described; `ImageError`, which is one, names an image file.

    Example:
        >>> open_images("digits")
        ImageData(digits: 1797 of 1 x 8 x 8, uint8 / 8 - 1, 10 classes)
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"expected on_error to be one of {get_args(OnError)}, got {on_error!r}")
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"expected mode to be one of {get_args(Mode)}, got {mode!r}")
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"expected layout to be one of {get_args(Layout)}, got {layout!r}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"expected resolution >= 1, got {resolution}")
    found = _find(source, split, Path(root))
    name = str(source) if split is None else f"{source} ({split})"
    scaling = scaling or found.scaling
    labels = found.labels
    if isinstance(found.images, Files):
        _expect_none(name, "an array", layout=layout)
        files = replace(found.images, mode=mode, resolution=resolution)
        images, kept = load(files, on_error, cache, name)
        labels = None if labels is None else labels[kept]
        skipped = len(files) - len(kept)
        return _counted(ImageData(images, labels, name=name, scaling=scaling, skipped=skipped))
    _expect_none(name, "a set of image files", mode=mode, resolution=resolution)
    images, scaling = as_store(found.images, layout, scaling, name)
    data = ImageData(images, labels, name=name, scaling=scaling)
    return data if on_error == "raise" else _counted(_drop_unusable(data))


def _find(source: str | Path, split: str | None, root: Path) -> Found:
    if isinstance(source, str):  # a Path is never a name
        kind, _, rest = source.partition(":")
        if kind == "torchvision":
            return open_torchvision(rest, root, split or "train")
        if kind == "hf":
            return open_hub(rest, split or "train")
        if source == "digits":
            _expect_none(source, "a source with splits", split=split)
            return open_digits()
    path = Path(source).expanduser()
    if not path.exists():
        names = ", ".join([*(f"torchvision:{name}" for name in TORCHVISION), "hf:NAME", "digits"])
        raise FileNotFoundError(f"no file or folder {source}, and not one of {names}")
    if path.is_dir() and not (path / METADATA).is_file() and (file := idx_file(path, split)):
        return open_idx(file)
    _expect_none(str(source), "a source with splits", split=split)
    if path.is_dir():
        return open_folder(path)
    if is_idx(path):
        return open_idx(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{source}: expected a folder, {', '.join(_SUFFIXES)} or ...-images-idx3-ubyte[.gz]")
    return _SUFFIXES[path.suffix.lower()](path)


def _expect_none(source: str, what: str, **options: Any) -> None:
    """An option that would have no effect is an error."""
    for key, value in options.items():
        if value is not None:
            raise ValueError(f"{source}: expected no {key}, since this is not {what}, got {value!r}")


def _drop_unusable(data: ImageData) -> ImageData:
    usable = data.usable()
    for index in (~usable).nonzero()[:, 0].tolist():
        log.warning("skipping %s", data.complaint(index))
    if not bool(usable.any()):
        raise ValueError(f"{data.name}: none of its {len(data)} images can be used; {data.complaint(0)}")
    if bool(usable.all()):
        return data
    kept = data.subset(usable.nonzero()[:, 0])
    kept.skipped = len(data) - len(kept)
    return kept


def _counted(data: ImageData) -> ImageData:
    if data.skipped:
        log.warning("%s: skipped %d images of %d", data.name, data.skipped, len(data) + data.skipped)
    return data
