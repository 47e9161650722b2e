"""The figure of a latent pipeline's trajectories, and of teleport in its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gaussnet.plots.emergence import quartiles_over, rotation
from gaussnet.plots.style import pyplot


def latent(rows: Sequence[Mapping[str, Any]], trajectories: int = 12) -> Any:
    """Draws how latents turn, how they leave the Gaussian's trajectory, and what teleport changes.

    Bands and bars are quartiles over trajectories.

    Args:
        rows: of the experiment, each with its kind: "geometry", "state" or "teleport".
        trajectories: shown in the plane of x_T and x_0, at most.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there are no rows of a kind.
    """
    kept = {kind: [row for row in rows if row["kind"] == kind] for kind in ("geometry", "state", "teleport")}
    for kind, own in kept.items():
        if not own:
            raise ValueError(f"expected rows of the kind {kind!r}, got none")
    figure, axes = pyplot().subplots(1, 3, figsize=(16, 4.3), layout="constrained")
    rotation(axes[0], kept["state"], kept["geometry"], trajectories)
    above = [row for row in kept["state"] if row["sigma"] > 0]
    sigmas, low, middle, high = quartiles_over(above, "deviation")
    axes[1].fill_between(sigmas, low, high, color="tab:blue", alpha=0.25, lw=0)
    axes[1].plot(sigmas, middle, color="tab:blue", lw=1.4)
    axes[1].set(xscale="log", xlabel=r"$\sigma$", ylabel="RMS per dimension")
    axes[1].set_title("Deviation from the latent Gaussian's trajectory", fontsize=10)
    skips, low, middle, high = quartiles_over(kept["teleport"], "rms", "skip")
    axes[2].errorbar(
        skips,
        middle,
        np.stack([middle - low, high - middle]),
        fmt="o-",
        color="tab:blue",
        ms=4,
        lw=1.2,
        capsize=2,
    )
    axes[2].set(xlabel="steps skipped", ylabel="RMS per dimension", ylim=(0, None))
    axes[2].set_title("Teleported against plain samples", fontsize=10)
    for axis in axes[1:]:
        axis.grid(alpha=0.25)
    return figure
