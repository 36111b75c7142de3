"""Attention over keys that arrive in blocks, merged by an online softmax.

Query heads that share a key head stay grouped: a block of keys is read once for all of them and
never repeated in memory. Source of the merge: Milakov and Gimelshein, arXiv 1805.02867.
"""

import jax.numpy as jnp

from echorl_jax.precision import wide_einsum
from echorl_jax.rollout.cache import Cache
from echorl_jax.types import Array, pytree

# Score of a key that must not be seen: exp of its distance to any real score is exactly 0.
NEVER = -1e30


@pytree
class Partial:
    """Attention over some of the keys: all that is needed to merge it with the rest."""

    mixed: Array  # f32 [M, KV, R, K], sum of exp(score - top) * value
    mass: Array  # f32 [M, KV, R], sum of exp(score - top)
    top: Array  # f32 [M, KV, R], largest score


def nothing(q: Array) -> Partial:
    """No attention yet, for queries ``[M, KV, R, K]``; the first block must hold a key for each."""
    return Partial(
        mixed=jnp.zeros(q.shape, jnp.float32),
        mass=jnp.zeros(q.shape[:-1], jnp.float32),
        top=jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
    )


def own_position(q: Array, k: Array, v: Array) -> Partial:
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

    With scores s and largest score m, old and new: all that is held is scaled by
    ``exp(m_old - m_new)``, then ``exp(s - m_new)`` is added.

    Args:
      partial: what has been seen.
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


def finish(partial: Partial) -> Array:
    """The attention output, f32 ``[M, KV, R, K]``."""
    return partial.mixed / partial.mass[..., None]
