"""Denoisers: the shared base class and the analytic ones, a file each."""

from gaussnet.denoisers.base import Denoiser
from gaussnet.denoisers.delta import DeltaDenoiser
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.mixture import GaussianMixtureDenoiser

__all__ = ["DeltaDenoiser", "Denoiser", "GaussianDenoiser", "GaussianMixtureDenoiser"]
