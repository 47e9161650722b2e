"""The `gaussnet` command.

    gaussnet fit DATA --out DIR [--components K | --classes] [--marginals] [--rank R] ...
    gaussnet info MODEL
    gaussnet import-edm SNAPSHOT.pkl DIR
    gaussnet sample MODEL --out DIR [--solver S] [--steps N] [--teleport auto] [--seeds 0-63] ...
    gaussnet fid IMAGES --ref STATS.npz | --make-ref DATA --out STATS.npz
    gaussnet reproduce EXPERIMENT --model MODEL --data DATA --out DIR
    gaussnet watch RUN [--every SECONDS] [--once]
    gaussnet report RUN [--out FILE.html] [--open]

`fit`, `sample`, `fid` and `reproduce` under `accelerate launch --no_python` or `torchrun --no-python` share
their work between processes. Errors are one line on standard error, with exit status 2; nothing is written
then.
"""

from __future__ import annotations

import argparse
import logging
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from gaussnet.cli_fid import add_fid
from gaussnet.cli_fit import add_fit, expect_free
from gaussnet.cli_reproduce import add_reproduce
from gaussnet.cli_sample import add_sample
from gaussnet.edm_import import import_edm
from gaussnet.hub import from_pretrained
from gaussnet.run_report import Run, watch, write_page
from gaussnet.run_report.folder import printable
from gaussnet.summary import summarise
from gaussnet.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:  # of torch
        logging.info("where:", exc_info=error)
        text = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"gaussnet {options.command}: {text}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gaussnet", description="Analytic denoisers from the command line.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_fit(commands.add_parser("fit", help="fit an analytic denoiser to images, and save it"))
    info = commands.add_parser("info", help="print what a saved model is")
    info.add_argument("model", help="a folder that save_pretrained wrote, or a hub repository")
    info.set_defaults(run=_info)
    edm = commands.add_parser(
        "import-edm", help="convert a network snapshot of NVlabs/edm, executing nothing"
    )
    edm.add_argument("snapshot", type=Path, help="network-snapshot-*.pkl")
    edm.add_argument("out", type=Path, metavar="DIR", help="folder for the model")
    edm.add_argument("--overwrite", action="store_true", help="replace a model that lies there")
    edm.set_defaults(run=_import_edm)
    add_sample(commands.add_parser("sample", help="draw images from a saved model"))
    add_fid(commands.add_parser("fid", help="measure images against data or its statistics"))
    add_reproduce(commands.add_parser("reproduce", help="repeat an experiment of the paper on a model"))
    watching = commands.add_parser("watch", help="show how a training run is doing, until it is complete")
    watching.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    watching.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="between looks (default: %(default)g)"
    )
    watching.add_argument("--once", action="store_true", help="print one status, and write nothing")
    watching.set_defaults(run=_watch)
    report = commands.add_parser("report", help="write a training run's page, one HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="(default: RUN/report.html)")
    report.add_argument("--open", action="store_true", help="show it in a browser")
    report.set_defaults(run=_report)
    for command in commands.choices.values():
        command.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    return parser


# Commands -----------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> None:
    print(summarise(from_pretrained(options.model)))


def _import_edm(options: argparse.Namespace) -> None:
    expect_free(options.out, options.overwrite)
    model = import_edm(options.snapshot)
    model.provenance = {"data": {"snapshot": options.snapshot.name}}
    model.save_pretrained(options.out)
    print(f"{summarise(model)}\n\nsaved to {options.out}")


def _watch(options: argparse.Namespace) -> None:
    if not options.every < 1e9:  # more than the system can sleep
        raise ValueError(f"expected --every of less than 1e9 seconds, got {options.every:g}")
    watch(options.folder, options.every, options.once)


def _report(options: argparse.Namespace) -> None:
    page = write_page(Run(options.folder), options.out)
    print(page)
    if options.open:
        webbrowser.open(page.resolve().as_uri())


if __name__ == "__main__":
    sys.exit(main())
