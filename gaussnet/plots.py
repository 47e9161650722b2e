"""Figures from the probes' tables and from samples. Needs matplotlib (`pip install gaussnet[train]`).

Each function draws one figure, saves it and closes it. Nothing here computes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def learning_dynamics(
    rows: Iterable[Mapping[str, Any]], path: str | Path, quantity: str = "score", weights: str = "ema"
) -> None:
    """Draws how a network's score approaches and leaves the analytic ones while it learns.

    One panel a noise level, one line a reference: the mean unexplained variance over training steps, as in
    Fig. 12 of arXiv 2412.09726. Step 0, the untrained network, is drawn at the left edge.

    Args:
        rows: of a run's probes.csv: step, weights, sigma, reference, quantity, mean.
        path: of the picture.
        quantity: "score" or "denoiser".
        weights: "ema" or "raw".

    Raises:
        ValueError: if no row has this quantity and these weights.
    """
    plt = _pyplot()
    chosen = [row for row in rows if row["quantity"] == quantity and row["weights"] == weights]
    if not chosen:
        raise ValueError(f"expected rows of quantity={quantity!r} and weights={weights!r}, got none")
    sigmas = sorted({float(row["sigma"]) for row in chosen})
    references = list(dict.fromkeys(str(row["reference"]) for row in chosen))
    columns = min(4, len(sigmas))
    lines = -(-len(sigmas) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.5 * lines), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, sigma in zip(axes.flat, sigmas, strict=False):
        for reference in references:
            points = sorted(
                (int(row["step"]), float(row["mean"]))
                for row in chosen
                if float(row["sigma"]) == sigma and row["reference"] == reference
            )
            steps, means = np.array(points).T
            # An untrained bypass model is its base: 0 has no place on a logarithmic axis.
            axis.plot(np.maximum(steps, 0.5), np.where(means > 0, means, np.nan), label=reference, lw=1.4)
        axis.set(xscale="log", yscale="log", title=f"$\\sigma$ = {sigma:g}")
        axis.grid(alpha=0.25, which="major")
    for axis in axes.flat[len(sigmas) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes[:, 0]:
        axis.set_ylabel("unexplained variance")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"What analytic denoisers leave unexplained of the network's {quantity}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def image_rows(rows: Mapping[str, Tensor], path: str | Path, columns: int = 12) -> None:
    """Draws rows of images under each other, each with its name.

    Args:
        rows: name -> images (N, C, H, W) in [-1, 1], C = 1 or 3.
        path: of the picture.
        columns: images a row, at most.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("expected at least one row of images, got none")
    plt = _pyplot()
    columns = min(columns, *(len(images) for images in rows.values()))
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(0.75 * columns + 1.6, 0.82 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis, (name, images) in zip(axes.flat, rows.items(), strict=True):
        strip = torch.cat([torch.nn.functional.pad(image, (0, 1)) for image in images[:columns]], dim=-1)
        strip = strip[..., :-1].detach().float().cpu().clamp(-1, 1) / 2 + 0.5
        picture = strip.permute(1, 2, 0).numpy()
        axis.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'gaussnet[train]'") from error
    plt.switch_backend("agg")
    return plt
