"""Figures of what mixtures of different sizes and ranks leave unexplained of a model's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gaussnet.plots.style import pyplot
from gaussnet.probes.modes import FULL, equal_error, minimal_ranks


def mode_panels(rows: Sequence[Mapping[str, Any]], contour_sigma: float) -> Any:
    """Draws Fig. 9 and 10 of arXiv 2412.09726.

    Above: the unexplained variance over the number of modes, a panel a noise level, a line a rank. Below:
    what modes change at full rank, the minimal rank of each level, and the contours of equal error at one
    level, in red what the fewest modes reach at full rank.

    Args:
        rows: modes, rank, axes, sigma, mean; full rank among them.
        contour_sigma: the level of the contours, one of the rows'.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there is no row, or none of full rank.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    plt = pyplot()
    sigmas = sorted({row["sigma"] for row in rows})
    ranks = sorted({row["rank"] for row in rows}, key=lambda rank: (rank == FULL, rank))
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.15, max(len(ranks) - 1, 1)))
    colours = {**dict(zip(ranks, shades, strict=False)), FULL: "black"}
    lines = -(-len(sigmas) // 4)
    figure = plt.figure(figsize=(13, 2.6 * lines + 4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.6 * lines, 4))
    for place, sigma in enumerate(sigmas):
        axis = above.add_subplot(lines, min(4, len(sigmas)), place + 1)
        for rank in ranks:
            own = [row for row in rows if row["sigma"] == sigma and row["rank"] == rank and row["mean"] > 0]
            points = sorted((row["modes"], row["mean"]) for row in own)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.3, color=colours[rank])
        axis.set(xscale="log", yscale="log", title=f"$\\sigma$ = {sigma:g}")
        _plain_ticks(axis)
        if place % 4 == 0:
            axis.set_ylabel("unexplained variance")
        if place >= len(sigmas) - 4:
            axis.set_xlabel("modes")
        axis.grid(alpha=0.25)
    handles = [plt.Line2D([], [], color=colours[rank], marker="o", ms=3, lw=1.3) for rank in ranks]
    above.legend(handles, ranks, title="rank", loc="outside right center", frameon=False)
    gain, least, contours = below.subplots(1, 3)
    _draw_gain(gain, rows, sigmas)
    _draw_minimal_ranks(least, rows)
    _draw_contours(contours, [row for row in rows if row["sigma"] == contour_sigma], contour_sigma, ranks)
    return figure


def _draw_gain(axis: Any, rows: Sequence[Mapping[str, Any]], sigmas: Sequence[float]) -> None:
    """What more modes explain beyond the fewest, at full rank (Fig. 10A)."""
    share = {(row["sigma"], row["modes"]): row["mean"] for row in rows if row["rank"] == FULL}
    few, *more = sorted({modes for _, modes in share})
    for modes, colour in zip(more, _shades(len(more)), strict=True):
        gains = [share[sigma, few] - share[sigma, modes] for sigma in sigmas]
        axis.plot(sigmas, gains, "o-", ms=3, lw=1.3, color=colour, label=str(modes))
    axis.axhline(0, color="0.5", lw=0.8)
    axis.set(
        xscale="log", xlabel=r"$\sigma$", ylabel="gain in explained variance", title=f"Modes beyond {few}"
    )
    # Gains span decades, and either sign.
    axis.set_yscale("symlog", linthresh=1e-6)
    axis.grid(alpha=0.25)
    if more:
        axis.legend(title="modes", frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_minimal_ranks(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The smallest rank that does about as well as full rank (Fig. 10B)."""
    found = minimal_ranks(rows)
    counts = sorted({row["modes"] for row in found})
    for modes, colour in zip(counts, ["tab:orange", *_shades(len(counts) - 1)], strict=True):
        points = sorted((row["sigma"], row["axes"]) for row in found if row["modes"] == modes)
        axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.3, color=colour, label=str(modes))
    axis.set(xscale="log", yscale="log", xlabel=r"$\sigma$", ylabel="axes", title="Minimal rank")
    _plain_ticks(axis)
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.25)
    axis.legend(title="modes", frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_contours(
    axis: Any, rows: Sequence[Mapping[str, Any]], sigma: float, ranks: Sequence[int | str]
) -> None:
    """The unexplained variance over modes and axes, and lines of equal error (Fig. 10C)."""
    counts = sorted({row["modes"] for row in rows})
    share = {(row["modes"], row["rank"]): row["mean"] for row in rows}
    levels = np.array([[share[modes, rank] for modes in counts] for rank in ranks])
    with np.errstate(divide="ignore"):
        mesh = axis.pcolormesh(
            np.arange(len(counts) + 1) - 0.5, np.arange(len(ranks) + 1) - 0.5, np.log10(levels), cmap="Blues"
        )
    axis.figure.colorbar(mesh, ax=axis, label="log10 of the unexplained variance")
    axis.set_xticks(range(len(counts)), counts)
    axis.set_yticks(range(len(ranks)), ranks)
    axis.set(xlabel="modes", ylabel="rank", title=f"Equal error, $\\sigma$ = {sigma:g}")
    low, high = levels.min(), levels.max()
    if min(levels.shape) < 2 or not 0 < low < high:  # there are no lines of equal error
        return
    axis.contour(np.log10(levels), levels=np.linspace(np.log10(low), np.log10(high), 8)[1:-1], colors="0.4",
                 linewidths=0.8, linestyles="-")  # fmt: skip
    level = share[counts[0], FULL]
    if len(equal_error(rows, sigma, level)) > 1:
        axis.contour(np.log10(levels), levels=[np.log10(level)], colors="tab:red", linestyles="--")


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are: of less than a decade, powers of ten tell little."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if side is axis.xaxis else (1, 1.5, 2, 3, 4, 6, 8)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(NullFormatter())


def _shades(count: int) -> list[Any]:
    return list(pyplot().get_cmap("Blues")(np.linspace(0.35, 1.0, count)))
