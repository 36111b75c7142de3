"""Attention of a decode step: of each slot to its prompt, its pages, the ring and itself.

On a mesh every device attends for its slots, to its part of ring and pages, with the heads that it
holds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.rollout import kernel
from echorl_jax.rollout.cache import (
    SPLIT_ROWS,
    WHOLE_ROWS,
    Cache,
    Partial,
    combine,
    finish_attention,
    gather_block,
    in_parts,
    merge_block,
    merge_pages,
    no_attention,
    read_block,
    self_attention,
)
from echorl_jax.rollout.pages import CHUNK, live_pages
from echorl_jax.rollout.request import greatest_divisor
from echorl_jax.rollout.slots import Queue, Slots, cached_of, group_of
from echorl_jax.types import Array, pytree


@pytree
class Seen:
    """The past positions that each of M slots attends to."""

    cached: Array  # i32 [M], of its prompt, in the store
    group: Array  # i32 [M], row of the store
    written: Array  # i32 [M], of its completion
    in_ring: Array  # i32 [M], how many of these, the latest ones, are in the ring
    owner: Array | None = None  # i32 [D, Q/D], slot of the part that reads the page; M/D for none
    start: Array | None = None  # i32 [D, Q/D], position of the page's first column
    used: Array | None = None  # i32 [D], pages in use
    table: Array | None = None  # i32 [M, n], pages of each slot in order, for the kernel


def seen_by(queue: Queue, slots: Slots, *, longest: int) -> Seen:
    """The positions that the slots attend to in this step.

    Args:
      queue: the rows to write.
      slots: the rows being written.
      longest: T; 0 leaves out the table.
    """
    if slots.pages is None:
        adjacent = _in_order(queue, slots)  # idle slots keep their prompts too
        group = queue.group if adjacent else group_of(queue, slots)
        cached = queue.cached[group] if adjacent else cached_of(queue, slots)
        return Seen(cached, group, slots.position, slots.position)
    pages, block = slots.pages, slots.ring.length
    row = slots.row.reshape(slots.parts, -1)
    owner = jnp.where(live_pages(pages, row), pages.slot, row.shape[1])
    table = None
    if longest:
        order = -(-pages.start // block)  # the first page of a row may begin before the row
        part = jnp.arange(slots.parts)[:, None]
        page = jnp.broadcast_to(jnp.arange(owner.shape[1]), owner.shape)
        table = jnp.zeros((*row.shape, -(-longest // block) + 1), jnp.int32)
        table = table.at[part, owner, order].set(page, mode="drop")
        table = table.reshape(row.size, -1)
    return Seen(
        cached_of(queue, slots),
        group_of(queue, slots),
        slots.position,
        jnp.minimum(slots.position, slots.step % block),
        owner=owner,
        start=pages.start,
        used=pages.used,
        table=table,
    )


def _in_order(queue: Queue, slots: Slots) -> bool:
    """True if slot i holds row i or is idle: with a slot for each row, unless rows may leave."""
    return slots.pages is None and slots.row.shape[0] == queue.rows


def attend(
    q: Array,
    k: Array,
    v: Array,
    queue: Queue,
    slots: Slots,
    seen: Seen,
    *,
    layer: Array,
    window: Array | None,
    by_kernel: bool,
) -> Array:
    """Attention of one layer.

    Args:
      q: ``[M, KV, R, K]``.
      k, v: ``[M, KV, K]``, of the position itself.
      queue: the rows to write, with their prompts.
      slots: the rows being written, with their ring and pages.
      seen: from :func:`seen_by`.
      layer: of the caches.
      window: latest positions that the layer attends to, itself included; None for all.
      by_kernel: on a GPU, whose kernel needs tables.

    Returns:
      ``[M, KV, R, K]``.
    """
    heads = ("batch", "kv_heads")
    column = slots.step % slots.ring.length
    arguments = (q, k, v, seen, (layer, window, column), queue.store, slots.ring, slots.pool)
    axes = (heads, heads, heads, ("batch",), (), WHOLE_ROWS, SPLIT_ROWS, SPLIT_ROWS)
    adjacent = queue.request.group_size if _in_order(queue, slots) else 0
    read = _by_kernel if by_kernel else functools.partial(_by_blocks, adjacent=adjacent)
    return in_parts(read, arguments, axes, like=0)


At = tuple[Array, Array | None, Array]  # layer, window, column of the ring that is written


def _by_kernel(
    q: Array, k: Array, v: Array, seen: Seen, at: At, store: Cache, ring: Cache, pool: Cache | None
) -> Array:
    """Each row reads only the columns of the caches that it has filled."""
    layer, window, column = at
    in_ring, in_pages = seen.in_ring, seen.written - seen.in_ring
    hidden, hidden_pages = jnp.zeros_like(seen.cached), jnp.zeros_like(seen.cached)
    if window is not None:
        first = seen.cached + seen.written - window + 1  # first position that is visible
        hidden = jnp.clip(first, 0, seen.cached)
        hidden_pages = jnp.clip(first - seen.cached, 0, in_pages)
        in_ring = jnp.minimum(in_ring, window - 1)
    caches, spans = [store], [kernel.Span(hidden, seen.cached - hidden, row=seen.group)]
    if pool is not None:
        # The last page is full; the first one may begin before the row does.
        assert seen.table is not None
        start = -in_pages % pool.block + hidden_pages
        span = kernel.Span(start, in_pages - hidden_pages, table=seen.table)
        caches, spans = [*caches, pool], [*spans, span]
    latest = kernel.Span((column - in_ring) % ring.length, in_ring)
    return kernel.attend(q, k, v, layer, (*caches, ring), (*spans, latest))


def _by_blocks(
    q: Array,
    k: Array,
    v: Array,
    seen: Seen,
    at: At,
    store: Cache,
    ring: Cache,
    pool: Cache | None,
    *,
    adjacent: int,
) -> Array:
    """Reads blocks of prompts and ring up to the longest row's, and the pages in use."""
    partial = self_attention(q, k, v)
    partial = _attend_ring(partial, q, seen, at, ring)
    if pool is not None:
        partial = _attend_pages(partial, q, seen, at, pool)
    partial = _attend_prompt(partial, q, seen, at, store, adjacent=adjacent)
    return finish_attention(partial)


def _attend_ring(partial: Partial, q: Array, seen: Seen, at: At, ring: Cache) -> Partial:
    """Merges columns of the ring. A column's age is its distance to the one being written."""
    layer, window, column = at
    oldest = seen.in_ring if window is None else jnp.minimum(seen.in_ring, window - 1)

    def merge(back: Array | int, partial: Partial) -> Partial:
        index = (column // ring.block - back) % ring.blocks
        age = (column - index * ring.block - jnp.arange(ring.block)) % ring.length
        valid = (age >= 1)[None, :] & (age[None, :] <= oldest[:, None])
        block = read_block(ring, layer, index)
        return merge_block(partial, q, block, valid[:, None, None])

    if ring.blocks == 1:
        return merge(0, partial)
    before = jnp.maximum(seen.in_ring.max() - column % ring.block, 0)  # in earlier blocks
    blocks = jnp.minimum(1 - (-before // ring.block), ring.blocks)
    return lax.fori_loop(0, blocks, merge, partial)


def _attend_pages(partial: Partial, q: Array, seen: Seen, at: At, pool: Cache) -> Partial:
    """Merges the pages in use, in the order in which they lie."""
    assert seen.owner is not None and seen.start is not None and seen.used is not None
    layer, window, _ = at
    owners, starts = seen.owner[0], seen.start[0]
    chunk = greatest_divisor(owners.shape[0], most=CHUNK)

    def merge(index: Array, partial: Partial) -> Partial:
        first = index * chunk
        owner, start = (lax.dynamic_slice(x, (first,), (chunk,)) for x in (owners, starts))
        position = start[:, None] + jnp.arange(pool.block)[None, :]  # [C, block]
        valid = position >= 0
        if window is not None:
            valid &= seen.written[owner][:, None] - position < window
        pages = read_block(pool, layer, 0, first, chunk)
        return merge_pages(partial, q, pages, owner, valid[:, None, None])

    return lax.fori_loop(0, -(-seen.used[0] // chunk), merge, partial)


def _attend_prompt(
    partial: Partial, q: Array, seen: Seen, at: At, store: Cache, *, adjacent: int
) -> Partial:
    """Merges the prompts without their last tokens, which count as written.

    Args:
      partial: attention to the completion.
      q: ``[M, KV, R, K]``.
      seen, at, store: see :func:`attend`.
      adjacent: slots side by side that share a prompt, which is read once for them; 0 if slots hold
        any rows.
    """
    layer, window, _ = at
    rows, heads, group, width = q.shape
    each = max(1, adjacent)
    count = rows // each
    split = count, each, heads, group
    shared = q.reshape(*split, width).swapaxes(1, 2).reshape(count, heads, -1, width)
    position = jnp.repeat(seen.cached + seen.written, group).reshape(count, -1)
    filled = seen.cached[::each]

    def merge(index: Array | int, partial: Partial) -> Partial:
        if adjacent:
            block = read_block(store, layer, index, seen.group[0], count)
        else:
            block = gather_block(store, layer, index, seen.group)
        column = index * store.block + jnp.arange(store.block)
        valid = (column[None, :] < filled[:, None])[:, None, None]
        if window is not None:
            valid &= (position[:, :, None] - column[None, None, :] < window)[:, None]
        return merge_block(partial, shared, block, valid)

    blocks = -(-filled.max() // store.block) if store.blocks > 1 else 1
    prompt = lax.fori_loop(0, blocks, merge, no_attention(shared))

    def apart(x: Array) -> Array:
        x = x.reshape(count, heads, each, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(rows, heads, group, *x.shape[4:])

    return combine(partial, jax.tree.map(apart, prompt))
