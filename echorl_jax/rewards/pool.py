"""Grades many responses in guarded processes: nothing a policy writes can stop or harm the run.

Each process gets one response at a time over its own socket: who failed on what is never in doubt,
a process that is over its time is killed at once, and its replacement starts while the others go
on. The processes are started as plain commands, not by ``multiprocessing``: no state of this
process is forked, and the user's script is not run a second time.
"""

import atexit
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
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from echorl_jax.rewards.loading import judge, load_grader
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


class GraderPool:
    """Applies a grader to lists of responses in processes of its own, under time and memory limits.

    A response whose grading hangs, crashes, or runs out of memory gets score 0 and a reason that
    says so; it costs the others nothing. A process that cannot start is an error of the pool and is
    raised.

    Args:
      name: as :func:`load_grader` takes it.
      workers: processes; 0 grades in this process, guarded against exceptions only.
      timeout_s: limit for one verdict (seconds).
      memory_mb: memory that a verdict may add to a process (MiB); not enforced outside Linux.
      faults: "hang", "crash" or "leak" -> share of the items that do so, on purpose.

    Raises:
      ConfigError: there is no such grader.

    >>> with GraderPool("countdown", workers=0) as pool:
    ...     row = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    ...     [verdict.score for verdict in pool.grade(["2*3=6", "2+3=6"], [row, row])]
    [1.0, 0.0]
    """

    def __init__(
        self,
        name: str,
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        faults: Mapping[str, float] | None = None,
    ) -> None:
        self._grader = load_grader(name)
        self._name = name
        self._count = workers
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._faults = dict(faults or {})
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._workers: list[_Worker] = []
        self._closed = False
        atexit.register(self.close)
        self._fill()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; further calls do nothing."""
        atexit.unregister(self.close)
        self._thread.shutdown(cancel_futures=True)
        with self._lock:
            self._closed = True
            self._empty()

    def grade(self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict for each response, in their order. ``rows`` is as long as ``responses``.

        Raises:
          PoolError: the grading processes cannot be started, or the pool is closed.
        """
        items = list(zip(responses, rows, strict=True))
        with self._lock:
            if self._closed:
                raise PoolError("the grading pool is closed")
            if self._count == 0:
                return [judge(self._grader, response, row) for response, row in items]
            self._fill()
            try:
                return _Round(items, self._timeout_s, self._start).run(self._workers)
            except BaseException:
                # Answers that are still on their way would be taken for those of the next round.
                self._empty()
                raise

    def submit(
        self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Future[list[Verdict]]:
        """Starts :meth:`grade` in the background, to overlap with work on the accelerator.

        Without processes it grades at once: graders may need the main thread for their time limits.
        """
        if self._count:
            return self._thread.submit(self.grade, responses, rows)
        done: Future[list[Verdict]] = Future()
        done.set_result(self.grade(responses, rows))
        return done

    def _start(self) -> "_Worker":
        return _Worker.start(self._name, self._memory_mb, self._faults)

    def _fill(self) -> None:
        while len(self._workers) < self._count:
            self._workers.append(self._start())

    def _empty(self) -> None:
        while self._workers:
            self._workers.pop().stop()


class _Worker:
    """One grading process and this end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_LIMIT_S
        self.done = 0

    @classmethod
    def start(cls, name: str, memory_mb: int, faults: Mapping[str, float]) -> "_Worker":
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

    def send(self, place: int, item: Item, timeout_s: float) -> None:
        response, row = item
        self.item, self.deadline = place, time.monotonic() + timeout_s
        sent = {name: value for name, value in row.items() if name not in UNSENT}
        self.connection.send((response, sent))

    def busy(self) -> bool:
        """Whether a message is due from it: a verdict, or word that it has started."""
        return self.item is not None or not self.ready


class _Round:
    """The work on one list of items: hands them out, collects verdicts, replaces lost processes."""

    def __init__(
        self, items: Sequence[Item], timeout_s: float, start: Callable[[], _Worker]
    ) -> None:
        self._items = items
        self._timeout_s = timeout_s
        self._start = start
        self._waiting = collections.deque(range(len(items)))
        self._verdicts: dict[int, Verdict] = {}
        self._lost_starts = 0

    def run(self, workers: list[_Worker]) -> list[Verdict]:
        """Works until each item has a verdict; ``workers`` is changed in place."""
        while len(self._verdicts) < len(self._items):
            for place, worker in enumerate(workers):
                if not worker.busy() and self._waiting and not self._hand_out(worker):
                    workers[place] = self._replace(worker)
            due = [worker for worker in workers if worker.busy()]
            patience = min(worker.deadline for worker in due) - time.monotonic()
            talking = wait([worker.connection for worker in due], max(patience, 0))
            for place, worker in enumerate(workers):
                if worker.connection in talking:
                    keep = self._receive(worker)
                else:
                    keep = not worker.busy() or time.monotonic() < worker.deadline
                    if not keep:
                        self._lose(worker, f"{HUNG} {self._timeout_s:g} s")
                if not keep:
                    workers[place] = self._replace(worker)
        return [self._verdicts[place] for place in range(len(self._items))]

    def _hand_out(self, worker: _Worker) -> bool:
        """Sends the next item; False if the process has died while it had nothing to do."""
        place = self._waiting.popleft()
        try:
            worker.send(place, self._items[place], self._timeout_s)
        except OSError:
            worker.item = None
            self._waiting.appendleft(place)
            self._count_lost_start(worker)
            return False
        return True

    def _receive(self, worker: _Worker) -> bool:
        """Takes one message; False if the process is to be replaced."""
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._lose(worker, DIED)
            return False
        if isinstance(message, dict):
            if "failed" in message:
                raise PoolError(f"a grading process cannot start: {message['failed']}")
            worker.ready, self._lost_starts = True, 0
            return True
        assert worker.item is not None
        self._verdicts[worker.item] = Verdict(*message)
        worker.item = None
        worker.done += 1
        return worker.done < MAX_ITEMS

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Settles what a process that is dead or over its time was doing."""
        if worker.item is None:
            self._count_lost_start(worker)
        else:
            self._verdicts[worker.item] = Verdict.wrong(reason)

    def _count_lost_start(self, worker: _Worker) -> None:
        self._lost_starts += 1
        if self._lost_starts >= MAX_LOST_STARTS:
            raise PoolError(
                f"grading processes do not start (exit code of the last: {worker.stop()})"
            )

    def _replace(self, worker: _Worker) -> _Worker:
        worker.stop()
        return self._start()
