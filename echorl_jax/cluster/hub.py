"""The hub: waits for all processes of a run, compares them, and reports the first failure to all.

The hub runs as threads of the supervisor of process 0. All supervisors, that one included, connect
to it and stay connected until the run has ended on every process. Any program can connect to its
port, but only a connection that has proved that it knows the run's secret makes an event.
"""

import contextlib
import dataclasses
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from echorl_jax.cluster.wire import Message, Wire, is_signed

# Process 0, and the hub with it, stays this long after the end for others to read it (seconds).
FAREWELL_S = 5.0
# A connection has this long to prove that it belongs to the run (seconds).
HELLO_WITHIN_S = 10.0
# Limits on connections without a proof, and on the bytes of a proof.
UNPROVED, PROOF_BYTES = 256, 1024


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a run: the exit code, and one line unless all went well."""

    code: int
    line: str = ""


_FULL = Ending(2, "all processes of this run have come already")


@dataclasses.dataclass(frozen=True)
class _Event:
    """A message of a process of this run; ``message`` is empty once it is gone or silent."""

    wire: Wire
    kind: Literal["hello", "said", "gone", "silent"]
    message: Message = dataclasses.field(default_factory=dict)


class Hub:
    """Waits for all processes, compares their facts, then waits for the first failure."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        processes: int,
        start_timeout_s: float,
        lost_after_s: float,
        address: Callable[[], str],
        secret: bytes,
        source: str,
    ) -> None:
        self._listener = listener
        self._processes = processes
        self._start_timeout_s = start_timeout_s
        self._lost_after_s = lost_after_s
        self._address = address
        self._secret, self._source = secret, source
        self._wires: dict[int, Wire] = {}  # of the processes that take part
        self._turned_away: list[Wire] = []
        self._hellos: dict[int, Message] = {}
        self._events: queue.Queue[_Event] = queue.Queue()
        self._ended: set[int] = set()
        self._unproved = threading.Semaphore(UNPROVED)
        self._done = threading.Event()

    def start(self) -> None:
        """Starts to listen, in threads."""
        for work in (self._accept, self._run):
            threading.Thread(target=work, name=f"hub-{work.__name__}", daemon=True).start()

    def wait_until_done(self) -> None:
        """Returns when every process has received the end of the run, or after a time limit."""
        self._done.wait(FAREWELL_S)

    def _accept(self) -> None:
        while not self._done.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # a connection was reset, or there are too many
                time.sleep(0.05)
                continue
            self._unproved.acquire()
            threading.Thread(target=self._listen, args=(Wire(connection),), daemon=True).start()

    def _listen(self, wire: Wire) -> None:
        """Turns messages of a supervisor into events; without the secret there are none."""
        timer = threading.Timer(HELLO_WITHIN_S, wire.close)
        timer.start()
        try:
            hello = self._hello(wire)
        except OSError:
            hello = None
        finally:
            timer.cancel()
            self._unproved.release()
        if hello is not None:
            self._follow(wire, hello)
        wire.close()

    def _hello(self, wire: Wire) -> Message | None:
        """The first message of a supervisor that knows the secret.

        Raises:
          OSError: the connection broke, was silent, or sent something else than messages.
        """
        challenge = secrets.token_hex(16)
        wire.send(challenge=challenge)
        proof = wire.receive(timeout_s=HELLO_WITHIN_S, most_bytes=PROOF_BYTES) or {}
        if not is_signed(self._secret, challenge, proof.get("signature")):
            wire.send(refused=self._source)
            return None
        wire.send(accepted=True)
        hello = wire.receive(timeout_s=HELLO_WITHIN_S) or {}
        return hello if _is_hello(hello) else None

    def _follow(self, wire: Wire, hello: Message) -> None:
        self._events.put(_Event(wire, "hello", hello))
        end: Literal["gone", "silent"] = "gone"
        try:
            while (message := wire.receive(timeout_s=self._lost_after_s)) is not None:
                if "beat" in message:
                    wire.send(beat=True)
                else:
                    self._events.put(_Event(wire, "said", message))
        except TimeoutError:
            end = "silent"
        except OSError:
            pass
        self._events.put(_Event(wire, end))

    def _run(self) -> None:
        try:
            ending = self._assemble()
            if ending is None:
                self._tell(address=self._address())
                ending = self._watch()
            self._tell(code=ending.code, line=ending.line)
            self._wait_for_others(ending)
        except BaseException:  # other processes must not wait for a hub that has failed
            for wire in (*self._wires.values(), *self._turned_away):
                wire.close()
            raise
        finally:
            self._done.set()
            self._listener.close()

    def _assemble(self) -> Ending | None:
        """Waits for the hellos of all processes; returns an ending if the run cannot start.

        An ending waits for process 0, which always connects, so that process 0 can print it.
        """
        deadline = time.monotonic() + self._start_timeout_s
        ending: Ending | None = None
        while 0 not in self._hellos or (ending is None and len(self._hellos) < self._processes):
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return ending or Ending(1, self._absent())
            found = self._greet(event)
            ending = ending or found
        return ending or self._disagreement()

    def _greet(self, event: _Event) -> Ending | None:
        """Registers a process; returns an ending if one has left, or has a wrong or used number."""
        if event.kind != "hello":
            known = self._process(event.wire)
            if known is None:
                return None
            return Ending(1, f"{self._name(known)} left before all had come")
        process = event.message["process"]
        known = self._hellos.get(process)
        if known is not None or not 0 <= process < self._processes:
            self._turned_away.append(event.wire)
            newcomer = f"process {process} on {event.message['host']}"
            taken = f"already there on {known['host']}" if known else "not to be expected"
            return Ending(2, f"{newcomer} is {taken}: there are {self._processes} processes")
        self._hellos[process], self._wires[process] = event.message, event.wire
        return None

    def _process(self, wire: Wire) -> int | None:
        """The number of the registered process with this connection, or None."""
        return next((process for process, own in self._wires.items() if own is wire), None)

    def _absent(self) -> str:
        missing = [str(i) for i in range(self._processes) if i not in self._hellos]
        present = ", ".join(f"{i} on {hello['host']}" for i, hello in sorted(self._hellos.items()))
        return (
            f"process {', '.join(missing[:8])}{' and others' if len(missing) > 8 else ''} of "
            f"{self._processes} did not come within {self._start_timeout_s:g} s; here: {present}"
        )

    def _disagreement(self) -> Ending | None:
        first = self._hellos[0]["facts"]
        for process in range(1, self._processes):
            difference = _difference(first, self._hellos[process]["facts"])
            if difference is not None:
                name, own, other = difference
                return Ending(
                    2,
                    f"{self._name(process)} has {name} = {other!r}, but {self._name(0)} has "
                    f"{own!r}: all processes need the same",
                )
        return None

    def _watch(self) -> Ending:
        """Waits until all processes have ended with code 0, or for the cause of a failure.

        When one process dies, the others fail too, in their communication with it. So a failure
        that may be such a consequence is held back for some seconds, and a certain cause replaces
        it.
        """
        suspect: Ending | None = None
        deadline: float | None = None
        while len(self._ended) < self._processes:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._events.get(timeout=patience)
            except queue.Empty:
                assert suspect is not None
                return suspect
            ending, certain = self._judge(event)
            if ending is not None and certain:
                return ending
            if ending is not None and suspect is None:
                suspect, deadline = ending, time.monotonic() + self._lost_after_s + 1.0
        return suspect or Ending(0)

    def _judge(self, event: _Event) -> tuple[Ending | None, bool]:
        """The end that an event causes, and whether it is certain to be the cause."""
        if event.kind == "hello":
            self._turn_away(event.wire, _FULL)
        process = self._process(event.wire)
        if process is None or process in self._ended:
            return None, True
        name = self._name(process)
        if event.kind != "said":
            silent = event.kind == "silent"
            how = f"has been silent for {self._lost_after_s:g} s" if silent else "is gone"
            return Ending(1, f"{name} {how}"), True
        code = int(event.message["code"])
        self._ended.add(process)
        if code == 0:
            return None, True
        return Ending(code, f"{name}: {event.message['line']}"), bool(event.message["certain"])

    def _tell(self, **message: Any) -> None:
        for wire in (*self._wires.values(), *self._turned_away):
            with contextlib.suppress(OSError):
                wire.send(**message)

    def _turn_away(self, wire: Wire, ending: Ending) -> None:
        self._turned_away.append(wire)
        with contextlib.suppress(OSError):
            wire.send(code=ending.code, line=ending.line)

    def _wait_for_others(self, ending: Ending) -> None:
        """Waits until the other processes have disconnected; late processes get the ending too."""
        deadline = time.monotonic() + FAREWELL_S
        others = {wire for process, wire in self._wires.items() if process} | {*self._turned_away}
        while time.monotonic() < deadline and (others or not self._events.empty()):
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=0.1)
                if event.kind == "hello":
                    self._turn_away(event.wire, ending)
                elif event.kind != "said":
                    others.discard(event.wire)

    def _name(self, process: int) -> str:
        hello = self._hellos[process]
        return f"process {process} of {self._processes} on {hello['host']}"


def _is_hello(message: Message) -> bool:
    kinds = {"process": int, "host": str, "facts": dict}
    return all(isinstance(message.get(name), kind) for name, kind in kinds.items())


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for name in {**first, **second}:
        if first.get(name) != second.get(name):
            return name, first.get(name), second.get(name)
    return None
