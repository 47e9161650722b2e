"""The typed configuration of a run. `train.configfile` reads it from YAML and key=value arguments.

Every dataclass checks its own values: an impossible one is an error that names the key.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any, get_args

from omegaconf import MISSING

from gaussnet.bypass_parts import Base, Centre
from gaussnet.fit.spectrum import SHRINKAGES
from gaussnet.networks import MLP, DhariwalUNet, DiT, SongUNet
from gaussnet.probes import PAPER_SIGMAS
from train.augment import AugmentConfig

NETWORKS = {cls.__name__: cls for cls in (SongUNet, DhariwalUNet, DiT, MLP)}
OF_THE_DATA = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""


class Precond(Enum):
    """What wraps the network."""

    bypass = "bypass"
    edm = "edm"


class Precision(Enum):
    """Mixed precision, as Accelerate names it."""

    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


class BypassGaussian(Enum):
    """What the bypass is made of."""

    gaussian = "gaussian"  # one for all
    mixture = "mixture"  # of bypass.components clusters
    classes = "classes"  # a Gaussian a class; needs data.labels


@dataclass
class DataConfig:
    """Where the images come from."""

    source: str = "digits"  # whatever gaussnet.data.open_images opens
    scaling: Any = None  # [low, high], the stored values that become -1 and 1, or "none"
    layout: str | None = None  # of arrays: NHW, NHWC, NCHW
    mode: str | None = None  # of image files: L, RGB, RGBA
    resolution: int | None = None  # to which image files are cropped and resized
    split: str | None = None  # of sources that have splits
    root: str = "data"  # for downloads
    on_error: str = "raise"  # or skip: leave out what cannot be read, and count it
    pad: int = 0  # pixels of black to add on each side
    xflip: bool = False  # mirror images, too
    labels: bool = False  # a class-conditional model
    heldout: float = 0.1  # share (or number, from 1 up) of images that training never sees
    groups: str | None = None  # .npy of an integer an image: variants of one image, held out together
    split_seed: int = 0
    workers: int = 0  # processes that read ahead; 0: none, right for data in memory

    def __post_init__(self) -> None:
        expect("data.heldout", self.heldout, self.heldout > 0, "> 0")
        expect("data.on_error", self.on_error, self.on_error in ("raise", "skip"), "raise or skip")
        pair = self.scaling
        known = pair is None or isinstance(pair, str)
        if not known and isinstance(pair, Sequence) and len(pair) == 2:
            known = all(isinstance(value, int | float) for value in pair)
        expect("data.scaling", pair, known, 'null, "none", or two numbers')
        for name in ("pad", "workers", "split_seed"):
            expect(f"data.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0")


@dataclass
class FitConfig:
    """The analytic denoisers."""

    rank: int | None = None  # eigenvectors to keep; null: all
    shrinkage: str = "cv"
    components: list[int] = field(default_factory=lambda: [10])  # of the mixtures of the probes
    mixture_rank: int | None = 64  # eigenvectors a component
    max_data: int = 65_536  # images, drawn at random, of mixtures, marginals, delta denoiser and gate
    gate_queries: int = 1024  # noised images at each of 25 levels
    folds: int | None = None  # of CrossFit; 0: none; null: 5 below 30 images a dimension and Gaussian
    error_queries: int | None = None  # noised held-out images at each of 31; null: as `MeasuredError.fit`

    def __post_init__(self) -> None:
        for name in ("rank", "mixture_rank", "error_queries"):
            value = getattr(self, name)
            expect(f"fit.{name}", value, value is None or value >= 1, "null or >= 1")
        known = self.folds is None or self.folds == 0 or self.folds >= 2
        expect("fit.folds", self.folds, known, "0, >= 2, or null")
        expect("fit.shrinkage", self.shrinkage, self.shrinkage in SHRINKAGES, f"one of {SHRINKAGES}")
        expect("fit.components", self.components, all(k >= 1 for k in self.components), "numbers >= 1")
        for name in ("max_data", "gate_queries"):
            expect(f"fit.{name}", getattr(self, name), getattr(self, name) >= 2, ">= 2")


@dataclass
class NetworkConfig:
    """The network; channels, resolution and label lengths come from data and augmentation."""

    name: str = "SongUNet"
    arguments: dict[str, Any] = field(default_factory=dict)  # null: not given
    checkpoint: bool = False  # gradient checkpointing: blocks are evaluated again, not remembered

    def __post_init__(self) -> None:
        expect("network.name", self.name, self.name in NETWORKS, f"one of {', '.join(NETWORKS)}")
        known = [
            name for name in inspect.signature(NETWORKS[self.name]).parameters if name not in OF_THE_DATA
        ]
        for key in (key for key, value in self.arguments.items() if value is not None):
            expect("network.arguments", key, key in known, f"keys among {', '.join(known)}")


@dataclass
class BypassConfig:
    """Options of `BypassPrecond`."""

    gate: bool = True
    gate_tol: float = 0.01
    show_gaussian: bool = True
    base: str = "marginal"  # blend, gaussian, isotropic, marginal
    centre: str | None = None  # pixel, channel, estimate; default: estimate with base=marginal, else pixel
    whiten: bool = False
    gaussian: BypassGaussian = BypassGaussian.gaussian
    components: int = 10
    prior: float | None = None  # samples of what all have in common, added to each; null: see chosen_prior

    def __post_init__(self) -> None:
        bases = get_args(Base)
        expect("bypass.base", self.base, self.base in bases, f"one of {', '.join(bases)}")
        centres = get_args(Centre)
        known = self.centre is None or self.centre in centres
        expect("bypass.centre", self.centre, known, f"one of {', '.join(centres)}")
        possible = self.centre != "estimate" or (self.show_gaussian and not self.whiten)
        told = "another one with show_gaussian=false or whiten=true"
        expect("bypass.centre", self.centre, possible, told)
        expect("bypass.gate_tol", self.gate_tol, 0 <= self.gate_tol < 1, "in [0, 1)")
        expect("bypass.components", self.components, self.components >= 1, ">= 1")
        expect("bypass.prior", self.prior, self.prior is None or self.prior >= 0, "null or >= 0")

    def chosen_prior(self, dim: int) -> float:
        """That which is given; with marginals, which small eigenvalues mislead, half a sample a dimension."""
        default = dim / 2 if self.base == "marginal" else 0.0
        return default if self.prior is None else self.prior


@dataclass
class EDMConfig:
    """Options of `EDMPrecond`."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        expect("edm.sigma_data", self.sigma_data, self.sigma_data > 0, "> 0")


@dataclass
class LossConfig:
    """The distribution of training noise: ln sigma ~ N(P_mean, P_std^2), up to sigma_max."""

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_max: float | None = None  # above it the model is left to the Gaussian
    label_dropout: float = 0.0  # share of class labels that are zeroed, for guidance
    gaussian_steps: int = 0  # first steps in which the network learns the Gaussian denoiser, not the images

    def __post_init__(self) -> None:
        expect("loss.P_std", self.P_std, self.P_std > 0, "> 0")
        expect("loss.sigma_max", self.sigma_max, self.sigma_max is None or self.sigma_max > 0, "null or > 0")
        expect("loss.label_dropout", self.label_dropout, 0 <= self.label_dropout <= 1, "in [0, 1]")
        expect("loss.gaussian_steps", self.gaussian_steps, self.gaussian_steps >= 0, ">= 0")


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int = 10_000
    batch: int = 128  # over all processes and accumulated parts
    accumulate: int = 1  # parts of a process's batch, one after the other
    optimizer: str = "adam"  # any name of timm's create_optimizer_v2
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 100  # steps of linear learning-rate ramp-up
    clip: float | None = None  # norm to which gradients are clipped
    precision: Precision = Precision.no
    tf32: bool = True  # of the network's matrix products and convolutions; analytic layers never
    compile: bool = False
    bad_steps: int = 20  # steps in a row with gradients not finite, after which the run stops
    log_every: int = 50  # steps; at every checkpoint, too
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "bad_steps"):
            expect(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        expect("train.lr", self.lr, self.lr > 0, "> 0")
        for name in ("warmup", "weight_decay"):
            expect(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0")
        expect("train.clip", self.clip, self.clip is None or self.clip > 0, "null or > 0")


@dataclass
class EMAConfig:
    """Moving averages of the weights. The first one is the model of the run."""

    halflife_kimg: list[float] = field(default_factory=lambda: [500.0])  # thousands of images
    rampup: float | None = 0.05  # no half-life exceeds this share of the images seen

    def __post_init__(self) -> None:
        halflives = self.halflife_kimg
        expect("ema.halflife_kimg", halflives, bool(halflives) and min(halflives) >= 0, "numbers >= 0")
        expect("ema.halflife_kimg", halflives, len(set(halflives)) == len(halflives), "different numbers")
        expect("ema.rampup", self.rampup, self.rampup is None or self.rampup > 0, "null or > 0")


@dataclass
class ProbeConfig:
    """Score probes: comparisons with the analytic denoisers while the network learns."""

    times: int = 24  # probes, evenly spaced in the logarithm of the step
    queries: int = 128
    sigmas: list[float] = field(default_factory=lambda: list(PAPER_SIGMAS))
    share: float = 0.1  # of the run's network evaluations that they may cost: else there are fewer

    def __post_init__(self) -> None:
        expect("probe.times", self.times, self.times >= 1, ">= 1")
        expect("probe.queries", self.queries, self.queries >= 1, ">= 1")
        expect("probe.sigmas", self.sigmas, bool(self.sigmas) and min(self.sigmas) > 0, "levels > 0")
        expect("probe.share", self.share, self.share > 0, "> 0")


@dataclass
class HeldoutConfig:
    """The denoising error on held-out images while training; the best model is kept."""

    every: int = 500  # steps; 0: never
    queries: int = 512
    sigmas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
    bands: int = 0  # of the Gaussian's axes, by which modes.csv tells the error; 0: no such file

    def __post_init__(self) -> None:
        expect("heldout.every", self.every, self.every >= 0, ">= 0")
        expect("heldout.bands", self.bands, self.bands >= 0, ">= 0")
        expect("heldout.queries", self.queries, self.queries >= 1, ">= 1")
        expect("heldout.sigmas", self.sigmas, bool(self.sigmas) and min(self.sigmas) > 0, "levels > 0")


@dataclass
class SamplesConfig:
    """Sample grids from fixed noise, with and without teleport."""

    every: int = 0  # steps; 0: at the end only
    count: int = 16
    steps: int = 18
    skip: int = 5

    def __post_init__(self) -> None:
        expect("samples.every", self.every, self.every >= 0, ">= 0")
        expect("samples.count", self.count, self.count >= 1, ">= 1")
        expect("samples.skip", self.skip, 0 <= self.skip < self.steps, f"in [0, {self.steps})")


@dataclass
class FrechetConfig:
    """The Frechet distance between samples and training images while training."""

    every: int = 0  # steps; 0: never
    extractor: str = "inception"  # or timm:NAME, or a folder of benchmarks/mnist_features.py
    samples: int = 10_000
    steps: int = 18
    batch: int = 256

    def __post_init__(self) -> None:
        expect("frechet.every", self.every, self.every >= 0, ">= 0")
        for name in ("samples", "steps", "batch"):
            expect(f"frechet.{name}", getattr(self, name), getattr(self, name) >= 2, ">= 2")


@dataclass
class CheckpointConfig:
    """Resumable states."""

    every: int = 500  # steps
    keep: int = 2  # the last N stay on disk

    def __post_init__(self) -> None:
        expect("checkpoint.every", self.every, self.every >= 1, ">= 1")
        expect("checkpoint.keep", self.keep, self.keep >= 1, ">= 1")


@dataclass
class ReportConfig:
    """What is measured when training is over."""

    sigmas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0])
    draws: int = 8  # noise draws per held-out image
    queries: int = 2000  # held-out images, at most
    sample_steps: int = 18
    skips: list[int] = field(default_factory=lambda: list(range(9)))
    samples: int = 64
    reference_steps: int = 128  # of the fine solution that samples are compared with
    picture_skip: int = 5  # skipped steps of the teleported row of samples.png

    def __post_init__(self) -> None:
        for name in ("draws", "queries", "sample_steps", "samples", "reference_steps"):
            expect(f"report.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        expect("report.sigmas", self.sigmas, bool(self.sigmas) and min(self.sigmas) > 0, "levels > 0")
        top = self.sample_steps - 1
        for name, skips in (("skips", self.skips), ("picture_skip", [self.picture_skip])):
            fits = all(0 <= skip <= top for skip in skips)
            expect(f"report.{name}", getattr(self, name), fits, f"between 0 and sample_steps - 1 = {top}")


@dataclass
class Config:
    """A run."""

    out: str = MISSING  # the run's folder
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    precond: Precond = Precond.bypass
    bypass: BypassConfig = field(default_factory=BypassConfig)
    edm: EDMConfig = field(default_factory=EDMConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # no group is on by default
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    frechet: FrechetConfig = field(default_factory=FrechetConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        for key, value in _leaves(self):
            expect(key, value, not isinstance(value, float) or math.isfinite(value), "a finite number")
        expect("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2^32)")  # NumPy takes no others
        whole = self.loss.sigma_max is None or self.precond is not Precond.edm
        expect("loss.sigma_max", self.loss.sigma_max, whole, "null with precond=edm, which has no Gaussian")
        needs = self.bypass.gaussian is BypassGaussian.classes or self.loss.label_dropout > 0
        expect("data.labels", self.data.labels, self.data.labels or not needs, "true: the run uses classes")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration; those of a list share its key."""
    if is_dataclass(value) or isinstance(value, dict):
        for name, part in (value if isinstance(value, dict) else vars(value)).items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value


def expect(key: str, value: object, holds: bool, expected: str) -> None:
    """Raises a ConfigError that names a key, unless its value holds."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {value}")
