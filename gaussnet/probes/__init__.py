"""Comparing denoisers: their scores, their trajectories and their samples, on the same noise."""

from gaussnet.probes.scores import (
    KINDS,
    PAPER_SIGMAS,
    QUANTITIES,
    ScoreProbe,
    log_spaced,
    minima,
    unexplained_variance,
)

__all__ = [
    "KINDS",
    "PAPER_SIGMAS",
    "QUANTITIES",
    "ScoreProbe",
    "log_spaced",
    "minima",
    "unexplained_variance",
]
