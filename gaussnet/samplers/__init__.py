"""Sampling: noise levels, solvers as plain functions, and the closed-form jump past their first steps."""

from gaussnet.samplers.adams import deis, ipndm, pndm
from gaussnet.samplers.choosing import Skip, TeleportCost, find_sigma_skip, teleport_cost
from gaussnet.samplers.dpm_v3 import dpm_v3
from gaussnet.samplers.exponential import dpmpp_2m, dpmpp_3m, unipc
from gaussnet.samplers.flows import flow_of, runge_kutta
from gaussnet.samplers.inpainting import inpainting_start
from gaussnet.samplers.model_statistics import ModelStatistics, compute_ems
from gaussnet.samplers.optimised import optimised_sigmas
from gaussnet.samplers.reference import dop853
from gaussnet.samplers.schedules import (
    karras_sigmas,
    log_snr_sigmas,
    model_sigmas,
    rounded_sigmas,
    vp_sigmas,
)
from gaussnet.samplers.solvers import ddim, dpmpp_2s, edm_stochastic, euler, heun
from gaussnet.samplers.stepping import Callback, History, Solver, count_nfe
from gaussnet.samplers.teleport import afs, teleport, warm_start

SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "ddim": ddim,
    "heun": heun,
    "edm_stochastic": edm_stochastic,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "pndm": pndm,
    "ipndm": ipndm,
    "deis": deis,
    "dpm_v3": dpm_v3,  # needs statistics=compute_ems(...)
    "dop853": dop853,
}
"""The solvers by name, for configurations and command lines. A new one is one more line."""

__all__ = [
    "SOLVERS",
    "Callback",
    "History",
    "ModelStatistics",
    "Skip",
    "Solver",
    "TeleportCost",
    "afs",
    "compute_ems",
    "count_nfe",
    "ddim",
    "deis",
    "dop853",
    "dpm_v3",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "edm_stochastic",
    "euler",
    "find_sigma_skip",
    "flow_of",
    "heun",
    "inpainting_start",
    "ipndm",
    "karras_sigmas",
    "log_snr_sigmas",
    "model_sigmas",
    "optimised_sigmas",
    "pndm",
    "rounded_sigmas",
    "runge_kutta",
    "teleport",
    "teleport_cost",
    "unipc",
    "vp_sigmas",
    "warm_start",
]
