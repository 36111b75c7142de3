"""Pages: one pool for the completions of all rows of a device.

The ring of ``slots.py`` then holds one block only. Whenever it is full, the block of each busy slot
becomes a page, so a row takes memory as it grows. Pages in use are the first ones of the pool: the
last of them move into the gaps that ended rows have left. So attention reads the pool from front to
back, each page for the slot that it names, and reads no more than the rows have written.

When pages run out, the youngest rows leave their slots. They begin again later and get the same
samples, because keys depend on row and token alone.

The arrays beside the cache have an axis of parts: devices that share the rows have a pool each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.rollout.cache import SPLIT_ROWS, Cache, copy_row, in_parts
from echorl_jax.types import Array, pytree

# Completions of at least this many blocks may be paged. In shorter ones, reading up to the longest
# row costs less than adding pages up.
PAGED_BLOCKS = 8
# Share of the pages that no new row may take: rows that are being written grow into them.
RESERVE = 1 / 20
# Pages that attention reads at once.
CHUNK = 32


def is_paged(length: int, block: int) -> bool:
    """True if completions of up to ``length`` tokens are paged."""
    return length >= PAGED_BLOCKS * block


def whole_pages(tokens: int, length: int, block: int) -> int:
    """Positions of whole pages, and of whole chunks of them, that hold at least ``tokens`` and one
    row of ``length``, which may begin within a page.

    >>> whole_pages(1000, 640, 64), whole_pages(5000, 640, 64)
    (1024, 6144)
    """
    pages = max(-(-tokens // block), -(-length // block) + 1)
    return block * (pages if pages <= CHUNK else -(-pages // CHUNK) * CHUNK)


@pytree
class Pages:
    """The writers of Q pages in D parts; the first ``used`` ones of each part are in use."""

    slot: Array  # i32 [D, Q/D], slot of the part that wrote the page
    row: Array  # i32 [D, Q/D], its row of the queue
    start: Array  # i32 [D, Q/D], position of its first column; negative: before the row
    used: Array  # i32 [D]


@pytree
class Moves:
    """Copies inside the pools, and then from the ring to the pools; for each part ``[D, ...]``."""

    source: Array  # i32 [D, Q/2], pages
    target: Array  # i32 [D, Q/2]
    moved: Array  # i32 [D], how many of them
    slot: Array  # i32 [D, M/D], slots whose blocks become pages from `first` on
    first: Array  # i32 [D]
    written: Array  # i32 [D], how many of them


def no_pages(count: int, *, parts: int) -> Pages:
    """``count`` pages in ``parts`` parts, none of them in use."""
    zeros = jnp.zeros((parts, count // parts), jnp.int32)
    return _replicated(Pages(zeros, zeros, zeros, zeros[:, 0]))


def _replicated(pages: Pages) -> Pages:
    """Replicates the arrays, because decisions depend on them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), pages)


def live_pages(pages: Pages, row: Array) -> Array:
    """True where the row that wrote the page is still in its slot, bool ``[D, Q/D]``.

    Args:
      pages: the pool.
      row: i32 ``[D, M/D]``, row of each slot.
    """
    index = jnp.arange(pages.slot.shape[1])
    same = jnp.take_along_axis(row, pages.slot, axis=1) == pages.row
    return same & (index[None, :] < pages.used[:, None])


def room(pages: Pages, row: Array, busy: Array) -> Array:
    """Rows that each part may take, i32 ``[D]``: at the next full block each needs a page.

    An empty part may always take one.
    """
    size = pages.slot.shape[1]
    held = live_pages(pages, row).sum(1, dtype=jnp.int32)
    count = busy.sum(1, dtype=jnp.int32)
    free = size - int(RESERVE * size) - held - count
    return jnp.maximum(free, (count == 0).astype(jnp.int32))


def plan_flush(
    pages: Pages, row: Array, position: Array, *, idle: int, block: int
) -> tuple[Pages, Moves, Array]:
    """Makes the block of each busy slot a page.

    Args:
      pages: before.
      row: i32 ``[D, M/D]``, row of each slot.
      position: i32 ``[D, M/D]``, tokens of the row.
      idle: the row of idle slots.
      block: positions in a page.

    Returns:
      The pages after the copies; the copies; the slots whose rows have to leave, bool
      ``[D, M/D]``.
    """
    plan = functools.partial(_plan_part, idle=idle, block=block)
    new, moves, leaves = jax.vmap(plan)(pages, live_pages(pages, row), row, position)
    return _replicated(new), moves, leaves


def _plan_part(
    pages: Pages, live: Array, row: Array, position: Array, *, idle: int, block: int
) -> tuple[Pages, Moves, Array]:
    """:func:`plan_flush` for one part."""
    size, slots = pages.slot.shape[0], row.shape[0]
    busy = row < idle
    # The youngest rows leave until the others' pages fit; the oldest always stays and ends one day.
    lacking = live.sum() + busy.sum() - size
    order = jnp.argsort(jnp.where(busy, position, jnp.iinfo(jnp.int32).max))
    held = jnp.zeros(slots, jnp.int32).at[pages.slot].add(live.astype(jnp.int32))
    gained = jnp.cumsum(held[order] + 1) - (held[order] + 1)
    leaves = jnp.zeros(slots, bool).at[order].set(gained < lacking) & busy
    live, busy = live & ~leaves[pages.slot], busy & ~leaves

    kept = live.sum(dtype=jnp.int32)
    index, half = jnp.arange(size), max(1, size // 2)
    source = jnp.nonzero(live & (index >= kept), size=half, fill_value=size)[0].astype(jnp.int32)
    target = jnp.nonzero(~live & (index < kept), size=half, fill_value=size)[0].astype(jnp.int32)
    writer = jnp.nonzero(busy, size=slots, fill_value=0)[0].astype(jnp.int32)
    written = busy.sum(dtype=jnp.int32)
    number = jnp.arange(slots)
    new = jnp.where(number < written, kept + number, size)

    def renew(array: Array, of_writer: Array) -> Array:
        moved = array.at[target].set(array[jnp.minimum(source, size - 1)], mode="drop")
        return moved.at[new].set(of_writer, mode="drop")

    moved = (live & (index >= kept)).sum(dtype=jnp.int32)
    renewed = Pages(
        slot=renew(pages.slot, writer),
        row=renew(pages.row, row[writer]),
        start=renew(pages.start, position[writer] - block),
        used=kept + written,
    )
    return renewed, Moves(source, target, moved, writer, kept, written), leaves


def no_moves(pages: Pages, slots: int) -> Moves:
    """Nothing to copy, for M slots."""
    parts, size = pages.slot.shape
    none, pairs = jnp.zeros(parts, jnp.int32), jnp.zeros((parts, max(1, size // 2)), jnp.int32)
    return Moves(pairs, pairs, none, jnp.zeros((parts, slots // parts), jnp.int32), none, none)


def move(pool: Cache, ring: Cache, moves: Moves) -> Cache:
    """Copies pages within the pool, and blocks of the ring to the pool."""

    def in_part(pool: Cache, ring: Cache, moves: Moves) -> Cache:
        one = jax.tree.map(lambda x: x[0], moves)

        def close_gap(index: Array, pool: Cache) -> Cache:
            return copy_row(pool, pool, one.target[index], one.source[index])

        def write(index: Array, pool: Cache) -> Cache:
            return copy_row(pool, ring, one.first + index, one.slot[index])

        pool = lax.fori_loop(0, one.moved, close_gap, pool)
        return lax.fori_loop(0, one.written, write, pool)

    axes = SPLIT_ROWS, SPLIT_ROWS, ("batch",)
    return in_parts(in_part, (pool, ring, moves), axes, like=0)
