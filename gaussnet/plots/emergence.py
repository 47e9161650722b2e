"""The figure of features, their critical levels, rotations and perturbations in sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gaussnet.plots.style import pyplot

Rows = Sequence[Mapping[str, Any]]


def feature_emergence(rows: Rows, trajectories: int = 12) -> Any:
    """Draws what features do over sigma (Fig. 3 C, E), when they emerge, and how states turn (Fig. 5 B).

    Lines are the closed form of the Gaussian, dots the model; bars and bands are quartiles over trajectories.

    Args:
        rows: of the experiment, each with its kind: "closed form", "course", "critical", "geometry", "state"
            or "gain".
        trajectories: shown in the plane of x_T and x_0, at most.

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if there are no rows of a kind.
    """
    kinds = ("closed form", "course", "critical", "geometry", "state", "gain")
    kept = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    for kind in kinds:
        if not kept[kind]:
            raise ValueError(f"expected rows of the kind {kind!r}, got none")
    plt = pyplot()
    eigenvalues = {row["feature"]: row["eigenvalue"] for row in kept["closed form"]}
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(eigenvalues)))
    colours = dict(zip(sorted(eigenvalues), shades, strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.8), layout="constrained")
    _denoised(axes[0, 0], kept["closed form"], kept["course"], colours)
    _critical(axes[0, 1], kept["critical"], plt)
    rotation(axes[1, 0], kept["state"], kept["geometry"], trajectories)
    _gains(axes[1, 1], kept["closed form"], kept["gain"], colours)
    handles = [plt.Line2D([], [], color=colour, marker="o", ms=3) for colour in colours.values()]
    labels = [f"{rank} ({eigenvalues[rank]:.2g})" for rank in colours]
    figure.legend(
        handles,
        labels,
        title=r"eigenvector ($\lambda$); lines: closed form, dots: model",
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    return figure


def rotation(axis: Any, states: Rows, paths: Rows, trajectories: int = 12) -> None:
    """Draws the error of the rotation formula over sigma, and in an inset the trajectories in their plane.

    Args:
        axis: to draw on.
        states: rows with seed, sigma, rotation_error, rotation_bound, gaussian_error, along and across.
        paths: rows with pc2 and pc3.
        trajectories: shown in the inset, at most.
    """
    above = [row for row in states if row["sigma"] > 0]
    sigmas, low, middle, high = quartiles_over(above, "rotation_error")
    axis.fill_between(sigmas, low, high, color="tab:blue", alpha=0.25, lw=0)
    axis.plot(sigmas, middle, color="tab:blue", lw=1.4, label="model")
    for name, label, style in (
        ("gaussian_error", "Gaussian", {"color": "tab:orange", "lw": 1.4}),
        ("rotation_bound", "bound of the Gaussian", {"color": "0.3", "lw": 1, "ls": "--"}),
    ):
        sigmas, _, middle, _ = quartiles_over(above, name)
        axis.plot(sigmas, middle, label=label, **style)
    top = max(float(line.get_ydata().max()) for line in axis.get_lines())
    axis.set(xscale="log", xlabel=r"$\sigma$", ylabel=r"$\|R_t\|\,/\,\|x_t\|$", ylim=(0, 1.75 * top))
    shares = [np.mean([row[f"pc{count}"] for row in paths]) for count in (2, 3)]
    axis.set_title(
        f"Rotation formula; variance in 2 and 3 components: {shares[0]:.2%}, {shares[1]:.2%}", fontsize=10
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.grid(alpha=0.25)
    inset = axis.inset_axes((0.66, 0.53, 0.33, 0.45))
    for seed in sorted({row["seed"] for row in states})[:trajectories]:
        path = sorted((row for row in states if row["seed"] == seed), key=lambda row: -row["sigma"])
        scale = path[0]["along"]
        points = np.array([[row["along"] / scale, row["across"] / scale] for row in path])
        inset.plot(*points.T, color="tab:blue", lw=0.7, alpha=0.6)
        inset.plot(*points[-1], "o", color="black", ms=2)
    inset.plot([1], [0], "o", color="black", ms=2)
    inset.set(xticks=[0, 1], yticks=[0, 1], aspect="equal")
    inset.tick_params(labelsize=7, pad=1)
    inset.set_xlabel(r"along $x_T$", fontsize=7, labelpad=-5)
    inset.set_ylabel("across", fontsize=7, labelpad=-3)


def quartiles_over(
    rows: Rows, name: str, place: str = "sigma"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The quartiles of a column at each value of another one.

    Returns:
        The values of `place`, in order, and the quartiles: four arrays.
    """
    groups: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: row[place]):
        groups.setdefault(row[place], []).append(row[name])
    low, middle, high = np.array([np.percentile(values, [25, 50, 75]) for values in groups.values()]).T
    return np.array(list(groups)), low, middle, high


def _denoised(axis: Any, exact: Rows, measured: Rows, colours: Mapping[int, Any]) -> None:
    for feature, colour in colours.items():
        line = sorted(
            (row["sigma"], row["xi"] / row["eigenvalue"] ** 0.5) for row in exact if row["feature"] == feature
        )
        axis.plot(*zip(*line, strict=True), color=colour, lw=1.2)
        own = [row for row in measured if row["feature"] == feature]
        sigmas = sorted({row["sigma"] for row in own})
        for sigma in sigmas[:: max(1, len(sigmas) // 24)]:
            here = [row for row in own if row["sigma"] == sigma]
            weights = [row["weight"] for row in here]  # least squares over all trajectories
            xi = np.average([row["xi"] for row in here], weights=weights)
            axis.plot(sigma, xi / here[0]["eigenvalue"] ** 0.5, "o", color=colour, ms=3)
    axis.set(xscale="log", xlabel=r"$\sigma$", ylabel=r"$\xi\,/\sqrt{\lambda}$")
    axis.set_title("Features of the denoised image", fontsize=10)
    axis.grid(alpha=0.25)


def _critical(axis: Any, rows: Rows, plt: Any) -> None:
    shares = sorted({row["share"] for row in rows})
    for share, colour in zip(shares, plt.get_cmap("plasma")(np.linspace(0, 0.8, len(shares))), strict=True):
        own = [row for row in rows if row["share"] == share]
        features = sorted({row["feature"] for row in own})
        groups = [[row for row in own if row["feature"] == feature] for feature in features]
        x = np.array([group[0]["eigenvalue"] ** 0.5 for group in groups])
        low, middle, high = np.array(
            [np.percentile([row["level"] for row in group], [25, 50, 75]) for group in groups]
        ).T
        axis.plot(x, [group[0]["predicted"] for group in groups], color=colour, lw=1.2)
        bars = np.stack([middle - low, high - middle])
        axis.errorbar(x, middle, bars, fmt="o", color=colour, ms=4, capsize=2, label=f"{share:.2g}")
    axis.set(xscale="log", yscale="log", xlabel=r"$\sqrt{\lambda}$", ylabel=r"$\sigma$")
    axis.set_title("Level at which a share of the feature is there", fontsize=10)
    axis.legend(title="share", frameon=False, fontsize=8, title_fontsize=8, loc="lower right")
    axis.grid(alpha=0.25)


def _gains(axis: Any, exact: Rows, measured: Rows, colours: Mapping[int, Any]) -> None:
    lowest = min(row["sigma"] for row in measured) / 2
    for feature, colour in colours.items():
        line = sorted(
            (row["sigma"], row["gain"])
            for row in exact
            if row["feature"] == feature and row["sigma"] >= lowest
        )
        axis.plot(*zip(*line, strict=True), color=colour, lw=1.2)
        own = [row for row in measured if row["feature"] == feature]
        sigmas, low, middle, high = quartiles_over(own, "gain")
        bars = np.stack([middle - low, high - middle])
        axis.errorbar(sigmas, middle, bars, fmt="o", color=colour, ms=3, lw=0.8, capsize=1.5)
    axis.set(xscale="log", xlabel=r"$\sigma$ of the perturbation", ylabel="gain in the sample")
    axis.set_title("Perturbations along eigenvectors", fontsize=10)
    axis.grid(alpha=0.25)
