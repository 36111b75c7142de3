"""One thin module per command: ``add_arguments(parser)`` and ``run(arguments) -> exit code``.

Heavy imports are inside ``run``, so that ``--help`` is quick.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from echorl_jax.config import LARGEST, Config

MODEL = "Hugging Face directory, repository id or builtin:countdown"
GRADERS = "auto (default), math, choice, countdown or package.module:function"
DTYPES = ("bfloat16", "float32")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declares ``--config``; the command then also takes ``--config.KEY=VALUE``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
    parser.set_defaults(overrides={})


def read_config(arguments: argparse.Namespace) -> Config:
    """The config of ``--config`` with its overrides."""
    from echorl_jax.config_file import load_config

    return load_config(arguments.config, arguments.overrides)


def add_compare(parser: argparse.ArgumentParser, use: str) -> None:
    """Declares ``--compare``, other runs for the report."""
    text = f"another run, {use}; may be repeated"
    parser.add_argument(
        "--compare", action="append", default=[], type=Path, metavar="DIR", help=text
    )


def whole(least: int = 0) -> Callable[[str], int]:
    """Makes the ``type`` of an option that is a whole number of at least ``least``.

    >>> whole(1)("12")
    12
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= LARGEST:
            raise argparse.ArgumentTypeError(
                f"{text[:80]!r}: must be a whole number from {least} to {LARGEST}"
            )
        return value

    return read


def number(text: str) -> float:
    """The ``type`` of an option that is a finite number of at least 0.

    >>> number("1e-3")
    0.001
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= sys.float_info.max:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: must be a finite number, 0 or above")
    return value
