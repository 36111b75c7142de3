"""Messages between supervisors: one JSON object a line, over TCP."""

import contextlib
import json
import socket
import threading
from typing import Any

Message = dict[str, Any]
# The configuration of a run is by far the longest message.
MAX_BYTES = 1 << 20


class WireError(OSError):
    """The bytes received are not a message."""


class Wire:
    """One connection. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Sends one message.

        Raises:
          OSError: the connection is gone.
        """
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, timeout_s: float, most_bytes: int = MAX_BYTES) -> Message | None:
        """The next message; None when the other side has closed.

        Raises:
          TimeoutError: nothing came.
          OSError: the connection broke, or something else than a message came.
        """
        self._socket.settimeout(timeout_s)
        line = self._lines.readline(most_bytes)
        if not line:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError("no message") from error
        if not isinstance(message, dict):
            raise WireError("no message")
        return message

    def close(self) -> None:
        """Closes, and wakes a thread that receives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
