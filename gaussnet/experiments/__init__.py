"""The paper's experiments as functions and as a command, `gaussnet reproduce`; see `running`.

Each is a module with the functions of `Experiment`. Reference: Wang and Vastola, arXiv 2412.09726.
"""

from gaussnet.experiments import (
    far_field,
    feature_emergence,
    guidance,
    latent,
    learning_dynamics,
    modes_ranks,
    sample_similarity,
    score_deviation,
    score_field,
    teleport_quality,
    trajectory_deviation,
)
from gaussnet.experiments.running import Experiment, Reading, defaults, run
from gaussnet.experiments.setting import Setting

EXPERIMENTS: dict[str, Experiment] = {
    "score-deviation": score_deviation,
    "trajectory-deviation": trajectory_deviation,
    "sample-similarity": sample_similarity,
    "modes-ranks": modes_ranks,
    "learning-dynamics": learning_dynamics,
    "score-field": score_field,
    "feature-emergence": feature_emergence,
    "far-field": far_field,
    "teleport": teleport_quality,
    "guidance": guidance,
    "latent": latent,
}

__all__ = ["EXPERIMENTS", "Experiment", "Reading", "Setting", "defaults", "run"]
