"""`gaussnet reproduce`: an experiment of the paper on a model, as a table, a figure and a reading.

    gaussnet reproduce score-deviation --model DIR --data DATA --out DIR
    accelerate launch --no_python gaussnet reproduce modes-ranks --model DIR --data DATA --out DIR

What lies in the folder already is not measured again; processes share the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gaussnet.data import open_images
from gaussnet.experiments import EXPERIMENTS, Setting, run
from gaussnet.experiments.running import SUFFIXES, markdown
from gaussnet.fit.spectrum import OPTIONS
from gaussnet.processes import joined_processes


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Repeats an experiment of arXiv 2412.09726 on a model. What was measured already is kept: the same "
        "command goes on where it was stopped. Processes of accelerate or torchrun share the work."
    )
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        summary = (experiment.__doc__ or "").splitlines()[0]
        command = experiments.add_parser(name, help=summary, description=summary)
        _add_setting(command, experiment.NEEDS_DATA, getattr(experiment, "DEFAULT_MODEL", None))
        experiment.add_arguments(command)
        command.set_defaults(run=_reproduce)


def _add_setting(parser: argparse.ArgumentParser, needs_data: bool, model: str | None) -> None:
    parser.add_argument(
        "--model",
        required=model is None,
        default=model,
        help="a folder of save_pretrained, a hub repository, an EDM snapshot (.pkl), diffusers:PATH, or an "
        "analytic denoiser: isotropic, gaussian, marginal, classes, mixture-K, delta"
        + ("" if model is None else f" (default {model})"),
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--batch", type=int, default=256, help="at a time (default %(default)s)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=needs_data, help="images, as for `gaussnet fit`")
    data.add_argument("--split", help="of MNIST's folders, torchvision and the hub")
    data.add_argument(
        "--heldout", type=int, default=0, help="images for queries, left out of fits (default: none)"
    )
    data.add_argument(
        "--fit-images", type=int, default=20_000, help="at most so many are fitted (default %(default)s)"
    )
    data.add_argument(
        "--shrinkage",
        choices=OPTIONS["shrinkage"],
        default="cv",
        help="of eigenvalues; the paper's is none (default %(default)s)",
    )


_SHARED = {"command", "experiment", "run", "verbose", "model", "out", "seed", "device", "batch", "data",
           "split", "heldout", "fit_images", "shrinkage"}  # fmt: skip


def _reproduce(options: argparse.Namespace) -> None:
    name = options.experiment
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"expected --out to be a folder, got the file {options.out}")
    own = argparse.Namespace(**{key: value for key, value in vars(options).items() if key not in _SHARED})
    with joined_processes() as processes:
        setting = Setting(
            options.model,
            None if options.data is None else open_images(options.data, split=options.split),
            heldout=options.heldout,
            fit_images=options.fit_images,
            shrinkage=options.shrinkage,
            seed=options.seed,
            device=processes.device(options.device),
            batch=options.batch,
            cache=options.out / "parts",
        )
        reading = run(name, EXPERIMENTS[name], setting, own, options.out, processes)
        if processes.first:
            files = ", ".join(f"{name}{suffix}" for suffix in SUFFIXES)
            print(f"{markdown(reading.table)}\n\n{reading.text}\n\n{files} in {options.out}")
