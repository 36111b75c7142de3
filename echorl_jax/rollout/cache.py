"""Keys and values of past positions in blocks, and attention over them.

A block of one layer is contiguous in memory. For each row and head it holds a matrix of values
``[block, K]`` and one of transposed keys ``[K, block]``, so that both products of attention read
contiguous rows. Keys include their rotary positions, so their order in the cache is free; the ring
of ``slots.py`` depends on that.

Attention visits the blocks one by one and merges them by an online softmax (Milakov and Gimelshein,
arXiv 1805.02867). Query heads that share a key head stay grouped: a block is read once for all of
them and never repeated in memory.
"""

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import KVDtype
from echorl_jax.parallel import constrain
from echorl_jax.precision import wide_einsum
from echorl_jax.types import Array, pytree

KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


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


def read_block(cache: Cache, layer: Array, index: Array) -> Cache:
    """Block ``index`` of ``layer``, without the two leading axes."""

    def read(x: Array) -> Array:
        at = (layer, index) + (0,) * (x.ndim - 2)
        return lax.dynamic_slice(x, at, (1, 1, *x.shape[2:]))[0, 0]

    return jax.tree.map(read, cache)


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


def gather_rows(source: Cache, rows: Array) -> Cache:
    """Copies rows i32 ``[M]`` of a replicated cache into one that is split over the devices."""
    return place(jax.tree.map(lambda x: x[:, :, rows], source), "batch")


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


def finish_attention(partial: Partial) -> Array:
    """The attention output, f32 ``[M, KV, R, K]``."""
    return partial.mixed / partial.mass[..., None]
