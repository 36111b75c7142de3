"""Keys and values of past positions, in blocks, and attention that merges blocks with an online softmax.

Layout ``[L, blocks, rows, KV, block, K]``: a block of one layer is one contiguous piece, and in it each (row, head) is a
matrix. A completion's cache is a ring: at every step all slots write the same column, so a write is one slice and needs no
scatter; a slot that takes a new row simply stops looking at older columns. Rotary positions are in the keys already, so where a
key lies does not matter.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.parallel.layout import constrain
from echorl_jax.types import Array, pytree

KVDtype = Literal["float32", "bfloat16", "int8"]
# Smaller than any score of a finite model, and exp(_NEVER - score) is exactly 0.
_NEVER = -1e30
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
        return self.k.shape[4]


@pytree
class Partial:
    """Attention over part of the keys: what is needed to merge it with the rest."""

    mixed: Array  # f32 [M, KV, R, K], sum of exp(score - top) * value
    mass: Array  # f32 [M, KV, R], sum of exp(score - top)
    top: Array  # f32 [M, KV, R], largest score


def empty_cache(
    *, layers: int, blocks: int, rows: int, kv_heads: int, block: int, head_dim: int, dtype: KVDtype
) -> Cache:
    """A cache of zeros, placed on the mesh in force."""
    shape = (layers, blocks, rows, kv_heads, block, head_dim)

    def zeros(shape: tuple[int, ...], dtype: str, axes: tuple[str | None, ...]) -> Array:
        return constrain(jnp.zeros(shape, jnp.dtype(dtype)), *axes)

    k, v = zeros(shape, dtype, _AXES), zeros(shape, dtype, _AXES)
    if dtype != "int8":
        return Cache(k, v)
    return Cache(
        k, v, zeros(shape[:-1], "float32", _AXES[:-1]), zeros(shape[:-1], "float32", _AXES[:-1])
    )


def encode(k: Array, v: Array, like: Cache) -> Cache:
    """Keys and values ``[..., K]`` as ``like`` stores them; int8 takes the scale of each vector from its largest entry."""
    if like.k_scale is None:
        return Cache(k.astype(like.k.dtype), v.astype(like.v.dtype))
    (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
    return Cache(k, v, k_scale, v_scale)


def _quantise(x: Array) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / safe[..., None]).astype(jnp.int8), scale


def write_column(cache: Cache, new: Cache, column: Array) -> Cache:
    """Writes one position of every row and layer.

    Args:
      cache: the ring.
      new: ``[L, rows, KV, K]`` (scales ``[L, rows, KV]``), from :func:`encode`.
      column: i32 scalar in ``[0, blocks * block)``.
    """
    at = (0, column // cache.block, 0, 0, column % cache.block, 0)

    def write(whole: Array, part: Array) -> Array:
        part = jnp.expand_dims(part, (1, 4))  # [L, 1, rows, KV, 1, ...]
        return lax.dynamic_update_slice(whole, part, at[: whole.ndim])

    return jax.tree.map(write, cache, new)


def start(q: Array, k: Array, v: Array) -> Partial:
    """Attention of each row's query to its own position only.

    Args:
      q: ``[M, KV, R, K]``, R query heads for each key head.
      k, v: ``[M, KV, K]``.
    """
    scores = jnp.einsum("mhrk,mhk->mhr", q, k, preferred_element_type=jnp.float32)
    mixed = jnp.broadcast_to(v[:, :, None, :].astype(jnp.float32), q.shape)
    return Partial(mixed=mixed, mass=jnp.ones_like(scores), top=scores * q.shape[-1] ** -0.5)


def attend_block(partial: Partial, q: Array, block: Cache, valid: Array) -> Partial:
    """Merges one block of keys into ``partial``.

    With scores s and the largest so far m: everything held is scaled by ``exp(m_old - m_new)`` and ``exp(s - m_new)`` is added.

    Args:
      q: ``[M, KV, R, K]``.
      block: arrays ``[M, KV, block, K]`` (scales ``[M, KV, block]``).
      valid: bool, broadcasts to ``[M, KV, R, block]``.
    """
    k, v = block.k.astype(q.dtype), block.v.astype(q.dtype)
    scores = jnp.einsum("mhrk,mhbk->mhrb", q, k, preferred_element_type=jnp.float32)
    if block.k_scale is not None:
        scores = scores * block.k_scale[:, :, None, :]
    scores = jnp.where(valid, scores * q.shape[-1] ** -0.5, _NEVER)
    top = jnp.maximum(partial.top, scores.max(-1))
    weight = jnp.exp(scores - top[..., None])
    shrink = jnp.exp(partial.top - top)
    mass = partial.mass * shrink + weight.sum(-1)
    if block.v_scale is not None:
        weight = weight * block.v_scale[:, :, None, :]
    mixed = jnp.einsum(
        "mhrb,mhbk->mhrk", weight.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return Partial(mixed=partial.mixed * shrink[..., None] + mixed, mass=mass, top=top)


def finish(partial: Partial) -> Array:
    """The attention output ``[M, KV, R, K]`` in float32."""
    return partial.mixed / partial.mass[..., None]


def read_block(cache: Cache, layer: Array, index: Array) -> Cache:
    """Block ``index`` of ``layer``, without the two leading axes."""

    def read(x: Array) -> Array:
        at = (layer, index) + (0,) * (x.ndim - 2)
        return lax.dynamic_slice(x, at, (1, 1, *x.shape[2:]))[0, 0]

    return jax.tree.map(read, cache)
