"""Injuries for test_faults.py: full disks, kills at the n-th change of the file system, tiny runs."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tqdm import tqdm

import train.loop
from train.config import Config
from train.configfile import load_config

ROOT = Path(__file__).parent.parent
TINY = [
    "network.name=MLP",
    "network.arguments.model_channels=8",
    "network.arguments.num_blocks=1",
    "network.arguments.channel_mult=null",
    "network.arguments.attn_resolutions=null",
    "network.arguments.dropout=0.1",
    "bypass.gate=false",
    "fit.components=[]",
    "ema.halflife_kimg=[0.1]",
    "probe.sigmas=[1]",
    "probe.times=2",
    "probe.queries=4",
    "heldout.every=4",
    "heldout.queries=16",
    "heldout.sigmas=[0.5,2]",
    "samples.every=0",
    "train.batch=16",
    "train.steps=8",
    "train.warmup=3",
    "train.log_every=4",
    "train.trackers=[]",
    "checkpoint.every=2",
    "report.samples=4",
    "report.draws=1",
    "report.sample_steps=6",
    "report.skips=[0]",
    "report.picture_skip=2",
    "report.reference_steps=6",
]

# At its first use autograd starts a thread for each accelerator that is registered, and with threads it works
# in no forked process. Compiling registers one: so it is used before any test compiles.
torch.zeros((), requires_grad=True).backward()


class Killed(BaseException):
    """Stands for SIGKILL: nothing but cleaning up catches it."""


def tiny(out: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", [*TINY, f"out={out}", *overrides])


def run(out: Path, *overrides: str) -> None:
    """A run in this process, without its tables and figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "write_report", lambda *_: "report\n")
        try:
            train.loop.run(tiny(out, *overrides))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()


def command(out: Path | str, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "train",
        str(ROOT / "configs" / "digits.yaml"),
        *TINY,
        f"out={out}",
        *overrides,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """A process of its own, with its output in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(arguments, **{"cwd": ROOT, "env": environment(), "text": True, **pipes})


def errors_of(text: str) -> list[str]:
    """The lines of a message; a traceback is a failure."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def mount(path: Path, *options: str) -> None:
    """A tmpfs; skips the test where mounting is not permitted."""
    path.mkdir(exist_ok=True)
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted")


def unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


class Disk:
    """A folder on a disk that can be filled, and freed."""

    def __init__(self, path: Path, full: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.path, self.full = path, full


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A tmpfs of a size, such as 2m."""
    mount(path, f"size={size}")

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        ballast = path / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        try:
            yield
        finally:
            ballast.unlink()

    try:
        yield Disk(path, full)
    finally:
        unmount(path)


@contextlib.contextmanager
def limited_files(path: Path) -> Iterator[Disk]:
    """Any folder, in which no file can grow: what a full disk is to those who may not mount one."""
    path.mkdir()

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield Disk(path, full)


def killed(
    change: Callable[[], object], at: int | None = None, when: Callable[[], None] | None = None
) -> bool:
    """Whether `change`, in a process of its own, is ended by SIGKILL before its end.

    It is sent before the `at`-th call (from 0) that changes files, or when `when` returns.
    """
    child = os.fork()
    if child == 0:
        try:
            faulthandler.enable(all_threads=True)
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # its own: who is killed would keep that of all processes
            if at is not None:
                die_at(at)
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                change()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if when is not None:
        when()
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.002)
    if not done[0]:
        os.kill(child, signal.SIGABRT)  # shows where it hangs
        os.waitpid(child, 0)
        raise AssertionError("it hung before it was killed")
    status = done[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed before it was killed"
    return os.WIFSIGNALED(status)


def die_at(call: int) -> None:
    """Kills this process before the call of this number that changes files."""
    calls: list[tuple[Any, str]] = [(Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "mkdir")]
    calls += [(Path, "rmdir"), (Path, "write_text"), (os, "unlink"), (os, "rmdir"), (os, "fsync")]
    left = call

    def dying(original: Any) -> Any:
        def replacement(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*arguments, **keywords)

        return replacement

    for owner, name in calls:
        setattr(owner, name, dying(getattr(owner, name)))


def killed_at_every_change(change: Callable[[], object], after: Callable[[int], None]) -> int:
    """Kills `change` before each of its calls that change files, each time followed by `after`.

    Returns the number of kills, when there was nothing left to be killed.
    """
    kills = 0
    while killed(change, at=kills):
        kills += 1
        after(kills)
    return kills
