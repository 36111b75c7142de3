"""Keys and values of past positions in blocks, and attention over them.

A block of one layer is contiguous in memory. For each row and head it holds a matrix of values
``[block, K]`` and one of transposed keys ``[K, block]``, so that both products of attention read
contiguous rows. Keys include their rotary positions, so their order in the cache is free; the ring
of ``slots.py`` depends on that.

Attention visits the blocks one by one and merges them by an online softmax (Milakov and Gimelshein,
arXiv 1805.02867). Query heads that share a key head stay grouped: a block is read once for all of
them and never repeated in memory.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import KVDtype
from echorl_jax.parallel import Platform, constrain, mesh_in_force, partition_spec
from echorl_jax.precision import wide_einsum
from echorl_jax.rollout.request import greatest_divisor
from echorl_jax.types import Array, PyTree, pytree

# Positions in a block of the cache. A TPU always computes with 128 lanes, and each block has a
# fixed cost; on CPU a block has to stay in the processor's caches (docs/performance.md), on GPU
# three blocks have to fit into the shared memory of a multiprocessor.
BLOCK = {"cpu": 64, "gpu": 64, "tpu": 128}
# Positions in a block of completions with several CPU workers: they start no threads per block, so
# short blocks waste less.
WORKER_BLOCK = 32
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def block_sizes(
    prompt_tokens: int, length: int, *, platform: Platform, cpu_workers: int = 1
) -> tuple[int, int]:
    """Positions in a block of the prompts' cache and of the completions'.

    >>> block_sizes(192, 96, platform="tpu"), block_sizes(192, 96, platform="gpu")
    ((96, 96), (64, 64))
    """
    most = BLOCK[platform]
    if platform == "gpu":  # its kernel needs powers of two
        no_shorter = 1 << (length - 1).bit_length()
        return min(most, prompt_tokens & -prompt_tokens), min(most, max(16, no_shorter))
    most_of_ring = most if cpu_workers == 1 else WORKER_BLOCK
    return greatest_divisor(prompt_tokens, most=most), min(length, most_of_ring)


@pytree
class Cache:
    """Keys and values; with int8 also the scale of each (position, head)."""

    k: Array  # [L, blocks, rows, KV, K, block]
    v: Array  # [L, blocks, rows, KV, block, K]
    k_scale: Array | None = None  # f32 [L, blocks, rows, KV, block]
    v_scale: Array | None = None

    @property
    def blocks(self) -> int:
        return self.v.shape[1]

    @property
    def block(self) -> int:
        """Positions in a block."""
        return self.v.shape[4]

    @property
    def length(self) -> int:
        """Positions in all blocks."""
        return self.blocks * self.block


def empty_cache(
    *,
    layers: int,
    blocks: int,
    rows: int,
    kv_heads: int,
    block: int,
    head_dim: int,
    dtype: KVDtype,
    whole: bool = False,
) -> Cache:
    """A cache of zeros; its rows are split over the current mesh, unless ``whole``."""
    matrices = (layers, blocks, rows, kv_heads)
    scale = jnp.zeros((*matrices, block), jnp.float32) if dtype == "int8" else None
    cache = Cache(
        k=jnp.zeros((*matrices, head_dim, block), jnp.dtype(dtype)),
        v=jnp.zeros((*matrices, block, head_dim), jnp.dtype(dtype)),
        k_scale=scale,
        v_scale=scale,
    )
    return place(cache, None if whole else "batch")


def place(cache: Cache, rows: str | None) -> Cache:
    """Constrains the cache to the current mesh, rows split ("batch") or replicated (None)."""
    axes = ("layers", None, rows, "kv_heads")
    return jax.tree.map(lambda x: constrain(x, *axes, *(None,) * (x.ndim - 4)), cache)


def encode(k: Array, v: Array, like: Cache) -> Cache:
    """Converts keys and values ``[..., K]`` to the type of ``like``.

    For int8 each vector is divided by its scale, ``max|x| / 127``, and rounded.
    """
    if like.k_scale is None:
        return Cache(k.astype(like.k.dtype), v.astype(like.v.dtype))
    (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
    return Cache(k, v, k_scale, v_scale)


def _quantise(x: Array) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / safe[..., None]).astype(jnp.int8), scale


def as_blocks(new: Cache, *, axis: int, block: int) -> Cache:
    """Cuts the axis of positions into blocks.

    Args:
      new: from :func:`encode`, ``[..., rows, positions, KV, K]`` (scales without K).
      axis: the axis of positions, counted from the front.
      block: positions in a block.

    Returns:
      ``[..., blocks, rows, KV, K, block]`` for keys, ``[..., blocks, rows, KV, block, K]`` else.
    """

    def split(x: Array) -> Array:
        x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        # rows, blocks, block, KV -> blocks, rows, KV, block
        return jnp.moveaxis(x, (axis - 1, axis + 1), (axis, axis + 2))

    blocks = jax.tree.map(split, new)
    return Cache(jnp.swapaxes(blocks.k, -1, -2), blocks.v, blocks.k_scale, blocks.v_scale)


def read_block(
    cache: Cache, layer: Array, index: Array | int, first: Array | int = 0, rows: int = 0
) -> Cache:
    """Block ``index`` of ``layer``, without the two leading axes; ``rows`` rows from ``first`` on,
    or all.
    """

    def read(x: Array) -> Array:
        at = (layer, index, first) + (0,) * (x.ndim - 3)
        return lax.dynamic_slice(x, at, (1, 1, rows or x.shape[2], *x.shape[3:]))[0, 0]

    return jax.tree.map(read, cache)


def gather_block(cache: Cache, layer: Array, index: Array | int, rows: Array) -> Cache:
    """Block ``index`` of ``layer`` for the given rows i32 ``[M]``."""
    return jax.tree.map(lambda x: x[layer, index, rows], cache)


def write_column(cache: Cache, new: Cache, column: Array) -> Cache:
    """Writes one position of every row and layer.

    Args:
      cache: the destination.
      new: ``[L, rows, KV, K]`` (scales ``[L, rows, KV]``), from :func:`encode`.
      column: i32 scalar in ``[0, length)``.
    """
    one = jax.tree.map(lambda x: jnp.expand_dims(x, 2), new)  # [L, rows, 1, KV, ...]
    index, place_in = column // cache.block, column % cache.block
    return _write(cache, as_blocks(one, axis=2, block=1), index, jnp.int32(0), place_in)


def write_piece(cache: Cache, new: Cache, row: Array, position: Array) -> Cache:
    """Writes whole blocks of some rows into a replicated cache.

    Args:
      cache: the destination.
      new: ``[L, rows, positions, KV, K]`` (scales without K), from :func:`encode`.
      row: i32 scalar, the first row.
      position: i32 scalar, the first position; a multiple of the block, as is their number.
    """
    pieces = place(as_blocks(new, axis=2, block=cache.block), None)
    return _write(cache, pieces, position // cache.block, row, jnp.int32(0))


def _write(cache: Cache, part: Cache, block: Array, row: Array, place_in: Array) -> Cache:
    zero = jnp.zeros_like(block)

    def write(whole: Array, part: Array, *last: Array) -> Array:
        return lax.dynamic_update_slice(whole, part, (zero, block, row, zero, *last))

    def write_scale(whole: Array, part: Array) -> Array:
        return write(whole, part, place_in)

    return Cache(
        k=write(cache.k, part.k, zero, place_in),
        v=write(cache.v, part.v, place_in, zero),
        k_scale=jax.tree.map(write_scale, cache.k_scale, part.k_scale),
        v_scale=jax.tree.map(write_scale, cache.v_scale, part.v_scale),
    )


def copy_row(cache: Cache, source: Cache, row: Array, source_row: Array) -> Cache:
    """Replaces row ``row`` by row ``source_row`` of ``source``."""

    def copy(whole: Array, other: Array) -> Array:
        part = lax.dynamic_slice_in_dim(other, source_row, 1, axis=2)
        return lax.dynamic_update_slice_in_dim(whole, part, row, axis=2)

    return jax.tree.map(copy, cache, source)


def pick_rows(cache: Cache, rows: Array) -> Cache:
    """Selects rows of each part of a split cache; no row moves between parts.

    Args:
      cache: M rows in d equal parts, one for each device that rows are split over.
      rows: i32 ``[d, m]``, numbers within the part.

    Returns:
      A cache of ``d * m`` rows.
    """

    def pick(x: Array) -> Array:
        parts = x.reshape(*x.shape[:2], rows.shape[0], -1, *x.shape[3:])
        picked = jax.vmap(lambda part, at: part[:, :, at], in_axes=(2, 0), out_axes=2)(parts, rows)
        return picked.reshape(*x.shape[:2], rows.size, *x.shape[3:])

    return place(jax.tree.map(pick, cache), "batch")


# Logical axes of the leading dimensions of caches whose rows are split, or replicated.
SPLIT_ROWS = (None, None, "batch", "kv_heads")
WHOLE_ROWS = (None, None, None, "kv_heads")


def in_parts(
    function: Callable[..., PyTree],
    arguments: Sequence[PyTree],
    axes: Sequence[tuple[str | None, ...]],
    *,
    like: int,
) -> PyTree:
    """Calls ``function`` on each device with its part of the arguments.

    Args:
      function: of the arguments; its result is split like argument ``like``.
      arguments: arrays, or trees of arrays of one kind.
      axes: for each argument the logical axes of its leading dimensions.
      like: index of an argument.
    """
    mesh = mesh_in_force()
    if mesh is None or mesh.size == 1:
        return function(*arguments)

    def specs(tree: PyTree, names: tuple[str | None, ...]) -> PyTree:
        return jax.tree.map(lambda x: partition_spec(names, x.shape[: len(names)], mesh), tree)

    split = tuple(map(specs, arguments, axes))
    call = jax.shard_map(
        function, mesh=mesh, in_specs=split, out_specs=split[like], check_vma=False
    )
    return call(*arguments)


# Score of a masked key: exp of its distance to any real score is exactly 0.
NEVER = -1e30


@pytree
class Partial:
    """Attention over some of the keys, in a form that can be merged with the rest."""

    mixed: Array  # f32 [M, KV, R, K], sum of exp(score - top) * value
    mass: Array  # f32 [M, KV, R], sum of exp(score - top)
    top: Array  # f32 [M, KV, R], largest score


def no_attention(q: Array) -> Partial:
    """No attention yet, for queries ``[M, KV, R, K]``; the first block must hold a key for each."""
    return Partial(
        mixed=jnp.zeros(q.shape, jnp.float32),
        mass=jnp.zeros(q.shape[:-1], jnp.float32),
        top=jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
    )


def self_attention(q: Array, k: Array, v: Array) -> Partial:
    """Attention of each query to its own position only.

    Args:
      q: ``[M, KV, R, K]``, R query heads for each key head.
      k: ``[M, KV, K]``.
      v: ``[M, KV, K]``.
    """
    scores = wide_einsum("mhrk,mhk->mhr", q, k)
    return Partial(
        mixed=jnp.broadcast_to(v[:, :, None, :].astype(jnp.float32), q.shape),
        mass=jnp.ones_like(scores),
        top=scores * q.shape[-1] ** -0.5,
    )


def merge_block(partial: Partial, q: Array, block: Cache, valid: Array) -> Partial:
    """Adds one block of keys.

    With scores s and the largest score m before and after: the sums so far are scaled by
    ``exp(m_old - m_new)``, then ``exp(s - m_new)`` is added.

    Args:
      partial: attention so far.
      q: ``[M, KV, R, K]``.
      block: keys ``[M, KV, K, block]``, values ``[M, KV, block, K]``, scales ``[M, KV, block]``.
      valid: bool, broadcasts to ``[M, KV, R, block]``.
    """
    k, v = block.k.astype(q.dtype), block.v.astype(q.dtype)
    scores = wide_einsum("mhrk,mhkb->mhrb", q, k)
    if block.k_scale is not None:
        scores = scores * block.k_scale[:, :, None, :]
    scores = jnp.where(valid, scores * q.shape[-1] ** -0.5, NEVER)
    top = jnp.maximum(partial.top, scores.max(-1))
    weight = jnp.exp(scores - top[..., None])
    shrink = jnp.exp(partial.top - top)
    mass = partial.mass * shrink + weight.sum(-1)
    if block.v_scale is not None:
        weight = weight * block.v_scale[:, :, None, :]
    mixed = wide_einsum("mhrb,mhbk->mhrk", weight.astype(v.dtype), v)
    return Partial(mixed=partial.mixed * shrink[..., None] + mixed, mass=mass, top=top)


def combine(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both; at least one of them has seen a key."""
    top = jnp.maximum(one.top, other.top)
    first, second = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Partial(
        mixed=one.mixed * first[..., None] + other.mixed * second[..., None],
        mass=one.mass * first + other.mass * second,
        top=top,
    )


def merge_pages(partial: Partial, q: Array, pages: Cache, owner: Array, valid: Array) -> Partial:
    """Adds pages, each to the row that it belongs to.

    Args:
      partial: attention so far, to a key at least.
      q: ``[M, KV, R, K]``.
      pages: C pages, as a block of C rows.
      owner: i32 ``[C]``; M for a page of no row.
      valid: bool, broadcasts to ``[C, KV, R, block]``.
    """
    rows = q.shape[0]
    mine = owner[None, :] == jnp.arange(rows)[:, None]  # [M, C]
    at = jnp.minimum(owner, rows - 1)
    seen = merge_block(no_attention(q[at]), q[at], pages, valid)
    highest = jnp.where(mine[:, :, None, None], seen.top[None], NEVER).max(1)
    top = jnp.maximum(partial.top, highest)
    weight = jnp.exp(jnp.minimum(seen.top - top[at], 0.0))
    shrink = jnp.exp(partial.top - top)
    one_hot = mine.astype(jnp.float32)
    mixed = wide_einsum("mc,chrk->mhrk", one_hot, seen.mixed * weight[..., None])
    mass = wide_einsum("mc,chr->mhr", one_hot, seen.mass * weight)
    return Partial(
        mixed=partial.mixed * shrink[..., None] + mixed,
        mass=partial.mass * shrink + mass,
        top=top,
    )


def finish_attention(partial: Partial) -> Array:
    """The attention output, f32 ``[M, KV, R, K]``."""
    return partial.mixed / partial.mass[..., None]
