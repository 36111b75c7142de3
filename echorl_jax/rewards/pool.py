"""Grades many responses in guarded processes: nothing a policy writes can stop or harm the run.

Each process gets one response at a time over its own socket: who failed on what is never in doubt,
a process that is over its time is killed at once, and its replacement starts while the others go
on. The processes are started as plain commands, not by ``multiprocessing``: no state of this
process is forked, and the user's script is not run a second time.
"""

import atexit
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from echorl_jax.rewards.dispatch import Dispatcher, PoolError, Submission, Worker
from echorl_jax.rewards.loading import BOUNDED, judge, load_grader
from echorl_jax.rewards.verdict import Verdict


class GraderPool:
    """Applies a grader to lists of responses in processes of its own, under time and memory limits.

    A response whose grading hangs, crashes, or runs out of memory gets score 0 and a reason that
    says so; it costs the others nothing. A process that cannot start is an error of the pool and is
    raised.

    Args:
      name: as :func:`load_grader` takes it.
      workers: processes. 0 grades in this process where the grader's costs are bounded by its code
        (``BOUNDED``), and in one process otherwise: responses are written by a policy.
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
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        if workers or name not in BOUNDED:
            start = functools.partial(Worker, name, memory_mb, dict(faults or {}))
            self._dispatcher = Dispatcher(start, workers=max(workers, 1), timeout_s=timeout_s)
        atexit.register(self.close)

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

    def grade(self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict for each response, in their order. ``rows`` is as long as ``responses``.

        Raises:
          PoolError: the grading processes cannot be started, or the pool is closed.
        """
        verdicts = self.submit(responses, rows)
        try:
            return verdicts.result()
        except BaseException:
            # Ctrl-C: what has not been begun is not wanted any more.
            verdicts.cancel()
            raise

    def submit(
        self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Future[list[Verdict]]:
        """Starts :meth:`grade` in the background, to overlap with work on the accelerator.

        May be called any number of times while earlier ones are under way: all processes serve one
        queue, so a slow response holds up nothing but itself. Its time limit runs from when a
        process gets it. Without processes it grades at once.

        Raises:
          PoolError: the pool is closed.
        """
        if self._closed:
            raise PoolError("the grading pool is closed")
        items = list(zip(responses, rows, strict=True))
        submission = Submission(items)
        if self._dispatcher is not None:
            self._dispatcher.add(submission)
        else:
            for place, (response, row) in enumerate(items):
                submission.settle(place, judge(self._grader, response, row))
        return submission.future
