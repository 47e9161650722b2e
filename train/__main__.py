"""Command line of the training application."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from dataclasses import replace

from train.config import Config, ConfigError
from train.configfile import load_config
from train.rundir import RunFolder
from train.writing import RunError

USAGE = """\
accelerate launch -m train CONFIG [key=value ...]

examples:
  accelerate launch -m train configs/digits.yaml
  accelerate launch -m train configs/digits.yaml train.steps=100 out=runs/short
  accelerate launch --multi_gpu --num_processes 8 -m train configs/digits.yaml out=runs/eight
  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m train configs/digits.yaml

Run the same command again to resume, or to see the table of a complete run. Keys are those of the YAML
file, nested ones joined by dots; train/config.py lists all of them with their defaults.
"""


def fork(config: Config, folder: str) -> Config:
    """The configuration of a run that goes on in another folder; the main process copies what it needs.

    The command can be given again: a folder that was forked with the same values is resumed.
    """
    target = replace(config, out=folder)
    if not RunFolder(folder).config.is_file() and int(os.environ.get("RANK", "0")) == 0:
        RunFolder(config.out).fork(RunFolder(folder), target)
    return target


def leave(number: int, _: object) -> None:
    """Ends the process on a signal where the loop does not see to it: while fitting, and in the report."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Runs a configuration; 2 is returned for one that cannot be run, 1 for a run that cannot go on."""
    parser = argparse.ArgumentParser(
        prog="train",
        description="Train a denoiser beside its analytic baselines, then sample from it with teleport.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, such as configs/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace those of the file"
    )
    parser.add_argument(
        "--fork",
        metavar="NEWDIR",
        help="go on from the run's last checkpoint in a new folder, with other values",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.fork:
            config = fork(config, arguments.fork)
        from train.loop import run  # heavy imports only for a config that can be run

        run(config)
    except ConfigError as error:
        if first:  # all processes have the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; once that is put right, the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if first:
            print(f"{stop or 'SIGINT'}: stopped; the same command goes on", file=sys.stderr)
        return 128 + (signal.SIGTERM if str(stop) == "SIGTERM" else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
