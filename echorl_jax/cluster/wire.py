"""Messages between the processes of a run: one JSON object a line.

Supervisors talk over TCP, and a training process with its supervisor over a socket pair. A shared
secret keeps other processes from joining or ending a run. It is ``ECHORL_SECRET`` where the
launcher sets that, else the file ``.secret`` in the directory that the run writes, which process 0
creates. It is never sent: each process signs a random challenge.
"""

import contextlib
import dataclasses
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echorl_jax.files import replace_text

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


SECRET_VARIABLE = "ECHORL_SECRET"
SECRET_FILE = ".secret"


@dataclasses.dataclass(frozen=True)
class Secret:
    """The source of the secret of a run."""

    source: str  # the variable, or the path of the file
    value: bytes = b""  # of the variable

    @classmethod
    def find(cls, environment: Mapping[str, str], directory: Path) -> "Secret":
        """The variable's value, or the file in the directory that the run writes."""
        if value := environment.get(SECRET_VARIABLE, ""):
            return cls(SECRET_VARIABLE, value.encode())
        return cls(str(directory / SECRET_FILE))

    def read(self) -> bytes:
        """The secret; empty while the file is not there."""
        try:
            return self.value or Path(self.source).read_bytes().strip()
        except FileNotFoundError:
            return b""

    def create(self) -> bytes:
        """The secret; a file that is not there is written, readable by this user alone."""
        if not self.read():
            path = Path(self.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, secrets.token_hex(16) + "\n", mode=0o600)
        return self.read()


def sign(secret: bytes, challenge: str) -> str:
    """Proves the knowledge of the secret without telling it."""
    return hmac.digest(secret, challenge.encode(), "sha256").hex()


def is_signed(secret: bytes, challenge: str, signature: object) -> bool:
    """True if this is the signature of the challenge."""
    found = str(signature).encode(errors="replace")
    return hmac.compare_digest(sign(secret, challenge).encode(), found)


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
      certain: not a consequence of another process's end.
    """
    given = assignment()
    if given is None:
        return False
    words = json.dumps({"line": line, "certain": certain}).encode()
    with contextlib.suppress(OSError):
        os.write(given.line, words + b"\n")
    return True
