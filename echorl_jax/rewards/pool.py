"""Grades many responses in guarded processes: nothing a policy writes can stop or harm the run.

The processes take responses from one queue, one at a time (whole groups where a function judges
groups), and a thread serves each process over a
socket: the pool knows which response a process failed on, kills a process that is over its time at
once, and starts its replacement while the others go on. The processes are plain commands, not
``multiprocessing``: no state of this process is forked, and the user's script runs only once.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from echorl_jax.config import Config
from echorl_jax.rewards.loading import BOUNDED, DIED, HUNG, Entry, Tokens, Verdict, load_grader

# A process is replaced after this many verdicts, so that what leaks in a grader stays small.
MAX_ITEMS = 2000
# Limit for a process to start and import its grader (seconds).
START_LIMIT_S = 120.0
# Processes that may die in a row before they are ready; then the pool gives up.
MAX_LOST_STARTS = 3
# A verdict is a few hundred bytes; a process that announces more is broken.
MAX_ANSWER_BYTES = 1 << 16
# Rows carry whole expert trajectories that no grader reads.
UNSENT = ("target",)

# Responses to one row, their row, and their tokens.
Item = tuple[Sequence[str], Mapping[str, Any], Tokens | None]


class PoolError(RuntimeError):
    """The pool itself does not work: its processes cannot be started. Never due to one response."""


class Submission:
    """Items that were handed in together; ``future`` has their verdicts once all are there."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.future: Future[list[Verdict]] = Future()
        self._verdicts: dict[int, list[Verdict]] = {}
        self._finish_if_complete()

    def settle(self, place: int, verdicts: list[Verdict]) -> None:
        """Notes the verdicts on the item of that number."""
        self._verdicts[place] = verdicts
        self._finish_if_complete()

    def fail(self, error: Exception) -> None:
        """Ends the submission without its verdicts."""
        # A caller that was interrupted does not wait any more.
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def _finish_if_complete(self) -> None:
        if len(self._verdicts) == len(self.items):
            with contextlib.suppress(InvalidStateError):
                ordered = (self._verdicts[i] for i in range(len(self.items)))
                self.future.set_result(list(itertools.chain(*ordered)))


class Worker:
    """A process that loads a grader, and this end of its socket. One thread talks to it.

    Messages are those of ``multiprocessing.connection``, here with a time limit: neither a process
    that does not read nor one that stops in the middle of an answer holds up the thread.
    """

    def __init__(
        self,
        spec: str,
        settings: Mapping[str, Any],
        memory_mb: int,
        faults: Mapping[str, float],
    ) -> None:
        self.ready = False
        self.done = 0
        self._socket, theirs = socket.socketpair()
        # An accelerator belongs to the training process alone, and parallelism comes from the
        # number of processes.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        # The package must be found even where only this process's search path knows it.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "echorl_jax.rewards.grading_process", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # its end is the end of this process: see worker.py
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,
            )
        setup = (sys.path, spec, settings, memory_mb, faults)
        self._send(pickle.dumps(setup), START_LIMIT_S)

    def exchange(self, message: bytes | None, limit_s: float, verdicts: int = 1) -> Any:
        """Sends a message, if any, and returns the answer, of so many verdicts.

        Raises:
          TimeoutError: both together took longer than ``limit_s``.
          OSError, EOFError, ValueError: the process is dead, or its answer is none.
        """
        deadline = time.monotonic() + limit_s
        if message is not None:
            self._send(message, limit_s)
        (size,) = struct.unpack("!i", self._receive(4, deadline))
        if not 0 <= size <= MAX_ANSWER_BYTES * verdicts:
            raise ValueError(f"an answer of {size} bytes")
        return json.loads(self._receive(size, deadline))

    def kill(self) -> None:
        """Kills the process with all that it started; a thread that waits for it is woken."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._process.returncode is None:  # not waited for: its number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> int:
        """Kills the process and frees what belongs to it; returns its exit code."""
        self.kill()
        self._socket.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()

    def _send(self, message: bytes, limit_s: float) -> None:
        self._socket.settimeout(limit_s)
        self._socket.sendall(struct.pack("!i", len(message)) + message)

    def _receive(self, size: int, deadline: float) -> bytes:
        parts = b""
        while len(parts) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts


class Dispatcher:
    """Hands items out in the order in which they came and replaces processes that are lost.

    Args:
      start: starts a process.
      workers: how many.
      timeout_s: limit for one verdict (seconds), from when a process is given the item.
    """

    def __init__(self, start: Callable[[], Worker], *, workers: int, timeout_s: float) -> None:
        self._start = start
        self._timeout_s = timeout_s
        self._queue: queue.SimpleQueue[tuple[Submission, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `_closed`: nothing is added or started after the end
        self._closed = False
        self._workers = [start() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=[place], name="grading", daemon=True)
            for place in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, submission: Submission) -> None:
        """Queues the items of a submission.

        Raises:
          PoolError: closed.
        """
        with self._lock:
            self._refuse_if_closed()
            for place in range(len(submission.items)):
                self._queue.put((submission, place))

    def close(self) -> None:
        """Ends processes and threads; submissions that are not complete get a `PoolError`."""
        with self._lock:
            first, self._closed = not self._closed, True
            for worker in self._workers if first else ():
                worker.kill()
                self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise PoolError("the grading pool is closed")

    def _serve(self, place: int) -> None:
        """Takes items until there is None, and judges them with the process of that number."""
        while (taken := self._queue.get()) is not None:
            submission, number = taken
            if submission.future.done():  # the caller gave up, or it failed
                continue
            try:
                self._refuse_if_closed()
                submission.settle(number, self._judge(place, *submission.items[number]))
            except Exception as error:
                submission.fail(error)
        self._workers[place].stop()

    def _judge(
        self, place: int, responses: Sequence[str], row: Mapping[str, Any], tokens: Tokens | None
    ) -> list[Verdict]:
        sent = {name: value for name, value in row.items() if name not in UNSENT}
        message, count = pickle.dumps((responses, sent, tokens)), len(responses)
        limit_s = self._timeout_s * count
        # A process may have been killed while it was idle: only a second death is the item's fault.
        for _ in range(2):
            worker = self._ready(place)
            try:
                answer = worker.exchange(message, limit_s, count)
                verdicts = [Verdict(*fields) for fields in answer]
            except TimeoutError:
                self._replace(place)
                return [Verdict.wrong(f"{HUNG} {limit_s:g} s")] * count
            except (OSError, EOFError, ValueError):
                self._replace(place)
                continue
            worker.done += count
            if worker.done >= MAX_ITEMS:
                self._replace(place)
            return verdicts
        return [Verdict.wrong(DIED)] * count

    def _ready(self, place: int) -> Worker:
        """The process of that number, once it has loaded its grader."""
        code = 0
        for _ in range(MAX_LOST_STARTS):
            worker = self._workers[place]
            if worker.ready:
                return worker
            try:
                told = worker.exchange(None, START_LIMIT_S)
            except (OSError, EOFError, ValueError):
                code = self._replace(place)
                continue
            if "failed" in told:
                self._replace(place)
                raise PoolError(f"a grading process cannot start: {told['failed']}")
            worker.ready = True
            return worker
        raise PoolError(f"grading processes do not start (exit code of the last: {code})")

    def _replace(self, place: int) -> int:
        """Starts another process in place of a lost one; returns the exit code of that."""
        code = self._workers[place].stop()
        with self._lock:
            self._refuse_if_closed()
            self._workers[place] = self._start()
        return code


class GraderPool:
    """Grades lists of responses in separate processes, under time and memory limits.

    A response whose grading hangs, crashes, or runs out of memory gets score 0 and a reason that
    says so; it costs the others nothing. A process that cannot start is an error of the pool and is
    raised.

    Args:
      spec: one grader or several, as :func:`load_grader` takes them.
      kwargs, success_threshold: see :func:`load_grader`.
      workers: processes. 0 grades in this process where the grader's costs are bounded by its code
        (``BOUNDED``), and in one process otherwise: responses are written by a policy.
      timeout_s: limit for one verdict (seconds); a group has as many times that as responses.
      memory_mb: memory that a verdict may add to a process (MiB); not enforced outside Linux.
      faults: "hang", "crash" or "leak" -> share of the items that do so, on purpose.

    Raises:
      ConfigError: see :func:`load_grader`.

    >>> with GraderPool("countdown", workers=0) as pool:
    ...     row = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    ...     [verdict.score for verdict in pool.grade(["2*3=6", "2+3=6"], [row, row])]
    [1.0, 0.0]
    """

    def __init__(
        self,
        spec: str,
        *,
        kwargs: Mapping[str, Any] | None = None,
        success_threshold: float | None = None,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        faults: Mapping[str, float] | None = None,
    ) -> None:
        settings = {"kwargs": dict(kwargs or {}), "success_threshold": success_threshold}
        self._grader = load_grader(spec, **settings)
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        if workers or not all(entry.path in BOUNDED for entry in self.entries):
            start = functools.partial(Worker, spec, settings, memory_mb, dict(faults or {}))
            self._dispatcher = Dispatcher(start, workers=max(workers, 1), timeout_s=timeout_s)
        atexit.register(self.close)

    @classmethod
    def of(cls, config: Config, *, faults: Mapping[str, float] | None = None) -> "GraderPool":
        """The pool that a run's config describes."""
        data = config.data
        return cls(
            data.grader,
            kwargs=json.loads(data.grader_kwargs),
            success_threshold=config.objective.success_threshold,
            workers=data.grader_workers,
            timeout_s=data.grader_timeout_s,
            faults=faults,
        )

    @property
    def entries(self) -> Sequence[Entry]:
        """The graders of the list."""
        return self._grader.entries

    @property
    def grouped(self) -> bool:
        """True if a function takes the responses of a group together, and their tokens."""
        return self._grader.grouped

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; further calls do nothing."""
        atexit.unregister(self.close)
        self._closed = True
        if self._dispatcher is not None:
            self._dispatcher.close()

    def grade(
        self,
        responses: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        tokens: Tokens | None = None,
    ) -> list[Verdict]:
        """One verdict for each response, in their order. ``rows`` is as long as ``responses``.

        Raises:
          PoolError: the grading processes cannot be started, or the pool is closed.
        """
        verdicts = self.submit(responses, rows, tokens)
        try:
            return verdicts.result()
        except BaseException:
            # Ctrl-C: what has not been begun is not wanted any more.
            verdicts.cancel()
            raise

    def submit(
        self,
        responses: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        tokens: Tokens | None = None,
        *,
        group_size: int = 1,
    ) -> Future[list[Verdict]]:
        """Starts :meth:`grade` in the background, to overlap with work on the accelerator.

        May be called any number of times while earlier ones are under way: all processes serve one
        queue, so a slow response holds up nothing but itself. Its time limit runs from when a
        process gets it. Without processes it grades at once.

        Args:
          tokens: of the responses, for functions that take ``completion_ids``.
          group_size: so many responses in a row answer one row and are judged together.

        Raises:
          PoolError: the pool is closed.
        """
        if self._closed:
            raise PoolError("the grading pool is closed")
        if len(responses) != len(rows):
            raise ValueError(f"{len(responses)} responses for {len(rows)} rows")
        tokens = tokens if self.grouped else None  # other functions see texts alone
        parts = [slice(i, i + group_size) for i in range(0, len(rows), group_size)]
        submission = Submission(
            [(responses[p], rows[p.start], None if tokens is None else tokens[p]) for p in parts]
        )
        if self._dispatcher is not None:
            self._dispatcher.add(submission)
        else:
            for place, item in enumerate(submission.items):
                submission.settle(place, self._grader.judge_all(*item))
        return submission.future
