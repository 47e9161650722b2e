"""Injured runs: each goes on as if nothing had happened, or ends with one clear message.

Whole processes that are killed, starved of disk space or of their peers are marked slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fault_tools import (
    ROOT,
    Disk,
    Killed,
    command,
    environment,
    errors_of,
    killed,
    killed_at_every_change,
    limited_files,
    mount,
    run,
    small_disk,
    start,
    tiny,
    unmount,
)
from PIL import Image
from safetensors.torch import load_file

import gaussnet
import train.__main__
import train.loop
from gaussnet import hub
from gaussnet.cli import main as gaussnet_main
from train import callbacks
from train.checkpoints import MANIFEST, damage
from train.config import ConfigError, DataConfig
from train.configfile import load_config, to_yaml
from train.data import StepSampler, load_data, loader
from train.rundir import RunFolder
from train.writing import RunError, append_csv, read_csv

PARTS = ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    expected, got = weights(theirs), weights(ours)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    run(out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that was killed before its report."""
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    (out / "report.md").unlink()
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace(str(whole), str(out)))
    return out


def save(folder: RunFolder, step: int, keep: int = 2, size: int = 5000) -> None:
    """A checkpoint of a model of nothing but its step."""

    def write(path: Path) -> None:
        path.mkdir(parents=True)
        for name in PARTS:
            (path / name).write_bytes(bytes([step]) * size)

    folder.save_checkpoint(step, keep, write, is_main=True, data={"images to train on": 10})


# Checkpoints ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(place: float) -> Callable[[Path], None]:
    def injure(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return injure


INJURIES = {
    "truncated": cut,
    "last byte cut": cut_last_byte,
    "empty": empty,
    "missing": Path.unlink,
    "bit flipped in the header": flip(0.001),
    "bit flipped in the payload": flip(0.7),
    "bit flipped at the end": flip(1.0),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("injury", INJURIES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    copy: Path, name: str, injury: str, caplog: pytest.LogCaptureFixture
) -> None:
    INJURIES[injury](copy / "checkpoints" / "step-000000008" / name)
    last = RunFolder(copy).last_checkpoint()
    assert last is not None
    assert last.name == "step-000000006"
    (line,) = caplog.messages
    assert "step-000000008 is damaged, and passed over" in line
    assert name in line
    INJURIES[injury](copy / "checkpoints" / "step-000000006" / name)
    with pytest.raises(ConfigError, match="checkpoints holds no whole checkpoint: remove it to begin anew"):
        RunFolder(copy).last_checkpoint()


@pytest.mark.parametrize("injury", ["truncated", "empty", "bit flipped in the header"])
def test_a_damaged_manifest_condemns_its_checkpoint(
    copy: Path, injury: str, caplog: pytest.LogCaptureFixture
) -> None:
    INJURIES[injury](copy / "checkpoints" / "step-000000008" / MANIFEST)
    last = RunFolder(copy).last_checkpoint()
    assert last is not None
    assert last.name == "step-000000006"
    assert "manifest.json" in caplog.text


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"sha256": null}', '{"sha256": ["a"]}', '{"sha256": {"no": 1}}']
)
def test_a_manifest_of_something_else_condemns_its_checkpoint(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert damage(tmp_path) is not None


def test_a_checkpoint_without_manifest_is_taken_with_a_warning_if_it_can_be_loaded(
    copy: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (6, 8):
        (copy / "checkpoints" / f"step-{step:09d}" / MANIFEST).unlink()
    cut(copy / "checkpoints" / "step-000000008" / "optimizer.bin")
    with pytest.raises(ConfigError, match="step-000000008 cannot be loaded: "):
        run(copy)
    shutil.rmtree(copy / "checkpoints" / "step-000000008")
    run(copy)
    assert "step-000000006 has no manifest.json to check it by" in caplog.text
    assert_same_weights(copy, whole)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(copy: Path, whole: Path) -> None:
    flip(0.7)(copy / "checkpoints" / "step-000000008" / "model.safetensors")
    run(copy)
    assert_same_weights(copy, whole)
    assert_same_weights(copy / "best", whole / "best")
    assert (copy / "heldout.csv").read_text() == (whole / "heldout.csv").read_text()
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["step-000000006", "step-000000008", "step-000000008.damaged"]
    assert damage(copy / "checkpoints" / "step-000000008") is None


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 8):
        save(folder, step)
    empty(folder.checkpoints / "step-000000008" / PARTS[0])
    folder.discard_after(4)
    save(folder, 6, keep=1)
    assert folder.last_checkpoint() == folder.checkpoints / "step-000000006"


def test_a_save_killed_at_any_change_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def begin() -> None:
        shutil.rmtree(folder.path, ignore_errors=True)
        for step in (2, 4):
            save(folder, step, keep=1)
        save(folder, 6, keep=1)

    def look(kills: int) -> None:
        last = folder.last_checkpoint()
        assert last is not None, kills
        step = int(last.name.removeprefix("step-"))
        assert step in (6, 8), kills
        assert all((last / name).read_bytes() == bytes([step]) * 5000 for name in PARTS)
        folder.discard_after(step)
        save(folder, step + 2, keep=1)  # and it goes on
        assert folder.last_checkpoint() == folder.checkpoints / f"step-{step + 2:09d}"
        begin()

    begin()
    assert killed_at_every_change(lambda: save(folder, 8, keep=1), look) > 8


def test_a_save_over_a_checkpoint_of_the_same_step_leaves_one_of_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (6, 8):
        save(folder, step)
    # Killed while it was removed: rmtree has got as far as one of its files.
    (folder.checkpoints / "step-000000008" / "optimizer.bin").unlink()
    assert folder.last_checkpoint() == folder.checkpoints / "step-000000006"


def test_a_best_model_killed_at_any_change_is_saved_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first, second = (gaussnet.GaussianDenoiser.isotropic(torch.full((1, 2, 2), m), 1.0) for m in (0.1, 0.2))
    folder.save_model(first, folder.best)

    def look(kills: int) -> None:
        held = folder.best if folder.best.exists() else tmp_path / "best.old"
        mean = gaussnet.from_pretrained(held).state_dict()["mean"]
        assert torch.equal(mean, first.mean) or torch.equal(mean, second.mean), kills
        folder.save_model(second, folder.best)
        assert torch.equal(gaussnet.from_pretrained(folder.best).state_dict()["mean"], second.mean)
        folder.save_model(first, folder.best)

    assert killed_at_every_change(lambda: folder.save_model(second, folder.best), look) > 5


# Tables --------------------------------------------------------------------------------------------


def test_tables_cut_at_any_byte_go_on_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [{"step": step, "weights": "ema", "error": 0.25 * step} for step in (0, 10, 100)]
    append_csv(folder.heldout, rows)
    content = folder.heldout.read_bytes()
    for end in range(len(content) + 1):
        folder.heldout.write_bytes(content[:end])
        folder.discard_after(10)
        append_csv(folder.heldout, [{"step": 20, "weights": "ema", "error": 5.0}])
        got = read_csv(folder.heldout)
        expected = [{key: str(value) for key, value in row.items()} for row in rows[:2]]
        assert got[:-1] == expected[: len(got) - 1], end
        assert got[-1] == {"step": "20", "weights": "ema", "error": "5.0"}, end


def test_metrics_cut_at_any_byte_or_overwritten_go_on_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (5, 10, 100):
        folder.log({"step": step, "loss": 0.5})
    content = folder.metrics.read_bytes()
    tails = [b"", b"\0\0\0", b"\xff\xfe", b"5\n", b"null\n", b"[]\n", b'{"step": null}\n', b'{"loss": 1}\n']
    for injured in [content[:end] for end in range(len(content))] + [content + tail for tail in tails]:
        folder.metrics.write_bytes(injured)
        folder.discard_after(10)
        folder.log({"step": 12, "loss": 0.25})
        steps = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
        assert steps in ([12], [5, 12], [5, 10, 12]), injured
        assert len(injured) < len(content) or steps == [5, 10, 12]


# Disks ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    made = (
        small_disk(tmp_path / "disk", "2m") if request.param == "tmpfs" else limited_files(tmp_path / "disk")
    )
    with made as disk:
        yield disk


def test_a_full_disk_leaves_the_last_checkpoint_whole(disk: Disk) -> None:
    folder = RunFolder(disk.path / "run")
    save(folder, 2)
    with disk.full(), pytest.raises(OSError, match=r"No space left|File too large"):
        save(folder, 4)
    assert folder.last_checkpoint() == folder.checkpoints / "step-000000002"
    save(folder, 4)
    assert folder.last_checkpoint() == folder.checkpoints / "step-000000004"


def test_a_full_disk_is_named_with_the_table(disk: Disk) -> None:
    folder = RunFolder(disk.path)
    folder.log({"step": 1, "loss": 0.5})
    row = {"step": 2, "loss": 0.5, "text": 10_000 * "x"}
    with disk.full():
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: .*(No space|too large)"):
            folder.log(row)
        with pytest.raises(OSError, match=r"heldout\.csv could not be written: .*(No space|too large)"):
            append_csv(folder.heldout, [row])
    folder.discard_after(1)
    folder.log({"step": 2, "loss": 0.25})
    assert [json.loads(line)["loss"] for line in folder.metrics.read_text().splitlines()] == [0.5, 0.25]


def test_a_full_disk_leaves_the_old_model(disk: Disk) -> None:
    old, new = (gaussnet.GaussianDenoiser.isotropic(torch.full((1, 64, 64), m), 1.0) for m in (0.1, 0.2))
    old.save_pretrained(disk.path / "model")
    with disk.full(), pytest.raises(OSError, match=r"model could not be written|No space|too large"):
        new.save_pretrained(disk.path / "model")
    assert torch.equal(gaussnet.from_pretrained(disk.path / "model").state_dict()["mean"], old.mean)
    assert not (disk.path / "model" / ".partial").exists()


@pytest.mark.parametrize(
    "at",
    [
        "save_checkpoint",
        "final",
        *(pytest.param(at, marks=pytest.mark.slow) for at in ("log", "save_model", "append")),
    ],
)
def test_a_run_on_a_full_disk_ends_with_one_message_and_resumes(
    disk: Disk, whole: Path, at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, filled = disk.path / "run", []

    def starved(original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if filled or not when(*arguments):
                return original(*arguments, **keywords)
            filled.append(True)
            with disk.full():
                return original(*arguments, **keywords)

        return call

    owner, name, when = {
        "save_checkpoint": (train.loop.Accelerator, "save_state", lambda _, path: "004" in path),
        "log": (RunFolder, "log", lambda _, row: row["step"] == 2),
        "save_model": (RunFolder, "save_model", lambda *_: True),
        "append": (callbacks, "append_csv", lambda path, _: path.name == "heldout.csv"),
        "final": (gaussnet.BypassPrecond, "save_pretrained", lambda _, path: path == out),
    }[at]
    monkeypatch.setattr(owner, name, starved(getattr(owner, name), when))
    assert in_main(out, monkeypatch) == 1
    (line,) = errors_of(capsys.readouterr().err)
    assert "could not be written" in line
    assert "once that is put right, the same command goes on" in line
    last = RunFolder(out).last_checkpoint()
    expected = {"save_checkpoint": 2, "log": None, "save_model": None, "append": None, "final": 8}[at]
    assert last == (None if expected is None else out / "checkpoints" / f"step-{expected:09d}")
    run(out)
    assert_same_weights(out, whole)
    assert (out / "heldout.csv").read_text() == (whole / "heldout.csv").read_text()


def in_main(out: Path, monkeypatch: pytest.MonkeyPatch, **parts: Callable[..., Any]) -> int:
    """The command line of a run in this process, with parts of the loop replaced; returns the exit status."""
    for name, part in ({"write_report": lambda *_: "report\n"} | parts).items():
        monkeypatch.setattr(train.loop, name, part)
    monkeypatch.setattr(sys, "argv", command(out)[2:])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train.__main__.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)


# The folder ----------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The id of another process that has the folder tmp_path / "run"."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        folder = RunFolder(tmp_path / "run")
        folder.lock()
        if os.fork() == 0:  # as data workers do, which outlive a kill by seconds
            time.sleep(30)
            os._exit(0)
        os.write(theirs, b"!")
        time.sleep(30)
        os._exit(0)
    assert os.read(ours, 1) == b"!"
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_run_in_a_folder_is_refused_by_the_first_ones_name(
    tmp_path: Path, holder: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_main(tmp_path / "run", monkeypatch) == 2
    (line,) = errors_of(capsys.readouterr().err)
    assert line == f"error: out: {tmp_path}/run is in use by process {holder} on {socket.gethostname()}"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path, holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {holder} on ")
    folder = RunFolder(tmp_path / "run")
    folder.lock()  # while a worker of the other still lives
    assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    folder.unlock()
    assert not (tmp_path / "run").exists(), "a folder that nothing was written to"


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: Any) -> None:
    folder, original, seen = RunFolder(tmp_path), fcntl.lockf, []

    def lockf(file: Any, how: int) -> None:
        if not seen:
            (tmp_path / ".lock").unlink()  # as another process does, when it ends between open and lockf
        seen.append(file)
        original(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder.lock()
    assert len(seen) == 2
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    folder.unlock()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="out: expected a folder, got the file"):
        run(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"out: cannot write to .*file/run: .*Not a directory"):
        run(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_that_cannot_be_written_to_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: cannot write to /proc/gaussnet: "):
        run(Path("/proc/gaussnet"))
    mount(tmp_path / "disk", "ro")
    try:
        with pytest.raises(ConfigError, match=r"out: cannot write to .*disk: .*Read-only"):
            run(tmp_path / "disk")
    finally:
        unmount(tmp_path / "disk")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", b"\xff\xfe\0", b"out: [", b"- 1\n- 2\n", b"word", b"a: ${"]
)
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"{tmp_path}/config\.yaml is damaged: .*remove it to go on unchecked"
    ):
        RunFolder(tmp_path).check(tiny(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")


def test_a_cut_config_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    whole = to_yaml(config)
    for end in range(0, len(whole) - 1, 300):  # but for the last line break, which says nothing
        (tmp_path / "config.yaml").write_text(whole[:end])
        with pytest.raises(ConfigError, match=r"is damaged|another configuration"):
            RunFolder(tmp_path).check(config)


# Data ----------------------------------------------------------------------------------------------


def images(path: Path, count: int = 60, side: int = 8, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side), np.uint8)
    np.save(path, pixels)
    return pixels


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A run without its report, and its options; each test writes other images in the place of its own."""
    folder = tmp_path_factory.mktemp("earlier")
    source = folder / "images.npy"
    options = (f"data.source={source}", "train.steps=2", "heldout.every=0", "probe.queries=2")
    images(source)
    run(folder / "run", *options)
    (folder / "run" / "report.md").unlink()
    return folder, options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 50}, r"images to train on: 48 -> 40\n  images held out: 12 -> 10"),
        ({"count": 61}, r"images to train on: 48 -> 49"),
        ({"side": 6}, r"shape: \[1, 8, 8\] -> \[1, 6, 6\]"),
        ({"seed": 1}, r"mean: -?0\.\d+ -> -?0\.\d+"),
    ],
)
def test_data_that_changed_between_runs_are_refused_with_both_numbers(
    earlier: tuple[Path, tuple[str, ...]], change: dict[str, int], message: str
) -> None:
    (folder, options), out = earlier, earlier[0] / "run"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    images(folder / "images.npy", **change)
    with pytest.raises(ConfigError, match=rf"data\.source: .*trained on other images(?s:.*){message}"):
        run(out, *options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scaling", [None, "none"])
def test_data_that_hold_no_numbers_are_refused_at_load(
    tmp_path: Path, value: float, scaling: str | None
) -> None:
    pixels = images(tmp_path / "images.npy", 200).astype(np.float32) / 127.5 - 1
    pixels[[101, 150], 3, 3] = value  # neither is among the 32 that are looked at to tell the range
    np.save(tmp_path / "images.npy", pixels)
    config = DataConfig(source=str(tmp_path / "images.npy"), scaling=scaling)
    with pytest.raises(ConfigError, match=r"data\.source: .*image 101: expected .*, one of 2 such images"):
        load_data(config)


def test_signals_to_the_whole_group_leave_data_workers_to_the_run() -> None:
    def go_on() -> None:
        os.setpgrp()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        data = load_data(DataConfig()).train
        batches = iter(loader(data, StepSampler(len(data), 4, 0, 0, 40, slice(0, 4)), workers=1, pin=False))
        next(batches)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)
        time.sleep(0.2)
        assert sum(1 for _ in batches) == 39

    assert not killed(go_on)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_that_are_damaged_during_a_run_end_it_with_the_step(tmp_path: Path, workers: int) -> None:
    source, out = tmp_path / "images.npy", tmp_path / "run"
    np.save(source, images(source).astype(np.float32) / 127.5 - 1)
    with pytest.MonkeyPatch.context() as patch:
        original = train.loop.load_batches

        def load_batches(*arguments: Any) -> Any:
            np.load(source, mmap_mode="r+")[:] = np.nan
            return original(*arguments)

        patch.setattr(train.loop, "load_batches", load_batches)
        with pytest.raises(RunError, match=r"data\.source: step 1: .*expected values in .*nan"):
            run(out, f"data.source={source}", "heldout.every=0", f"data.workers={workers}")
    assert RunFolder(out).last_checkpoint() is None
    gc.collect()  # torch waits seconds for a worker that has failed: not in the next test


# Numbers -------------------------------------------------------------------------------------------


def test_a_gradient_that_is_no_number_is_zeroed_counted_and_not_saved(
    tmp_path: Path, monkeypatch: Any
) -> None:
    original, calls = train.loop.zero_bad_gradients, []

    def injured(parameters: Any) -> torch.Tensor:
        held = list(parameters)
        calls.append(held)
        if len(calls) == 4:
            held[0].grad.view(-1)[0] = torch.nan
            held[-1].grad.view(-1)[0] = torch.inf
        return original(held)

    monkeypatch.setattr(train.loop, "zero_bad_gradients", injured)
    run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 1]
    assert_finite(tmp_path / "checkpoints" / "step-000000008")


def assert_finite(checkpoint: Path) -> None:
    assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert all(moment.isfinite().all() for slot in state.values() for moment in slot.values())
    average = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in average.values())


def test_weights_that_are_no_numbers_are_not_saved(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    original = train.loop.learning_rate
    monkeypatch.setattr(
        train.loop, "learning_rate", lambda step, *rest: float("inf") if step == 4 else original(step, *rest)
    )
    assert in_main(tmp_path, monkeypatch) == 1
    (line,) = errors_of(capsys.readouterr().err)
    last = tmp_path / "checkpoints" / "step-000000004"
    expected = (
        f"weights are not finite at step 6, which is not saved: lower train.lr with --fork, from {last}"
    )
    assert line == f"error: {expected}"
    assert RunFolder(tmp_path).last_checkpoint() == last
    assert_finite(last)


# Signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "number"), [("fit_analytic", signal.SIGTERM), ("write_report", signal.SIGINT)]
)
def test_a_signal_outside_of_the_loop_ends_the_run_at_once(
    tmp_path: Path, whole: Path, monkeypatch: Any, capsys: Any, at: str, number: signal.Signals
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        assert in_main(tmp_path / "run", patch, **{at: signalled}) == 128 + number
    assert errors_of(out := capsys.readouterr().err) == []
    assert out.splitlines()[-1] == f"{number.name}: stopped; the same command goes on"
    assert not (tmp_path / "run" / ".lock").exists()
    run(tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole)


# The command line of the library -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "gaussian"
    gaussnet.GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 0.3).save_pretrained(out)
    return out


def test_sampling_killed_in_an_image_leaves_no_half_of_it(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    command = ["sample", str(model), "--seeds", "0-5", "--steps", "3", "--batch", "2", "--device", "cpu"]
    assert gaussnet_main([*command, "--out", str(tmp_path / "whole")]) == 0
    original = Image.Image.save

    def dying(self: Image.Image, path: Path, *arguments: Any, **keywords: Any) -> None:
        original(self, path, *arguments, **keywords)
        if path.stem == "000003":
            cut(path)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", dying)
        with pytest.raises(Killed):
            gaussnet_main([*command, "--out", str(tmp_path / "killed")])
    assert sorted(path.name for path in (tmp_path / "killed").glob("*.png")) == [
        f"00000{seed}.png" for seed in range(3)
    ]
    assert gaussnet_main([*command, "--out", str(tmp_path / "killed")]) == 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_model_killed_at_any_change_is_the_old_or_the_new_one_or_says_that_it_is_none(
    tmp_path: Path,
) -> None:
    old, new = (gaussnet.GaussianDenoiser.isotropic(torch.full((1, n, n), 0.1 * n), 1.0) for n in (2, 3))
    old.provenance, new.provenance = {"made": "first"}, {"made": "second"}
    old.save_pretrained(tmp_path / "model")
    told: list[str] = []

    def look(kills: int) -> None:
        try:
            found = gaussnet.from_pretrained(tmp_path / "model")
            expected = old if found.provenance["made"] == "first" else new
            assert torch.equal(found.state_dict()["mean"], expected.mean), kills
            told.append(found.provenance["made"])
        except FileNotFoundError as error:
            told.append(str(error))
        new.save_pretrained(tmp_path / "model")
        assert torch.equal(gaussnet.from_pretrained(tmp_path / "model").state_dict()["mean"], new.mean)
        old.save_pretrained(tmp_path / "model")

    killed_at_every_change(lambda: new.save_pretrained(tmp_path / "model"), look)
    assert set(told) - {"first", "second"} <= {
        f"no config.json in {tmp_path / 'model'}: expected a folder that save_pretrained wrote"
    }
    assert told == sorted(
        told, key=lambda text: ["first", *sorted(set(told) - {"first", "second"}), "second"].index(text)
    )
    assert told.count("first") >= 5
    assert "second" in told


def test_a_fit_killed_while_it_writes_weights_leaves_the_old_model(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "model"
    shutil.copytree(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def dying(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_file", dying)
        with pytest.raises(Killed):
            gaussnet_main(["fit", "digits", "--out", str(out), "--overwrite", "--rank", "4"])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert gaussnet_main(["fit", "digits", "--out", str(out), "--overwrite", "--rank", "4"]) == 0
    assert gaussnet.from_pretrained(out).provenance["data"]["name"] == "digits"


def test_sampling_killed_again_and_again_has_whole_images_alone(model: Path, tmp_path: Path) -> None:
    command = ["sample", str(model), "--seeds", "0-59", "--steps", "2", "--batch", "1", "--device", "cpu"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert gaussnet_main([*command, "--out", str(whole)]) == 0
    random, kills = np.random.default_rng(0), 0
    while killed(lambda: gaussnet_main([*command, "--out", str(out)]), at=int(random.integers(5, 25))):
        kills += 1
        for path in out.glob("*.png"):
            assert path.read_bytes() == (whole / path.name).read_bytes(), path.name
    assert kills >= 3
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert (out / "sample.json").read_bytes() == (whole / "sample.json").read_bytes()


# Whole runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path: Path, rounds: int) -> None:
    options = (f"train.steps={30 * rounds}", "checkpoint.every=1", "heldout.every=3", "probe.share=1")
    run(tmp_path / "whole", *options)
    random, kills, out = np.random.default_rng(rounds), 0, tmp_path / "killed"
    for number in range(10 * rounds):
        if (out / "report.md").exists() or kills == rounds:
            break
        # By turns: at any moment, and where it writes; about 30 calls a step change files.
        at, pause, before = int(random.integers(20, 400)), random.uniform(0, 0.1), latest(out)

        def after_a_save(before: str = before, pause: float = pause) -> None:
            wait_for(lambda: latest(out) != before or (out / "report.md").exists())
            time.sleep(pause)

        if number % 2:
            kills += killed(lambda: run(out, *options), when=after_a_save)
        else:
            kills += killed(lambda: run(out, *options), at=at)
    assert kills == rounds, "too fast to be killed"
    run(out, *options)
    assert_same_weights(out, tmp_path / "whole")
    assert_same_weights(out / "best", tmp_path / "whole" / "best")
    for table in ("heldout.csv", "probes.csv"):
        assert (out / table).read_text() == (tmp_path / "whole" / table).read_text(), table
    losses = [
        [
            (row["step"], row["loss"])
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        ]
        for path in (out, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


@pytest.mark.slow
def test_a_whole_command_on_a_full_disk_ends_with_one_message_and_resumes(
    whole: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "400k") as disk:
        options = ["checkpoint.every=1", "checkpoint.keep=8", "train.trackers=[tensorboard]"]
        starved = start(command(disk.path / "run", *options))
        _, told = starved.communicate(timeout=120)
        assert starved.returncode == 1, told
        (line,) = errors_of(told)
        assert "could not be written" in line
        assert "; 0.0 MiB are free there; once" in line
        last = RunFolder(disk.path / "run").last_checkpoint()
        assert last is not None
        mount(disk.path, "remount", "size=20m")
        resumed = start(command(disk.path / "run", *options))
        out, told = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, told
        assert f"at step {int(last.name[-3:])} of 8" in out
        assert_same_weights(disk.path / "run", whole)


@pytest.mark.slow
def test_two_commands_in_one_folder_and_one_after_the_other(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "train.steps=100000", "checkpoint.every=20", "heldout.every=0")
    first = start(arguments)
    wait_for(lambda: RunFolder(tmp_path / "run").last_checkpoint() is not None)
    second = start(arguments)
    _, told = second.communicate(timeout=120)
    assert second.returncode == 2
    holder = f"process {first.pid} on {socket.gethostname()}"
    assert errors_of(told) == [f"error: out: {tmp_path}/run is in use by {holder}"]
    assert first.poll() is None, "the first went on"
    first.kill()
    first.communicate()
    third = start(arguments)
    before = RunFolder(tmp_path / "run").last_checkpoint()
    wait_for(lambda: RunFolder(tmp_path / "run").last_checkpoint() != before)
    third.send_signal(signal.SIGTERM)
    out, told = third.communicate(timeout=120)
    assert third.returncode == 0, told
    assert "SIGTERM: saved step" in out
    assert damage(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]) is None


def latest(out: Path) -> str:
    return max((path.name for path in out.glob("checkpoints/*[0-9]")), default="")


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


DIES = """
import os, signal, sys
import train.__main__, train.loop

original = train.loop.make_batch

def make_batch(*arguments):
    if os.environ["RANK"] == os.environ["DIES"] and arguments[2] == 5:
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("as any other")
    return original(*arguments)

train.loop.make_batch = make_batch
sys.exit(train.__main__.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_process_whose_peer_dies_ends_within_a_minute(tmp_path: Path, how: str, dies: int) -> None:
    """Without a launcher, which would end it."""
    (tmp_path / "dies.py").write_text(DIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, str(tmp_path / "dies.py"), *command(tmp_path / "run")[3:]]
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(ROOT), "HOW": how, "DIES": str(dies)}
    processes = [
        start(arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    died, left = processes[dies], processes[1 - dies]
    try:
        died.communicate(timeout=120)
        assert died.returncode == (-signal.SIGKILL if how == "killed" else 1)
        _, told = left.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert left.returncode not in (0, None), told
    assert "peer" in told or "onnection" in told, told
    last = RunFolder(tmp_path / "run").last_checkpoint()
    assert last is not None
    assert last.name == "step-000000004"
    run(tmp_path / "run")  # on one process
    assert (tmp_path / "run" / "report.md").exists()
