"""Comparing denoisers: their scores, their trajectories and their samples, on the same noise."""

from gaussnet.probes.emergence import emergence_level, feature_course, perturbation_gains, select_features
from gaussnet.probes.geometry import principal_shares, rotation_bounds, rotation_error
from gaussnet.probes.modes import equal_error, minimal_ranks, modes_and_ranks, truncated
from gaussnet.probes.pairs import paired_difference
from gaussnet.probes.planes import Plane, score_field
from gaussnet.probes.quality import SkippedRun, distances, features_of, skipped_run
from gaussnet.probes.scores import (
    KINDS,
    PAPER_SIGMAS,
    QUANTITIES,
    ScoreProbe,
    log_spaced,
    minima,
    unexplained_variance,
)
from gaussnet.probes.trajectories import (
    Trajectory,
    check_trajectory,
    deviations,
    divergence,
    exact_sample,
    exact_trajectory,
    solver_trajectory,
)

__all__ = [
    "KINDS",
    "PAPER_SIGMAS",
    "QUANTITIES",
    "Plane",
    "ScoreProbe",
    "SkippedRun",
    "Trajectory",
    "check_trajectory",
    "deviations",
    "distances",
    "divergence",
    "emergence_level",
    "equal_error",
    "exact_sample",
    "exact_trajectory",
    "feature_course",
    "features_of",
    "log_spaced",
    "minima",
    "minimal_ranks",
    "modes_and_ranks",
    "paired_difference",
    "perturbation_gains",
    "principal_shares",
    "rotation_bounds",
    "rotation_error",
    "score_field",
    "select_features",
    "skipped_run",
    "solver_trajectory",
    "truncated",
    "unexplained_variance",
]
