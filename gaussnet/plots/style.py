"""What all figures share: matplotlib without a display, and a colour for each reference."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

DPI = 130
LEFT = 0.5  # where step 0 is drawn on a logarithmic axis
QUERIES = {"noised": "queries: noised data", "noise": r"queries: N(0, $\sigma^2$)"}  # titles by kind

_FIXED = {"isotropic": "0.6", "gaussian": "tab:orange", "marginal": "tab:red", "delta": "black"}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        ImportError: if matplotlib is not installed, with how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'gaussnet[train]'") from error
    plt.switch_backend("agg")
    return plt


def save(figure: Any, *paths: str | Path) -> None:
    """Saves a figure in the formats that the names of the files tell, and closes it."""
    for path in paths:
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot().close(figure)


def colours(references: Iterable[str]) -> dict[str, Any]:
    """Reference -> colour, from coarse to memorising; mixtures are darker the more components they have."""
    names = set(references)
    graded = sorted(
        (name for name in names if name not in _FIXED),
        key=lambda name: (int((re.findall(r"\d+", name) or [0])[0]), name),  # of mixture-KrR, K
    )
    shades = pyplot().get_cmap("Blues")(np.linspace(1.0, 0.35, len(graded)))[::-1]
    *coarse, finest = _FIXED
    ordered = [*coarse, *graded, finest]
    colour = _FIXED | dict(zip(graded, shades, strict=True))
    return {name: colour[name] for name in ordered if name in names}
