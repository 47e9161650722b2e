"""The parts of a run: analytic denoisers fitted to the data, the network, and what wraps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

from torch import nn

from gaussnet import (
    BypassPrecond,
    DeltaDenoiser,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    SongUNet,
)
from gaussnet.precond import Base
from train.config import Config, ConfigError, Precond
from train.data import Data, generator_for


@dataclass(frozen=True)
class Analytic:
    """The closed-form denoisers of a data set, from the coarsest to the memorising one."""

    isotropic: GaussianDenoiser
    gaussian: GaussianDenoiser
    mixture: GaussianMixtureDenoiser
    delta: DeltaDenoiser

    def named(self) -> dict[str, Denoiser]:
        """Name -> denoiser."""
        return {
            "isotropic": self.isotropic,
            "gaussian": self.gaussian,
            "mixture": self.mixture,
            "delta": self.delta,
        }


def fit_analytic(config: Config, data: Data) -> Analytic:
    """Fits all of them to the training images.

    Raises:
        ConfigError: if a fit option does not fit the data.
    """
    fit = config.fit
    try:
        gaussian = GaussianDenoiser.fit(data.train, rank=fit.rank, shrinkage=fit.shrinkage)
        mixture = GaussianMixtureDenoiser.fit(
            data.train, fit.components, rank=fit.rank, seed=config.seed, shrinkage=fit.shrinkage
        )
    except ValueError as error:
        raise ConfigError(f"fit: {error}") from error
    return Analytic(
        isotropic=GaussianDenoiser.isotropic(gaussian.mean, gaussian.variance),
        gaussian=gaussian,
        mixture=mixture,
        delta=DeltaDenoiser(data.train),
    )


def build_network(config: Config, data: Data) -> SongUNet:
    """The UNet for the data's channels and resolution.

    Raises:
        ConfigError: if the network cannot be built, or cannot take the images.
    """
    channels, height, width = data.event_shape
    shown = config.precond is Precond.bypass and config.bypass.show_gaussian
    try:
        return SongUNet(
            img_resolution=max(height, width),
            in_channels=channels * (2 if shown else 1),
            out_channels=channels,
            **asdict(config.network),
        )
    except ValueError as error:
        raise ConfigError(f"network: {error}") from error


def fit_gate(config: Config, data: Data, gaussian: GaussianDenoiser) -> Gate | None:
    """The bypass's gate, where the configuration asks for one."""
    if config.precond is not Precond.bypass or not config.bypass.gate:
        return None
    return Gate.fit(gaussian, data.train, generator=generator_for(config.seed, "gate"))


def wrap(config: Config, network: nn.Module, gaussian: GaussianDenoiser, gate: Gate | None) -> BypassPrecond:
    """The denoiser around a network: plain EDM, or the bypass."""
    if config.precond is Precond.edm:
        return EDMPrecond(network, config.edm.sigma_data, event_shape=tuple(gaussian.event_shape))
    options = config.bypass
    return BypassPrecond(
        network,
        gaussian,
        gate,
        options.show_gaussian,
        cast(Base, options.base),
        whiten=options.whiten,
        gate_tol=options.gate_tol,
    )
