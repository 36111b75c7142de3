"""Grading that goes wrong on purpose for a share of the items: the pool's guards, on trial."""

import os
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from echorl_jax.rewards.loading import Grader

# So long that any time limit comes first (seconds).
FOREVER = 1e6
LEAK_BYTES = 2**26


def misbehave(grader: Grader, shares: Mapping[str, float]) -> Grader:
    """The grader, except that a share of the responses makes its process hang, crash or leak.

    Which ones follows from the response and its row, so that a repeated run has the same.

    Args:
      grader: judges the others.
      shares: "hang", "crash" or "leak" -> share of the items, in [0, 1].
    """

    def grade(response: str, row: Mapping[str, Any]) -> Any:
        place = fate(response, row)
        for kind, share in shares.items():
            if place < share:
                FAULTS[kind]()
            place -= share
        return grader(response, row)

    return grade


def fate(response: str, row: Mapping[str, Any]) -> float:
    """A number in [0, 1) that is drawn from the item itself."""
    text = f"{response}|{row.get('reward_model')}"
    return zlib.crc32(text.encode(errors="replace")) / 2**32


def _hang() -> NoReturn:
    while True:
        time.sleep(FOREVER)


def _crash() -> NoReturn:
    os._exit(1)


def _leak() -> NoReturn:
    hoard = []
    while True:
        hoard.append(bytes(LEAK_BYTES))


FAULTS: Mapping[str, Callable[[], NoReturn]] = {"hang": _hang, "crash": _crash, "leak": _leak}
