"""Continuous batching: a slot whose row has ended takes the next row of the queue.

The cache of the completions is a ring. In every decode step all slots write the same column, so the
write is one slice and needs no scatter. A slot whose row has t tokens reads the t latest columns,
so a slot that takes a new row does not read the columns of the previous one.

Decisions depend on replicated arrays only, so that every device and process takes the same ones.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.rollout.cache import Cache, copy_row, gather_rows, pick_rows
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
    cached: Array  # i32 [M], filled positions of `prompt`
    prompt: Cache | None  # M rows; None while slot i holds row i: then the queue's store is read
    ring: Cache  # M rows
    step: Array  # i32 [], decode steps so far; modulo the ring's length the next column to write
    next_row: Array  # i32 [], first row that no slot has taken


def _whole(slots: Slots) -> Slots:
    """Replicates the arrays that decisions depend on."""
    return dataclasses.replace(
        slots,
        row=constrain(slots.row, None),
        position=constrain(slots.position, None),
        token=constrain(slots.token, None),
        recent=constrain(slots.recent, None, None),
        cached=constrain(slots.cached, None),
    )


def first_slots(queue: Queue, *, slots: int, stop_window: int, ring: Cache) -> Slots:
    """Gives the first rows to M ``slots``; with a slot for each row prompts are not copied.

    Args:
      queue: the rows to write.
      slots: M.
      stop_window: W.
      ring: an empty cache of M rows.
    """
    row = jnp.arange(slots, dtype=jnp.int32)
    group = queue.group[jnp.minimum(row, queue.rows - 1)]
    first = Slots(
        row=jnp.where(row < queue.request.count, row, queue.rows),
        position=jnp.zeros(slots, jnp.int32),
        token=queue.last_token[group],
        recent=jnp.full((slots, stop_window), -1, jnp.int32),
        cached=queue.cached[group],
        prompt=None if slots == queue.rows else gather_rows(queue.store, group),
        ring=ring,
        step=jnp.zeros((), jnp.int32),
        next_row=jnp.minimum(slots, queue.request.count).astype(jnp.int32),
    )
    return _whole(first)


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
    stopped = jnp.zeros(token.shape, bool)
    for end in sampling.eos_ids:
        stopped |= token == end
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
        cached=jnp.where(ended, 0, slots.cached),
    )
    return _whole(idle)


def refill(queue: Queue, slots: Slots) -> Slots:
    """Gives the next rows of the queue to idle slots, in order of slots."""
    idle = slots.row >= queue.rows
    candidate = slots.next_row + jnp.cumsum(idle) - 1
    takes = idle & (candidate < queue.request.count)
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
    """Fewest slots that hold the busy ones in ``shards`` equal parts: the fullest part decides."""
    return busy.reshape(shards, -1).sum(-1, dtype=jnp.int32).max() * shards


def compact(queue: Queue, slots: Slots, *, size: int, shards: int) -> Slots:
    """Moves the busy slots into ``size`` slots, which idle ones fill up.

    Args:
      queue: the rows to write.
      slots: ``needed`` is at most ``size``.
      size: the new M, a multiple of ``shards``.
      shards: parts that the slots are split into; no cache row moves between parts.
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
