"""Converts a Hugging Face model directory to an Orbax checkpoint, or such a checkpoint back.

The direction follows from what --model is. The round trip is bit-identical. A run's workdir becomes
a Hugging Face directory of one of its checkpoints, also while the run goes on.

examples:
  echorl convert --model=models/qwen --out=checkpoints/qwen
  echorl convert --model=checkpoints/qwen --out=models/qwen-again
  echorl convert --model=runs/first --step=best --out=models/first-best
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", required=True, metavar="DIR", help="what to convert")
    parser.add_argument(
        "--step", default="latest", help="of a workdir: latest (the default), best, or a number"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Converts and says what was written."""
    from echorl_jax.training.convert import convert

    print(convert(arguments.model, arguments.out, step=arguments.step))
    return 0
