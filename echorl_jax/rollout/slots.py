"""Who is being written: rows waiting in a queue, and slots that take the next one as they finish.

The completion cache is a ring. At every turn all slots write the same column, so a write is one
slice and needs no scatter. A slot whose row has t tokens looks at the t latest columns; when it
takes a new row it simply stops looking at the older ones.

All decisions are made on whole (replicated) arrays of one number per slot, so every device and
every process makes the same ones.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.rollout.cache import Cache, copy_row, gather_rows, pick_rows
from echorl_jax.rollout.settings import Sampling
from echorl_jax.types import Array, pytree


@pytree
class Queue:
    """What every row starts from. Read only."""

    key: Array  # PRNG keys [N] of the rows
    count: Array  # i32 [], rows to be written; rows from there on are padding
    group: Array  # i32 [N], prompt of the row
    limit: Array  # i32 [N], longest completion of the row
    cached: Array  # i32 [P], positions of the prompt in `store`: all but the last token
    last_token: Array  # i32 [P], last token of the prompt
    forced: Array  # i32 [N, F], tokens that the completion has to begin with
    forced_length: Array  # i32 [N]
    store: Cache  # P rows

    @property
    def rows(self) -> int:
        """N; also the row number of idle slots."""
        return self.group.shape[0]


@pytree
class Slots:
    """The rows being written, M at a time, and the memory they attend to."""

    row: Array  # i32 [M], row of the queue; N where idle
    position: Array  # i32 [M], tokens that the row has; so many columns of `ring` are its own
    token: Array  # i32 [M], latest token: the next input
    recent: Array  # i32 [M, W], latest tokens, for stop sequences; -1 where none
    cached: Array  # i32 [M], positions of `prompt` that are filled
    prompt: Cache | None  # M rows; None while slot i holds row i: then the queue's store serves
    ring: Cache  # M rows
    turn: Array  # i32 [], turns so far; modulo the ring's length the column to be written
    next_row: Array  # i32 [], first row that no slot has taken


def _whole(slots: Slots) -> Slots:
    """Keeps the numbers that decisions are made from whole on every device."""
    return dataclasses.replace(
        slots,
        row=constrain(slots.row, None),
        position=constrain(slots.position, None),
        token=constrain(slots.token, None),
        recent=constrain(slots.recent, None, None),
        cached=constrain(slots.cached, None),
    )


def first_slots(queue: Queue, *, slots: int, memory: int, ring: Cache) -> Slots:
    """Gives the first rows to the slots; with a slot for each row prompts are not copied.

    Args:
      queue: the work.
      slots: M.
      memory: W.
      ring: an empty cache of M rows.
    """
    row = jnp.arange(slots, dtype=jnp.int32)
    group = queue.group[jnp.minimum(row, queue.rows - 1)]
    first = Slots(
        row=jnp.where(row < queue.count, row, queue.rows),
        position=jnp.zeros(slots, jnp.int32),
        token=queue.last_token[group],
        recent=jnp.full((slots, memory), -1, jnp.int32),
        cached=queue.cached[group],
        prompt=None if slots == queue.rows else gather_rows(queue.store, group),
        ring=ring,
        turn=jnp.zeros((), jnp.int32),
        next_row=jnp.minimum(slots, queue.count).astype(jnp.int32),
    )
    return _whole(first)


def forced_tokens(queue: Queue, slots: Slots) -> Array | None:
    """The token that each slot has to write, or -1; None if the call forces nothing."""
    width = queue.forced.shape[1]
    if width == 0:
        return None
    row = jnp.minimum(slots.row, queue.rows - 1)
    token = queue.forced[row, jnp.minimum(slots.position, width - 1)]
    return jnp.where(slots.position < queue.forced_length[row], token, -1)


def append(
    queue: Queue, slots: Slots, token: Array, sampling: Sampling
) -> tuple[Slots, Array, Array]:
    """Adds a token to every row.

    Returns:
      The slots; which of their rows are over, bool ``[M]``; which of them ended themselves, by EOS
      or a stop sequence, bool ``[M]``.
    """
    recent = slots.recent
    if sampling.memory:
        recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
    stopped = jnp.zeros(token.shape, bool)
    for end in sampling.eos_ids:
        stopped |= token == end
    for sequence in sampling.stop_sequences:
        latest = recent[:, -len(sequence) :]
        stopped |= (latest == jnp.array([sequence], jnp.int32)).all(-1)
    position = slots.position + 1
    full = position >= queue.limit[jnp.minimum(slots.row, queue.rows - 1)]
    slots = dataclasses.replace(
        slots, token=token, position=position, recent=recent, turn=slots.turn + 1
    )
    return slots, (stopped | full) & (slots.row < queue.rows), stopped


def retire(queue: Queue, slots: Slots, over: Array) -> Slots:
    """Makes slots idle. An idle slot attends to nothing but itself and its tokens are dropped."""
    over |= slots.row >= queue.rows
    idle = dataclasses.replace(
        slots,
        row=jnp.where(over, queue.rows, slots.row),
        position=jnp.where(over, 0, slots.position),
        cached=jnp.where(over, 0, slots.cached),
    )
    return _whole(idle)


def refill(queue: Queue, slots: Slots) -> Slots:
    """Gives the next rows of the queue to idle slots, in order of slots."""
    idle = slots.row >= queue.rows
    candidate = slots.next_row + jnp.cumsum(idle) - 1
    takes = idle & (candidate < queue.count)
    group = queue.group[jnp.where(takes, candidate, 0)]
    takers = jnp.nonzero(takes, size=takes.shape[0], fill_value=0)[0]
    taken = takes.sum(dtype=jnp.int32)

    def copy(index: Array, prompt: Cache) -> Cache:
        slot = takers[index]
        return copy_row(prompt, queue.store, slot, group[slot])

    filled = dataclasses.replace(
        slots,
        row=jnp.where(takes, candidate, slots.row),
        token=jnp.where(takes, queue.last_token[group], slots.token),
        recent=jnp.where(takes[:, None], -1, slots.recent),
        cached=jnp.where(takes, queue.cached[group], slots.cached),
        prompt=lax.fori_loop(0, taken, copy, slots.prompt),
        next_row=slots.next_row + taken,
    )
    return _whole(filled)


def needed(busy: Array, *, shards: int) -> Array:
    """The fewest slots that hold the busy ones, in ``shards`` parts as large as the fullest."""
    return busy.reshape(shards, -1).sum(-1, dtype=jnp.int32).max() * shards


def compact(queue: Queue, slots: Slots, *, size: int, shards: int) -> Slots:
    """The same work in ``size`` slots: the busy ones, and idle ones to fill up.

    Args:
      queue: the work.
      slots: ``needed`` is at most ``size``.
      size: the new M, a multiple of ``shards``.
      shards: parts that the slots are split into; no cache moves from one to another.
    """
    parts = (slots.row >= queue.rows).reshape(shards, -1)
    rows = jnp.argsort(parts, axis=1, stable=True)[:, : size // shards]
    order = (rows + jnp.arange(shards)[:, None] * parts.shape[1]).reshape(-1)
    row = slots.row[order]
    if slots.prompt is None:
        prompt = gather_rows(queue.store, queue.group[jnp.minimum(row, queue.rows - 1)])
    else:
        prompt = pick_rows(slots.prompt, rows)
    fewer = dataclasses.replace(
        slots,
        row=row,
        position=slots.position[order],
        token=slots.token[order],
        recent=slots.recent[order],
        cached=slots.cached[order],
        prompt=prompt,
        ring=pick_rows(slots.ring, rows),
    )
    return _whole(fewer)
