"""Figures of a run as inline SVG: text stays text, no file or font is referred to, nothing can run.

Each is a pure function of the values that it draws and is kept, as drawing takes seconds and a page is
written anew whenever one table of a run has grown.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gaussnet import plots
from gaussnet.plots.style import LEFT, pyplot

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gaussnet",  # the same values give the same file
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}

Values = tuple[tuple[Any, ...], ...]


def values(rows: Iterable[Mapping[str, Any]], *names: str) -> Values:
    """The columns of rows that a figure draws, hashable."""
    return tuple(tuple(row[name] for name in names) for row in rows)


@lru_cache(maxsize=4)
def training(rows: Values) -> str:
    """Loss, throughput and the share of time that waits for data; rows of (step, loss, images/s, waiting)."""
    plt = pyplot()

    def draw(path: Path) -> None:
        figure, axes = plt.subplots(
            3, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
        )
        labels = ("training loss", "images/s", "waiting")
        for i, (axis, label) in enumerate(zip(axes, labels, strict=True), start=1):
            # A loss that is not finite leaves a gap.
            points = [(row[0], float("nan") if row[i] is None else row[i]) for row in rows]
            _curve(axis, points, color="tab:blue" if i == 1 else "0.4")
            axis.set(xscale="log", ylabel=label)
            axis.grid(alpha=0.25, which="major")
        _log_heights(axes[0])
        for i, axis in enumerate(axes[1:], start=2):
            axis.set_ylim(0, 1.1 * max((row[i] or 0.0 for row in rows), default=0.0) or 1.0)
        axes[2].yaxis.set_major_formatter("{x:.1%}")
        axes[2].set_xlabel("training step")
        figure.savefig(path)
        plt.close(figure)

    return _svg("training", "Training loss, throughput and waiting over steps", draw)


@lru_cache(maxsize=4)
def heldout(rows: Values) -> str:
    """Held-out errors over steps, a line a level; rows of (step, weights, sigma, error, relative)."""
    plt = pyplot()
    titles = {"raw": "trained weights", "ema": "averaged weights"}
    weights = list(dict.fromkeys(row[1] for row in rows))
    sigmas = sorted({row[2] for row in rows})

    def draw(path: Path) -> None:
        figure, axes = plt.subplots(
            2,
            len(weights),
            figsize=(3.8 * len(weights) + 1.2, 6),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        colours = plt.get_cmap("viridis")([i / max(len(sigmas), 2) for i in range(len(sigmas))])
        for line, label in enumerate(("error per pixel", "relative to the Gaussian's")):
            for column, name in enumerate(weights):
                axis = axes[line, column]
                for sigma, colour in zip(sigmas, colours, strict=True):
                    points = [(row[0], row[3 + line]) for row in rows if row[1:3] == (name, sigma)]
                    _curve(axis, points, color=colour, label=f"{sigma:g}")
                axis.set_xscale("log")
                _log_heights(axis)
                axis.grid(alpha=0.25, which="major")
            axes[line, 0].set_ylabel(label)
        for column, name in enumerate(weights):
            axes[0, column].set_title(titles.get(name, _plain(name)))
            axes[1, column].axhline(1, color="0.5", lw=0.8, ls=":")
            axes[1, column].set_xlabel("training step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="$\\sigma$")
        figure.savefig(path)
        plt.close(figure)

    return _svg("heldout", "Held-out denoising error over steps", draw)


@lru_cache(maxsize=8)
def dynamics(rows: Values, quantity: str, kind: str) -> str:
    """`plots.learning_dynamics` of the averaged weights; rows of (step, sigma, reference, mean) of them."""
    fixed = {"weights": "ema", "queries": kind, "quantity": quantity}
    table = [
        {"step": step, "sigma": sigma, "reference": _plain(reference), "mean": mean, **fixed}
        for step, sigma, reference, mean in rows
    ]
    return _svg(
        f"{quantity}-{kind}",
        f"Unexplained variance of the {quantity} over steps, {kind}",
        lambda path: plots.learning_dynamics(table, path, quantity=quantity, kind=kind),
    )


@lru_cache(maxsize=4)
def distances(rows: Values) -> str:
    """Numbers over steps, a panel a name; rows of (step, name, value)."""
    plt = pyplot()
    names = list(dict.fromkeys(row[1] for row in rows))

    def draw(path: Path) -> None:
        figure, axes = plt.subplots(
            len(names),
            1,
            figsize=(7, 2.4 * len(names) + 0.4),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, name in zip(axes[:, 0], names, strict=True):
            _curve(axis, [(step, value) for step, own, value in rows if own == name], color="tab:blue")
            axis.set(xscale="log", ylabel=_plain(name))
            axis.grid(alpha=0.25, which="major")
        axes[-1, 0].set_xlabel("training step")
        figure.savefig(path)
        plt.close(figure)

    return _svg("frechet", "Distances over steps", draw)


def _curve(axis: Any, points: list[tuple[float, float]], **options: Any) -> None:
    steps = [max(step, LEFT) for step, _ in sorted(points, key=lambda point: point[0])]
    heights = [height for _, height in sorted(points, key=lambda point: point[0])]
    axis.plot(steps, heights, lw=1.3, marker="." if len(points) < 30 else None, ms=4, **options)


def _log_heights(axis: Any) -> None:
    """Logarithmic, if anything is drawn that has a place there."""
    if any(height > 0 for line in axis.get_lines() for height in line.get_ydata()):
        axis.set_yscale("log")


def _plain(text: str) -> str:
    return text.replace("$", "\\$")  # no mathematics


def _svg(name: str, title: str, draw: Callable[[Path], None]) -> str:
    """What `draw` writes to a file, as an element of a page: ids begin with `name`, nothing is external."""
    import matplotlib

    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that a font lacks, of panels without a positive value
        path = Path(folder) / "figure.svg"
        draw(path)
        root = ElementTree.parse(path).getroot()
    for element in list(root.iter()):
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):  # namespaces' addresses; style of the whole page
                element.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _own(key, value, name) for key, value in attributes.items()})
    width = root.attrib.pop("width").removesuffix("pt")
    root.attrib.pop("height")
    root.attrib |= {
        "role": "img",
        "aria-label": title,
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
        "style": f"max-width: {float(width) * 4 / 3:.0f}px; min-width: {min(float(width), 560):.0f}px",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    """An attribute, its id or references made this figure's own: a page holds several figures."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-")
