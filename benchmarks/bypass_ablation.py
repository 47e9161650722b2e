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
run that is there is not done again.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TABLES = HERE / "bypass_ablation"
RATES = (2e-3, 4e-3, 8e-3)
RATE_SEED = 100
SHORT = 5  # runs that choose a learning rate have this part of the steps

BLEND = "bypass.base=blend"
CROSS = "fit.folds=5"
NO_GATE, HIDDEN, CHANNEL = "bypass.gate=false", "bypass.show_gaussian=false", "bypass.centre=channel"
ARMS: dict[str, tuple[str, ...]] = {
    "edm": ("precond=edm",),
    "edm-moments": ("bypass.base=isotropic", HIDDEN, NO_GATE),
    "edm-shown": ("bypass.base=isotropic", NO_GATE),
    "bypass": ("bypass.base=gaussian", HIDDEN, NO_GATE),
    "bypass-gate": ("bypass.base=gaussian", HIDDEN),
    "bypass-shown": ("bypass.base=gaussian", NO_GATE),
    "bypass-gate-shown": ("bypass.base=gaussian",),
    "bypass-all": (BLEND,),  # with gate and shown
    "bypass-sample": (BLEND, "fit.shrinkage=none"),
    "bypass-whitened": (BLEND, "bypass.whiten=true"),
    "marginal": ("bypass.base=marginal",),  # with gate and shown: the defaults
    "marginal-hidden": ("bypass.base=marginal", HIDDEN),
    "edm-shown-folds": ("bypass.base=isotropic", NO_GATE, CROSS),
    "bypass-all-folds": (BLEND, CROSS),
    "marginal-folds": ("bypass.base=marginal", CROSS),  # the defaults where images are few
    "edm-moments-channel": ("bypass.base=isotropic", HIDDEN, NO_GATE, CHANNEL),
    "bypass-all-channel": (BLEND, CHANNEL),
    "marginal-channel": ("bypass.base=marginal", CHANNEL),
    "edm-warm": ("precond=edm", "loss.gaussian_steps=150"),
    "edm-classes": ("precond=edm", "data.labels=true"),
    "bypass-classes": (BLEND, "data.labels=true", "bypass.gaussian=classes"),
    "bypass-mixture": (BLEND, "bypass.gaussian=mixture", "bypass.components=10"),
    "bypass-truncated": (BLEND, "loss.sigma_max=10"),
}
HEADLINE = ("edm", "bypass-all", "marginal", "edm-moments", "edm-shown")
FEW = (*HEADLINE, "marginal-folds", "bypass-all-folds", "edm-shown-folds")
PARTS = (*FEW, "bypass-shown", "marginal-hidden")
LARGEST = ("edm", "bypass-all", "marginal", "bypass-all-folds", "marginal-folds")


@dataclass(frozen=True)
class Task:
    """Images, network and steps; arms and seeds that are worth their time."""

    keys: tuple[str, ...]
    arms: tuple[str, ...] = HEADLINE
    seeds: int = 2
    steps: int = 1500
    rates: tuple[float, ...] = RATES  # of which arms choose one; none: they take that of the task `core`
    widths: tuple[int, ...] = ()  # of a network that sees 1, 2, 3 images, where inputs are many parameters
    features: str | None = None


CORE = tuple(arm for arm in ARMS if CROSS not in ARMS[arm])
N = "network.arguments"
NO_UNET = (f"{N}.channel_mult=null", f"{N}.attn_resolutions=null", f"{N}.num_blocks=4")
DIT = (*NO_UNET, "network.name=DiT", f"{N}.model_channels=128", f"{N}.patch_size=4", f"{N}.num_heads=4")
MLP = (*NO_UNET, "network.name=MLP")
MINI_EDM = ("data.pad=2", "network.arguments.channel_mult=[1,2,3,4]")
UNET = "network.arguments.model_channels=24"
FEATURES = "tests/fixtures/mnist_features"
TASKS: dict[str, Task] = {
    "core": Task(("data.source={mnist}",), CORE, 3, features=FEATURES),
    "emoji32": Task(("data.source={emoji32}", "data.groups={groups}", "data.heldout=0.15", UNET), FEW),
    "digits": Task(("data.source=digits", "data.heldout=0.2", "network.arguments.channel_mult=[1,2]"), FEW),
    "patches": Task(("data.source={patches}", "data.groups={patch_groups}", "data.heldout=0.2", UNET), FEW),
    "dit": Task(("data.source={mnist}", *DIT), rates=(5e-4, 1e-3, 2e-3)),  # above, runs break late
    "mlp": Task(("data.source={mnist}", *MLP), rates=(5e-4, 1e-3, 2e-3), widths=(512, 492, 474)),
    "mnist-300": Task(("data.source={mnist}", "data.heldout=59700"), PARTS, rates=(), features=FEATURES),
    "mnist-3000": Task(("data.source={mnist}", "data.heldout=57000"), FEW, rates=(), features=FEATURES),
    "mnist-10000": Task(("data.source={mnist}", "data.heldout=50000"), LARGEST, rates=(), features=FEATURES),
    # At 8e-3, which short runs would choose, three of five arms break between steps 2,000 and 4,000.
    "long": Task(("data.source={mnist}", *MINI_EDM), steps=10_000, rates=(2e-3,), features=FEATURES),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    arm: str
    seed: int
    lr: float
    steps: int
    keys: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}/{self.arm}/lr{self.lr:g}-seed{self.seed}"


def runs(
    task: str, arms: list[str], seeds: int | None, errors: list[dict[str, str]], data: Mapping[str, str]
) -> Iterator[Run]:
    """All runs of a task, those of the first seeds first; learning rates are chosen when they can be.

    `errors` are the rows of the table so far.
    """
    spec = TASKS[task]
    for seed in range(-1, spec.seeds if seeds is None else seeds):
        for arm in arms:
            keys = keys_of(task, arm, data)
            if seed < 0:
                for lr in spec.rates if len(spec.rates) > 1 and arm == plain(arm) else ():
                    yield Run(task, arm, RATE_SEED, lr, spec.steps // SHORT, keys)
                continue
            rate = best_rate(task if spec.rates else "core", plain(arm), errors)
            if rate is not None:
                yield Run(task, arm, seed, rate, spec.steps, keys)


def keys_of(task: str, arm: str, data: Mapping[str, str]) -> tuple[str, ...]:
    """What sets a task's arm apart in train/config.py; `data` are the names of sources."""
    spec = TASKS[task]
    keys = tuple(key.format(**data) for key in spec.keys) + ARMS[arm]
    return (*keys, f"{N}.model_channels={spec.widths[images_seen(arm) - 1]}") if spec.widths else keys


def images_seen(arm: str) -> int:
    """How many images the network of an arm is shown: the noisy one, D_gauss, D_m."""
    if "precond=edm" in ARMS[arm] or HIDDEN in ARMS[arm]:
        return 1
    return 3 if "bypass.base=marginal" in ARMS[arm] else 2


def plain(arm: str) -> str:
    """The arm whose learning rate an arm takes: the same without folds."""
    return arm.removesuffix("-folds")


def best_rate(task: str, arm: str, errors: list[dict[str, str]]) -> float | None:
    """The learning rate of the lowest error in the short runs; None while one of them is missing."""
    spec = TASKS[task]
    if len(spec.rates) == 1:
        return spec.rates[0]
    logs: dict[float, list[float]] = {lr: [] for lr in spec.rates}
    for row in errors:
        if (row["task"], row["arm"], row["seed"]) == (task, arm, str(RATE_SEED)) and float(row["lr"]) in logs:
            logs[float(row["lr"])].append(float(np.log(float(row["error"]))))
    if not all(logs.values()):
        return None
    return min(logs, key=lambda lr: float(np.mean(logs[lr])))


def finished(errors: list[dict[str, str]]) -> set[Run]:
    """The runs whose last step is in the table of errors."""
    ends = [row for row in errors if row["step"] == row["steps"]]
    return {
        Run(row["task"], row["arm"], int(row["seed"]), float(row["lr"]), int(row["steps"])) for row in ends
    }


def last_error(path: Path) -> float:
    """The mean logarithm of the held-out error over the levels, of the averaged weights at the last step."""
    rows = [row for row in read(path / "heldout.csv") if row["weights"] == "ema"]
    last = max(int(row["step"]) for row in rows)
    return float(np.mean([np.log(float(row["error"])) for row in rows if int(row["step"]) == last]))


def train(run: Run, folder: Path, threads: int) -> bool:
    """Trains, or goes on; False if another process is at it, or it is complete."""
    path = folder / run.name
    if (path / "measured.json").is_file():
        return False
    path.mkdir(parents=True, exist_ok=True)
    lock = path / "lock"
    if not claim(lock):
        return False
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
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
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = lock.read_text()
        if owner.isdigit() and Path(f"/proc/{owner}").exists():
            return False
        lock.unlink(missing_ok=True)
        return claim(lock)
    with os.fdopen(handle, "w") as file:
        file.write(str(os.getpid()))
    return True


def collect(run: Run, folder: Path) -> None:
    """Puts a run's rows into the tables, in place of those of the same run."""
    TABLES.mkdir(exist_ok=True)
    with (TABLES / ".lock").open("w") as lock:  # released when the file is closed
        fcntl.flock(lock, fcntl.LOCK_EX)
        _collect(run, folder / run.name)


def _collect(run: Run, path: Path) -> None:
    label = {"task": run.task, "arm": run.arm, "seed": run.seed, "lr": f"{run.lr:g}", "steps": run.steps}
    heldout = [row for row in read(path / "heldout.csv") if row["weights"] == "ema" and shown(row["step"])]
    modes = [row for row in read(path / "modes.csv") if row["weights"] == "ema"]
    probes = [
        row
        for row in read(path / "probes.csv")
        if row["weights"] == "ema" and row["queries"] == "noised" and row["quantity"] == "denoiser"
    ]
    if run.seed == RATE_SEED:  # these only choose a rate
        last = max((int(row["step"]) for row in heldout), default=0)
        heldout = [row for row in heldout if int(row["step"]) == last]
    merge("errors", label, heldout, ("step", "sigma", "error"))
    merge("measures", label, json.loads((path / "measured.json").read_text()), ("name", "value"))
    if run.seed != RATE_SEED:
        merge(
            "modes",
            label,
            learned(modes),
            ("sigma", "axes", "variance", "first", "last", "gaussian", "learned"),
        )
        merge("probes", label, probes, ("step", "sigma", "reference", "mean"))


def shown(step: str) -> bool:
    """Whether the tables hold a step: of long runs, few of the later ones."""
    return int(step) <= 1500 or int(step) % 500 == 0


def learned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for each level and band of axes: errors before and after training, and when it came.

    `learned` is the first step measured at which the error is within a tenth of the last one.
    """
    bands: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        bands.setdefault((row["sigma"], row["axes"]), []).append(row)
    table: list[dict[str, str]] = []
    for curve in bands.values():
        target = 1.1 * float(curve[-1]["error"])
        step = next(row["step"] for row in curve if float(row["error"]) <= target)
        ends = {"first": curve[0]["error"], "last": curve[-1]["error"], "learned": step}
        table.append({**curve[-1], **ends})
    return table


def merge(
    table: str, label: Mapping[str, object], rows: list[dict[str, str]], columns: tuple[str, ...]
) -> None:
    """Replaces one run's rows in a table."""
    path = TABLES / f"{table}.csv"
    own = {key: str(value) for key, value in label.items()}
    kept = [row for row in read(path) if any(row[key] != value for key, value in own.items())]
    kept += [own | {name: short(row[name]) for name in columns} for row in rows]
    kept.sort(key=lambda row: [row["task"], row["arm"], int(row["seed"]), float(row["lr"])])
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*own, *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    aside.replace(path)


def short(value: object) -> str:
    """Numbers with six digits: the tables are committed."""
    text = str(value)
    try:
        return text if text.isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
    options = parser.parse_args()
    folder = options.folder.resolve()
    data = prepare(options, folder)
    if "emoji32" in options.task and "emoji32" not in data:
        print("emoji32: left out, as --emoji is not given")
    tasks = [task for task in options.task if task != "emoji32" or "emoji32" in data]
    while work(tasks, options, folder, data):  # runs that waited for learning rates come in the next pass
        pass


def work(tasks: list[str], options: argparse.Namespace, folder: Path, data: Mapping[str, str]) -> bool:
    """Goes through all runs once; whether anything was trained."""
    trained, errors = False, read(TABLES / "errors.csv")
    known = finished(errors)
    for task in tasks:
        arms = [arm for arm in TASKS[task].arms if options.arm is None or arm in options.arm]
        for run in runs(task, arms, options.seeds, errors, data):
            if options.command == "list":
                done = (folder / run.name / "measured.json").is_file() or run in known
                print(f"{'done' if done else 'open':5} {run.name}, {run.steps} steps")
            elif options.command == "collect":
                if (folder / run.name / "measured.json").is_file():
                    collect(run, folder)
            elif run not in known and train(run, folder, options.threads):
                collect(run, folder)
                print(f"{run.name}: {last_error(folder / run.name):.4f}", flush=True)
                trained = True
    return trained


if __name__ == "__main__":
    main()
