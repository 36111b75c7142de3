"""Stopping on request: SIGTERM or SIGUSR1 (preemption) and Ctrl-C end a run after its step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from echorl_jax.cluster import handling


class StopRequest:
    """Whether a signal has asked the run to stop."""

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
