"""The figure of how similar samples are: distances, and the images themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gaussnet.plots.style import colours, pyplot


def sample_similarity(
    rows: Sequence[Mapping[str, Any]], images: Mapping[str, Sequence[np.ndarray]] | None = None
) -> Any:
    """Draws the distances of references' samples from a model's, and examples under them (Fig. 8, 18).

    Args:
        rows: metric, reference and distance, a row a sample.
        images: name -> pictures (H, W) or (H, W, 3), uint8, a strip each; as many for each name.

    Returns:
        The figure, not saved: a panel a metric, a violin a reference with its quartiles; then the strips.

    Raises:
        ValueError: if there is no row.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    if not metrics:
        raise ValueError("expected rows of distances, got none")
    images = images or {}
    shades = colours(row["reference"] for row in rows)
    columns = max(map(len, images.values()), default=0)
    width = max(3.2 * len(metrics), 0.8 * columns + 1.2, 5.2)
    heights = [3.2, *([0.8 * len(images)] if images else [])]
    figure = pyplot().figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, metric in zip(parts[0].subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        values = [
            [row["distance"] for row in rows if row["metric"] == metric and row["reference"] == name]
            for name in shades
        ]
        _violins(axis, values, list(shades.values()))
        axis.set_xticks(range(len(shades)), list(shades), rotation=20 if len(shades) > 3 else 0)
        axis.set(title=metric, ylim=(0, None))
        axis.grid(alpha=0.25, axis="y")
        if metric == metrics[0]:
            axis.set_ylabel("distance from the model's sample")
    if images:
        axes = parts[1].subplots(len(images), 1, squeeze=False)[:, 0]
        for axis, (name, pictures) in zip(axes, images.items(), strict=True):
            axis.imshow(_strip(pictures), cmap="gray", vmin=0, vmax=255)
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            axis.set(xticks=[], yticks=[])
    return figure


def _violins(axis: Any, values: Sequence[Sequence[float]], shades: Sequence[Any]) -> None:
    for place, (sample, shade) in enumerate(zip(values, shades, strict=True)):
        if np.ptp(sample) > 0:  # equal distances have no density
            for body in axis.violinplot([sample], [place], widths=0.8, showextrema=False)["bodies"]:
                body.set(facecolor=shade, alpha=0.3)
        low, middle, high = np.quantile(sample, [0.25, 0.5, 0.75])
        axis.vlines(place, low, high, color=shade, lw=4)
        axis.plot(place, middle, "o", ms=5, color="white", markeredgecolor=shade)


def _strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side, with a white line a pixel wide between them."""
    frame = [(0, 0), (0, 1)]
    padded = [np.pad(p, frame + [(0, 0)] * (p.ndim - 2), constant_values=255) for p in pictures]
    return np.concatenate(padded, 1)[:, :-1]
