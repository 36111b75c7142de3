"""Converts a Hugging Face model directory to an Orbax checkpoint, or such a checkpoint back.

The kind of --model decides the direction. The round trip is bit-identical. A run's workdir gives a
Hugging Face directory of one of its checkpoints, even during the run; a run with LoRA gives a PEFT
directory, or with --merge the merged model. --adapter adds a PEFT directory to a Hugging Face one.

examples:
  echorl convert --model=models/qwen --out=checkpoints/qwen
  echorl convert --model=checkpoints/qwen --out=models/qwen-again
  echorl convert --model=runs/first --step=best --out=models/first-best
  echorl convert --model=models/qwen --adapter=runs/lora/export/adapter --out=models/merged
  echorl convert --model=runs/first --step=best --out=models/first-best --push=me/first-best
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face directory, Orbax checkpoint or workdir of a run",
    )
    parser.add_argument(
        "--step",
        default="latest",
        help="checkpoint of a workdir: latest (default), best or a number",
    )
    parser.add_argument(
        "--adapter", default="", metavar="DIR", help="PEFT directory to merge into the model"
    )
    parser.add_argument(
        "--merge", action="store_true", help="of a workdir with LoRA: the merged model"
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="also push it to this repository of the Hugging Face Hub; a new one is private",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Converts and prints the written path."""
    from echorl_jax.training.convert import convert

    options = {name: getattr(arguments, name) for name in ("out", "step", "adapter", "merge")}
    print(convert(arguments.model, push_to=arguments.push, **options))
    return 0
