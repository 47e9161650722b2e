"""Figures from the probes' tables and from samples. Needs matplotlib (`pip install gaussnet[train]`).

Each function draws one figure. Nothing here computes a result.
"""

from gaussnet.plots.emergence import feature_emergence
from gaussnet.plots.far_field import far_field_panels
from gaussnet.plots.latent import latent
from gaussnet.plots.modes import mode_panels
from gaussnet.plots.planes import field_panels
from gaussnet.plots.runs import dynamics_panels, image_rows, learning_dynamics, loss_curve
from gaussnet.plots.scores import score_deviation
from gaussnet.plots.similarity import sample_similarity
from gaussnet.plots.teleport import teleport_quality
from gaussnet.plots.trajectories import guidance, trajectory_deviation

__all__ = [
    "dynamics_panels",
    "far_field_panels",
    "feature_emergence",
    "field_panels",
    "guidance",
    "image_rows",
    "latent",
    "learning_dynamics",
    "loss_curve",
    "mode_panels",
    "sample_similarity",
    "score_deviation",
    "teleport_quality",
    "trajectory_deviation",
]
