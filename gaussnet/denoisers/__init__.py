"""Denoisers: the shared base class and the analytic ones, a file each."""

from gaussnet.denoisers.base import Denoiser
from gaussnet.denoisers.component_marginals import ComponentMarginals
from gaussnet.denoisers.delta import DeltaDenoiser
from gaussnet.denoisers.far_field import FarFieldDenoiser
from gaussnet.denoisers.gaussian import GaussianDenoiser
from gaussnet.denoisers.guided import GuidedDenoiser
from gaussnet.denoisers.marginal import MarginalDenoiser
from gaussnet.denoisers.mixture import GaussianMixtureDenoiser
from gaussnet.denoisers.patch import LocalDenoiser, PatchDenoiser
from gaussnet.denoisers.pca_local import PCALocalDenoiser
from gaussnet.denoisers.pixel_marginals import Marginals
from gaussnet.denoisers.posterior import PosteriorCovariance

__all__ = [
    "ComponentMarginals",
    "DeltaDenoiser",
    "Denoiser",
    "FarFieldDenoiser",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "LocalDenoiser",
    "MarginalDenoiser",
    "Marginals",
    "PCALocalDenoiser",
    "PatchDenoiser",
    "PosteriorCovariance",
]
