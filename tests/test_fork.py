"""Runs that go on from another one's checkpoint, with other values."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import gaussnet
import train.__main__
import train.loop
from train.config import Config, ConfigError
from train.configfile import load_config
from train.data import load_data
from train.models import build_network, fit_analytic, fit_wrapping, wrap
from train.rundir import RunFolder

ROOT = Path(__file__).parent.parent
SMALL = [
    "network.arguments.model_channels=8",
    "network.arguments.channel_mult=[1]",
    "fit.components=[]",
    "fit.gate_queries=64",
    "fit.error_queries=64",
    "probe.times=1",
    "probe.queries=4",
    "heldout.every=4",
    "heldout.queries=16",
    "samples.count=4",
    "train.batch=16",
    "train.steps=4",
    "train.lr=1e-5",
    "train.trackers=[]",
]


@pytest.fixture(autouse=True, scope="module")
def brief():
    """Runs end with their model, without measuring and drawing their report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "write_report", lambda *_: "report\n")
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def small(out: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", [*SMALL, f"out={out}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forks") / "whole"
    train.loop.run(small(out))
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def forked(whole: Path, to: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The tensors of a run that goes on for two steps with other values."""
    train.loop.run(train.__main__.fork(small(whole, "train.steps=6", *overrides), str(to)))
    return load_file(to / "model.safetensors")


@pytest.mark.parametrize("options", [["fit.shrinkage=none"], ["fit.rank=10"], ["data.heldout=0.4"]], ids=str)
def test_what_is_fitted_is_fitted_anew(whole: Path, tmp_path: Path, options: list[str]) -> None:
    weights = forked(whole, tmp_path / "fork", *options)
    config, before = small(tmp_path / "fresh", *options), load_file(whole / "model.safetensors")
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    wrapping = fit_wrapping(config, data, fit_analytic(config, data, accelerator), accelerator)
    fresh = wrap(config, build_network(config, data), wrapping).state_dict()
    fits = [name for name in weights if not name.startswith("model.")]
    assert any(
        weights[name].shape != before[name].shape or not weights[name].equal(before[name]) for name in fits
    )
    for name in fits:
        torch.testing.assert_close(weights[name], fresh[name], msg=f"{name} is not that of the new values")
    for name in weights.keys() - set(fits):  # and the network is the old one, two small steps on
        torch.testing.assert_close(weights[name], before[name], rtol=0, atol=1e-3, msg=name)


def test_the_best_model_goes_along_unless_errors_are_others(whole: Path, tmp_path: Path) -> None:
    forked(whole, tmp_path / "same", "train.lr=1e-6")
    assert gaussnet.from_pretrained(tmp_path / "same" / "best") is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    forked(whole, tmp_path / "other", "fit.rank=10", "heldout.every=2")
    assert gaussnet.from_pretrained(tmp_path / "other" / "best").state_dict()[
        "gaussian.covariance.eigvals"
    ].shape == (10,)
    steps = {}
    for name in ("same", "other"):
        with (tmp_path / name / "heldout.csv").open(newline="") as file:
            steps[name] = {int(row["step"]) for row in csv.DictReader(file)}
    assert steps["same"] >= {0, 4}
    assert steps["other"] == {6}, "errors around another Gaussian are not compared with"


def test_a_network_of_another_shape_says_what_to_remove(whole: Path, tmp_path: Path) -> None:
    config = small(whole, "train.steps=6", "network.arguments.model_channels=16")
    message = rf"size mismatch.*; remove {tmp_path}/fork before another --fork"
    with pytest.raises(ConfigError, match=message):
        train.loop.run(train.__main__.fork(config, str(tmp_path / "fork")))


def test_a_folder_that_was_moved_or_spelt_otherwise_is_resumed(whole: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    for spelt in (moved, f"{moved}/", tmp_path / "." / "moved"):
        RunFolder(spelt).check(small(Path(spelt)))
        RunFolder(spelt).check(load_config(ROOT / "configs" / "digits.yaml", [*SMALL, f"out={spelt}"]))
    with pytest.raises(ConfigError, match=r"train.lr: 1e-05 -> 0.1"):
        RunFolder(moved).check(small(moved, "train.lr=0.1"))


def test_a_launcher_of_another_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"train.precision: expected bf16, as `accelerate launch` was told"):
        train.loop.run(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=nosuch", r"train\.optimizer: .*nosuch"),
        ("augment.lumaflip=1", r"augment\.lumaflip: expected images of 3 channels, got 1"),
    ],
)
def test_what_the_images_or_timm_do_not_allow_is_told_before_the_fit(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.loop, "fit_analytic", lambda *_: pytest.fail("fitted"))
    with pytest.raises(ConfigError, match=message):
        train.loop.run(small(tmp_path / "run", override))
