"""Runs that go on from another one's checkpoint, with other values."""

import csv
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import gaussnet
import train.__main__
import train.callbacks
import train.loop
from train.config import Config, ConfigError
from train.configfile import load_config, to_yaml
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


def test_fewer_steps_than_the_checkpoint_has_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected train.steps >= 4, as in .*step-000000004, got 3"):
        train.__main__.fork(small(whole, "train.steps=3"), str(tmp_path / "fork"))
    assert not (tmp_path / "fork").exists()


def test_distances_by_another_extractor_stay_behind(whole: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(whole, start)
    (start / "frechet.csv").write_text("step,frechet,samples,NFE\n4,1.0,16,35\n")
    for override, goes in (("train.lr=1e-6", True), ("frechet.extractor=timm:resnet18", False)):
        to = tmp_path / override
        train.__main__.fork(small(start, "train.steps=6", override), str(to))
        assert (to / "frechet.csv").is_file() == goes, override
        assert (to / "heldout.csv").is_file()


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


def test_the_best_model_does_not_go_along_if_it_is_later_than_the_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    assert RunFolder(whole).best_saved()[0] == 4
    for step, goes in ((3, False), (4, True), (5, True)):
        early = tmp_path / f"early-{step}"
        shutil.copytree(whole, early)
        (early / "checkpoints" / "step-000000004").rename(early / "checkpoints" / f"step-{step:09d}")
        train.__main__.fork(small(early, "train.steps=6"), str(tmp_path / f"fork-{step}"))
        assert RunFolder(tmp_path / f"fork-{step}").best.is_dir() == goes, step


def test_a_fork_has_the_weight_decay_that_is_asked_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    make = train.loop.make_optimizer
    monkeypatch.setattr(train.loop, "make_optimizer", lambda *given: made.append(make(*given)) or made[-1])
    decayed = tmp_path / "decayed"
    train.loop.run(small(decayed, "train.weight_decay=0.1"))
    AcceleratorState._reset_state(reset_partial_state=True)
    forked(decayed, tmp_path / "fork", "train.weight_decay=0.5")
    assert sorted({group["weight_decay"] for group in made[-1].param_groups}) == [0, 0.5]
    for start, override in (
        (whole, "train.weight_decay=0.1"),
        (decayed, "train.weight_decay=0"),
        (whole, "train.optimizer=adamw"),
    ):
        message = (
            rf"the state of the optimizer goes on, which does not allow {override.partition('=')[0]}: .*"
        )
        with pytest.raises(ConfigError, match=message):
            train.__main__.fork(small(start, override), str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("now", "goes"),
    [([0.5, 0.02], True), ([0.02, 0.1], False), ([0.1], False), ([0.1, 0.02, 1.0], False)],
    ids=str,
)
def test_averages_of_a_fork_are_those_that_go_on(now: list[float], goes: bool, tmp_path: Path) -> None:
    """The half-life of one may change; it may not take another's place."""
    folder = RunFolder(tmp_path / "run")
    checkpoint = folder.checkpoints / "step-000000004"
    checkpoint.mkdir(parents=True)
    folder.config.write_text(to_yaml(small(folder.path, "ema.halflife_kimg=[0.1,0.02]")))
    config = small(folder.path, f"ema.halflife_kimg={now}")
    message = r"averages go on in their order, which does not allow ema\.halflife_kimg: \[0\.1, 0\.02\] -> "
    with nullcontext() if goes else pytest.raises(ConfigError, match=message):
        train.__main__.fork(config, str(tmp_path / "fork"))
    assert (tmp_path / "fork").exists() == goes


@pytest.mark.parametrize("errors", [[math.nan, 0.5, 0.7], [0.9, math.nan, 0.6], [0.4, 0.6, 0.5]])
def test_the_best_model_is_that_of_the_least_error_that_is_a_number(
    errors: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([error for now in errors for error in (1.0, now)])  # trained weights, then their average
    monkeypatch.setattr(train.callbacks, "error_sums", lambda *_: torch.full((1, 1), next(given)))
    out = tmp_path / "run"
    train.loop.run(small(out, "train.steps=8", "heldout.sigmas=[1.0]", "ema.halflife_kimg=[0.1]"))
    step, error = RunFolder(out).best_saved()
    least = min(error for error in errors if error == error)
    assert step == 4 * errors.index(least)
    assert error == gaussnet.from_pretrained(out / "best").provenance["held out"]["relative error"]
    assert gaussnet.from_pretrained(out).provenance["training"]["steps"] == 8
