"""The training application end to end, at a tiny size."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from cases import tiny_unet
from PIL import Image
from safetensors.torch import load_file

import gaussnet
import train.__main__
import train.frechet
import train.loop
import train.models
from gaussnet.metrics import SmallClassifier
from gaussnet.summary import summarise
from train.config import Config, ConfigError, Precond
from train.configfile import load_config
from train.data import load_data
from train.models import build_network, fit_analytic, fit_folds, fit_wrapping, wrap
from train.writing import read_csv

ROOT = Path(__file__).parent.parent
TINY = [
    "network.arguments.model_channels=8",
    "network.arguments.channel_mult=[1]",
    "network.arguments.dropout=0.1",
    "fit.components=[3]",
    "fit.gate_queries=64",
    "fit.error_queries=64",
    "ema.halflife_kimg=[0.1,0.02]",
    "probe.sigmas=[0.1,1,10]",
    "probe.share=10",
    "heldout.every=4",
    "heldout.queries=16",
    "samples.every=4",
    "samples.count=4",
    "train.batch=16",
    "train.steps=8",
    "train.warmup=3",
    "train.log_every=4",
    "checkpoint.every=2",
    "probe.times=3",
    "probe.queries=4",
    "report.samples=4",
    "report.draws=1",
    "report.sample_steps=6",
    "report.skips=[0,1,2]",
    "report.picture_skip=2",
    "report.reference_steps=8",
]
OTHER = ["network.arguments.channel_mult=null", "network.arguments.attn_resolutions=null"]
LIGHT = ["probe.times=1", "samples.every=0", "report.reference_steps=6"]
ADAMW = ["train.accumulate=4", "train.clip=1", "train.optimizer=adamw", "train.weight_decay=0.01"]
BF16 = ["train.precision=bf16", "network.checkpoint=true"]
FILES = {
    "README.md", "config.json", "config.yaml", "errors.csv", "heldout.csv", "metrics.jsonl",
    "model.safetensors", "probes.csv", "probes.png", "report.md", "samples.png", "skips.csv",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def tiny(out: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", [*TINY, f"out={out}", *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def launch(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Accelerate's flag for several processes, on the CPU (and gloo) with ACCELERATE_USE_CPU.
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_cpu_threads_per_process", "1", "-m", "train", "configs/digits.yaml", *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with their model, without measuring and drawing their report, which takes half of the time."""
    monkeypatch.setattr(train.loop, "write_report", lambda *_: "report\n")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.loop.run(tiny(out))
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def test_run_writes_everything_it_promises(complete: Path) -> None:
    assert {path.name for path in complete.iterdir() if path.is_file()} == FILES
    metrics = [json.loads(line) for line in (complete / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [2, 4, 6, 8]
    assert all(0.1 < row["loss"] < 3 for row in metrics), metrics
    assert [round(row["lr"], 6) for row in metrics] == [0.000667, 0.001, 0.001, 0.001]
    with (complete / "probes.csv").open(newline="") as file:
        probes = list(csv.DictReader(file))
    assert {int(row["step"]) for row in probes} == {0, 1, 3, 8}
    assert {row["reference"] for row in probes} == {"isotropic", "gaussian", "marginal", "mixture-3", "delta"}
    assert {row["weights"] for row in probes} == {"raw", "ema"}
    assert {row["queries"] for row in probes} == {"noised", "noise"}
    assert len(probes) == 4 * 2 * 3 * 2 * 5 * 2
    with (complete / "heldout.csv").open(newline="") as file:
        heldout = list(csv.DictReader(file))
    assert {(row["step"], row["weights"]) for row in heldout} == {
        (step, name) for step in ("0", "4", "8") for name in ("raw", "ema", "ema-0.02")
    }
    assert {path.name for path in (complete / "samples").iterdir()} == {
        f"step-{step:09d}.png" for step in (0, 4, 8)
    }
    kept = sorted(path.name for path in (complete / "checkpoints").iterdir())
    assert kept == ["step-000000006", "step-000000008"]


def test_report_has_the_table_of_errors_and_skips(complete: Path) -> None:
    with (complete / "errors.csv").open(newline="") as file:
        errors = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["sigma"] for row in errors] == [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 40]
    # Above sigma = 5 all of them are within sampling error of each other.
    assert all(row["gaussian"] < row["isotropic"] for row in errors if row["sigma"] <= 5), errors
    assert all(row["model"] < 2 * row["isotropic"] for row in errors)
    with (complete / "skips.csv").open(newline="") as file:
        skips = list(csv.DictReader(file))
    model = gaussnet.from_pretrained(complete)
    assert isinstance(model, gaussnet.BypassPrecond)
    closed = int((gaussnet.karras_sigmas(6) > model.sigma_gate).sum())
    assert 1 <= closed <= 3, "levels at which the network rests"
    expected = [(skip, 11 - 2 * max(skip, closed) + (skip < closed)) for skip in (0, 1, 2)]
    assert [(int(row["skipped"]), int(row["NFE"])) for row in skips] == expected
    report = (complete / "report.md").read_text()
    for row in errors:
        assert f"{row['model']:.5f}" in report


def test_run_folder_loads_as_the_model(complete: Path) -> None:
    model = gaussnet.from_pretrained(complete)
    assert isinstance(model, gaussnet.BypassPrecond)
    clean = load_data(load_config(complete / "config.yaml").data).heldout.tensor()
    x = clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    error = (model(x, 0.5) - clean).square().mean()
    assert error < (x - clean).square().mean()


def test_the_model_carries_the_numbers_of_its_run(complete: Path) -> None:
    model = gaussnet.from_pretrained(complete)
    assert model.provenance["training"]["steps"] == 8
    assert model.provenance["report"] == (complete / "report.md").read_text()
    assert model.provenance["report"].strip() in (complete / "README.md").read_text()
    told = summarise(model)
    assert "| steps | 8 |" in told
    assert "| sigma_gate | " in told


def test_a_complete_run_says_so_and_loses_nothing(complete: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", logger="train"):
        train.loop.run(tiny(complete))
    assert "is complete: 8 steps" in caplog.text
    assert (complete / "report.md").read_text() in caplog.text
    assert {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_with_its_keys(complete: Path) -> None:
    with pytest.raises(ConfigError, match=r"another configuration(?s:.*)train\.lr: 0\.001 -> 0\.1"):
        train.loop.run(tiny(complete, "train.lr=0.1"))


@pytest.mark.parametrize("stop", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 7))])
def test_resumed_run_equals_an_uninterrupted_one(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    class Killed(BaseException):
        pass

    original = train.loop.make_batch

    def dies(*arguments, **keywords):
        if arguments[2] == stop:
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "make_batch", dies)
        with pytest.raises(Killed):
            train.loop.run(tiny(tmp_path))
    # What a kill inside of a save leaves behind, and rows after the last checkpoint.
    (tmp_path / "checkpoints" / "step-000000099.partial").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 9.9}\n{"step": 8, "lo')
    AcceleratorState._reset_state(reset_partial_state=True)
    train.loop.run(tiny(tmp_path))

    expected, resumed = weights(complete), weights(tmp_path)
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs after a resume at {stop}"
    for name in ("probes.csv", "heldout.csv", "errors.csv", "skips.csv", "report.md"):
        assert (tmp_path / name).read_text() == (complete / name).read_text(), name
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (complete, tmp_path)
    ]
    whole, resumed_rows = ([(row["step"], row["loss"], row["lr"]) for row in run] for run in rows)
    assert whole == resumed_rows
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_run_that_died_before_its_report_writes_it(complete: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(complete, out)
    (out / "report.md").unlink()
    config = (out / "config.yaml").read_text().replace(str(complete), str(out))
    (out / "config.yaml").write_text(config)
    train.loop.run(tiny(out))
    assert (out / "report.md").read_text() == (complete / "report.md").read_text()


@pytest.mark.usefixtures("brief")
def test_gradients_that_are_not_finite_are_zeroed_and_counted(tmp_path: Path, monkeypatch: Any) -> None:
    original = train.loop.denoising_loss
    calls = 0

    def spoils(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls in (3, 4) else 1)

    monkeypatch.setattr(train.loop, "denoising_loss", spoils)
    train.loop.run(tiny(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [0, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.usefixtures("brief")
def test_gradients_that_stay_so_stop_the_run_and_keep_its_state(tmp_path: Path, monkeypatch: Any) -> None:
    original = train.loop.denoising_loss
    monkeypatch.setattr(train.loop, "denoising_loss", lambda *a: original(*a) * float("inf"))
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row, up to step 3; .*step-000000003"):
        train.loop.run(tiny(tmp_path, "train.bad_steps=3"))
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train.loop.run(tiny(tmp_path, "train.bad_steps=3"))  # the state is whole: it goes on from there
    assert (tmp_path / "report.md").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ["precond=edm"],
        [],
        ["bypass.base=isotropic", "bypass.gate=false"],
        ["bypass.gaussian=mixture", "bypass.components=3"],
        ["bypass.gaussian=classes", "data.labels=true"],
        ["bypass.whiten=true", "loss.sigma_max=5"],
        ["bypass.base=blend"],
        ["bypass.centre=estimate"],
    ],
    ids=["edm", "bypass", "isotropic", "mixture", "classes", "white-truncated", "blend", "estimate"],
)
def test_every_preconditioning_builds_and_starts_as_its_base(tmp_path: Path, options: list[str]) -> None:
    config = tiny(tmp_path, *options)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    analytic = fit_analytic(config, data, accelerator)
    wrapping = fit_wrapping(config, data, analytic, accelerator)
    model = wrap(config, build_network(config, data), wrapping)
    raw, labels = data.heldout[torch.arange(8)]
    x, one_hot = data.heldout.to_float(raw) + 0.3, data.one_hot(labels)
    base = model.untrained(x, 0.3, one_hot)  # of one level, not of eight: matrix products may round otherwise
    torch.testing.assert_close(model(x, 0.3, one_hot), base, rtol=1e-5, atol=1e-6)
    assert isinstance(model, gaussnet.EDMPrecond) == (config.precond is Precond.edm)
    if "loss.sigma_max=5" in options:
        assert model.sigma_gate == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [[], ["bypass.base=blend"], ["bypass.gaussian=classes", "data.labels=true"]],
    ids=["marginal", "blend", "classes"],
)
def test_folds_are_fitted_without_their_images(tmp_path: Path, options: list[str]) -> None:
    config = tiny(tmp_path, "fit.folds=3", "data.heldout=1600", *options)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    cross = fit_folds(config, data, accelerator)
    assert cross is not None
    rest = (cross.folds != 1).nonzero()[:, 0]
    fit = load_data(config.data)
    part = replace(fit, train=fit.train.subset(rest))
    analytic = fit_analytic(config, part, accelerator)
    wrapping = fit_wrapping(config, part, analytic, accelerator)
    index = (cross.folds == 1).nonzero()[:4, 0]
    raw, labels = data.train[index]
    x, one_hot = data.train.to_float(raw) + 0.3, data.one_hot(labels)
    forms = cross(x, 0.5, index, one_hot)
    expected = [wrapping.base(x, 0.5, one_hot)]
    if wrapping.marginals is not None:
        expected.append(gaussnet.MarginalDenoiser(wrapping.base, wrapping.marginals)(x, 0.5, one_hot))
    assert (len(expected) == 1) == ("bypass.base=blend" in options)
    torch.testing.assert_close(list(forms), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["data.heldout=1100"], None),  # 697 images of 64 dimensions
        (["data.heldout=1200"], 5),
        (["data.heldout=600", "bypass.gaussian=mixture", "bypass.components=2"], 5),  # 1,197 for two
        (["data.heldout=600", "bypass.gaussian=classes", "data.labels=true"], 5),
        (["data.heldout=600"], None),
        (["data.heldout=1200", "fit.folds=0"], None),
        (["data.heldout=1200", "precond=edm"], None),
        (["data.heldout=100", "fit.folds=7"], 7),
    ],
    ids=["many", "few", "few-a-cluster", "few-a-class", "enough", "few-none", "edm", "asked"],
)
def test_few_images_are_cross_fitted(
    tmp_path: Path, options: list[str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.models.FEW * 64 > 1797, "all of the digits are few"
    monkeypatch.setattr(train.models, "FEW", 10)
    config = tiny(tmp_path, *options)
    cross = fit_folds(config, load_data(config.data), Accelerator(cpu=True))
    assert (None if cross is None else len(cross.denoisers)) == expected


def test_few_groups_are_fewer_folds(tmp_path: Path) -> None:
    for count, expected in ((4, 3), (2, None)):  # one of them is held out
        groups = tmp_path / f"{count}.npy"
        np.save(groups, np.arange(1797) % count)
        config = tiny(tmp_path, "data.pad=4", f"data.groups={groups}")
        cross = fit_folds(config, load_data(config.data), Accelerator(cpu=True))
        assert (None if cross is None else len(cross.denoisers)) == expected, count
    config = tiny(tmp_path, f"data.groups={groups}", "fit.folds=3")
    with pytest.raises(ConfigError, match=r"fit.folds: expected at least 2 folds and as many images or g"):
        fit_folds(config, load_data(config.data), Accelerator(cpu=True))


@pytest.mark.usefixtures("brief")
def test_training_is_shown_the_closed_forms_of_folds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, folded = tmp_path / "plain", tmp_path / "folded"
    with caplog.at_level("INFO", logger="train"):
        train.loop.run(tiny(plain, "data.heldout=1500", "fit.folds=0"))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert "folds" not in caplog.text
        train.loop.run(tiny(folded, "data.heldout=1500"))
    assert "those of training in 5 folds" in caplog.text
    a, b = weights(plain), weights(folded)
    assert a.keys() == b.keys(), "folds are no part of the model"
    assert any(not torch.equal(a[name], b[name]) for name in a)
    buffers = [name for name in a if not name.startswith("model.")]
    assert all(torch.equal(a[name], b[name]) for name in buffers), "the model has the fit to all images"


def test_marginals_and_their_error_are_of_what_the_network_will_see(tmp_path: Path) -> None:
    errors: list[torch.Tensor] = []
    for options in (["data.xflip=true"], ["data.xflip=true", "augment.p=1", "augment.rotate_int=1"]):
        config = tiny(tmp_path, *options)
        data, accelerator = load_data(config.data), Accelerator(cpu=True)
        analytic = fit_analytic(config, data, accelerator)
        counts = analytic.marginal.marginals.log_weights
        torch.testing.assert_close(counts, counts.flip(-2), msg="mirror images were not counted")
        error = fit_wrapping(config, data, analytic, accelerator).error
        assert error is not None
        errors.append(error.values[15])
    assert float(errors[1][0]) > 1.05 * float(errors[0][0])  # turned digits are not those of the fit


def test_arms_begin_with_the_same_weights(tmp_path: Path) -> None:
    networks: list[torch.nn.Module] = []
    for options in (["precond=edm"], [], ["bypass.show_gaussian=false"], ["bypass.base=blend"]):
        config = tiny(tmp_path, *options)
        torch.manual_seed(3)
        networks.append(build_network(config, load_data(config.data)))
    edm, shown, plain, blend = (dict(network.named_parameters()) for network in networks)
    differ = {name for name in edm if edm[name].shape != shown[name].shape}
    assert len(differ) == 1  # the first convolution
    assert all(torch.equal(edm[name], shown[name]) for name in edm if name not in differ)
    assert all(torch.equal(edm[name], plain[name]) for name in edm)
    assert all(torch.equal(edm[name], blend[name]) for name in edm if name not in differ)


@pytest.mark.usefixtures("brief")
def test_it_can_begin_by_learning_the_gaussian(tmp_path: Path) -> None:
    warm = ["precond=edm", "edm.sigma_data=1", "train.steps=60", "heldout.every=60", "probe.times=1",
            "samples.every=0", "checkpoint.every=60"]  # fmt: skip
    train.loop.run(tiny(tmp_path / "gaussian", *warm, "loss.gaussian_steps=60"))
    train.loop.run(tiny(tmp_path / "images", *warm))
    rest = [explained(tmp_path / name / "probes.csv") for name in ("gaussian", "images")]
    assert rest[0] < 0.8 * rest[1]  # what the Gaussian leaves unexplained of the network


def explained(path: Path) -> float:
    rows = [row for row in read_csv(path) if row["reference"] == "gaussian" and row["weights"] == "raw"]
    last = max(int(row["step"]) for row in rows)
    chosen = [
        float(row["mean"])
        for row in rows
        if int(row["step"]) == last
        and row["quantity"] == "denoiser"
        and row["queries"] == "noised"
        and 0.2 <= float(row["sigma"]) <= 1
    ]
    return sum(chosen) / len(chosen)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "options",
    [
        ["data.labels=true", "loss.label_dropout=0.3", "bypass.gaussian=classes"],
        [*OTHER, "network.name=DiT", "network.arguments.num_heads=2", *ADAMW],
        [*OTHER, "network.name=MLP", "data.xflip=true", "data.workers=1", "train.trackers=[]"],
        [*BF16, "augment.xflip=1", "augment.scale=1", "augment.translate_frac=1", "loss.sigma_max=3"],
    ],
    ids=["classes", "dit-accumulate-adamw", "mlp-flip-workers", "augment-truncate-bf16"],
)
def test_options_of_a_run(tmp_path: Path, options: list[str]) -> None:
    train.loop.run(tiny(tmp_path, *LIGHT, *options))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0.1 < row["loss"] < 5 for row in rows)
    model = gaussnet.from_pretrained(tmp_path)
    moved = [name for name, value in model.named_parameters() if name.endswith("weight") and value.std() == 0]
    assert len(moved) < len(list(model.parameters())) / 4, "weights that have not learned"


@pytest.mark.usefixtures("brief")
def test_accumulated_parts_are_one_batch(complete: Path, tmp_path: Path) -> None:
    options = ["network.arguments.dropout=0", *LIGHT]
    for parts in (1, 4):
        train.loop.run(tiny(tmp_path / str(parts), f"train.accumulate={parts}", *options))
        AcceleratorState._reset_state(reset_partial_state=True)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("brief")
def test_checkpointed_blocks_learn_the_same(complete: Path, tmp_path: Path) -> None:
    options = [*LIGHT, "network.checkpoint=true"]
    train.loop.run(tiny(tmp_path, *options))
    for name, tensor in weights(complete).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_best_model_is_that_of_the_lowest_error(complete: Path) -> None:
    with (complete / "heldout.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weights"] == "ema"]
    means = {
        step: sum(float(row["relative"]) for row in rows if row["step"] == step) / 7
        for step in ("0", "4", "8")
    }
    best = gaussnet.from_pretrained(complete / "best").state_dict()
    last = gaussnet.from_pretrained(complete).state_dict()
    same = all(torch.equal(value, last[name]) for name, value in best.items())
    assert same == (min(means, key=lambda step: means[step]) == "8"), means


def test_a_fork_goes_on_with_other_values(complete: Path, tmp_path: Path, caplog: Any) -> None:
    before = {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}
    config = tiny(complete, "train.steps=12", "train.lr=1e-4", "report.reference_steps=6")
    train.__main__.fork(config, str(tmp_path / "fork"))
    forked = train.__main__.fork(config, str(tmp_path / "fork"))  # the same command again: resumes
    assert forked.out == str(tmp_path / "fork")
    with caplog.at_level("INFO", logger="train"):
        train.loop.run(forked)
    assert f"resuming {tmp_path}/fork at step 8 of 12" in caplog.text
    assert {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()} == before
    rows = [json.loads(line) for line in (tmp_path / "fork" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lr"]) for row in rows[-3:]] == [(8, 0.001), (10, 0.0001), (12, 0.0001)]
    (tmp_path / "something").mkdir()
    with pytest.raises(ConfigError, match=r"expected a new folder, got .*something"):
        train.__main__.fork(config, str(tmp_path / "something"))
    with pytest.raises(ConfigError, match=r"expected a checkpoint in .*none"):
        train.__main__.fork(tiny(tmp_path / "none"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(
    complete: Path, tmp_path: Path, monkeypatch: Any, caplog: Any, number: signal.Signals
) -> None:
    original = train.loop.make_batch

    def interrupts(*arguments: Any) -> Any:
        if arguments[2] == 4:
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="train"):
        patch.setattr(train.loop, "make_batch", interrupts)
        train.loop.run(tiny(tmp_path))
    assert f"{number.name}: saved step 5; the same command resumes" in caplog.text
    assert (tmp_path / "checkpoints" / "step-000000005").is_dir()
    assert not (tmp_path / "report.md").exists()
    assert signal.getsignal(number) is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    train.loop.run(tiny(tmp_path))
    for name, tensor in weights(complete).items():
        assert torch.equal(weights(tmp_path)[name], tensor), name


@pytest.mark.usefixtures("brief")
def test_samples_with_nan_have_no_frechet_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    SmallClassifier().save_pretrained(tmp_path / "features")
    options = [f"frechet.extractor={tmp_path}/features", "frechet.every=2", "frechet.samples=6"]
    options += ["frechet.batch=4", "frechet.steps=4", "train.steps=4", "probe.times=1", "fit.components=[]"]
    solve, calls = train.frechet.heun, itertools.count()

    def broken(*arguments: Any, **named: Any) -> torch.Tensor:
        images = solve(*arguments, **named)
        return images.index_fill(0, torch.tensor([1]), math.nan) if next(calls) == 1 else images

    monkeypatch.setattr(train.frechet, "heun", broken)
    train.loop.run(tiny(tmp_path / "run", *options))
    found = [float(row["frechet"]) for row in read_csv(tmp_path / "run" / "frechet.csv")]
    assert [math.isnan(distance) for distance in found] == [True, False]
    assert "step 2: samples of the model have NaN, and no Frechet distance" in caplog.text


@pytest.mark.slow
def test_frechet_distance_on_a_given_extractor(tmp_path: Path) -> None:
    SmallClassifier().save_pretrained(tmp_path / "features")
    options = [f"frechet.extractor={tmp_path}/features", "frechet.every=4", "frechet.samples=24"]
    options += ["frechet.batch=10", "frechet.steps=4", *LIGHT]
    train.loop.run(tiny(tmp_path / "run", *options))
    with (tmp_path / "run" / "frechet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "8"]
    assert all(float(row["frechet"]) > 0 for row in rows)
    model = gaussnet.from_pretrained(tmp_path / "run")
    with gaussnet.count_nfe(model) as nfe:
        gaussnet.heun(model, 80 * torch.randn(2, 1, 8, 8), gaussnet.karras_sigmas(4))
    assert int(rows[0]["NFE"]) == nfe()
    with pytest.raises(ConfigError, match=r"frechet\.extractor: .*nowhere"):
        train.loop.run(tiny(tmp_path / "other", "frechet.every=4", "frechet.extractor=nowhere"))


@pytest.mark.usefixtures("brief")
def test_one_bad_image_is_named_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8), 6 * i, np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "images" / "13.png").write_bytes(b"no picture")
    options = [f"data.source={tmp_path}/images", "fit.components=[]", "probe.times=1", "samples.every=0"]
    with pytest.raises(ConfigError, match=r"data\.source: .*13\.png"):
        train.loop.run(tiny(tmp_path / "run", *options))
    AcceleratorState._reset_state(reset_partial_state=True)
    train.loop.run(tiny(tmp_path / "run", *options, "data.on_error=skip"))
    assert gaussnet.from_pretrained(tmp_path / "run").provenance["data"]["training"] == 31


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["network.arguments.dropout=0", "augment.scale=1", "augment.p=0.5", "data.xflip=true"]
    options += ["fit.folds=3"]
    train.loop.run(tiny(one, *options))
    result = launch(*TINY, *options, f"out={two}", processes=2)
    assert result.returncode == 0, result.stderr
    assert "on 2 process(es), cpu" in result.stdout
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-4)
    ours, theirs = weights(one), weights(two)
    for name, tensor in ours.items():
        if name.startswith("model."):  # eigenvectors of equal eigenvalues may be others
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(theirs["gate.values"], ours["gate.values"], rtol=1e-3, atol=1e-4)
    # Probes, held-out errors, tables and samples are shared, and come out the same.
    for table in ("probes.csv", "heldout.csv", "errors.csv", "skips.csv"):
        tables = [list(csv.DictReader((run / table).open(newline=""))) for run in (one, two)]
        assert len(tables[0]) == len(tables[1]), table
        for row, other in zip(*tables, strict=True):
            for key, value in row.items():
                if key in ("mean", "mean_reverse", "error", "model", "mixture-3", "RMS"):
                    assert float(value) == pytest.approx(float(other[key]), rel=0.01, abs=1e-4), (table, row)
                elif key in ("step", "weights", "sigma", "reference", "skipped", "NFE"):
                    assert value == other[key], (table, row)
    assert {path.name for path in two.iterdir() if path.is_file()} == FILES


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """200 steps in one go, and with SIGKILL at random moments, inside of saves, too."""
    options = [*TINY, "train.steps=200", "checkpoint.every=1", "probe.times=1", "heldout.every=0"]
    options += ["samples.every=0", "report.reference_steps=6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.loop.run(load_config(ROOT / "configs" / "digits.yaml", [*options, f"out={whole}"]))
    random = np.random.default_rng(0)
    kills = 0
    while not (killed / "report.md").exists():
        command = [sys.executable, "-m", "train", "configs/digits.yaml", *options, f"out={killed}"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        before = sorted(killed.glob("checkpoints/*"))
        while process.poll() is None and sorted(killed.glob("checkpoints/*")) == before:
            time.sleep(0.01)  # it steps, and saves at every step
        try:
            process.wait(float(random.uniform(0.5, 6)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3, "too fast to be killed"
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_it_trains_the_same(complete: Path, tmp_path: Path) -> None:
    # Something else that was compiled in this process, of another size and number of channels.
    other: Any = torch.compile(tiny_unet(img_resolution=16, in_channels=3, out_channels=3), backend="eager")
    other(torch.zeros(2, 3, 16, 16), torch.ones(2), None)
    options = ["network.arguments.dropout=0", *LIGHT]
    for compiled in ("false", "true"):
        train.loop.run(tiny(tmp_path / compiled, f"train.compile={compiled}", *options))
        AcceleratorState._reset_state(reset_partial_state=True)
    plain, compiled_weights = weights(tmp_path / "false"), weights(tmp_path / "true")
    assert plain.keys() == compiled_weights.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled_weights[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3"], "train.stepz"),
        (["train.batch=3"], "train.batch: expected a multiple of 2"),
    ],
)
def test_errors_reach_the_shell_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "run"
    result = launch(*TINY, *arguments, f"out={out}", processes=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert not (out / "config.yaml").exists(), "an impossible run was started"


@pytest.mark.usefixtures("brief")
def test_errors_along_all_axes_are_the_whole_error(tmp_path: Path) -> None:
    train.loop.run(tiny(tmp_path, *LIGHT, "heldout.bands=4"))
    whole = {
        (r["step"], r["weights"], r["sigma"]): float(r["error"]) for r in read_csv(tmp_path / "heldout.csv")
    }
    bands: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read_csv(tmp_path / "modes.csv"):
        bands.setdefault((row["step"], row["weights"], row["sigma"]), []).append(row)
    assert bands.keys() == whole.keys()
    for key, rows in bands.items():
        assert [int(row["axes"]) for row in rows] == [1, 2, 4, 57]
        total = sum(int(row["axes"]) * float(row["error"]) for row in rows)
        assert total == pytest.approx(64 * whole[key], rel=1e-4), key
        variances = [float(row["variance"]) for row in rows]
        assert variances == sorted(variances, reverse=True)
    start = next(rows for key, rows in bands.items() if key == ("4", "ema", "5.0"))
    for row in start:  # at high noise, the model is its Gaussian, which predicts its error
        assert float(row["error"]) == pytest.approx(float(row["gaussian"]), rel=0.8), row
