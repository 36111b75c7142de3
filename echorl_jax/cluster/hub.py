"""Process 0's list of who takes part: who has come, whether all agree, who was the first to fail.

The hub runs as threads of the supervisor of process 0. All supervisors, that one included, connect
to it, and stay connected until the run has ended on every process.
"""

import contextlib
import dataclasses
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from echorl_jax.cluster.wire import Message, Wire

# How long others get to take the verdict before process 0 goes, and the hub with it (seconds).
FAREWELL_S = 5.0


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ends: the exit code, and one line unless all went well."""

    code: int
    line: str = ""


@dataclasses.dataclass(frozen=True)
class _Event:
    process: int
    message: Message | None  # None: the connection is gone
    silent: bool = False  # gone because nothing came for too long


class Hub:
    """Waits for all processes, compares them, and then for the first end that is not a good one."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        processes: int,
        start_timeout_s: float,
        lost_after_s: float,
        address: Callable[[], str],
    ) -> None:
        self._listener = listener
        self._processes = processes
        self._start_timeout_s = start_timeout_s
        self._lost_after_s = lost_after_s
        self._address = address
        self._wires: dict[int, Wire] = {}
        self._hellos: dict[int, Message] = {}
        self._events: queue.Queue[_Event] = queue.Queue()
        self._ended: set[int] = set()
        self._refusal = Ending(2, "all processes of this run have come already")
        self._complete = threading.Event()
        self._done = threading.Event()

    def start(self) -> None:
        """Begins to listen, in the background."""
        for work in (self._accept, self._preside):
            threading.Thread(target=work, name=f"hub-{work.__name__}", daemon=True).start()

    def wait_until_done(self) -> None:
        """Returns when every process has been told how the run ended, or had time for it."""
        self._done.wait(FAREWELL_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(Wire(connection),), daemon=True).start()

    def _listen(self, wire: Wire) -> None:
        """Turns what one supervisor says into events; a stranger is not listened to."""
        process = -1
        try:
            hello = wire.receive(timeout_s=10.0)
            if hello is None or not _is_hello(hello):
                return
            if self._complete.is_set():
                wire.send(code=self._refusal.code, line=self._refusal.line)
                return
            process = hello["process"]
            hello["wire"] = wire
            self._events.put(_Event(process, hello))
            while (message := wire.receive(timeout_s=self._lost_after_s)) is not None:
                if "beat" in message:
                    wire.send(beat=True)
                else:
                    self._events.put(_Event(process, message))
            self._events.put(_Event(process, None))
        except TimeoutError:
            self._events.put(_Event(process, None, silent=True))
        except OSError:
            self._events.put(_Event(process, None))
        finally:
            wire.close()

    def _preside(self) -> None:
        ending = self._assemble()
        self._refusal = ending or self._refusal
        self._complete.set()
        if ending is None:
            self._tell(address=self._address())
            ending = self._watch()
        self._tell(code=ending.code, line=ending.line)
        self._take_leave(ending)
        self._listener.close()
        self._done.set()

    def _assemble(self) -> Ending | None:
        """Waits for all hellos; an ending if the run cannot start.

        Process 0, which the hub belongs to, always comes: an ending waits for it to be told there.
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
        """Takes down who has come; an ending if somebody has left again, or should not be here."""
        process, message = event.process, event.message
        known = self._hellos.get(process)
        if message is None:
            if known is None:
                return None
            return Ending(1, f"{self._name(process)} left before all had come")
        if known is not None or not 0 <= process < self._processes:
            self._wires[-1 - len(self._wires)] = message["wire"]
            newcomer = f"process {process} on {message['host']}"
            taken = f"already there on {known['host']}" if known else "not to be expected"
            return Ending(2, f"{newcomer} is {taken}: there are {self._processes} processes")
        self._hellos[process], self._wires[process] = message, message["wire"]
        return None

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
        """Waits until all have ended well, or for the cause of a bad end.

        When one process dies, the others fail too, in the middle of talking to it. So an end that
        may be such a consequence waits for a better explanation.
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
        """What an event means for the run, and whether it is certain to be the cause."""
        if event.process in self._ended:
            return None, True
        name = self._name(event.process)
        if event.message is None:
            how = f"has been silent for {self._lost_after_s:g} s" if event.silent else "is gone"
            return Ending(1, f"{name} {how}"), True
        if "code" not in event.message:
            return None, True
        code = int(event.message["code"])
        self._ended.add(event.process)
        if code == 0:
            return None, True
        return Ending(code, f"{name}: {event.message['line']}"), bool(event.message["certain"])

    def _tell(self, **message: Any) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send(**message)

    def _take_leave(self, ending: Ending) -> None:
        """Waits until the others have hung up; process 0 itself is the one that waits.

        Who came too late to be told with the rest is told now.
        """
        deadline = time.monotonic() + FAREWELL_S
        left = 0
        while time.monotonic() < deadline:
            if left >= len(self._wires.keys() - {0}) and self._events.empty():
                return
            with contextlib.suppress(queue.Empty, OSError):
                event = self._events.get(timeout=0.1)
                if event.message is None:
                    left += event.process != 0
                elif "wire" in event.message:
                    wire = event.message["wire"]
                    self._wires[-1 - len(self._wires)] = wire
                    wire.send(code=ending.code, line=ending.line)

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
