"""One thin module per command: ``add_arguments(parser)`` and ``run(arguments) -> exit code``.

Nothing heavy is imported before ``run``, so that ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Callable

from echorl_jax.config import LARGEST


def whole(least: int = 0) -> Callable[[str], int]:
    """Reads a whole number of at least ``least``, for an option of a command.

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
    """Reads a finite number of at least 0, for an option of a command.

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
