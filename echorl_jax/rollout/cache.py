"""Keys and values of past positions, in blocks.

Layout ``[L, blocks, rows, KV, block, K]``: a block of one layer is one contiguous piece, and in it
each (row, head) is a matrix. Rotary positions are in the keys already, so where a key lies does not
matter; that makes the ring possible (see ``slots.py``).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.types import Array, pytree

KVDtype = Literal["float32", "bfloat16", "int8"]
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_AXES = ("layers", None, "batch", "kv_heads", None, "head_dim")


@pytree
class Cache:
    """Keys and values; with int8 also the scale of each (position, head)."""

    k: Array  # [L, blocks, rows, KV, block, K]
    v: Array  # likewise
    k_scale: Array | None = None  # f32 [L, blocks, rows, KV, block]
    v_scale: Array | None = None

    @property
    def blocks(self) -> int:
        return self.k.shape[1]

    @property
    def block(self) -> int:
        """Positions in a block."""
        return self.k.shape[4]

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
    """A cache of zeros, placed on the mesh in force: rows split over it, unless ``whole``."""
    vectors = (layers, blocks, rows, kv_heads, block)
    zeros = jnp.zeros((*vectors, head_dim), jnp.dtype(dtype))
    scale = jnp.zeros(vectors, jnp.float32) if dtype == "int8" else None
    return place(Cache(zeros, zeros, scale, scale), None if whole else "batch")


def place(cache: Cache, rows: str | None) -> Cache:
    """Pins the cache to the mesh in force, its rows split ("batch") or whole (None)."""
    axes = (*_AXES[:2], rows, *_AXES[3:])
    return jax.tree.map(lambda x: constrain(x, *axes[: x.ndim]), cache)


def encode(k: Array, v: Array, like: Cache) -> Cache:
    """Keys and values ``[..., K]`` as ``like`` stores them.

    int8: each vector is divided by ``max|x| / 127``, its scale, and rounded.
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


def read_block(cache: Cache, layer: Array, index: Array) -> Cache:
    """Block ``index`` of ``layer``, without the two leading axes."""

    def read(x: Array) -> Array:
        at = (layer, index) + (0,) * (x.ndim - 2)
        return lax.dynamic_slice(x, at, (1, 1, *x.shape[2:]))[0, 0]

    return jax.tree.map(read, cache)


def write_column(cache: Cache, new: Cache, column: Array) -> Cache:
    """Writes one position of every row and layer.

    Args:
      cache: where to.
      new: ``[L, rows, KV, K]`` (scales ``[L, rows, KV]``), from :func:`encode`.
      column: i32 scalar in ``[0, length)``.
    """
    at = (0, column // cache.block, 0, 0, column % cache.block, 0)

    def write(whole: Array, part: Array) -> Array:
        part = jnp.expand_dims(part, (1, 4))  # [L, 1, rows, KV, 1, ...]
        return lax.dynamic_update_slice(whole, part, at[: whole.ndim])

    return jax.tree.map(write, cache, new)


def write_piece(cache: Cache, new: Cache, row: Array, position: Array) -> Cache:
    """Writes whole blocks of some rows into a cache that is whole on every device.

    Args:
      cache: where to.
      new: ``[L, rows, positions, KV, K]`` (scales without K), from :func:`encode`.
      row: i32 scalar, the first row.
      position: i32 scalar, the first position; a multiple of the block, as is their number.
    """
    at = (0, position // cache.block, row, 0, 0, 0)

    def write(whole: Array, part: Array) -> Array:
        layers, rows, positions, *rest = part.shape
        part = constrain(part, "layers", None, None, "kv_heads", *(None,) * len(rest[1:]))
        part = part.reshape(layers, rows, positions // cache.block, cache.block, *rest)
        part = jnp.moveaxis(part, (1, 2, 3, 4), (2, 1, 4, 3))  # [L, blocks, rows, KV, block, ...]
        return lax.dynamic_update_slice(whole, part, at[: whole.ndim])

    return jax.tree.map(write, cache, new)


def copy_row(cache: Cache, source: Cache, row: Array, source_row: Array) -> Cache:
    """Row ``row`` becomes a copy of ``source``'s ``source_row``."""

    def copy(whole: Array, other: Array) -> Array:
        part = lax.dynamic_slice_in_dim(other, source_row, 1, axis=2)
        return lax.dynamic_update_slice_in_dim(whole, part, row, axis=2)

    return jax.tree.map(copy, cache, source)


def gather_rows(source: Cache, rows: Array) -> Cache:
    """Rows i32 ``[M]`` of a cache that is whole on every device, split over them."""
    return place(jax.tree.map(lambda x: x[:, :, rows], source), "batch")


def pick_rows(cache: Cache, rows: Array) -> Cache:
    """Some rows of each part of a split cache, without moving any between the parts.

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
