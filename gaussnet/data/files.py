"""Encoded images (png, jpeg, webp, bmp), decoded by Pillow to uint8 (C, H, W), and one rule for their modes.

Without a `mode`, an image is taken as it is decoded: grey (1 channel) or RGB (palette and CMYK become RGB).
Alpha is left out where it is opaque throughout; an image with transparent pixels is an error, and so is one
with another number of channels than most. With `mode` "L" or "RGB" all images are converted, transparent
pixels laid over white; "RGBA" keeps alpha as the fourth channel. More than 8 bits a channel are an error in
any case. EXIF orientation is not applied.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from math import prod
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from gaussnet.data.images import Picked, Store, spread

log: logging.Logger = logging.getLogger(__name__)

Mode = Literal["L", "RGB", "RGBA"]
OnError = Literal["raise", "skip"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 1 << 28  # of one encoded image; no real one comes near

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the others of Pillow's decoders are not needed, so not exposed
_GROUP = 32  # images that a thread decodes at a time


class ImageError(ValueError):
    """An image that cannot be used: corrupt, or of another shape than expected. The message names it."""


@dataclass(frozen=True)
class Files:
    """A store of encoded images.

    Attributes:
        names: of each image, for messages.
        read: the encoded bytes of image i. It travels to worker processes, so it pickles.
        mode: see the head of this module.
        resolution: side of the square to which each image is cut and resized; None leaves it as it is.
        shape: (C, H, W) expected of each image, once it is known.
    """

    names: list[str]
    read: Callable[[int], bytes]
    mode: Mode | None = None
    resolution: int | None = None
    shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor) -> Tensor:
        if len(index) == 0:
            return torch.empty(0, *(self.shape or ()), dtype=torch.uint8)
        return torch.from_numpy(np.stack([self.decode(i) for i in index.tolist()]))

    def decode(self, index: int) -> np.ndarray:
        """Image `index`, uint8 (C, H, W).

        Raises:
            ImageError: if it cannot be decoded or has another shape than the others.
        """
        name = self.names[index]
        known = self.shape if self.resolution is None else None
        pixels = decode(self.read(index), name, self.mode, self.resolution, known)
        if self.shape is not None and pixels.shape != self.shape:
            hint = '; mode="L" or "RGB" converts all' if pixels.shape[1:] == self.shape[1:] else ""
            raise ImageError(
                f"{name}: expected {_by(self.shape)} (channels x height x width), as most images, "
                f"got {_by(pixels.shape)}{hint}"
            )
        return pixels

    def attempt(self, index: int) -> np.ndarray | ImageError:
        """As `decode`, with the error returned."""
        try:
            return self.decode(index)
        except ImageError as error:
            return error


def decode(
    encoded: bytes,
    name: str,
    mode: Mode | None = None,
    resolution: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Decodes an image to uint8 (C, H, W).

    Args:
        encoded: the bytes of a png, jpeg, webp or bmp file.
        name: of the image, for messages.
        mode: see the head of this module.
        resolution: cut the central square and resize it (Lanczos, antialiased) to this side.
        shape: (C, H, W); an image whose header tells other sides is not decoded.

    Raises:
        ImageError: if that is impossible, or the image is larger than Pillow's limit for decompression bombs.
    """
    try:
        with Image.open(BytesIO(encoded), formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns up to twice the limit
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS = {limit}"
                )
            if shape is not None and image.size != (shape[2], shape[1]):
                raise ImageError(
                    f"{name}: expected {_by(shape)} (channels x height x width), as most images, "
                    f"got {len(image.getbands())} x {image.height} x {image.width}"
                )
            image = _convert(image, name, mode)
            if resolution is not None:
                image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
            pixels = np.array(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: cannot be decoded: not a png, jpeg, webp or bmp image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: refused, since it may be a decompression bomb: {error}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise ImageError(f"{name}: cannot be decoded: {error}") from error
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


def _convert(image: Image.Image, name: str, mode: Mode | None) -> Image.Image:
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
        raise ImageError(f"{name}: expected grey or colour of 8 bits a channel, got Pillow mode {image.mode}")
    if mode == "RGBA":
        return image.convert("RGBA")
    natural = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if mode is None and rgba.getchannel("A").getextrema() != (255, 255):
            raise ImageError(
                f'{name}: has transparent pixels; mode="RGB" or "L" lays them on white, "RGBA" keeps them'
            )
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return image.convert(mode or natural)


def load(files: Files, on_error: OnError, cache: int, name: str) -> tuple[Store, Tensor]:
    """Fixes the shape of the images, and decodes all if they fit into `cache` bytes or bad ones are skipped.

    The shape is the most common one of up to 32 images, spread evenly over the data.

    Returns:
        The store, and the indices of the images that it holds.

    Raises:
        ImageError: if an image that is decoded here cannot be used, or, with `on_error="skip"`, if none of
            those looked at can.
    """
    sample = [_shape(files.attempt(i)) for i in spread(len(files)).tolist()]  # not 32 images at a time
    shapes = Counter(shape for shape in sample if not isinstance(shape, ImageError))
    errors = [error for error in sample if isinstance(error, ImageError)]
    if not shapes:
        raise ImageError(f"{name}: none of the {len(sample)} images looked at can be used; {errors[0]}")
    shape = shapes.most_common(1)[0][0]
    files = replace(files, shape=shape)
    fits = len(files) * prod(shape) <= cache
    if not fits and on_error == "raise":
        return files, torch.arange(len(files))

    images = torch.empty(len(files) if fits else 0, *shape, dtype=torch.uint8)
    kept: list[int] = []
    decode_one = files.decode if on_error == "raise" else files.attempt
    groups = [range(i, min(i + _GROUP, len(files))) for i in range(0, len(files), _GROUP)]
    bar = tqdm(total=len(files), desc=f"decoding {name}", unit=" images", delay=2, leave=False, disable=None)
    # Pillow decodes without the interpreter's lock.
    with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for group, decoded in zip(
            groups, pool.map(lambda g: [decode_one(i) for i in g], groups), strict=True
        ):
            for i, image in zip(group, decoded, strict=True):
                if isinstance(image, ImageError):
                    log.warning("skipping %s", image)
                    continue
                if fits:
                    images[len(kept)] = torch.from_numpy(image)
                kept.append(i)
            bar.update(len(group))
    index = torch.tensor(kept)
    return (images[: len(kept)] if fits else Picked(files, index)), index


def _shape(image: np.ndarray | ImageError) -> tuple[int, ...] | ImageError:
    return image if isinstance(image, ImageError) else image.shape


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
