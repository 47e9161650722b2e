"""Analytic denoisers as modules, a diffusion network that learns only what they leave, and teleport.

    gaussian = GaussianDenoiser.fit(train)                    # closed form, all state in buffers
    model = BypassPrecond.fit(SongUNet(...), train, heldout)  # train it: it learns the nonlinear residual
    x, sigmas = teleport(gaussian, x, karras_sigmas(18), skip=5)
    images = heun(model, x, sigmas)                           # 13 steps in place of 18

Reference: Wang and Vastola, arXiv 2412.09726.
"""

from gaussnet.covariance import CosineCovariance, Covariance
from gaussnet.cross_fit import CrossFit
from gaussnet.data import ImageData, open_images
from gaussnet.denoisers import (
    ComponentMarginals,
    DeltaDenoiser,
    Denoiser,
    FarFieldDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    MarginalDenoiser,
    Marginals,
    PatchDenoiser,
    PCALocalDenoiser,
    PosteriorCovariance,
)
from gaussnet.edm import EDMPrecond
from gaussnet.edm_import import import_edm
from gaussnet.edm_pickle import read_edm_pickle
from gaussnet.edm_preconds import VEPrecond, VPPrecond, iDDPMPrecond
from gaussnet.flow import GaussianFlow
from gaussnet.gate import Gate, find_sigma_gate
from gaussnet.hub import from_pretrained
from gaussnet.measured import MeasuredError
from gaussnet.networks import MLP, DhariwalUNet, DiT, SongUNet
from gaussnet.precond import BypassPrecond
from gaussnet.probes import ScoreProbe, unexplained_variance
from gaussnet.samplers import (
    SOLVERS,
    afs,
    compute_ems,
    count_nfe,
    ddim,
    deis,
    dop853,
    dpm_v3,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    edm_stochastic,
    euler,
    find_sigma_skip,
    heun,
    inpainting_start,
    ipndm,
    karras_sigmas,
    log_snr_sigmas,
    model_sigmas,
    optimised_sigmas,
    pndm,
    rounded_sigmas,
    teleport,
    teleport_cost,
    unipc,
    vp_sigmas,
    warm_start,
)
from gaussnet.version import __version__

__all__ = [
    "MLP",
    "SOLVERS",
    "BypassPrecond",
    "ComponentMarginals",
    "CosineCovariance",
    "Covariance",
    "CrossFit",
    "DeltaDenoiser",
    "Denoiser",
    "DhariwalUNet",
    "DiT",
    "EDMPrecond",
    "FarFieldDenoiser",
    "Gate",
    "GaussianDenoiser",
    "GaussianFlow",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "ImageData",
    "MarginalDenoiser",
    "Marginals",
    "MeasuredError",
    "PCALocalDenoiser",
    "PatchDenoiser",
    "PosteriorCovariance",
    "ScoreProbe",
    "SongUNet",
    "VEPrecond",
    "VPPrecond",
    "__version__",
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
    "find_sigma_gate",
    "find_sigma_skip",
    "from_pretrained",
    "heun",
    "iDDPMPrecond",
    "import_edm",
    "inpainting_start",
    "ipndm",
    "karras_sigmas",
    "log_snr_sigmas",
    "model_sigmas",
    "open_images",
    "optimised_sigmas",
    "pndm",
    "read_edm_pickle",
    "rounded_sigmas",
    "teleport",
    "teleport_cost",
    "unexplained_variance",
    "unipc",
    "vp_sigmas",
    "warm_start",
]
