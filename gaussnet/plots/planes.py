"""Figures of score fields on planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from gaussnet.plots.style import pyplot

ARROWS = 14  # a side of a panel, at most


def field_panels(rows: Sequence[Mapping[str, Any]], anchors: Sequence[tuple[float, float]]) -> Any:
    """Draws score fields: a row of panels a denoiser, a column a noise level (Fig. 11, 13).

    Colours are the length of the score in the plane, on one scale a column, by its square root: the delta
    score is far longer than others at low noise. Arrows are as long as the colours are bright. Dots mark the
    three images.

    Args:
        rows: of `score_field`, with denoiser and sigma, on a full grid each.
        anchors: coordinates (u, v) of the images.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    from matplotlib.colors import PowerNorm

    plt = pyplot()
    names = list(dict.fromkeys(row["denoiser"] for row in rows))
    sigmas = sorted({row["sigma"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(
        len(names),
        len(sigmas),
        figsize=(2.7 * len(sigmas) + 0.6, 2.6 * len(names) + 0.7),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for column, sigma in zip(axes.T, sigmas, strict=True):
        own = [row for row in rows if row["sigma"] == sigma]
        longest = max(row["norm_in_plane"] for row in own) or 1.0
        mesh = None
        for axis, name in zip(column, names, strict=True):
            u, v, score_u, score_v, length = _grid(row for row in own if row["denoiser"] == name)
            norm = PowerNorm(0.5, vmin=0, vmax=longest)
            mesh = axis.pcolormesh(u, v, length, norm=norm, cmap="viridis", rasterized=True)
            step = -(-len(u) // ARROWS)
            some = (slice(step // 2, None, step),) * 2
            cell = step * (u[0, 1] - u[0, 0])
            # The direction times the square root of the length; no length has no direction.
            factor = cell / np.sqrt(np.maximum(length, np.finfo(float).tiny) * longest)
            arrows = (score[some] * factor[some] for score in (score_u, score_v))
            axis.quiver(
                u[some], v[some], *arrows, color="white", angles="xy", scale_units="xy", scale=1, width=0.006
            )
            axis.plot(*zip(*anchors, strict=True), "o", color="tab:red", mec="white", ms=5)
            axis.set_aspect("equal")
            axis.set(xlim=(u.min(), u.max()), ylim=(v.min(), v.max()))
        column[0].set_title(f"$\\sigma$ = {sigma:g}")
        column[-1].set_xlabel("u")
        figure.colorbar(
            mesh,
            ax=list(column),
            location="bottom",
            shrink=0.8,
            fraction=0.1 / len(names),
            pad=0.03 / len(names),
            aspect=16,
            label="score in the plane",
        )
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(f"{'/'.join(PurePath(name).parts[-2:])}\nv")
    return figure


def _grid(rows: Any) -> list[np.ndarray]:
    """U, v, score_u, score_v and norm_in_plane as arrays (size, size), v along the first axis."""
    ordered = sorted(rows, key=lambda row: (row["v"], row["u"]))
    size = len({row["v"] for row in ordered})
    names = ("u", "v", "score_u", "score_v", "norm_in_plane")
    return [np.array([row[name] for row in ordered]).reshape(size, -1) for name in names]
