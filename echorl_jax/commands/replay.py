"""Repeats a dumped update: compares loss and gradient norm with the run's and names wrong values.

A run dumps an update whose gradient is not finite, and the first one of config.debug.dump_step, to
WORKDIR/dumps. Exit code 1 if the run's values are not reproduced.

example:
  echorl replay runs/first/dumps/step_000005_update_00
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a directory under WORKDIR/dumps")


def run(arguments: argparse.Namespace) -> int:
    """Repeats the update and prints the comparison."""
    from echorl_jax.training.diagnose import describe, replay

    replayed = replay(arguments.dump)
    print("\n".join(describe(replayed)))
    return 0 if replayed.reproduced else 1
