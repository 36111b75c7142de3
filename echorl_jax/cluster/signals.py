"""Signals that ask a process to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Preemption by a launcher, Ctrl-C, and Slurm's warning before its time limit.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hands these signals to ``handler`` while inside, in the main thread."""
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """True if a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.requested = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGUSR1 and SIGINT while inside; a second Ctrl-C interrupts at once.

    In a thread other than the main one, where Python cannot catch signals, nothing is caught.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with handling(stop._handle):
        yield stop
