"""Figures of what analytic scores explain of a model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gaussnet.plots.style import QUERIES, colours, pyplot


def score_deviation(
    rows: Sequence[Mapping[str, Any]], marks: Sequence[float] = (), quantity: str = "score"
) -> Any:
    """Draws the unexplained variance over sigma, a line a reference, a panel a kind of queries (Fig. 6).

    Args:
        rows: of `ScoreProbe.rows`.
        marks: levels for vertical lines: square roots of the covariance's first eigenvalues.
        quantity: "score" or "denoiser".

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if no row has the quantity.
    """
    chosen = [row for row in rows if row["quantity"] == quantity]
    if not chosen:
        raise ValueError(f"expected rows of quantity {quantity!r}, got none")
    plt = pyplot()
    kinds = list(dict.fromkeys(row["queries"] for row in chosen))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.2 * len(kinds), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for reference, colour in colours(row["reference"] for row in chosen).items():
            line = sorted(
                (row["sigma"], row["mean"])
                for row in chosen
                if row["reference"] == reference and row["queries"] == kind and row["mean"] > 0
            )
            if line:
                axis.plot(*zip(*line, strict=True), "o-", ms=3, lw=1.4, color=colour, label=reference)
        for mark in marks:
            axis.axvline(mark, color="tab:red", lw=0.6, ls="--", alpha=0.5)
        axis.set(xscale="log", yscale="log", xlabel=r"$\sigma$", title=QUERIES.get(kind, kind))
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel(f"unexplained variance of the {quantity}")
    axes[0, -1].legend(frameon=False, fontsize=9)
    return figure
