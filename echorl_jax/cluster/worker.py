"""The training process's connection to its supervisor: settings in, heartbeats and errors out."""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time

VARIABLE = "ECHORL_WORKER"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The settings that a supervisor passes to the training process that it starts."""

    coordinator: str  # host:port of JAX's own service
    processes: int
    process: int
    local_devices: tuple[int, ...] | None
    start_timeout_s: float
    lost_after_s: float
    line: int  # file descriptor of the socket to the supervisor


def assignment() -> Assignment | None:
    """The settings from the supervisor of this process; None when there is none."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    values = json.loads(text)
    devices = values.pop("local_devices")
    return Assignment(**values, local_devices=None if devices is None else tuple(devices))


def follow_supervisor(given: Assignment) -> None:
    """Sends heartbeats to the supervisor, and ends this process once the supervisor is gone."""
    threading.Thread(target=_beat, args=(given,), daemon=True).start()
    threading.Thread(target=_wait_for_end, args=(given.line,), daemon=True).start()


def _beat(given: Assignment) -> None:
    with contextlib.suppress(OSError):
        while True:
            os.write(given.line, b'{"beat": true}\n')
            time.sleep(given.lost_after_s / 4)


def _wait_for_end(line: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(line)) as connection:
        connection.recv(1)
    os._exit(1)


def tell(line: str, *, certain: bool) -> bool:
    """Tells the supervisor why this process ends; returns False when there is no supervisor.

    Args:
      line: one line.
      certain: not a consequence of another process's end.
    """
    given = assignment()
    if given is None:
        return False
    words = json.dumps({"line": line, "certain": certain}).encode()
    with contextlib.suppress(OSError):
        os.write(given.line, words + b"\n")
    return True
