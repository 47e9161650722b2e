"""The paper's experiments as functions and as a command, `gaussnet reproduce`; see `running`.

Each is a module with the functions of `Experiment`. Reference: Wang and Vastola, arXiv 2412.09726.
"""

from gaussnet.experiments import score_deviation
from gaussnet.experiments.running import Experiment, Reading, defaults, run
from gaussnet.experiments.setting import Setting

EXPERIMENTS: dict[str, Experiment] = {
    "score-deviation": score_deviation,
}

__all__ = ["EXPERIMENTS", "Experiment", "Reading", "Setting", "defaults", "run"]
