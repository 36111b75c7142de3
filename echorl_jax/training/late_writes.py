"""Hides the tracebacks of a checkpoint that cannot be written: the run says so in one line.

When one array's write fails, Orbax raises that error and closes its event loop, while TensorStore
still has other arrays' writes in hand. Each of those then wants to tell the closed loop that it has
ended, from a thread of C++, and Python prints "Event loop is closed" with a traceback for each.
"""

import functools
import sys
from asyncio import base_events
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


@functools.cache
def leave_out_late_writes() -> None:
    """Hides such tracebacks from now on; all others go where they went before."""
    before = sys.unraisablehook

    def report(found: "UnraisableHookArgs") -> None:
        if not is_late_write(found):
            before(found)

    sys.unraisablehook = report


def is_late_write(found: "UnraisableHookArgs") -> bool:
    """Whether code outside Python has told a closed event loop about the end of its work."""
    first = found.exc_traceback
    return (
        isinstance(found.exc_value, RuntimeError)
        and str(found.exc_value) == "Event loop is closed"
        and found.object is None
        and first is not None
        and first.tb_frame.f_code is base_events.BaseEventLoop.call_soon_threadsafe.__code__
    )
