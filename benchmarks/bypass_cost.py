"""What does a training step of each arm of benchmarks/bypass_ablation.py cost, over one of EDM's?

    python benchmarks/bypass_cost.py --mnist FOLDER [--emoji ZIP] [--task core emoji32] [--repeats 15]
    python benchmarks/bypass_cost.py --mnist FOLDER --arm marginal bypass-all

Forward and backward pass on a batch, of the arms' own models, interleaved in one process; ratios of the
medians. Steps times this ratio are the time in which an arm reaches EDM's error. Rows of other tasks and
arms in cost.csv stay. Closed forms are of sample eigenvalues, which are fitted sooner and cost a step the
same.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from accelerate import Accelerator
from bypass_ablation import prepare
from bypass_tables import HERE, TABLES, read
from bypass_tasks import ARMS, TASKS, keys_of
from results import Record, parser
from timing import Call, compare

from gaussnet import BypassPrecond, CrossFit
from train.config import Config
from train.configfile import load_config
from train.data import Data, load_data
from train.loss import denoising_loss, make_batch
from train.models import build_network, fit_analytic, fit_folds, fit_wrapping, wrap


def step(config: Config, data: Data, model: BypassPrecond, cross: CrossFit | None) -> Call:
    """Forward and backward pass on the first batch."""
    device = model.gaussian.mean.device
    raw, labels = (part.to(device) for part in data.train[torch.arange(config.train.batch)])
    batch = make_batch(raw, labels, 0, slice(0, config.train.batch), data, config)

    def call() -> None:
        model.zero_grad(set_to_none=True)
        denoising_loss(model, model, batch, cross=cross).backward()

    return call


def main() -> None:
    """Prints a table a task, and writes cost.csv."""
    made = parser(__doc__)
    made.add_argument("--mnist", help="folder of MNIST's files (default: torchvision's)")
    made.add_argument("--emoji", help="a zip of 64x64 images, for the task emoji32")
    made.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="for images that are made")
    made.add_argument("--task", nargs="+", choices=TASKS, default=["core"])
    made.add_argument("--arm", nargs="+", choices=ARMS, help="beside edm (default: all of the task)")
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    record, sources = Record(options), prepare(options, options.folder.resolve())
    rows: list[dict[str, str]] = []
    for task in options.task:
        calls: dict[str, Call] = {}
        for arm in [arm for arm in TASKS[task].arms if options.arm is None or arm in ("edm", *options.arm)]:
            keys = [*keys_of(task, arm, sources), "fit.max_data=2000", "fit.shrinkage=none"]
            config = load_config(HERE / "bypass_ablation.yaml", keys)
            data = load_data(config.data)
            accelerator = Accelerator(cpu=options.device == "cpu")
            wrapping = fit_wrapping(config, data, fit_analytic(config, data, accelerator), accelerator)
            model = wrap(config, build_network(config, data), wrapping).to(accelerator.device)
            cross = fit_folds(config, data, accelerator)
            calls[arm] = step(config, data, model.train(), cross)
        times = compare(calls, options.repeats)
        for arm, seconds in times.items():
            ratio = record.number(f"{task}: step of {arm} over EDM's", seconds / times["edm"])
            rows.append({"task": task, "arm": arm, "cost": f"{ratio:.3f}"})
        record.table(
            [f"{task}: arm", "time of a step over EDM's"],
            [[r["arm"], r["cost"]] for r in rows if r["task"] == task],
        )
    measured = {(row["task"], row["arm"]) for row in rows}
    rows += [row for row in read(TABLES / "cost.csv") if (row["task"], row["arm"]) not in measured]
    arms, tasks = list(ARMS), list(TASKS)
    with (TABLES / "cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["task", "arm", "cost"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (tasks.index(row["task"]), arms.index(row["arm"]))))
    record.close()


if __name__ == "__main__":
    main()
