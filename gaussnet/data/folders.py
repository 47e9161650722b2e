"""Zips and folders of images: EDM's data sets, and folders with a subfolder for each class.

An EDM data set (arXiv 2206.00364) is a zip, or the folder that it was made from, of images in subfolders with
a dataset.json at its root: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}. Images are
sorted by name. Nothing is ever extracted from a zip. Hidden files and __MACOSX folders are passed over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
from itertools import pairwise
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from gaussnet.data.files import MAX_BYTES, SUFFIXES, Files, ImageError
from gaussnet.data.images import Found

log: logging.Logger = logging.getLogger(__name__)

_BZ2_ERROR = "Invalid data stream"  # an OSError without a number

METADATA = "dataset.json"
METADATA_BYTES, IMAGE_BYTES = 1 << 20, 1 << 10  # of it at most, and more for each image: parsed, it is larger


class FolderReader:
    """The bytes of files under a folder."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root = root
        self.files = files

    def __call__(self, index: int) -> bytes:
        path = self.root / self.files[index]
        if not path.is_file():
            raise ImageError(f"{path}: no such file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ImageError(f"{path}: refused: {size} bytes are more than {MAX_BYTES}")
        return path.read_bytes()


class ZipReader:
    """The bytes of members of a zip; each process opens it for itself, since a handle has one position."""

    def __init__(self, path: Path, members: list[str]) -> None:
        self.path = path
        self.members = members
        self._zip: tuple[int, ZipFile] | None = None  # with the process that opened it

    def __call__(self, index: int) -> bytes:
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), ZipFile(self.path))
        return read_member(self._zip[1], self.members[index])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None}


def read_member(archive: ZipFile, member: str) -> bytes:
    """The bytes of a member of a zip.

    Raises:
        ImageError: if it is corrupt, or absurdly large.
    """
    if (size := archive.getinfo(member).file_size) > MAX_BYTES:
        raise ImageError(f"{archive.filename}/{member}: refused: {size} bytes are more than {MAX_BYTES}")
    try:
        return archive.read(member)
    except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError
        if isinstance(error, OSError) and error.errno != errno.EINVAL and str(error) != _BZ2_ERROR:
            raise  # of the disk, not of the member or its offset
        raise ImageError(f"{archive.filename}/{member}: cannot be read: {error}") from error


def open_zip(path: Path) -> Found:
    """An EDM data set in a zip; without dataset.json, its images have no labels."""
    try:
        with ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            images = sorted(filter(_is_image, members))
            metadata = read_member(archive, METADATA) if METADATA in members else None
    except (BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path}: expected a zip file: {error}") from error
    if not images:
        raise ValueError(f"{path}: expected images ({', '.join(SUFFIXES)}) in the zip, got none")
    if len(set(images)) < len(images):
        twice = next(a for a, b in pairwise(images) if a == b)
        raise ValueError(f"{path}: expected members of different names, got {twice} twice")
    deeper = [member for member in members if member.endswith(f"/{METADATA}")]
    if metadata is None and deeper:
        raise ValueError(f"{path}: expected {METADATA} at the root of the zip, got {deeper[0]}")
    files = Files([f"{path}/{image}" for image in images], ZipReader(path, images))
    return Found(files, None if metadata is None else edm_labels(metadata, images, f"{path}/{METADATA}"))


def open_folder(path: Path) -> Found:
    """An EDM data set in a folder, if there is a dataset.json; else a folder of images.

    Its images have labels if all lie in subfolders: the number of the first-level subfolder in sorted order,
    as torchvision's ImageFolder has it.
    """
    images = sorted(filter(_is_image, _walk(path)))
    if not images:
        raise ValueError(f"{path}: expected images ({', '.join(SUFFIXES)}) in the folder, got none")
    files = Files([str(path / image) for image in images], FolderReader(path, images))
    if (path / METADATA).is_file():
        metadata = FolderReader(path, [METADATA])(0)
        return Found(files, edm_labels(metadata, images, str(path / METADATA)))
    tops = [PurePosixPath(image).parts[0] for image in images]
    if any("/" not in image for image in images):
        return Found(files)
    classes = {top: label for label, top in enumerate(sorted(set(tops)))}
    log.info("%s: classes %s", path, classes)
    return Found(files, torch.tensor([classes[top] for top in tops]))


def _walk(root: Path) -> list[str]:
    """Relative names of all files below a folder, with forward slashes; follows links, but not in circles."""
    found: list[str] = []
    for base, folders, files in os.walk(root, followlinks=True):
        here = Path(base).resolve()
        folders[:] = [folder for folder in folders if not here.is_relative_to((here / folder).resolve())]
        found += [(Path(base) / file).relative_to(root).as_posix() for file in files]
    return found


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


def edm_labels(metadata: bytes, images: list[str], where: str) -> Tensor | None:
    """The labels of `images` from the text of a dataset.json.

    Raises:
        ValueError: unless there is exactly one integer >= 0 for each image, or none for any.
    """
    if len(metadata) > (limit := METADATA_BYTES + IMAGE_BYTES * len(images)):
        raise ValueError(f"{where}: refused: {len(metadata)} bytes are more than {limit}")
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON: {error}") from error
    entries = content.get("labels") if isinstance(content, dict) else 0
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f'{where}: expected {{"labels": [[name, label], ...] or null}}')
    labels: dict[str, int] = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{where}: expected labels of the form [name, label], got {entry!r:.100}")
        name, label = entry
        if type(label) is not int or not 0 <= label < 2**31:
            raise ValueError(f"{where}: expected an integer label >= 0 for {name}, got {label!r:.100}")
        if name in labels:
            raise ValueError(f"{where}: expected one label for {name}, got several")
        labels[name] = label
    for these, those, what in ((images, labels, "has no label"), (labels, set(images), "is no image")):
        missing = [name for name in these if name not in those]
        if missing:
            raise ValueError(
                f"{where}: expected a label for each of {len(images)} images, got {len(labels)}: "
                f"{missing[0]} {what}"
            )
    return torch.tensor([labels[image] for image in images])
