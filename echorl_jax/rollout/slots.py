"""Continuous batching: a slot whose row has ended takes the next row of the queue.

The cache of the completions is a ring. In every decode step all slots write the same column, so the
write is one slice and needs no scatter. A slot whose row has t tokens reads the t latest columns,
so a slot that takes a new row does not read the columns of the previous one. The ring holds as many
columns as the longest completion, or one block whose earlier contents are in ``pages.py``.

Decisions depend on replicated arrays only, so that every device and process takes the same ones.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.rollout.cache import Cache, pick_rows
from echorl_jax.rollout.pages import Pages, move, no_moves, no_pages, plan_flush, room
from echorl_jax.rollout.request import Request, Sampling
from echorl_jax.types import Array, pytree


@pytree
class Queue:
    """The rows of a call with their prompts and keys; never written to."""

    request: Request
    key: Array  # PRNG keys [N] of the rows
    last_token: Array  # i32 [P], last token of the prompt
    store: Cache  # P rows: the prompts without their last token

    @property
    def rows(self) -> int:
        """N; also the row number of idle slots."""
        return self.request.rows

    @property
    def cached(self) -> Array:
        """i32 ``[P]``, positions of the prompt in the store."""
        return self.request.length - 1

    @property
    def group(self) -> Array:
        """i32 ``[N]``, prompt of the row."""
        return self.request.group


@pytree
class Slots:
    """The M rows being written, and the caches that they attend to."""

    row: Array  # i32 [M], row of the queue; N where idle
    position: Array  # i32 [M], tokens of the row so far, and columns of `ring` that it reads
    token: Array  # i32 [M], latest token: the next input
    recent: Array  # i32 [M, W], latest tokens, for stop sequences; -1 where none
    ring: Cache  # M rows
    pool: Cache | None  # Q pages; None: the ring holds whole completions
    pages: Pages | None
    step: Array  # i32 [], decode steps so far; modulo the ring's length the next column to write
    next_row: Array  # i32 [], first row that no slot has taken
    requeued: Array  # i32 [M], rows that had to leave their slots; the last one begins again first
    requeued_count: Array  # i32 []
    restarted: Array  # i32 [], rows that have left their slots so far
    dropped: Array  # i32 [], tokens that they had

    @property
    def parts(self) -> int:
        """Parts that the pages are split into; 1 without pages."""
        return 1 if self.pages is None else self.pages.used.shape[0]

    def waiting(self, queue: Queue) -> Array:
        """i32 [], rows that need a slot."""
        return queue.request.count - self.next_row + self.requeued_count


def _whole(slots: Slots) -> Slots:
    """Replicates the arrays that decisions depend on."""
    return dataclasses.replace(
        slots,
        row=constrain(slots.row, None),
        position=constrain(slots.position, None),
        token=constrain(slots.token, None),
        recent=constrain(slots.recent, None, None),
    )


def first_slots(
    queue: Queue,
    *,
    slots: int,
    stop_window: int,
    ring: Cache,
    pool: Cache | None = None,
    parts: int = 1,
) -> Slots:
    """Gives the first rows to M ``slots``.

    Args:
      queue: the rows to write.
      slots: M.
      stop_window: W.
      ring: an empty cache of M rows.
      pool: Q empty pages of one block like the ring's, if that holds one block only.
      parts: parts that slots and pages are split into.
    """
    none, zero = jnp.zeros(slots, jnp.int32), jnp.zeros((), jnp.int32)
    idle = Slots(
        row=jnp.full(slots, queue.rows, jnp.int32),
        position=none,
        token=none,
        recent=jnp.full((slots, stop_window), -1, jnp.int32),
        ring=ring,
        pool=pool,
        pages=None if pool is None else no_pages(pool.v.shape[2], parts=parts),
        step=zero,
        next_row=zero,
        requeued=none,
        requeued_count=zero,
        restarted=zero,
        dropped=zero,
    )
    return refill(queue, idle)


def group_of(queue: Queue, slots: Slots) -> Array:
    """i32 ``[M]``, prompt of each slot's row; any prompt for idle slots."""
    return queue.group[jnp.minimum(slots.row, queue.rows - 1)]


def cached_of(queue: Queue, slots: Slots) -> Array:
    """i32 ``[M]``, positions of each slot's prompt in the store; 0 for idle slots."""
    return jnp.where(slots.row < queue.rows, queue.cached[group_of(queue, slots)], 0)


def prefix_tokens(queue: Queue, slots: Slots) -> Array | None:
    """The prefix token that each slot has to write, or -1: i32 ``[M]``; None without prefixes."""
    prefix = queue.request.prefix
    width = prefix.shape[1]
    if width == 0:
        return None
    row = jnp.minimum(slots.row, queue.rows - 1)
    token = prefix[row, jnp.minimum(slots.position, width - 1)]
    return jnp.where(slots.position < queue.request.prefix_length[row], token, -1)


def append(
    queue: Queue, slots: Slots, token: Array, sampling: Sampling
) -> tuple[Slots, Array, Array]:
    """Adds a token to every row.

    Returns:
      The slots; whether their rows have ended, bool ``[M]``; whether by EOS or a stop sequence,
      bool ``[M]``.
    """
    recent = slots.recent
    if sampling.stop_window:
        recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
    stopped = jnp.isin(token, jnp.array(sampling.eos_ids, jnp.int32))
    for sequence in sampling.stop_sequences:
        latest = recent[:, -len(sequence) :]
        stopped |= (latest == jnp.array([sequence], jnp.int32)).all(-1)
    position = slots.position + 1
    full = position >= queue.request.limit[jnp.minimum(slots.row, queue.rows - 1)]
    slots = dataclasses.replace(
        slots, token=token, position=position, recent=recent, step=slots.step + 1
    )
    return slots, (stopped | full) & (slots.row < queue.rows), stopped


def retire(queue: Queue, slots: Slots, ended: Array) -> Slots:
    """Makes slots idle. An idle slot attends only to itself, and its tokens are dropped."""
    ended |= slots.row >= queue.rows
    idle = dataclasses.replace(
        slots,
        row=jnp.where(ended, queue.rows, slots.row),
        position=jnp.where(ended, 0, slots.position),
    )
    return _whole(idle)


def refill(queue: Queue, slots: Slots) -> Slots:
    """Gives waiting rows to idle slots, in order of slots: first those that begin again."""
    takes = slots.row >= queue.rows
    if slots.pages is not None:
        parts = takes.reshape(slots.parts, -1)
        free = room(slots.pages, slots.row.reshape(parts.shape), ~parts)
        takes = (parts & (jnp.cumsum(parts, axis=1) <= free[:, None])).reshape(-1)
    number = jnp.cumsum(takes, dtype=jnp.int32) - 1
    takes &= number < slots.waiting(queue)
    again = slots.requeued_count - 1 - number
    new = slots.next_row + number - slots.requeued_count
    row = jnp.where(again >= 0, slots.requeued[jnp.maximum(again, 0)], new)
    group = queue.group[jnp.where(takes, row, 0)]
    taken = takes.sum(dtype=jnp.int32)
    left = jnp.maximum(slots.requeued_count - taken, 0)
    filled = dataclasses.replace(
        slots,
        row=jnp.where(takes, row, slots.row),
        token=jnp.where(takes, queue.last_token[group], slots.token),
        recent=jnp.where(takes[:, None], -1, slots.recent),
        next_row=slots.next_row + taken - (slots.requeued_count - left),
        requeued_count=left,
    )
    return _whole(filled)


def flush(queue: Queue, slots: Slots) -> Slots:
    """Turns the full block of the ring into pages; where they run out, rows leave their slots."""
    assert slots.pool is not None and slots.pages is not None
    pages, block = slots.pages, slots.ring.length
    row, position = (x.reshape(slots.parts, -1) for x in (slots.row, slots.position))
    planned, moves, leaves = lax.cond(
        (slots.step % block == 0) & (slots.step > 0),
        lambda: plan_flush(pages, row, position, idle=queue.rows, block=block),
        lambda: (pages, no_moves(pages, row.size), jnp.zeros(row.shape, bool)),
    )
    leaves = leaves.reshape(-1)
    place = slots.requeued_count + jnp.cumsum(leaves) - 1
    count = leaves.sum(dtype=jnp.int32)
    requeued = slots.requeued.at[jnp.where(leaves, place, row.size)].set(slots.row, mode="drop")
    flushed = dataclasses.replace(
        slots,
        pool=move(slots.pool, slots.ring, moves),
        pages=planned,
        requeued=requeued,
        requeued_count=slots.requeued_count + count,
        restarted=slots.restarted + count,
        dropped=slots.dropped + jnp.where(leaves, slots.position, 0).sum(dtype=jnp.int32),
    )
    return retire(queue, flushed, leaves)


def needed(busy: Array, *, shards: int) -> Array:
    """Fewest slots that hold the busy ones in ``shards`` equal parts: the fullest part decides."""
    return busy.reshape(shards, -1).sum(-1, dtype=jnp.int32).max() * shards


def compact(queue: Queue, slots: Slots, *, size: int, shards: int) -> Slots:
    """Moves the busy slots into ``size`` slots, which idle ones fill up. Pages stay in their place.

    Args:
      queue: the rows to write; none of them waits.
      slots: ``needed`` is at most ``size``.
      size: the new M, a multiple of ``shards``.
      shards: parts that the slots are split into; no cache row moves between parts.
    """
    parts = (slots.row >= queue.rows).reshape(shards, -1)
    order = jnp.argsort(parts, axis=1, stable=True)
    rows = order[:, : size // shards]
    flat = (rows + jnp.arange(shards)[:, None] * parts.shape[1]).reshape(-1)
    pages = slots.pages
    if pages is not None:
        place = jnp.argsort(order, axis=1).astype(jnp.int32)  # new number of each slot
        slot = jnp.take_along_axis(place, pages.slot, axis=1)
        # An idle slot may be gone: its pages are dead, whatever slot they name.
        pages = dataclasses.replace(pages, slot=jnp.minimum(slot, size // shards - 1))
    fewer = dataclasses.replace(
        slots,
        row=slots.row[flat],
        position=slots.position[flat],
        token=slots.token[flat],
        recent=slots.recent[flat],
        ring=pick_rows(slots.ring, rows),
        pages=pages,
        requeued=slots.requeued[:size],
    )
    return _whole(fewer)
