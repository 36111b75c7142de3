"""Checks a config's data without an accelerator.

Reads the training and evaluation rows, grades each row's gold answer (it must be right) and that
of another row (it must be wrong), measures prompt lengths, and counts problems that occur in both
sets. Exit code 1 if a check fails.

examples:
  echorl check --config=configs/countdown.py
  echorl check --config=configs/countdown.py --config.data.train=rows.parquet --show=2
"""

import argparse

from echorl_jax.commands import add_config, read_config, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    add_config(parser)
    rows = "rows to check in each set (default 256)"
    parser.add_argument("--rows", type=whole(), default=256, help=rows)
    parser.add_argument("--show", type=whole(), default=0, metavar="N", help="print N prompts")


def run(arguments: argparse.Namespace) -> int:
    """Checks and prints the findings."""
    config = read_config(arguments)
    from echorl_jax.evaluation.check import check

    return 0 if check(config, rows=arguments.rows, show=arguments.show) else 1
