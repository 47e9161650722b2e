"""Figures of a training run: its probes, its loss, its samples. Each is saved, and closed, but for panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussnet.plots.style import DPI, LEFT, pyplot, save
from gaussnet.plots.style import colours as colours_of
from gaussnet.probes import minima


def learning_dynamics(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    quantity: str = "score",
    weights: str = "ema",
    kind: str = "noised",
) -> None:
    """Saves the figure of `dynamics_panels`; arguments and errors as there.

    Args:
        rows: of a run's probes.csv.
        path: of the picture.
        quantity: "score" or "denoiser".
        weights: "ema" or "raw".
        kind: the queries: "noised" (data) or "noise".
    """
    figure = dynamics_panels(rows, quantity, weights, kind)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


def dynamics_panels(
    rows: Iterable[Mapping[str, Any]],
    quantity: str = "score",
    weights: str = "ema",
    kind: str = "noised",
) -> Any:
    """Draws how a network's score approaches and leaves the analytic ones while it learns.

    One panel a noise level, one line a reference: the mean unexplained variance over training steps, as in
    Fig. 12 of arXiv 2412.09726, with a dot where it is smallest. Step 0, the untrained network, is drawn at
    the left edge.

    Args:
        rows: of a run's probes.csv: step, weights, sigma, queries, reference, quantity, mean.
        quantity: "score" or "denoiser".
        weights: "ema" or "raw".
        kind: the queries: "noised" (data) or "noise".

    Returns:
        The figure, not saved.

    Raises:
        ValueError: if no row has this quantity, these weights and this kind of queries.
    """
    plt = pyplot()
    wanted = {"quantity": quantity, "weights": weights, "queries": kind}
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not chosen:
        given = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise ValueError(f"expected rows of {given}, got none")
    sigmas = sorted({float(row["sigma"]) for row in chosen})
    colours = colours_of(str(row["reference"]) for row in chosen)
    numbers = [row for row in chosen if not math.isnan(float(row["mean"]))]  # the others are gaps
    closest = {(row["sigma"], row["reference"]): row for row in minima(numbers)}
    columns = min(4, len(sigmas))
    lines = -(-len(sigmas) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.5 * lines), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, sigma in zip(axes.flat, sigmas, strict=False):
        scale = "linear"  # of a panel without any positive value
        for reference, colour in colours.items():
            points = sorted(
                (int(row["step"]), float(row["mean"]))
                for row in chosen
                if float(row["sigma"]) == sigma and row["reference"] == reference
            )
            if not points:
                continue
            steps, means = np.array(points).T
            # An untrained bypass model is its base: 0 has no place on a logarithmic axis.
            drawn = np.isfinite(means) & (means > 0)
            scale = "log" if drawn.any() else scale
            axis.plot(
                np.maximum(steps, LEFT),
                np.where(drawn, means, np.nan),
                label=reference,
                color=colour,
                lw=1.4,
            )
            least = closest.get((sigma, reference))
            if least is not None and least["minimum"] > 0:
                axis.plot(max(least["step"], LEFT), least["minimum"], "o", color=colour, ms=4)
        axis.set(xscale="log", yscale=scale, title=f"$\\sigma$ = {sigma:g}")
        axis.grid(alpha=0.25, which="major")
    for axis in axes.flat[len(sigmas) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes[:, 0]:
        axis.set_ylabel("unexplained variance")
    handles = [plt.Line2D([], [], color=colour, lw=1.4) for colour in colours.values()]
    per_row = min(len(colours), 9 * columns // 4)  # as many as fit
    figure.legend(
        handles,
        list(colours),
        loc="outside lower center",
        ncols=per_row,
        frameon=False,
    )
    queries = {"noised": "noised data", "noise": "noise"}.get(kind, kind)
    figure.suptitle(f"What analytic denoisers leave unexplained of the network's {quantity}, at {queries}")
    return figure


def loss_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the training loss, on logarithmic axes, and the throughput under it.

    Args:
        rows: of a run's metrics: step, loss (None where it was not finite: a gap), images_per_second.
        path: of the picture.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("expected at least one row of metrics, got none")
    plt = pyplot()
    steps, losses, speeds = (
        [math.nan if row[name] is None else float(row[name]) for row in rows]
        for name in ("step", "loss", "images_per_second")
    )
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    above.plot(steps, losses, lw=1.2)
    above.set(xscale="log", yscale="log", ylabel="training loss")
    fastest = 1.1 * max((speed for speed in speeds if not math.isnan(speed)), default=1.0)
    below.plot(steps, speeds, lw=1.2, color="0.4")
    below.set(xlabel="training step", ylabel="images per second", ylim=(0, fastest))
    for axis in (above, below):
        axis.grid(alpha=0.25, which="major")
    figure.savefig(path, dpi=DPI)
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
    columns = min([columns, *(len(images) for images in rows.values())])
    if not rows or columns == 0:
        raise ValueError("expected at least one row of images, and in each an image, got none")
    plt = pyplot()
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
    save(figure, path)
