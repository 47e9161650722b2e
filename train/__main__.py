"""Command line of the training application."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from train.config import ConfigError, load_config

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


def main() -> int:
    """Runs a configuration; 2 is returned for one that cannot be run."""
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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        config = load_config(arguments.config, arguments.overrides)
        from train.loop import run  # heavy imports only for a config that can be run

        run(config)
    except ConfigError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
