"""Trains a 1M-parameter model on Countdown with GRPO + EchoRL, on CPU, and writes a report.

Nothing is downloaded. The same command again goes on where the run stopped.

examples:
  echorl quickstart
  echorl quickstart runs/plain --config.echo.enabled=false
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from echorl_jax.commands import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    directory = "directory of the run's files; runs/quickstart unless given"
    parser.add_argument("workdir", nargs="?", default="runs/quickstart", help=directory)
    parser.set_defaults(config="configs/countdown.py", overrides={})


def run(arguments: argparse.Namespace) -> int:
    """Trains as ``echorl train`` does, and says where to go on."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    workdir = arguments.workdir
    print(
        "== training: a 1M-parameter model on Countdown, GRPO + EchoRL, into " + workdir, flush=True
    )
    if code := train.run(arguments):
        return code
    program, compare = _program(), shlex.join([f"--workdir={workdir}", "--compare=runs/plain"])
    print(
        "== where to go on\n"
        f"   look at the report:      open {workdir}/report.html in a browser\n"
        f"   compare with plain GRPO: {program} quickstart runs/plain --config.echo.enabled=false\n"
        f"                            {program} report {compare}\n"
        f"   every option:            {program} options"
    )
    return 0


def _program() -> str:
    """The program as it can be typed here; below this folder it is often not in PATH."""
    place = Path(os.path.relpath(sys.argv[0]))
    inside = place.name == "echorl" and ".." not in place.parts
    return str(place) if inside else "echorl"
