"""The host side of sampling: starts programs, polls them and reports finished rows.

A worker is one decode loop with its share of the rows and of the slots. An accelerator has one. On
CPU, XLA splits each operation over the cores, and with a small model the cores wait for each other
longer than they compute. So each core gets a worker, and workers do not wait for each other.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

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
# With weights up to this size more workers are always faster (docs/performance.md).
SHARED_WEIGHT_BYTES = 64 << 20
# Rows of one fetch: one shape, so that one program fetches any number of rows.
FETCH_ROWS = 32

# Called with row numbers and the tokens of each row, EOS included.
Finished = Callable[[Sequence[int], Sequence[HostArray]], None]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a call at a poll."""

    rows: int
    rows_done: int
    tokens: int
    seconds: float
    slots: int  # slots of the programs that ran last
    occupancy: float  # tokens so far / tokens computed so far, idle slots included
    restarted: int = 0  # rows that had to begin again because pages ran out

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

    Every worker reads all weights, but attention is faster within a worker. So workers are added
    while the weights that the additional ones read are at most as many bytes as the cache of the
    completions (measured on two cores, docs/performance.md).

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

    The host finds them when it polls. It copies them before the next program takes over the
    buffers, and calls ``finished`` while that program runs.

    Args:
      finished: called with each row once, in any order.
      row_numbers: the caller's numbers of the rows that are not padding.
    """

    def __init__(self, finished: Finished | None, row_numbers: HostArray) -> None:
        self._finished = finished
        self._row_numbers = row_numbers
        self.rows = len(row_numbers)
        self._known = np.zeros(self.rows, bool)
        self._fetched: list[tuple[HostArray, Array, Array]] = []

    def flags(self, limit: Array, output: Output) -> Array | None:
        """Flags of the rows that have ended, bool ``[N]``, to be read together with the status."""
        if self._finished is None:
            return None
        return _ended(limit, output.length, output.stopped)

    def fetch(self, ended: HostArray | None, output: Output) -> None:
        """Starts to copy the rows that have ended since the last call."""
        if ended is None:
            return
        new = np.flatnonzero(ended[: self.rows] & ~self._known)
        self._known[new] = True
        for start in range(0, len(new), FETCH_ROWS):
            rows: HostArray = new[start : start + FETCH_ROWS]
            filled = np.resize(rows, FETCH_ROWS).astype(np.int32)
            self._fetched.append((rows, *_pick(output.token, output.length, filled)))

    def report(self) -> None:
        """Passes the copied rows to ``finished``."""
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
      finished: reports finished rows.
      slots: M.
      spec: the static settings of the decode program.
      alone: whether there is no other worker.
    """

    def __init__(
        self,
        begin: Callable[[], tuple[Queue, Slots, Output]],
        finished: FinishedRows,
        *,
        slots: int,
        spec: DecodeSpec,
        alone: bool,
    ) -> None:
        self.rows, self.rows_done, self.tokens, self.computed = finished.rows, 0, 0, 0
        self.restarted = 0
        self._begin, self._spec, self._finished, self._alone = begin, spec, finished, alone
        self._state: tuple[Queue, Slots, Output] | None = None
        self._slot_counts = slot_counts(slots, smallest=max(FEWEST_SLOTS, spec.shards))
        self._level = 0
        self._status: tuple[Status, Array | None]

    @property
    def slots(self) -> int:
        """Slots of the current program."""
        return self._slot_counts[self._level]

    @property
    def _shrink_at(self) -> int:
        below = self._level + 1
        return self._slot_counts[below] if below < len(self._slot_counts) else 0

    @property
    def output(self) -> Output:
        """The tokens written so far, after :meth:`start`."""
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
        self.restarted = int(status.restarted)
        self.rows_done = self.rows - int(status.waiting) - int(status.active)
        if status.waiting:
            return True
        # One level at a time: there is a program for each move between neighbouring levels.
        while 0 < status.active and status.needed <= self._shrink_at:
            self._level += 1
            queue, slots, output = self._state
            # Rows may have to leave their slots as long as there are pages.
            self._spec = dataclasses.replace(self._spec, refill=slots.pool is not None)
            pool, slots = slots.pool, dataclasses.replace(slots, pool=None)  # it stays in place
            slots = _compact(queue, slots, size=self.slots, shards=self._spec.shards)
            self._state = queue, dataclasses.replace(slots, pool=pool), output
        return bool(status.active)

    def report(self) -> None:
        """Reports the rows that had ended at the last :meth:`poll`; a program may run meanwhile."""
        self._finished.report()


decode_call = jax.jit(
    decode, static_argnames=("model", "spec"), donate_argnames=("slots", "output")
)


@functools.cache
def _decode_in_order() -> Callable[..., tuple[Slots, Output, Status]]:
    """The decode program for one of several workers, with its operations in order.

    XLA's default schedule for CPU moves operations ahead so that they can run in parallel. It would
    read the weights of a layer so early that they leave the cache before they are used.
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


def mesh_context(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes ``mesh`` the current one; does nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def run_workers(
    model: Decoder,
    params: PyTree,
    workers: Sequence[Worker],
    *,
    mesh: Mesh | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Runs the workers until all rows are written; calls ``progress`` after each poll."""
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
    """Runs each worker in a thread: on CPU, programs of one thread run one after the other.

    Callbacks run in the thread of the caller.
    """

    starting = threading.Lock()  # so that only the first worker compiles the program

    def advance(worker: Worker) -> None:
        with starting, mesh_context(mesh):
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
        restarted=sum(worker.restarted for worker in workers),
    )
