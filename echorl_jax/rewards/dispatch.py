"""One queue of responses for all grading processes, served by a thread of its own."""

import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from multiprocessing.connection import Connection, wait
from typing import Any

from echorl_jax.rewards.verdict import DIED, HUNG, Verdict

# A process is replaced after this many verdicts: whatever leaks in a grader stays small.
MAX_ITEMS = 2000
# Limit for a process to start and import its grader (seconds).
START_LIMIT_S = 120.0
# Processes that may be lost in a row without a verdict of their own before the pool gives up.
MAX_LOST_STARTS = 3
# Rows carry whole expert trajectories that no grader reads.
UNSENT = ("target",)

Item = tuple[str, Mapping[str, Any]]


class PoolError(RuntimeError):
    """The pool itself does not work: its processes cannot be started. Never due to one response."""


class Submission:
    """Items that were handed in together; ``future`` has their verdicts once all are there."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.future: Future[list[Verdict]] = Future()
        self._verdicts: dict[int, Verdict] = {}
        self._finish_if_complete()

    def settle(self, place: int, verdict: Verdict) -> None:
        """Notes the verdict on the item of that number."""
        self._verdicts[place] = verdict
        self._finish_if_complete()

    def fail(self, error: Exception) -> None:
        """Ends the submission without its verdicts."""
        # Who has been interrupted does not wait any more.
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def _finish_if_complete(self) -> None:
        if len(self._verdicts) == len(self.items):
            with contextlib.suppress(InvalidStateError):
                self.future.set_result([self._verdicts[i] for i in range(len(self.items))])


class Worker:
    """One grading process and this end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.ready = False
        self.item: tuple[Submission, int] | None = None
        self.deadline = time.monotonic() + START_LIMIT_S
        self.done = 0

    @classmethod
    def start(cls, name: str, memory_mb: int, faults: Mapping[str, float]) -> "Worker":
        """A process that loads the grader; it says when it is ready."""
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        # An accelerator belongs to the training process alone, and parallelism comes from the
        # number of processes.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        # The package must be found even where only this process's search path knows it.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "echorl_jax.rewards.worker", str(fd)],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                env=env,
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        connection.send((sys.path, name, memory_mb, faults))
        return cls(process, connection)

    def stop(self) -> int:
        """Kills the process with all that it started; returns its exit code."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def send(self, submission: Submission, place: int, timeout_s: float) -> None:
        """Gives it an item; OSError if it is dead."""
        response, row = submission.items[place]
        # From here on, so that no item pays for those that it waited behind.
        self.item, self.deadline = (submission, place), time.monotonic() + timeout_s
        sent = {name: value for name, value in row.items() if name not in UNSENT}
        self.connection.send((response, sent))

    def busy(self) -> bool:
        """Whether a message is due from it: a verdict, or word that it has started."""
        return self.item is not None or not self.ready


class Dispatcher:
    """Hands items out in the order in which they came, collects verdicts, replaces lost processes.

    Args:
      start: starts a process.
      workers: how many.
      timeout_s: limit for one verdict (seconds).
    """

    def __init__(self, start: Callable[[], Worker], *, workers: int, timeout_s: float) -> None:
        self._start = start
        self._count = workers
        self._timeout_s = timeout_s
        self._waiting: collections.deque[tuple[Submission, int]] = collections.deque()
        self._lost_starts = 0
        self._lock = threading.Lock()  # of `_closed`, so that nothing is added after the end
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._workers: list[Worker] = []
        self._fill()
        self._thread = threading.Thread(target=self._serve, name="grading", daemon=True)
        self._thread.start()

    def add(self, submission: Submission) -> None:
        """Queues the items of a submission.

        Raises:
          PoolError: closed.
        """
        with self._lock:
            if self._closed:
                raise PoolError("the grading pool is closed")
            self._waiting.extend((submission, place) for place in range(len(submission.items)))
            self._ring()

    def close(self) -> None:
        """Ends the thread and the processes; who still waits gets a :class:`PoolError`."""
        with self._lock:
            first, self._closed = not self._closed, True
            if first:
                self._ring()
        self._thread.join()

    def _ring(self) -> None:
        # A full pipe wakes the thread as well.
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"!")

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._turn()
            except Exception as error:
                self._fail(error)
        self._fail(PoolError("the grading pool is closed"))
        self._wake.close()
        self._woken.close()

    def _turn(self) -> None:
        """Hands out what can be, then waits for word from a process, a time limit, or new work."""
        if self._waiting:
            self._fill()
        for place, worker in enumerate(self._workers):
            if not worker.busy() and not self._hand_out(worker):
                self._workers[place] = self._replace(worker)
        at_work = any(worker.item is not None for worker in self._workers)
        # Without work nobody is watched: who died is found out when it is given something.
        due = (
            [worker for worker in self._workers if worker.busy()]
            if self._waiting or at_work
            else []
        )
        patience = min((worker.deadline for worker in due), default=None)
        if patience is not None:
            patience = max(0.0, patience - time.monotonic())
        talking = wait([self._woken, *(worker.connection for worker in due)], patience)
        if self._woken in talking:
            self._woken.recv(4096)
        for worker in due:
            if worker.connection in talking:
                keep = self._receive(worker)
            else:
                keep = time.monotonic() < worker.deadline
                if not keep:
                    self._lose(worker, f"{HUNG} {self._timeout_s:g} s")
            if not keep:
                self._workers[self._workers.index(worker)] = self._replace(worker)

    def _hand_out(self, worker: Worker) -> bool:
        """Sends the next item, if any; False if the process died while it had nothing to do."""
        while self._waiting:
            submission, place = self._waiting.popleft()
            if submission.future.done():  # given up by who asked
                continue
            try:
                worker.send(submission, place, self._timeout_s)
            except OSError:
                worker.item = None
                self._waiting.appendleft((submission, place))
                self._count_lost_start(worker)
                return False
            break
        return True

    def _receive(self, worker: Worker) -> bool:
        """Takes one message; False if the process is to be replaced."""
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._lose(worker, DIED)
            return False
        if isinstance(message, dict):
            if "failed" in message:
                raise PoolError(f"a grading process cannot start: {message['failed']}")
            worker.ready, self._lost_starts = True, 0
            return True
        assert worker.item is not None
        submission, place = worker.item
        worker.item = None
        worker.done += 1
        submission.settle(place, Verdict(*message))
        return worker.done < MAX_ITEMS

    def _lose(self, worker: Worker, reason: str) -> None:
        """Settles what a process that is dead or over its time was doing."""
        if worker.item is None:
            self._count_lost_start(worker)
        else:
            submission, place = worker.item
            submission.settle(place, Verdict.wrong(reason))

    def _count_lost_start(self, worker: Worker) -> None:
        self._lost_starts += 1
        if self._lost_starts >= MAX_LOST_STARTS:
            raise PoolError(
                f"grading processes do not start (exit code of the last: {worker.stop()})"
            )

    def _replace(self, worker: Worker) -> Worker:
        worker.stop()
        return self._start()

    def _fill(self) -> None:
        while len(self._workers) < self._count:
            self._workers.append(self._start())

    def _fail(self, error: Exception) -> None:
        """Tells all who wait, and begins anew: no verdict can reach a later submission."""
        submissions = [worker.item[0] for worker in self._workers if worker.item is not None]
        while self._workers:
            self._workers.pop().stop()
        self._lost_starts = 0
        while self._waiting:
            submissions.append(self._waiting.popleft()[0])
        for submission in submissions:
            submission.fail(error)
