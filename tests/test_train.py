"""The training application end to end, at a tiny size."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import gaussnet
import train.loop
from gaussnet.summary import summarise
from train.config import Config, ConfigError, Precond, load_config
from train.data import load_data
from train.models import build_network, fit_analytic, wrap

ROOT = Path(__file__).parent.parent
TINY = [
    "network.model_channels=8",
    "network.channel_mult=[1]",
    "network.dropout=0.1",
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
FILES = {
    "README.md", "config.json", "config.yaml", "errors.csv", "metrics.jsonl", "model.safetensors",
    "probes.csv", "probes.png", "report.md", "samples.png", "skips.csv",
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
    assert {row["reference"] for row in probes} == {"isotropic", "gaussian", "mixture", "delta"}
    assert {row["weights"] for row in probes} == {"raw", "ema"}
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
    clean = load_data(load_config(complete / "config.yaml").data).heldout
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


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resumed_run_equals_an_uninterrupted_one(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    class Killed(BaseException):
        pass

    original = train.loop.step_loss

    def dies(*arguments, **keywords):
        if arguments[4] == stop:
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "step_loss", dies)
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
    for name in ("probes.csv", "errors.csv", "skips.csv", "report.md"):
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


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) after step 2; the last checkpoint"):
        train.loop.run(tiny(tmp_path, "train.lr=1e30", "train.warmup=0"))


@pytest.mark.parametrize("precond", list(Precond), ids=lambda precond: precond.name)
def test_both_preconditionings_build_and_start_as_their_base(tmp_path: Path, precond: Precond) -> None:
    config = tiny(tmp_path, f"precond={precond.name}")
    data = load_data(config.data)
    gaussian = fit_analytic(config, data).gaussian
    model = wrap(config, build_network(config, data), gaussian, gate=None)
    x = data.heldout + 0.3
    assert torch.equal(model(x, 0.3), model.untrained(x, 0.3))
    assert isinstance(model, gaussnet.EDMPrecond) == (precond is Precond.edm)


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    runs: dict[int, Path] = {}
    for processes in (1, 2):
        runs[processes] = tmp_path / str(processes)
        result = launch(*TINY, "network.dropout=0", f"out={runs[processes]}", processes=processes)
        assert result.returncode == 0, result.stderr
        assert f"on {processes} process(es), cpu" in result.stdout
    losses = {
        processes: [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for processes, run in runs.items()
    }
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    one, two = weights(runs[1]), weights(runs[2])
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-5), name
    assert {path.name for path in runs[2].iterdir() if path.is_file()} == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["train.stepz=3"], "train.stepz"), (["train.batch=3"], "train.batch: expected a multiple of 2")],
)
def test_errors_reach_the_shell_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "run"
    result = launch(*TINY, *arguments, f"out={out}", processes=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert not (out / "config.yaml").exists(), "an impossible run was started"
