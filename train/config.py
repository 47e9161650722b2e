"""The typed configuration of a run: a YAML file, overridden by key=value arguments.

An unknown key, a wrong type or an impossible value is an error that names the key, before anything is
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gaussnet.fit.spectrum import SHRINKAGES
from gaussnet.precond import Base


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


@dataclass
class DataConfig:
    """Where the images come from."""

    name: str = "digits"
    heldout: float = 0.2  # share of the data that training never sees
    split_seed: int = 0

    def __post_init__(self) -> None:
        _expect("data.heldout", self.heldout, 0 < self.heldout < 1, "between 0 and 1")


@dataclass
class FitConfig:
    """The analytic denoisers."""

    rank: int | None = None  # eigenvectors to keep; null: all
    shrinkage: str = "cv"
    components: int = 10  # of the mixture

    def __post_init__(self) -> None:
        _expect("fit.rank", self.rank, self.rank is None or self.rank >= 1, "null or >= 1")
        _expect("fit.shrinkage", self.shrinkage, self.shrinkage in SHRINKAGES, f"one of {SHRINKAGES}")
        _expect("fit.components", self.components, self.components >= 1, ">= 1")


@dataclass
class NetworkConfig:
    """Arguments of `SongUNet`; channels and resolution come from the data."""

    model_channels: int = 128
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    num_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=list)
    dropout: float = 0.0
    embedding_type: str = "positional"
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    channel_mult_noise: int = 1
    resample_filter: list[int] = field(default_factory=lambda: [1, 1])


@dataclass
class BypassConfig:
    """Options of `BypassPrecond`."""

    gate: bool = True
    show_gaussian: bool = True
    base: str = "blend"  # or gaussian, isotropic
    whiten: bool = False
    gate_tol: float = 0.01

    def __post_init__(self) -> None:
        bases = get_args(Base)
        _expect("bypass.base", self.base, self.base in bases, f"one of {', '.join(bases)}")
        _expect("bypass.gate_tol", self.gate_tol, 0 <= self.gate_tol < 1, "in [0, 1)")


@dataclass
class EDMConfig:
    """Options of `EDMPrecond`."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _expect("edm.sigma_data", self.sigma_data, self.sigma_data > 0, "> 0")


@dataclass
class LossConfig:
    """The distribution of training noise: ln sigma ~ N(P_mean, P_std^2)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        _expect("loss.P_std", self.P_std, self.P_std > 0, "> 0")


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int = 10_000
    batch: int = 128  # over all processes
    optimizer: str = "adam"  # any name of timm's create_optimizer_v2
    lr: float = 1e-3
    warmup: int = 100  # steps of linear learning-rate ramp-up
    clip: float | None = None  # norm to which gradients are clipped
    ema_decay: float = 0.999
    precision: Precision = Precision.no
    log_every: int = 50  # steps; at every checkpoint, too

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every"):
            _expect(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        _expect("train.lr", self.lr, self.lr > 0, "> 0")
        _expect("train.warmup", self.warmup, self.warmup >= 0, ">= 0")
        _expect("train.clip", self.clip, self.clip is None or self.clip > 0, "null or > 0")
        _expect("train.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1)")


@dataclass
class ProbeConfig:
    """Score probes: comparisons with the analytic denoisers while the network learns."""

    times: int = 24  # probes, evenly spaced in the logarithm of the step
    queries: int = 128
    sigmas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0])

    def __post_init__(self) -> None:
        _expect("probe.times", self.times, self.times >= 1, ">= 1")
        _expect("probe.queries", self.queries, self.queries >= 1, ">= 1")
        _expect("probe.sigmas", self.sigmas, bool(self.sigmas) and min(self.sigmas) > 0, "levels > 0")


@dataclass
class CheckpointConfig:
    """Resumable states."""

    every: int = 500  # steps
    keep: int = 2  # the last N stay on disk

    def __post_init__(self) -> None:
        _expect("checkpoint.every", self.every, self.every >= 1, ">= 1")
        _expect("checkpoint.keep", self.keep, self.keep >= 1, ">= 1")


@dataclass
class ReportConfig:
    """What is measured when training is over."""

    sigmas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0])
    draws: int = 8  # noise draws per held-out image
    sample_steps: int = 18
    skips: list[int] = field(default_factory=lambda: list(range(9)))
    samples: int = 64
    reference_steps: int = 128  # of the fine solution that samples are compared with
    picture_skip: int = 5  # skipped steps of the teleported row of samples.png

    def __post_init__(self) -> None:
        for name in ("draws", "sample_steps", "samples", "reference_steps"):
            _expect(f"report.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        _expect("report.sigmas", self.sigmas, bool(self.sigmas) and min(self.sigmas) > 0, "levels > 0")
        top = self.sample_steps - 1
        for name, skips in (("skips", self.skips), ("picture_skip", [self.picture_skip])):
            fits = all(0 <= skip <= top for skip in skips)
            _expect(f"report.{name}", getattr(self, name), fits, f"between 0 and sample_steps - 1 = {top}")


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
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        _expect("seed", self.seed, self.seed >= 0, ">= 0")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as "train.steps=100".

    Raises:
        ConfigError: naming the file or the key that is missing, unknown, of a wrong type or impossible.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"expected overrides of the form key=value, got {override!r}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(f"{path}: expected values for {', '.join(sorted(missing))}, got none")
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: {key}: {reason}" if key else f"{path}: {reason}") from error
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(saved: str, config: Config) -> list[str]:
    """Lines "key: saved -> now" for each value of a saved YAML that differs from `config`."""
    old = _flatten(OmegaConf.to_container(OmegaConf.create(saved)))
    new = _flatten(OmegaConf.to_container(OmegaConf.create(to_yaml(config))))
    keys = sorted(set(old) | set(new))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _expect(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {value}")
