"""The supervisor: starts the training process and ends it when another process of the run fails.

Each process of a run is a pair. The supervisor holds a connection to the hub and nothing else; its
child trains. When a child dies, its supervisor knows at once which signal or exit code ended it;
all other supervisors then end their children and print one line that names the cause. The launcher
reads the exit code and starts the run again.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from echorl_jax.cluster.place import Place
from echorl_jax.cluster.wire import VARIABLE, Assignment, Message, Secret, Wire, sign
from echorl_jax.errors import RunStopped, UserError, plain_line

if TYPE_CHECKING:
    from echorl_jax.cluster.hub import Hub

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


@dataclasses.dataclass(frozen=True)
class Limits:
    """Time limits for the processes of a run (seconds)."""

    start_timeout_s: float  # until all processes have connected
    lost_after_s: float  # without a heartbeat


def supervise(
    place: Place,
    command: Sequence[str],
    *,
    facts: Mapping[str, Any],
    limits: Limits,
    secret: Secret,
) -> int:
    """Runs ``command`` as one process of a run; returns its exit code when all have ended well.

    Args:
      place: of this process among the others.
      command: the training process; its environment gets an :class:`Assignment`.
      facts: JSON values that must be the same on all processes.
      limits: time limits.
      secret: known only to the processes of the run.

    Raises:
      UserError: the facts of the processes differ, or one has a wrong option.
      RunStopped: a process did not connect, is gone, or failed. In either case the line names it,
        and the training processes of all have ended.
    """
    hub = _open_hub(place, limits, secret) if place.process == 0 else None
    wire = _connect(place, limits.start_timeout_s, facts, secret)
    peers = _Peers(wire, limits)
    child = _Child()
    with handling(child.signal):  # goes to the training process
        try:
            code, line = _run(place, command, peers, child, limits)
        finally:
            child.kill()
            wire.close()
            if hub is not None:
                hub.wait_until_done()
    if code == 0:
        return 0
    raise (UserError if code == 2 else RunStopped)(line)


class _Child:
    """The training process; signals that arrive before its start are sent after it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []

    def start(self, command: Sequence[str], given: Assignment, theirs: socket.socket) -> None:
        words = json.dumps(dataclasses.asdict(given))
        self._process = subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: words},
            pass_fds=[theirs.fileno()],
            # A terminal's Ctrl-C goes to the supervisor alone, which passes it on once.
            start_new_session=True,
        )
        for number in self._pending:
            self._process.send_signal(number)

    def signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._process is None:
            self._pending.append(number)
        else:
            self._process.send_signal(number)

    @property
    def waiting(self) -> bool:
        """True if a signal asked it to stop before its start."""
        return self._process is None and bool(self._pending)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class _Peers:
    """The connection to the hub: sends heartbeats, receives messages."""

    def __init__(self, wire: Wire, limits: Limits) -> None:
        self.wire = wire
        self.messages: queue.Queue[Message | None] = queue.Queue()
        self._limits = limits
        for work in (self._beat, self._receive):
            threading.Thread(target=work, daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.wire.send(beat=True)
                time.sleep(self._limits.lost_after_s / 4)

    def _receive(self) -> None:
        """Queues messages of the hub; None at the end, when it is gone or silent."""
        with contextlib.suppress(OSError):
            while (message := self.wire.receive(timeout_s=self._limits.lost_after_s)) is not None:
                if "beat" not in message:
                    self.messages.put(message)
        self.messages.put(None)


def _run(
    place: Place, command: Sequence[str], peers: _Peers, child: _Child, limits: Limits
) -> tuple[int, str]:
    """Runs one process of the run to its end; returns the exit code and the line."""
    while True:
        try:
            message = peers.messages.get(timeout=0.2)
        except queue.Empty:
            if child.waiting:
                return 1, "stopped by a signal before all processes had come"
            continue
        if message is None:
            return 1, _hub_gone(place)
        if "code" in message:
            return int(message["code"]), plain_line(str(message["line"]))
        ours, theirs = socket.socketpair()
        given = Assignment(
            coordinator=message["address"],
            processes=place.processes,
            process=place.process,
            local_devices=place.local_devices,
            start_timeout_s=limits.start_timeout_s,
            lost_after_s=limits.lost_after_s,
            line=theirs.fileno(),
        )
        with theirs:
            child.start(command, given, theirs)
        arguments = (child, Wire(ours), peers.wire, limits)
        for work in (_close_at_end, _report):
            threading.Thread(target=work, args=arguments, daemon=True).start()


def _close_at_end(child: _Child, line: Wire, *_: object) -> None:
    """Closes the socket to the training process, even if a child of that process holds it open."""
    child.wait()
    line.close()


def _report(child: _Child, line: Wire, wire: Wire, limits: Limits) -> None:
    """Watches the training process and tells the hub how it ended, or that it is frozen."""
    said: Message = {}
    patience = limits.start_timeout_s
    try:
        while (message := line.receive(timeout_s=patience)) is not None:
            if "beat" in message:
                patience = limits.lost_after_s
            else:
                said = message
    except TimeoutError:
        frozen = f"its training process is frozen: no sign of life for {patience:g} s"
        with contextlib.suppress(OSError):
            wire.send(code=1, line=frozen, certain=True)
        return
    code = child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        # JAX's runtime aborts when it loses another process.
        said = {"line": f"its training process was killed by {name}", "certain": -code != 6}
    line = said.get("line", f"its training process ended with exit code {code}")
    with contextlib.suppress(OSError):
        wire.send(code=1 if code < 0 else code, line=line, certain=said.get("certain", False))


def _hub_gone(place: Place) -> str:
    return f"process 0 of {place.processes} on {place.address[0]} is gone"


def _open_hub(place: Place, limits: Limits, secret: Secret) -> "Hub":
    from echorl_jax.cluster.hub import Hub

    host, port = place.address
    try:
        if host in ("localhost", "127.0.0.1"):
            listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        elif socket.has_dualstack_ipv6():
            family = socket.AF_INET6
            listener = socket.create_server(
                ("", port), family=family, dualstack_ipv6=True, backlog=1024
            )
        else:
            listener = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} for the others: {error.strerror}"
        ) from error

    def free_address() -> str:
        with socket.create_server(("", 0)) as probe:
            return f"{place.coordinator.rpartition(':')[0]}:{probe.getsockname()[1]}"

    hub = Hub(
        listener,
        processes=place.processes,
        start_timeout_s=limits.start_timeout_s,
        lost_after_s=limits.lost_after_s,
        address=free_address,
        secret=secret.create(),
        source=secret.source,
    )
    hub.start()
    return hub


class _RefusedError(OSError):
    """Process 0 has another secret, or this process has none yet."""


def _connect(place: Place, timeout_s: float, facts: Mapping[str, Any], secret: Secret) -> Wire:
    """Connects to process 0 as soon as it listens, and sends the number and facts of this process.

    A refused process tries again: a file system may take a while to show the secret, and an earlier
    start of the run may still listen with another one.
    """
    me = f"process {place.process} of {place.processes}"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            wire = Wire(socket.create_connection(place.address, timeout=10.0))
            _prove(wire, secret, me)
            wire.send(process=place.process, host=socket.gethostname(), facts=dict(facts))
            return wire
        except _RefusedError as error:
            if time.monotonic() >= deadline:
                raise RunStopped(
                    f"{me} was refused at {place.coordinator}: {secret.source} is not the same "
                    f"there and here after {timeout_s:g} s; the workdir must be on a file system "
                    "that all hosts share, or set ECHORL_SECRET for all"
                ) from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RunStopped(
                    f"{me} found no process 0 at {place.coordinator} within {timeout_s:g} s "
                    f"({error.strerror or error})"
                ) from error
        time.sleep(min(0.5, timeout_s / 10))


def _prove(wire: Wire, secret: Secret, me: str) -> None:
    """Proves to the hub that this process belongs to the run.

    Raises:
      UserError: the hub takes its secret from another place than this process.
      OSError: the program that listens is not a hub, or has another secret.
    """
    challenge = (wire.receive(timeout_s=10.0) or {}).get("challenge")
    wire.send(signature=sign(secret.read(), str(challenge)))
    answer = wire.receive(timeout_s=10.0) or {}
    if "accepted" in answer:
        return
    source = answer.get("refused")
    if isinstance(source, str) and source != secret.source:
        raise UserError(f"{me} has its secret from {secret.source}, but process 0 from {source}")
    raise _RefusedError("refused" if source else "no answer of a hub")
