"""Trains on expert trajectories, from given or random weights.

Rows need an expert's text: a `target` column with messages, or a `solution`; with a column `hint`
it is `answer`. Generated rows have one. With --config.model.init=random the model directory gives
only architecture and tokenizer.

example:
  echorl sft --config=configs/countdown_sft.py --workdir=runs/sft

`echorl options` lists every key.
"""

import argparse

from echorl_jax.commands import join, read_config
from echorl_jax.commands.train import add_arguments as add_arguments
from echorl_jax.commands.train import finish
from echorl_jax.remote import mirrored


def run(arguments: argparse.Namespace) -> int:
    """Loads the config, then trains."""
    config = read_config(arguments)
    if (code := join(config, arguments)) is not None:
        return code
    from echorl_jax.training.sft import train_supervised

    with mirrored(arguments.workdir) as mirror:
        train_supervised(config, mirror.directory, mirror=mirror)
        finish(mirror, report=config.log.report)
    return 0
