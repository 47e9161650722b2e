"""Figures of trajectories from the same noise: how analytic ones leave a model's, and what guidance does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from gaussnet.plots.style import colours, pyplot

_TITLES = {"state": r"state $x_\sigma$", "denoised": r"denoised $D(x_\sigma, \sigma)$"}
_DASHES = ("-", "--", ":", "-.")


def trajectory_deviation(rows: Sequence[Mapping[str, Any]], bound: float | None = None) -> Any:
    """Draws the deviation from a model's trajectory over steps: Fig. 7 for the state, 15 for the denoised.

    Args:
        rows: of `deviation_rows`, each with its reference.
        bound: for a horizontal line.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there is no row.
    """
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    if not quantities:
        raise ValueError("expected rows of deviations, got none")
    figure, axes = pyplot().subplots(
        1,
        len(quantities),
        figsize=(5.2 * len(quantities), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, quantity in zip(axes[0], quantities, strict=True):
        for reference, colour in colours(row["reference"] for row in rows).items():
            line = [row for row in rows if row["reference"] == reference and row["quantity"] == quantity]
            _band(axis, line, "step", colour, reference)
        _over_steps(axis, [row for row in rows if row["quantity"] == quantity], bound)
        axis.set_title(_TITLES.get(quantity, quantity))
    axes[0, 0].set_ylabel("mean squared deviation per pixel")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def guidance(rows: Sequence[Mapping[str, Any]], bound: float | None = None) -> Any:
    """Draws the deviation of samples over the guidance weight, and that of states over steps (Fig. 17 E, F).

    Args:
        rows: of `deviation_rows`, each with its weight, class, reference and analytic ("conditional" or
            "guided").
        bound: for a horizontal line in the panels of states.

    Returns:
        The figure, not saved: a panel of samples, mean over classes and range of the classes, and a panel of
        states for each reference, against the first kind of analytic trajectory, a line a weight.

    Raises:
        ValueError: if there is no row of states.
    """
    states = [row for row in rows if row["quantity"] == "state"]
    if not states:
        raise ValueError("expected rows of states, got none")
    plt = pyplot()
    names = colours(row["reference"] for row in states)
    kinds = list(dict.fromkeys(row["analytic"] for row in states))
    weights = sorted({row["weight"] for row in states})
    last = max(row["step"] for row in states)
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(4.4 * (1 + len(names)), 4.2), squeeze=False, layout="constrained"
    )
    samples, *panels = axes[0]
    for reference, colour in names.items():
        for kind, dash in zip(kinds, _DASHES, strict=False):
            wanted = {"reference": reference, "analytic": kind, "step": last}
            means = [_means(states, weight=weight, **wanted) for weight in weights]
            label = f"{reference}, {kind}"
            samples.plot(
                weights, [fmean(m) for m in means], "o", ls=dash, ms=3, lw=1.4, color=colour, label=label
            )
            if kind == kinds[0]:
                ends = [min(m) for m in means], [max(m) for m in means]
                samples.fill_between(weights, *ends, color=colour, alpha=0.12, lw=0)
    samples.set(xlabel="guidance weight", ylabel="mean squared deviation per pixel", title="samples")
    samples.set_ylim(bottom=0)
    samples.grid(alpha=0.25)
    samples.legend(frameon=False, fontsize=8)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(weights)))
    for axis, reference in zip(panels, names, strict=True):
        for weight, shade in zip(weights, shades, strict=True):
            wanted = {"reference": reference, "analytic": kinds[0], "weight": weight}
            means = [fmean(_means(states, step=step, **wanted)) for step in range(last + 1)]
            axis.plot(range(last + 1), _positive(means), lw=1.4, color=shade, label=f"{weight:g}")
        _over_steps(axis, states, bound)
        axis.set_title(f"state, against {reference}, {kinds[0]}")
    panels[-1].legend(frameon=False, fontsize=8, title="guidance", loc="lower right")
    return figure


def _band(axis: Any, rows: Sequence[Mapping[str, Any]], over: str, colour: Any, label: str) -> None:
    """A line of means, and the quartiles as a band."""
    places = [row[over] for row in rows]
    low, mean, high = (_positive([row[name] for row in rows]) for name in ("q25", "mean", "q75"))
    axis.plot(places, mean, lw=1.6, color=colour, label=label)
    axis.fill_between(places, low, high, color=colour, alpha=0.18, lw=0)


def _positive(values: Any) -> np.ndarray:
    """Nothing in place of 0, which a logarithmic axis cannot show: all trajectories start together."""
    array = np.asarray(values, dtype=float)
    return np.where(array > 0, array, np.nan)


def _means(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[float]:
    return [row["mean"] for row in rows if wanted.items() <= row.items()]


def _over_steps(axis: Any, rows: Sequence[Mapping[str, Any]], bound: float | None) -> None:
    """A logarithmic axis over steps, with their levels at the top."""
    levels = dict(sorted((row["step"], row["sigma"]) for row in rows))
    if bound is not None:
        axis.axhline(bound, color="0.5", lw=0.8, ls="--")
    drawn = [row["mean"] for row in rows if row["mean"] > 0]
    axis.set(yscale="log" if drawn else "linear", xlabel="step", xlim=(0, max(levels)))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    marked = list(levels)[:: max(1, len(levels) // 6)]
    top = axis.secondary_xaxis("top")
    top.set_xticks(marked, [f"{levels[step]:.2g}" for step in marked], fontsize=8)
    top.set_xlabel(r"$\sigma$", labelpad=2)
