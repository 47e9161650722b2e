"""The configuration of a run: every error names its key, before anything is computed."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train.loop
from gaussnet import from_pretrained
from train.augment import label_dim
from train.config import NETWORKS, Config, ConfigError, Precond
from train.configfile import differences, load_config, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
DIGITS = next(path for path in CONFIGS if path.stem == "digits")
EVENTS = {
    "digits": (1, 8, 8),
    "mnist_mini_edm": (1, 32, 32),
    "mnist_cond": (1, 32, 32),
    "cifar10_mini_edm": (3, 32, 32),
    "cifar10_edm": (3, 32, 32),
    "afhqv2_64_edm": (3, 64, 64),
    "ffhq_64_edm": (3, 64, 64),
    "celeba_64": (3, 64, 64),
    "emoji64": (3, 64, 64),
}
EDM_PARAMETERS = {
    "cifar10_edm": 55_733_891,
    "afhqv2_64_edm": 61_805_571,
    "ffhq_64_edm": 61_805_571,
    "mnist_mini_edm": 1_000_801,
    "cifar10_mini_edm": 15_707_235,
}
every = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
QUICK = ("digits", "mnist_cond", "cifar10_edm", "emoji64")  # which train in the default tests


@every
def test_every_config_loads_and_names_its_command(path: Path) -> None:
    config = load_config(path)
    assert config.out == f"runs/{path.stem}"
    assert path.read_text().startswith(f"# accelerate launch -m train configs/{path.name}\n")


@pytest.mark.parametrize("name", EDM_PARAMETERS)
def test_networks_have_as_many_parameters_as_edms(name: str) -> None:
    config = load_config(DIGITS.with_stem(name))
    channels, resolution, _ = EVENTS[name]
    with torch.device("meta"):
        network = NETWORKS[config.network.name](
            img_resolution=resolution,
            in_channels=channels,
            out_channels=channels,
            augment_dim=label_dim(config.augment),
            **config.network.arguments,
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == EDM_PARAMETERS[name]


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS],
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("precond", ["edm", "bypass"])
def test_every_config_trains(
    path: Path, precond: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps on synthetic images of its shape, at reduced width."""
    if precond == "edm" or path.stem not in ("mnist_cond", "emoji64"):  # reports of grey and colour images
        monkeypatch.setattr(train.loop, "write_report", lambda *_: "report\n")
    channels, height, width = EVENTS[path.stem]
    frame = 2 * load_config(path).data.pad
    shape = (60, height - frame, width - frame, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(60) % 3)
    config = load_config(
        path,
        [
            f"out={tmp_path}/run",
            f"precond={precond}",
            f"data.source={tmp_path}/images.npz",
            *([] if shape[-1] == 3 else ["data.layout=NHWC"]),
            *([] if load_config(path).data.resolution is None else ["data.resolution=null"]),
            "data.heldout=10",
            "data.workers=0",
            "fit.rank=8",
            "fit.components=[2]",
            "fit.gate_queries=8",
            "fit.error_queries=8",
            "network.arguments.model_channels=4",
            "network.arguments.num_blocks=1",
            "train.steps=3",
            "train.batch=4",
            "probe.queries=2",
            "probe.sigmas=[0.5,5]",
            "heldout.queries=4",
            "report.sigmas=[0.5]",
            "report.draws=1",
            "report.sample_steps=2",
            "report.skips=[0,1]",
            "report.picture_skip=1",
            "report.samples=2",
            "report.reference_steps=2",
        ],
    )
    train.loop.run(config)
    model = from_pretrained(tmp_path / "run")
    assert tuple(model.event_shape) == EVENTS[path.stem]
    assert type(model).__name__ == {"edm": "EDMPrecond", "bypass": "BypassPrecond"}[precond]
    assert model.provenance["training"]["steps"] == 3


def test_overrides_win_over_the_file() -> None:
    config = load_config(
        DIGITS, ["train.steps=7", "out=elsewhere", "precond=edm", "network.arguments.channel_mult=[3]"]
    )
    assert (config.train.steps, config.out, config.precond) == (7, "elsewhere", Precond.edm)
    assert config.network.arguments["channel_mult"] == [3]
    assert config.network.arguments["model_channels"] == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train\.stepz"),
        ("trian.steps=3", r"trian"),
        ("train.steps=many", r"train\.steps.*many"),
        ("train.steps=0", r"train\.steps: expected >= 1, got 0"),
        ("train.lr=-1", r"train\.lr: expected > 0, got -1"),
        ("ema.halflife_kimg=[]", r"ema\.halflife_kimg"),
        ("ema.halflife_kimg=[1,1]", r"ema\.halflife_kimg: expected different numbers"),
        ("precond=vp", r"precond.*vp.*bypass, edm"),
        ("data.heldout=0", r"data\.heldout: expected > 0, got 0"),
        ("data.on_error=stop", r"data\.on_error: expected raise or skip, got stop"),
        ("fit.shrinkage=ridge", r"fit\.shrinkage.*ridge"),
        ("loss.P_std=0", r"loss\.P_std"),
        ("loss.label_dropout=0.1", r"data\.labels: expected true: the run uses classes, got False"),
        ("bypass.gaussian=classes", r"data\.labels: expected true"),
        ("bypass.prior=-1", r"bypass\.prior: expected null or >= 0, got -1"),
        ("bypass.centre=image", r"bypass\.centre: expected one of pixel, channel, estimate, got image"),
        (
            "bypass.centre=estimate bypass.whiten=true",
            r"bypass\.centre: expected another one with show_gaussian=false or whiten=true, got estimate",
        ),
        ("bypass.base=edm", r"bypass\.base: expected one of blend, gaussian, isotropic, marginal, got edm"),
        ("network.name=UNet", r"network\.name: expected one of SongUNet, DhariwalUNet, DiT, MLP, got UNet"),
        ("network.arguments.width=3", r"network\.arguments: expected keys among .*model_channels.*got width"),
        ("network.arguments.in_channels=3", r"network\.arguments: expected keys among .*got in_channels"),
        ("augment.p=-1", r"augment\.p: expected a finite value >= 0, got -1"),
        ("augment.flip=1", r"augment\.flip"),
        ("samples.skip=18", r"samples\.skip: expected in \[0, 18\), got 18"),
        ("probe.sigmas=[0.1,-1]", r"probe\.sigmas"),
        ("report.skips=[0,18]", r"report\.skips: expected between 0 and sample_steps - 1 = 17"),
        ("seed=-1", r"seed"),
        ("seed=4294967296", r"seed: expected in \[0, 2\^32\), got 4294967296"),
        ("precond=edm loss.sigma_max=3", r"loss\.sigma_max: expected null with precond=edm.*got 3"),
        ("data.split_seed=-1", r"data\.split_seed: expected >= 0, got -1"),
        ("data.scaling=0.5", r'data\.scaling: expected null, "none", or two numbers, got 0\.5'),
        ("data.scaling=[a,b]", r"data\.scaling: expected .* two numbers, got \['a', 'b'\]"),
        ("data.scaling=[0,1,2]", r"data\.scaling: expected .* two numbers, got \[0, 1, 2\]"),
        ("train.steps", r"key=value, got 'train.steps'"),
    ],
)
def test_impossible_values_are_errors_that_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DIGITS, override.split())


@pytest.mark.parametrize(
    ("options", "base", "prior"),
    [
        ("bypass.gaussian=classes", "marginal", 32.0),
        ("bypass.gaussian=classes bypass.prior=5", "marginal", 5.0),
        ("bypass.gaussian=classes bypass.base=blend", "blend", 0.0),
        ("bypass.gaussian=mixture", "marginal", 32.0),
        ("bypass.gaussian=mixture bypass.base=marginal bypass.prior=0", "marginal", 0.0),
    ],
)
def test_base_and_prior_of_mixtures(options: str, base: str, prior: float) -> None:
    chosen = load_config(DIGITS, ["data.labels=true", *options.split()]).bypass
    assert (chosen.base, chosen.chosen_prior(64)) == (base, prior)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bare.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="expected values for out"):
        load_config(tmp_path / "bare.yaml")
    (tmp_path / "broken.yaml").write_text("out: [unclosed\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_yaml_and_back() -> None:
    config = load_config(DIGITS)
    assert isinstance(config, Config)
    assert differences(to_yaml(config), config) == []


def test_a_key_that_is_newer_than_a_run_has_its_default() -> None:
    lines = to_yaml(load_config(DIGITS)).splitlines(keepends=True)
    saved = "".join(line for line in lines if "gaussian_steps" not in line)
    assert len(saved) < len("".join(lines))
    assert differences(saved, load_config(DIGITS)) == []
    changed = load_config(DIGITS, ["loss.gaussian_steps=5"])
    assert differences(saved, changed) == ["loss.gaussian_steps: 0 -> 5"]


def test_differences_name_each_key_and_both_values() -> None:
    config = load_config(DIGITS)
    saved = to_yaml(config)
    config.train.lr, config.seed = 0.5, 3
    assert differences(saved, config) == ["seed: 0 -> 3", "train.lr: 0.001 -> 0.5"]
