"""Images of benchmarks/bypass_ablation.py that are made here: emoji at 32x32, patches of two photographs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = 40  # neighbours in the zip, among which the variants of one emoji lie
TILE, PATCH, STRIDE = 128, 32, 8


def emoji32(archive: Path, folder: Path) -> tuple[str, str]:
    """All images of a zip of 64x64 PNGs, averaged over 2x2 pixels, and blocks of neighbours as groups.

    Returns:
        The paths of (N, 32, 32, 3) bytes and of N integers.
    """
    images, groups = folder / "emoji32.npy", folder / "emoji32_groups.npy"
    if not groups.is_file():
        with zipfile.ZipFile(archive) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".png"))
            pixels = [np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names]
        stacked = np.stack(pixels).astype(np.float64)
        halved = stacked.reshape(len(stacked), 32, 2, 32, 2, 3).mean((2, 4))
        np.save(images, np.rint(halved).astype(np.uint8))
        np.save(groups, np.arange(len(halved)) // BLOCK)
    return str(images), str(groups)


def patches(folder: Path) -> tuple[str, str]:
    """Patches of scikit-learn's two photographs: 169 overlapping ones from each tile of 128x128 pixels.

    Returns:
        The paths of (5070, 32, 32, 3) bytes and of the tiles' numbers.
    """
    images, groups = folder / "patches.npy", folder / "patches_groups.npy"
    if not groups.is_file():
        from sklearn.datasets import load_sample_images

        cut: list[np.ndarray] = []
        tiles: list[int] = []
        for photograph in load_sample_images().images:
            height, width = photograph.shape[:2]
            for top in range(0, height - TILE + 1, TILE):
                for left in range(0, width - TILE + 1, TILE):
                    number = tiles[-1] + 1 if tiles else 0
                    for y in range(top, top + TILE - PATCH + 1, STRIDE):
                        for x in range(left, left + TILE - PATCH + 1, STRIDE):
                            cut.append(photograph[y : y + PATCH, x : x + PATCH])
                            tiles.append(number)
        np.save(images, np.stack(cut))
        np.save(groups, np.array(tiles))
    return str(images), str(groups)
