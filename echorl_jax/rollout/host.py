"""The host's part of sampling: starts programs, polls them, reports finished rows.

A worker is one decode loop with its share of the rows and of the slots. An accelerator has one. On
CPU, XLA splits each operation over the cores, and with a small model the cores spend more time
waiting for each other than computing; so there each core gets a worker, and workers do not wait for
each other.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import jax
import numpy as np
from jax.sharding import Mesh

from echorl_jax.choices import KVDtype
from echorl_jax.models import Decoder
from echorl_jax.parallel import constrain, platform_of
from echorl_jax.rollout.decode import DecodeSpec, Output, Status, decode
from echorl_jax.rollout.memory import position_bytes, weight_bytes
from echorl_jax.rollout.request import slot_counts
from echorl_jax.rollout.slots import Queue, Slots, compact
from echorl_jax.types import Array, HostArray, PyTree

# Fewest slots of a program when the queue runs out, and fewest of a worker.
FEWEST_SLOTS = 8
# More workers are untested.
MOST_CPU_WORKERS = 8
# Weights up to this size may be read by every worker at no loss (docs/performance.md).
SHARED_WEIGHT_BYTES = 64 << 20
# Rows of one fetch, so that one program fetches any number of them.
FETCH_ROWS = 32

# Called with numbers of rows and their tokens, EOS included.
Finished = Callable[[Sequence[int], Sequence[HostArray]], None]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a call at a poll."""

    rows: int
    rows_done: int
    tokens: int
    seconds: float
    slots: int  # of the programs that ran last
    occupancy: float  # tokens so far / tokens computed so far, idle slots included

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def choose_cpu_workers(
    model: Decoder,
    *,
    prompts: int,
    slots: int,
    max_new_tokens: int,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | None,
) -> int:
    """One worker per core on a single CPU device, fewer if weights are large; otherwise one.

    Every worker reads all weights. With large weights that pays when completions are long, because
    attention runs faster within a worker: as long as the weights that all workers but one read are
    at most as many bytes as the cache of the completions (measured on two cores,
    docs/performance.md).

    Args:
      model: the decoder.
      prompts: P; a group is not split.
      slots: M; a worker has at least ``FEWEST_SLOTS`` of them.
      max_new_tokens: T.
      kv_dtype: type of the cache; the model's unless given.
      mesh: where it runs; one device unless given.
    """
    if (mesh is not None and mesh.size > 1) or platform_of(mesh) != "cpu":
        return 1
    most = min(_cores(), MOST_CPU_WORKERS, prompts, slots // FEWEST_SLOTS)
    weights = weight_bytes(model, None)
    if weights > SHARED_WEIGHT_BYTES:
        cached = slots * max_new_tokens * position_bytes(model, kv_dtype)
        most = min(most, 1 + cached // weights)
    return max(1, most)


def worker_slots(rows: int, slots: int, *, workers: int, shards: int = 1) -> int:
    """Slots of each worker: an equal share, a multiple of ``shards``, and at most its rows.

    Args:
      rows: N, padding included.
      slots: M.
      workers: N / G is a multiple of it.
      shards: parts that a worker's slots are split into on a mesh.
    """
    return min(rows // workers, -(-slots // (workers * shards)) * shards)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class FinishedRows:
    """Passes each finished row to ``finished`` once; does nothing without that callback.

    Rows are found at the host's polls. They are copied out before the next program takes over the
    buffers, and handed to the callback while that program runs.

    Args:
      finished: called with each row once, in any order.
      row_numbers: the caller's numbers of the rows that are not padding.
    """

    def __init__(self, finished: Finished | None, row_numbers: HostArray) -> None:
        self._finished = finished
        self._row_numbers = row_numbers
        self._known = np.zeros(len(row_numbers), bool)
        self._fetched: list[tuple[HostArray, Array, Array]] = []

    def flags(self, limit: Array, output: Output) -> Array | None:
        """Bool ``[N]``, which rows have ended, to be read together with the status."""
        if self._finished is None:
            return None
        return _ended(limit, output.length, output.stopped)

    def fetch(self, ended: HostArray | None, output: Output) -> None:
        """Starts to copy out the rows that have ended since the last call."""
        if ended is None:
            return
        new = np.flatnonzero(ended[: len(self._known)] & ~self._known)
        self._known[new] = True
        for start in range(0, len(new), FETCH_ROWS):
            rows: HostArray = new[start : start + FETCH_ROWS]
            filled = np.resize(rows, FETCH_ROWS).astype(np.int32)
            self._fetched.append((rows, *_pick(output.token, output.length, filled)))

    def report(self) -> None:
        """Hands over the rows that were copied out."""
        for rows, *arrays in self._fetched:
            token, length = jax.device_get(arrays)
            completions = [token[i, : length[i]] for i in range(len(rows))]
            assert self._finished is not None
            self._finished(self._row_numbers[rows].tolist(), completions)
        self._fetched.clear()


@jax.jit
def _ended(limit: Array, length: Array, stopped: Array) -> Array:
    return constrain(stopped | (length >= limit), None)


@jax.jit
def _pick(token: Array, length: Array, rows: Array) -> tuple[Array, Array]:
    return constrain(token[rows], None, None), constrain(length[rows], None)


class Worker:
    """One decode loop and its progress.

    Args:
      begin: returns the queue, slots that hold its first rows, and an empty output.
      rows: rows that are not padding.
      slots: M.
      spec: the static part of the decode program.
      finished: reports finished rows.
      alone: whether there is no other worker.
    """

    def __init__(
        self,
        begin: Callable[[], tuple[Queue, Slots, Output]],
        *,
        rows: int,
        slots: int,
        spec: DecodeSpec,
        finished: FinishedRows,
        alone: bool,
    ) -> None:
        self.rows, self.rows_done, self.tokens, self.computed = rows, 0, 0, 0
        self._begin, self._spec, self._finished, self._alone = begin, spec, finished, alone
        self._state: tuple[Queue, Slots, Output] | None = None
        self._slot_counts = slot_counts(slots, smallest=max(FEWEST_SLOTS, spec.shards))
        self._level = 0
        self._status: tuple[Status, Array | None]

    @property
    def slots(self) -> int:
        """Slots of the program that runs, or ran last."""
        return self._slot_counts[self._level]

    @property
    def _shrink_at(self) -> int:
        below = self._level + 1
        return self._slot_counts[below] if below < len(self._slot_counts) else 0

    @property
    def output(self) -> Output:
        """The rows as far as they are; the worker must have been started."""
        assert self._state is not None
        return self._state[2]

    def start(self, model: Decoder, params: PyTree) -> None:
        """Starts the next decode program, and the prefill program before the first one."""
        decode = decode_call if self._alone else _decode_in_order()
        queue, slots, output = self._state or self._begin()
        slots, output, status = decode(
            model, params, queue, slots, output, np.int32(self._shrink_at), spec=self._spec
        )
        self._state = queue, slots, output
        self._status = status, self._finished.flags(queue.request.limit, output)

    def wait(self) -> None:
        """Waits until the program has ended."""
        self._status = jax.device_get(self._status)

    def poll(self) -> bool:
        """Reads the finished program's status; returns whether rows are left."""
        assert self._state is not None
        status, ended = self._status
        self._finished.fetch(ended, self.output)
        self.tokens += int(status.tokens)
        self.computed += int(status.steps) * self.slots
        self.rows_done = int(status.next_row) - int(status.active)
        if status.next_row < self.rows:
            return True
        # One level at a time: there is a program for each move between neighbouring levels.
        while 0 < status.active and status.needed <= self._shrink_at:
            self._level += 1
            self._spec = dataclasses.replace(self._spec, refill=False)
            queue, slots, output = self._state
            slots = _compact(queue, slots, size=self.slots, shards=self._spec.shards)
            self._state = queue, slots, output
        return bool(status.active)

    def report(self) -> None:
        """Reports the rows that had ended at the last :meth:`poll`; a program may run meanwhile."""
        self._finished.report()


decode_call = jax.jit(
    decode, static_argnames=("model", "spec"), donate_argnames=("slots", "output")
)


@functools.cache
def _decode_in_order() -> Callable[..., tuple[Slots, Output, Status]]:
    """The decode program for one of several workers: one thread computes its operations in order.

    XLA's default schedule for CPU moves operations ahead so that they can run in parallel. Weights
    of a layer would then be read long before their use, and have left the cache by then.
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # a JAX that does not know the option
        return decode_call
    return jax.jit(
        decode,
        static_argnames=("model", "spec"),
        donate_argnames=("slots", "output"),
        compiler_options=options,
    )


_compact = jax.jit(compact, static_argnames=("size", "shards"))


def run_workers(
    model: Decoder,
    params: PyTree,
    workers: Sequence[Worker],
    *,
    mesh: Mesh | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes all rows of all workers.

    Args:
      model: the decoder.
      params: the weights, in the layout for sampling.
      workers: each is polled when its program has ended.
      mesh: the current one.
      progress: called after each poll.
    """
    begin = time.perf_counter()

    def report() -> None:
        if progress is not None:
            progress(_progress(workers, time.perf_counter() - begin))

    if len(workers) > 1:
        return _run_threads(model, params, workers, mesh, report)
    (worker,) = workers
    rows_left = True
    while rows_left:
        worker.start(model, params)
        worker.report()
        worker.wait()
        rows_left = worker.poll()
        report()
    worker.report()


def _run_threads(
    model: Decoder,
    params: PyTree,
    workers: Sequence[Worker],
    mesh: Mesh | None,
    report: Callable[[], None],
) -> None:
    """A thread for each worker: on CPU, programs started by one thread run one after the other.

    All callbacks are called from the caller's thread.
    """

    starting = threading.Lock()  # the second worker then finds the program compiled

    def advance(worker: Worker) -> None:
        with starting, jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            worker.start(model, params)
        worker.wait()

    with ThreadPoolExecutor(len(workers), "cpu_worker") as pool:
        running = {pool.submit(advance, worker): worker for worker in workers}
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                worker = running.pop(future)
                future.result()
                if worker.poll():
                    running[pool.submit(advance, worker)] = worker
                worker.report()
                report()


def _progress(workers: Sequence[Worker], seconds: float) -> Progress:
    tokens = sum(worker.tokens for worker in workers)
    return Progress(
        rows=sum(worker.rows for worker in workers),
        rows_done=sum(worker.rows_done for worker in workers),
        tokens=tokens,
        seconds=seconds,
        slots=sum(worker.slots for worker in workers),
        occupancy=tokens / max(1, sum(worker.computed for worker in workers)),
    )
