"""Sampling: noise levels, solvers as plain functions, and the closed-form jump past their first steps."""

from gaussnet.samplers.schedules import karras_sigmas
from gaussnet.samplers.solvers import count_nfe, euler, heun
from gaussnet.samplers.teleport import teleport

__all__ = ["count_nfe", "euler", "heun", "karras_sigmas", "teleport"]
