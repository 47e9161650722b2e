"""Figures from the probes' tables and from samples. Needs matplotlib (`pip install gaussnet[train]`).

Each function draws one figure. Nothing here computes a result.
"""

from gaussnet.plots.runs import image_rows, learning_dynamics, loss_curve
from gaussnet.plots.scores import score_deviation

__all__ = ["image_rows", "learning_dynamics", "loss_curve", "score_deviation"]
