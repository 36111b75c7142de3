"""Looks at a config's data before any accelerator time.

Reads the training and evaluation rows, lets the grader judge the gold answers (they must be right)
and another row's (they must be wrong), measures prompt lengths, and counts problems that occur in
both sets. Exit code 1 when something is wrong.

examples:
  echorl check --config=configs/countdown.py
  echorl check --config=configs/countdown.py --config.data.train=rows.parquet --show=2
"""

import argparse

from echorl_jax.commands import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
    parser.add_argument("--rows", type=whole(), default=256, help="rows to look at in each set")
    parser.add_argument("--show", type=whole(), default=0, metavar="N", help="print N prompts")
    parser.set_defaults(overrides={})


def run(arguments: argparse.Namespace) -> int:
    """Checks and prints the findings."""
    from echorl_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    from echorl_jax.evaluation.check import check

    return 0 if check(config, rows=arguments.rows, show=arguments.show) else 1
