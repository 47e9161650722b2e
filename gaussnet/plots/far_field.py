"""Figures of the far field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gaussnet.plots.style import QUERIES, pyplot

_LOOKS = {"order-1": "tab:green", "order-2": "tab:blue", "gaussian": "tab:orange"}


def far_field_panels(rows: Sequence[Mapping[str, Any]], far: float) -> Any:
    """Draws relative errors of far-field expansions over sigma / sqrt(tr Sigma), a panel a kind of queries.

    A dotted line marks sqrt(lam_max), below which the expansions diverge; the far field is shaded.

    Args:
        rows: approximation, queries, ratio, error, top (sqrt(lam_max) in units of sqrt(tr Sigma)).
        far: the ratio from which on it is the far field.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    plt = pyplot()
    kinds = list(dict.fromkeys(row["queries"] for row in rows))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.2 * len(kinds), 4), sharey=True, squeeze=False, layout="constrained"
    )
    ends = [extreme(row["ratio"] for row in rows) for extreme in (min, max)]
    for axis, kind in zip(axes[0], kinds, strict=True):
        for name, colour in _LOOKS.items():
            line = sorted(
                (row["ratio"], row["error"])
                for row in rows
                if row["approximation"] == name and row["queries"] == kind and row["error"] > 0
            )
            if line:
                axis.plot(*zip(*line, strict=True), "o-", ms=3, lw=1.4, color=colour, label=name)
        axis.axvline(rows[0]["top"], color="0.4", lw=0.9, ls=":", label=r"$\sqrt{\lambda_{max}}$")
        if far < ends[1]:
            axis.axvspan(far, ends[1], color="0.9", zorder=0, label="far field")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=r"$\sigma\,/\,\sqrt{\mathrm{tr}\,\Sigma}$",
            title=QUERIES.get(kind, kind),
        )
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("relative error of the score")
    axes[0, 0].legend(frameon=False, fontsize=9, loc="lower left")
    return figure
