"""The parts of a run: analytic denoisers fitted to the data, the network, and what wraps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gaussnet import (
    BypassPrecond,
    ComponentMarginals,
    CrossFit,
    DeltaDenoiser,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
    MeasuredError,
)
from gaussnet.bypass_parts import Base, Centre
from gaussnet.gate import SIGMAS, measure_gate
from gaussnet.networks.blocks import UNetBlock
from gaussnet.networks.dit import DiTBlock
from gaussnet.networks.mlp import MLPBlock
from train.augment import apply, draw, label_dim
from train.config import NETWORKS, BypassGaussian, Config, ConfigError, Precond
from train.data import Data, fit_source, generator_for

FOLDS = 5
FEW = 30  # images a dimension and Gaussian, below which closed forms err a percent less on their own images


@dataclass(frozen=True)
class Analytic:
    """The closed-form denoisers of a data set, from the coarsest to the memorising one."""

    isotropic: GaussianDenoiser
    gaussian: GaussianDenoiser
    marginal: MarginalDenoiser
    mixtures: dict[int, GaussianMixtureDenoiser]  # by number of components
    delta: DeltaDenoiser

    def named(self) -> dict[str, Denoiser]:
        """Name -> denoiser."""
        mixtures = {f"mixture-{k}": mixture for k, mixture in self.mixtures.items()}
        return {
            "isotropic": self.isotropic,
            "gaussian": self.gaussian,
            "marginal": self.marginal,
            **mixtures,
            "delta": self.delta,
        }


@dataclass(frozen=True)
class Wrapping:
    """All of a model but its network."""

    base: GaussianDenoiser | GaussianMixtureDenoiser
    gate: Gate | None = None
    marginals: Marginals | ComponentMarginals | None = None
    error: MeasuredError | None = None


def fit_analytic(config: Config, data: Data, accelerator: Accelerator) -> Analytic:
    """Fits all of them to the training images; several processes share the pass for the moments.

    Raises:
        ConfigError: if a fit option does not fit the data.
    """
    fit, device = config.fit, accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    source = fit_source(data.train, rank, world)
    index = some_indices(config, data)
    images = data.train.to_float(data.train[index][0]).to(device)
    groups = data.groups
    try:
        gaussian = GaussianDenoiser.fit(
            source.to(device) if isinstance(source, Tensor) else source,
            rank=fit.rank,
            shrinkage=fit.shrinkage,
            groups=None if groups is None else groups[rank::world],
            mirror=config.data.xflip,
            all_processes=world > 1,
        ).to(device)
        mixtures = {
            k: GaussianMixtureDenoiser.fit(
                images,
                k,
                fit.mixture_rank,
                config.seed,
                shrinkage=fit.shrinkage,
                groups=None if groups is None else groups[index],
                mirror=config.data.xflip,
            )
            for k in fit.components
            if k == 1 or len(images) >= 20 * k
        }
    except (ValueError, TypeError) as error:
        raise ConfigError(f"fit: {error}") from error
    isotropic = GaussianDenoiser.isotropic(gaussian.mean, gaussian.variance)
    drawn = generator_for(config.seed, "marginals")  # a resumed run has the levels of its checkpoint
    marginals = Marginals.fit(images, mirror=config.data.xflip, generator=drawn).to(device)
    delta = DeltaDenoiser(torch.cat([images, images.flip(-1)]) if config.data.xflip else images)
    return Analytic(isotropic, gaussian, MarginalDenoiser(gaussian, marginals), mixtures, delta)


def some_indices(config: Config, data: Data) -> Tensor:
    """Indices of at most fit.max_data training images, drawn at random."""
    index = torch.arange(len(data.train))
    if len(index) > config.fit.max_data:
        index = torch.randperm(len(index), generator=generator_for(config.seed, "fit"))[: config.fit.max_data]
    return index


def fit_wrapping(config: Config, data: Data, analytic: Analytic, accelerator: Accelerator) -> Wrapping:
    """The base of the model, with the marginals, measured error and gate that the configuration asks for.

    Raises:
        ConfigError: if a fit option does not fit the data.
    """
    if config.precond is Precond.edm:
        return Wrapping(analytic.gaussian)
    device, options = accelerator.device, config.bypass
    index = some_indices(config, data)
    raw, classes = data.train[index]
    images, labels = data.train.to_float(raw).to(device), classes if data.n_classes else None
    base = fit_base(config, data, analytic.gaussian)
    other = fit_marginal(config, data, analytic, base) if options.base == "marginal" else None
    error = None
    if other is not None or base is not analytic.gaussian:
        raw, classes = data.heldout[torch.arange(min(len(data.heldout), 4096))]
        heldout = data.heldout.to_float(raw)
        if config.augment.on():  # c_out is the error on what the network will see
            heldout, _ = apply(
                heldout, draw(len(heldout), config.augment, generator_for(config.seed, "error augment"))
            )
        try:
            error = MeasuredError.fit(
                base,
                heldout,
                n_queries=config.fit.error_queries,
                generator=generator_for(config.seed, "error"),
                labels=classes if options.gaussian is BypassGaussian.classes else None,
                other=other,
            )
        except ValueError as problem:  # such as classes of held-out images alone
            raise ConfigError(f"data.heldout: {problem}") from problem
    gate = None
    if options.gate:
        gate = fit_gate(config, base, images, labels, accelerator)
    if config.loss.sigma_max is not None:  # the network never sees what is above
        gate = gate.cut(config.loss.sigma_max) if gate is not None else Gate.step(config.loss.sigma_max)
    marginals = None if other is None else other.marginals
    return Wrapping(base, None if gate is None else gate.to(device), marginals, error)


def fit_base(
    config: Config, data: Data, gaussian: GaussianDenoiser
) -> GaussianDenoiser | GaussianMixtureDenoiser:
    """The Gaussian, or the mixture that the configuration asks for in its place.

    Raises:
        ConfigError: if the mixture does not fit the data.
    """
    options = config.bypass
    if options.gaussian is BypassGaussian.gaussian:
        return gaussian
    index = some_indices(config, data)
    raw, classes = data.train[index]
    device, by_class = gaussian.mean.device, options.gaussian is BypassGaussian.classes
    try:
        mixture = GaussianMixtureDenoiser.fit(
            data.train.to_float(raw).to(device),
            None if by_class else options.components,
            config.fit.rank,
            config.seed,
            classes if by_class else None,
            config.fit.shrinkage,
            groups=None if data.groups is None else data.groups[index],
            mirror=config.data.xflip,
            prior=options.chosen_prior(math.prod(data.event_shape)),
        )
    except ValueError as problem:
        raise ConfigError(f"bypass.gaussian: {problem}") from problem
    return mixture.to(device)


def fit_marginal(
    config: Config, data: Data, analytic: Analytic, base: GaussianDenoiser | GaussianMixtureDenoiser
) -> MarginalDenoiser:
    """The base with the marginals of all images, or of each of its components."""
    if base is analytic.gaussian:
        return analytic.marginal
    raw, classes = data.train[some_indices(config, data)]
    images = data.train.to_float(raw).to(base.mean.device)
    labels = classes if config.bypass.gaussian is BypassGaussian.classes else None
    drawn = generator_for(config.seed, "marginals")
    return MarginalDenoiser.fit(images, base, labels=labels, mirror=config.data.xflip, generator=drawn)


def gaussians(config: Config, data: Data) -> int:
    """The number of Gaussians that the base has, among which the images are divided."""
    counts = {BypassGaussian.classes: data.n_classes, BypassGaussian.mixture: config.bypass.components}
    return counts.get(config.bypass.gaussian, 1)


def fit_folds(config: Config, data: Data, accelerator: Accelerator) -> CrossFit | None:
    """The closed forms that training is shown, each fitted without a fold; None: those of all images.

    Raises:
        ConfigError: if there are fewer images, or groups, than folds, or a fit option does not fit a fold.
    """
    folds, count = config.fit.folds, len(data.train)
    if folds is None:
        alone = count if data.groups is None else len(data.groups.unique())
        few = count < FEW * gaussians(config, data) * math.prod(data.event_shape)
        folds = min(FOLDS, alone) if few and alone > 1 else 0
    if folds == 0 or config.precond is Precond.edm:
        return None
    lean = replace(config, fit=replace(config.fit, components=[]))
    dealt = data.groups
    if dealt is None and config.bypass.gaussian is BypassGaussian.classes:
        dealt = places_in_class(data.train[torch.arange(count)][1])  # no fold has all images of a class

    def fit(kept: Tensor) -> Denoiser:
        groups = None if data.groups is None else data.groups[kept]
        part = replace(data, train=data.train.subset(kept), groups=groups)
        analytic = fit_analytic(lean, part, accelerator)
        base = fit_base(lean, part, analytic.gaussian)
        if config.bypass.base == "marginal":
            return fit_marginal(lean, part, analytic, base)
        return base

    try:
        return CrossFit.fit(fit, count, folds, dealt)
    except ConfigError as error:
        raise ConfigError(f"{error}, without the images of a fold: fit.folds=0 does without") from error
    except ValueError as error:
        raise ConfigError(f"fit.folds: {error}") from error


def places_in_class(labels: Tensor) -> Tensor:
    """The number of each label's equals before it, (N,)."""
    order = labels.argsort(stable=True)
    _, sizes = labels.unique(return_counts=True)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels)) - starts
    return places


def fit_gate(
    config: Config, base: Denoiser, images: Tensor, labels: Tensor | None, accelerator: Accelerator
) -> Gate:
    """The gate; each process measures some of its levels."""
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = SIGMAS[rank::world] if world > 1 else SIGMAS
    values = measure_gate(
        base,
        images,
        mine,
        config.fit.gate_queries,
        generator_for(config.seed, "gate"),
        labels=labels,
        max_data=config.fit.max_data,
        mirror=config.data.xflip,
    )
    found = list(zip(mine, values, strict=True))
    pairs = sorted(gather_object(found) if world > 1 else found)
    sigmas, shares = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    # The share falls with the noise; sampling error must not make it rise again.
    return Gate(sigmas.float(), shares.cummin(0).values.float())


def build_network(config: Config, data: Data) -> nn.Module:
    """The network for the data's channels and resolution.

    One that is shown the Gaussian has more input channels, and would draw all its initial weights otherwise.
    It gets those of the plain network wherever shapes agree: runs differ by what they compare alone.

    Raises:
        ConfigError: if the network cannot be built, or cannot take the images.
    """
    channels = data.event_shape[0]
    plain = _network(config, data, channels)
    if config.precond is not Precond.bypass or not config.bypass.show_gaussian:
        return plain
    network = _network(config, data, (3 if config.bypass.base == "marginal" else 2) * channels)
    weights = plain.state_dict()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])
    return network


def _network(config: Config, data: Data, in_channels: int) -> nn.Module:
    channels, height, width = data.event_shape
    exact = config.network.name == "MLP" and height != width
    try:
        return NETWORKS[config.network.name](
            img_resolution=cast(Any, [height, width] if exact else max(height, width)),
            in_channels=in_channels,
            out_channels=channels,
            label_dim=data.n_classes,
            augment_dim=label_dim(config.augment),
            **{key: value for key, value in config.network.arguments.items() if value is not None},
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"network: {error}") from error


def wrap(config: Config, network: nn.Module, wrapping: Wrapping) -> BypassPrecond:
    """The denoiser around a network: plain EDM, or the bypass."""
    if config.precond is Precond.edm:
        return EDMPrecond(network, config.edm.sigma_data, event_shape=tuple(wrapping.base.event_shape))
    options = config.bypass
    try:
        return BypassPrecond(
            network,
            wrapping.base,
            wrapping.gate,
            options.show_gaussian,
            cast("Base", options.base),
            centre=cast("Centre | None", options.centre),
            whiten=options.whiten,
            marginals=wrapping.marginals,
            error=wrapping.error,
            gate_tol=options.gate_tol,
        )
    except ValueError as error:
        raise ConfigError(f"bypass: {error}") from error


def remember_less(network: nn.Module) -> None:
    """Gradient checkpointing: blocks are evaluated again in the backward pass, not remembered."""
    for block in network.modules():
        if isinstance(block, UNetBlock | DiTBlock | MLPBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
