"""Does the bypass pay? Runs that differ by one thing each; `bypass_report.py` draws the conclusions.

    python benchmarks/bypass_ablation.py run --mnist FOLDER --emoji ZIP --task core
    python benchmarks/bypass_ablation.py run --mnist FOLDER --emoji ZIP --task emoji32 --arm edm bypass-all
    python benchmarks/bypass_ablation.py list
    python benchmarks/bypass_ablation.py collect        the tables again, from the folders of finished runs
    python benchmarks/bypass_report.py

An arm is a way to train a denoiser, as keys of train/config.py; a task is images, network and steps. Arms
of a task and seed see the same images in the same order, the same noise, and begin with the same weights
wherever shapes agree. The learning rate of each arm is the best of three in runs of a fifth of the steps,
with a seed of its own. Several of these commands can run beside each other, each with --threads 1: a run is
done by one of them. What was measured is added to the tables in benchmarks/bypass_ablation/ as runs end; a
run that is there is not done again. Noise is drawn on the device that trains: runs are compared with those of
the same device where there are such, and `--device cpu` or cuda does those that the tables lack of it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from bypass_tables import HERE, TABLES, collect, device_of, last_error, read
from bypass_tasks import ARMS, RATE_SEED, TASKS, Run, best_rate, finished, plain, runs


def train(run: Run, folder: Path, threads: int, device: str | None = None) -> bool:
    """Trains, or goes on; False if another process is at it, or it is complete.

    Raises:
        SystemExit: if a complete run is of another device than the one named.
    """
    path = folder / run.name
    if (path / "measured.json").is_file():
        if device not in (None, device_of(path)):
            raise SystemExit(
                f"{path}: expected a run on {device}, got one on {device_of(path)}: give another --folder"
            )
        return False
    path.mkdir(parents=True, exist_ok=True)
    lock = path / "lock"
    if not claim(lock):
        return False
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        keys = [
            *run.keys,
            f"out={path}",
            f"seed={run.seed}",
            f"train.lr={run.lr}",
            f"train.steps={run.steps}",
        ]
        command = [sys.executable, "-m", "train", str(HERE / "bypass_ablation.yaml"), *keys]
        with (path / "log.txt").open("a") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        measure = [sys.executable, str(HERE / "bypass_measure.py"), str(path)]
        if TASKS[run.task].features is not None and run.seed != RATE_SEED:
            measure += ["--features", str(TASKS[run.task].features)]
        if run.seed != RATE_SEED:
            subprocess.run(measure, env=environment, check=True)
        else:
            (path / "measured.json").write_text("[]")
    finally:
        lock.unlink(missing_ok=True)
    return True


def claim(lock: Path) -> bool:
    """Whether this process now holds the lock; that of a process that is gone is taken over."""
    folder = os.open(lock.parent, os.O_RDONLY)
    try:
        fcntl.flock(
            folder, fcntl.LOCK_EX
        )  # nobody sees a lock without its number, or takes over the same one
        try:
            owner = lock.read_text()
        except FileNotFoundError:
            owner = ""
        if owner.isdigit() and Path(f"/proc/{owner}").exists():
            return False
        lock.write_text(str(os.getpid()))
        return True
    finally:
        os.close(folder)


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The data of all tasks; what has to be made is made in the folder."""
    from bypass_data import emoji32, patches

    data = {"mnist": options.mnist or "torchvision:MNIST"}
    made = folder / "data"
    made.mkdir(parents=True, exist_ok=True)
    if options.emoji:
        data["emoji32"], data["groups"] = emoji32(Path(options.emoji), made)
    data["patches"], data["patch_groups"] = patches(made)
    return data


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "list", "collect"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="of the runs")
        command.add_argument("--mnist", help="folder of MNIST's files (default: torchvision's)")
        command.add_argument("--emoji", help="a zip of 64x64 images, for the task emoji32")
        command.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
        command.add_argument("--arm", nargs="+", choices=ARMS, help="default: all of the task")
        command.add_argument("--seeds", type=int, help="default: as many as the task has")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument(
            "--device", choices=("cpu", "cuda"), help="do also what the tables have of another alone"
        )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    folder = options.folder.resolve()
    data = prepare(options, folder)
    if "emoji32" in options.task and "emoji32" not in data:
        print("emoji32: left out, as --emoji is not given")
    tasks = [task for task in options.task if task != "emoji32" or "emoji32" in data]
    while work(tasks, options, folder, data):  # runs that waited for learning rates come in the next pass
        pass
    for line in waiting(tasks, options.arm, read(TABLES / "errors.csv")):
        print(line)


def work(tasks: list[str], options: argparse.Namespace, folder: Path, data: Mapping[str, str]) -> bool:
    """Goes through all runs once; whether anything was trained."""
    trained, errors = False, read(TABLES / "errors.csv")
    known = finished(errors, options.device)
    for task in tasks:
        arms = [arm for arm in TASKS[task].arms if options.arm is None or arm in options.arm]
        for run in runs(task, arms, options.seeds, errors, data):
            if options.command == "list":
                done = (folder / run.name / "measured.json").is_file() or run in known
                print(f"{'done' if done else 'open':5} {run.name}, {run.steps} steps")
            elif options.command == "collect":
                if (folder / run.name / "measured.json").is_file():
                    collect(run, folder)
            elif run not in known and train(run, folder, options.threads, options.device):
                collect(run, folder)
                print(f"{run.name}: {last_error(folder / run.name):.4f}", flush=True)
                trained = True
    return trained


def waiting(tasks: list[str], arms: list[str] | None, errors: list[dict[str, str]]) -> list[str]:
    """What is not run, as the short runs that choose its learning rate are not in the table."""
    lines: list[str] = []
    for task in tasks:
        source = task if TASKS[task].rates else "core"
        chosen = [arm for arm in TASKS[task].arms if arms is None or arm in arms]
        lacking = dict.fromkeys(plain(arm) for arm in chosen if best_rate(source, plain(arm), errors) is None)
        if lacking:
            needed = f"--task {source} --arm {' '.join(lacking)}"
            lines.append(f"{task}: waits for the learning rates of short runs: run {needed}")
    return lines


if __name__ == "__main__":
    main()
