"""Figures of what teleport saves and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gaussnet.plots.style import pyplot


def teleport_quality(
    rows: Sequence[Mapping[str, Any]], tolerance: float = 0.03, chosen: Mapping[str, int] | None = None
) -> Any:
    """Draws distances over the number of skipped steps, a row of panels a solver (Fig. 14 C, 29).

    Left the Frechet distance to the data with its interval, right the RMS per pixel to the samples without a
    skip. Below each skip stand the level where the run begins, and the NFE.

    Args:
        rows: solver, skip, sigma_skip, NFE, frechet, low, high, rms; of each solver skip 0, too.
        tolerance: share of the distance without a skip by which the upper line lies above the lower.
        chosen: solver -> skip to mark.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("expected rows of skips, got none")
    plt = pyplot()
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    figure, axes = plt.subplots(
        len(solvers), 2, figsize=(11, 3.6 * len(solvers)), squeeze=False, layout="constrained"
    )
    for (left, right), solver in zip(axes, solvers, strict=True):
        mine = sorted((row for row in rows if row["solver"] == solver), key=lambda row: row["skip"])
        places, values = range(len(mine)), [row["frechet"] for row in mine]
        below = [max(0.0, row["frechet"] - row["low"]) for row in mine]
        above = [max(0.0, row["high"] - row["frechet"]) for row in mine]
        left.errorbar(
            places, values, yerr=[below, above], fmt="o-", ms=4, lw=1.4, capsize=2, color="tab:blue"
        )
        left.axhline(values[0], color="0.4", lw=0.8, ls="--", label="no skip")
        left.axhline((1 + tolerance) * values[0], color="tab:red", lw=0.8, ls=":", label=f"+ {tolerance:.0%}")
        at = [i for i in places if mine[i]["skip"] == (chosen or {}).get(solver)]
        left.plot(at, [values[i] for i in at], "o", ms=11, mfc="none", mec="tab:red")
        if min(values) > 0 and max(values) > 5 * min(values):
            left.set_yscale("log")
        left.set_ylabel(f"{solver}: Frechet distance")
        left.legend(frameon=False, fontsize=8, loc="upper left")
        moved = [i for i in places if mine[i]["rms"] > 0]
        right.plot(moved, [mine[i]["rms"] for i in moved], "o-", ms=4, lw=1.4, color="tab:blue")
        right.set_ylabel("RMS to no skip, per pixel")
        if moved:
            right.set_yscale("log")
        for axis in (left, right):
            told = [f"{row['skip']}\n{row['sigma_skip']:.3g}\n{row['NFE']:g}" for row in mine]
            axis.set_xticks(places, told, fontsize=8)
            axis.set_xlim(-0.5, len(mine) - 0.5)
            axis.set_xlabel("skipped steps / level / NFE")
            axis.grid(alpha=0.25)
    return figure
