"""The host's part: it starts programs, looks at what they say, and moves work to smaller ones.

A lane is a part of the rows with slots of its own. An accelerator has one. On CPU, XLA splits each
operation over the cores, and with a small model they spend more time waiting for each other than
computing; there each core gets a lane, and lanes wait for nobody.
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
from echorl_jax.parallel import platform_of
from echorl_jax.rollout.buckets import levels
from echorl_jax.rollout.loop import Output, Program, Status, decode
from echorl_jax.rollout.memory import position_bytes, weight_bytes
from echorl_jax.rollout.slots import Queue, Slots, compact
from echorl_jax.rollout.watch import Watch
from echorl_jax.types import Array, PyTree

# Fewest slots that get a program of their own when the work runs out, and fewest of a lane.
SMALLEST_LEVEL = 8
# More lanes have not been tried.
MOST_LANES = 8
# Weights that lanes may read again whatever they read besides (docs/performance.md).
LANE_WEIGHT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a call is, each time the host looks."""

    rows: int
    rows_done: int
    tokens: int
    seconds: float
    slots: int  # of the programs that ran last
    occupancy: float  # tokens / computed tokens so far: the share that somebody wanted

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def choose_lanes(
    model: Decoder,
    *,
    prompts: int,
    slots: int,
    max_new_tokens: int,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | None,
) -> int:
    """One for each core on a CPU that is one device, fewer if weights are large; else one.

    Every lane reads all weights for itself. With large ones that pays when completions are long,
    since a lane's attention is faster: as long as what all lanes but one read of the weights is no
    more bytes than the cache of the completions has (measured on two cores, docs/performance.md).

    Args:
      model: the decoder.
      prompts: P; a group is not split.
      slots: M; a lane has at least ``SMALLEST_LEVEL`` of them.
      max_new_tokens: T.
      kv_dtype: type of the cache; the model's unless given.
      mesh: where it runs; one device unless given.
    """
    if (mesh is not None and mesh.size > 1) or platform_of(mesh) != "cpu":
        return 1
    most = min(_cores(), MOST_LANES, prompts, slots // SMALLEST_LEVEL)
    weights = weight_bytes(model, None)
    if weights > LANE_WEIGHT_BYTES:
        cached = slots * max_new_tokens * position_bytes(model, kv_dtype)
        most = min(most, 1 + cached // weights)
    return max(1, most)


def lane_slots(rows: int, slots: int, *, lanes: int, shards: int = 1) -> int:
    """Slots of each lane: an equal share, a multiple of ``shards``, and at most its rows.

    Args:
      rows: N, padding included.
      slots: M.
      lanes: N / G is a multiple of it.
      shards: parts that a lane's slots are split into on a mesh.
    """
    return min(rows // lanes, -(-slots // (lanes * shards)) * shards)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Lane:
    """The rows of one queue, and how far they are.

    Args:
      begin: makes the queue, slots with its first rows, and an output of nothing yet.
      rows: those that are not padding.
      slots: M.
      program: what is fixed when the loop is compiled.
      watch: hears what ends.
      alone: there is no other lane.
    """

    def __init__(
        self,
        begin: Callable[[], tuple[Queue, Slots, Output]],
        *,
        rows: int,
        slots: int,
        program: Program,
        watch: Watch,
        alone: bool,
    ) -> None:
        self.rows, self.rows_done, self.tokens, self.computed = rows, 0, 0, 0
        self._begin, self._program, self._watch, self._alone = begin, program, watch, alone
        self._work: tuple[Queue, Slots, Output] | None = None
        self._sizes = levels(slots, smallest=max(SMALLEST_LEVEL, program.shards))
        self._level = 0
        self._said: tuple[Status, Array | None]

    @property
    def slots(self) -> int:
        """Slots of the program that runs, or ran last."""
        return self._sizes[self._level]

    @property
    def _shrink_at(self) -> int:
        below = self._level + 1
        return self._sizes[below] if below < len(self._sizes) else 0

    @property
    def output(self) -> Output:
        """What has been written; the lane must have been started."""
        assert self._work is not None
        return self._work[2]

    def start(self, model: Decoder, params: PyTree) -> None:
        """Starts the next program, the first time after the one that prefills."""
        decode = decode_call if self._alone else _decode_in_order()
        queue, slots, output = self._work or self._begin()
        slots, output, status = decode(
            model, params, queue, slots, output, np.int32(self._shrink_at), program=self._program
        )
        self._work = queue, slots, output
        self._said = status, self._watch.ended(queue.limit, output)

    def wait(self) -> None:
        """Waits until the program has ended."""
        self._said = jax.device_get(self._said)

    def look(self) -> bool:
        """Reads the finished program's status; True while rows are left."""
        assert self._work is not None
        status, ended = self._said
        self._watch.copy(ended, self.output)
        self.tokens += int(status.tokens)
        self.computed += int(status.turns) * self.slots
        self.rows_done = int(status.next_row) - int(status.active)
        if status.next_row < self.rows:
            return True
        # One level at a time, so that the moves are as few programs as the levels.
        while 0 < status.active and status.needed <= self._shrink_at:
            self._level += 1
            self._program = dataclasses.replace(self._program, refill=False)
            queue, slots, output = self._work
            slots = _compact(queue, slots, size=self.slots, shards=self._program.shards)
            self._work = queue, slots, output
        return bool(status.active)

    def tell(self) -> None:
        """Calls ``finished`` for rows that had ended at the last :meth:`look`.

        The next program may run meanwhile.
        """
        self._watch.tell()


decode_call = jax.jit(
    decode, static_argnames=("model", "program"), donate_argnames=("slots", "output")
)


@functools.cache
def _decode_in_order() -> Callable[..., tuple[Slots, Output, Status]]:
    """The decode loop for one of several lanes: one thread computes its operations in order.

    XLA's schedule for CPU brings operations forward that could run beside others, so that a layer's
    weights are read long before they are used; here they would have left the caches by then.
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # a JAX that does not know the option
        return decode_call
    return jax.jit(
        decode,
        static_argnames=("model", "program"),
        donate_argnames=("slots", "output"),
        compiler_options=options,
    )


_compact = jax.jit(compact, static_argnames=("size", "shards"))


def run(
    model: Decoder,
    params: PyTree,
    lanes: Sequence[Lane],
    *,
    mesh: Mesh | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes all rows of all lanes.

    Args:
      model: the decoder.
      params: its weights, in the rollout layout.
      lanes: side by side on the device; each is looked at when its program has ended.
      mesh: in force.
      progress: called after each look.
    """
    begin = time.perf_counter()

    def report() -> None:
        if progress is not None:
            progress(_progress(lanes, time.perf_counter() - begin))

    if len(lanes) > 1:
        return _side_by_side(model, params, lanes, mesh, report)
    (lane,) = lanes
    work_is_left = True
    while work_is_left:
        lane.start(model, params)
        lane.tell()
        lane.wait()
        work_is_left = lane.look()
        report()
    lane.tell()


def _side_by_side(
    model: Decoder,
    params: PyTree,
    lanes: Sequence[Lane],
    mesh: Mesh | None,
    report: Callable[[], None],
) -> None:
    """A thread for each lane: on CPU the programs that one thread starts run after each other.

    What the caller hears, it hears from its own thread.
    """

    starting = threading.Lock()  # who comes second finds the program compiled

    def advance(lane: Lane) -> None:
        with starting, jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            lane.start(model, params)
        lane.wait()

    with ThreadPoolExecutor(len(lanes), "lane") as pool:
        running = {pool.submit(advance, lane): lane for lane in lanes}
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                lane = running.pop(future)
                future.result()
                if lane.look():
                    running[pool.submit(advance, lane)] = lane
                lane.tell()
                report()


def _progress(lanes: Sequence[Lane], seconds: float) -> Progress:
    tokens = sum(lane.tokens for lane in lanes)
    return Progress(
        rows=sum(lane.rows for lane in lanes),
        rows_done=sum(lane.rows_done for lane in lanes),
        tokens=tokens,
        seconds=seconds,
        slots=sum(lane.slots for lane in lanes),
        occupancy=tokens / max(1, sum(lane.computed for lane in lanes)),
    )
