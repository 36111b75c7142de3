"""Trains a policy with verifiable rewards; EchoRL is on unless config.echo.enabled is false.

A workdir that already has a checkpoint is continued. It receives config.json, metrics.jsonl (a line
per step), checkpoints/, samples/, tensorboard/, report.html and export/ (Hugging Face format).

examples:
  echorl train --config=configs/countdown.py --workdir=runs/first
  echorl train --config=configs/countdown.py --workdir=runs/plain --config.echo.enabled=false
  echorl train --config=configs/countdown.py --workdir=runs/own --config.data.train=rows.parquet

`echorl options` lists every key.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives")
    parser.set_defaults(overrides={})


def run(arguments: argparse.Namespace) -> int:
    """Loads the config, then trains."""
    from echorl_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    from echorl_jax.training.loop import train

    train(config, arguments.workdir)
    return 0
