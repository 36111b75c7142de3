"""Draws a token from logits, with its log-probability and entropy; two random numbers per token.

The Gumbel method would need V random numbers per token. Here one uniform number selects a block of
the vocabulary from the cumulative distribution, and another one a token of the block. So only the
block sums and one block are scanned, and only these are sent where devices share the vocabulary.

Arrays are ``[V, M]`` inside, because the product with a tied embedding is faster so on CPU.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.parallel import constrain
from echorl_jax.rollout.request import Sampling
from echorl_jax.types import Array, pytree

# Logit of excluded tokens: its exp is exactly 0 in float32, and 0 times it is 0, not NaN.
_NEVER = -1e30
# The number of blocks shares as many divisors with this as possible, so that 2, 3, 4, 6, 8, 16 or
# 32 devices can split the vocabulary.
SHARED = 96


@pytree
class Sampled:
    """One token per row."""

    token: Array  # i32 [M]
    logprob: Array  # f32 [M], under the whole distribution at the sampling temperature
    entropy: Array  # f32 [M], likewise


def sampling_key(key: Array) -> Array:
    """Converts a key of any generator to one for Threefry.

    Numbers of other generators (``rbg``) depend on the rows that are computed together, so samples
    would depend on the number of slots.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl="threefry2x32")


def row_keys(key: Array, number: Array) -> Array:
    """The keys ``fold_in(key, number)`` for ``number`` i32 ``[N]``."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, number)


def token_uniforms(keys: Array, position: Array) -> Array:
    """Two uniform numbers for each token; they depend on its row and position alone.

    Args:
      keys: ``[M]`` from :func:`row_keys`.
      position: i32 ``[M]``.

    Returns:
      f32 ``[M, 2]`` in ``[0, 1)``, from the keys ``fold_in(row's key, position)``.
    """

    def bits(key: Array, position: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    return (jax.vmap(bits)(keys, position) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def sample(
    logits: Array, uniforms: Array, sampling: Sampling, *, prefix: Array | None = None
) -> Sampled:
    """Draws a token from each row of logits.

    With ``z = logits / temperature`` and ``p = softmax(z)``: ``logprob = z[token] - logsumexp(z)``,
    ``entropy = -sum p log p``. These are of the untruncated distribution; bans and truncation only
    decide what can be drawn.

    Args:
      logits: ``[M, V]``.
      uniforms: f32 ``[M, 2]`` from :func:`token_uniforms`.
      sampling: the settings.
      prefix: i32 ``[M]``, a token to take in place of the draw; -1 takes the draw.
    """
    z = logits.astype(jnp.float32).T
    # Subtract before the division, so that the likeliest token weighs exactly 1.
    z = z - z.max(0, keepdims=True)
    if sampling.scale != 1:
        z = jnp.maximum(z / sampling.scale, _NEVER)
    vocab, rows = z.shape
    blocks, width = vocabulary_blocks(vocab)
    z = jnp.pad(z, ((0, blocks * width - vocab), (0, 0)), constant_values=_NEVER)
    z = constrain(z.reshape(blocks, width, rows), "vocab", None, "batch")
    weight = jnp.exp(z)
    block_sums = weight.sum(1)
    total = block_sums.sum(0)
    entropy = jnp.log(total) - (weight * z).sum((0, 1)) / total
    if sampling.greedy:
        token = _greedy(z, sampling.banned_ids)
    else:
        weight, block_sums = _truncate(z, weight, block_sums, sampling)
        token = _draw(weight, block_sums, uniforms)
    if prefix is not None:
        token = jnp.where(prefix >= 0, prefix, token)
    chosen = jnp.take_along_axis(z.reshape(-1, rows), token[None], axis=0)[0]
    return Sampled(token=token, logprob=chosen - jnp.log(total), entropy=jnp.maximum(entropy, 0.0))


def vocabulary_blocks(vocab: int) -> tuple[int, int]:
    """Splits a vocabulary of V tokens into blocks for the two-level search.

    The drawn token depends on the blocks, so these depend on V alone and not on the mesh; devices
    can split them evenly, see :data:`SHARED`.

    Returns:
      ``(blocks, width)`` with ``blocks * width >= vocab``: a pair of divisors near the square root
      if there is one, else a pair near the square root with padding.

    >>> vocabulary_blocks(32_000), vocabulary_blocks(50_257)
    ((160, 200), (288, 175))
    >>> vocabulary_blocks(151_936), vocabulary_blocks(60)
    ((128, 1187), (12, 5))
    """
    root = max(1, math.isqrt(vocab))
    near = range(max(1, root // 4) + 1, root + 1)
    divisors = {n for width in near if vocab % width == 0 for n in (width, vocab // width)}
    if divisors:
        # Of those that most devices can share, the one nearest the square root.
        blocks = max(divisors, key=lambda n: (math.gcd(n, SHARED), -max(n, vocab // n), n))
    else:
        blocks = SHARED * -(-vocab // (root * SHARED))
    return blocks, -(-vocab // blocks)


def _banned(shape: tuple[int, ...], banned_ids: tuple[int, ...]) -> np.ndarray:
    """True for banned tokens, to be broadcast to ``[blocks, width, M]``."""
    blocks, width, _ = shape
    mask = np.zeros(blocks * width, bool)
    mask[list(banned_ids)] = True
    return mask.reshape(blocks, width, 1)


def _greedy(z: Array, banned_ids: tuple[int, ...]) -> Array:
    if banned_ids:
        z = jnp.where(_banned(z.shape, banned_ids), _NEVER, z)
    return jnp.argmax(z.reshape(-1, z.shape[2]), axis=0).astype(jnp.int32)


def _truncate(
    z: Array, weight: Array, block_sums: Array, sampling: Sampling
) -> tuple[Array, Array]:
    """Weights ``[blocks, width, M]``, 0 where a token may not be drawn, and their block sums."""
    if sampling.banned_ids:
        # Subtract the maximum again: nearly all the mass may lie on banned tokens.
        z = jnp.where(_banned(z.shape, sampling.banned_ids), _NEVER, z)
        weight = jnp.exp(z - z.max((0, 1), keepdims=True))
    if sampling.top_k:
        weight = _keep_likeliest(weight, lambda kept: (kept > 0).sum((0, 1)) >= sampling.top_k)
    if sampling.top_p < 1:
        wanted = sampling.top_p * weight.sum((0, 1))
        weight = _keep_likeliest(weight, lambda kept: kept.sum((0, 1)) >= wanted)
    if sampling.min_p:
        weight = jnp.where(weight >= sampling.min_p, weight, 0.0)  # the likeliest weighs 1
    changed = sampling.banned_ids or sampling.top_k or sampling.top_p < 1 or sampling.min_p
    return weight, weight.sum(1) if changed else block_sums


def _keep_likeliest(weight: Array, enough: Callable[[Array], Array]) -> Array:
    """Zeroes weights below the largest threshold for which ``enough(kept weights) [M]`` holds.

    Non-negative floats are ordered as their bit patterns, so bisection of the patterns finds the
    threshold exactly, without a sort and without a gather where devices split the vocabulary.
    """
    bits = lax.bitcast_convert_type(weight, jnp.int32)

    def kept(threshold: Array) -> Array:
        return jnp.where(bits >= threshold[None, None], weight, 0.0)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        good = enough(kept(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    largest = int(np.float32(1.0).view(np.int32))  # the likeliest token's weight
    rows = weight.shape[2]
    bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, largest, jnp.int32)
    low, _ = lax.fori_loop(0, largest.bit_length() + 1, halve, bounds)
    return kept(low)


def _draw(weight: Array, block_sums: Array, uniforms: Array) -> Array:
    block = _search(constrain(block_sums.T, "batch", None), uniforms[:, 0])
    inside = jnp.take_along_axis(weight, block[None, None, :], axis=0)[0]
    token = _search(constrain(inside.T, "batch", None), uniforms[:, 1])
    return (block * weight.shape[1] + token).astype(jnp.int32)


def _search(weight: Array, uniform: Array) -> Array:
    """First index with a weight above 0 whose cumulative weight exceeds ``uniform`` of the total.

    Args:
      weight: f32 ``[M, n]``, not negative.
      uniform: f32 ``[M]`` in ``[0, 1)``.
    """
    cumulative = jnp.cumsum(weight, axis=-1)
    passed = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weight > 0)
    # By rounding, a parallel prefix sum may exceed its last entry, so that no index passes. Then
    # take the likeliest.
    return jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), jnp.argmax(weight, axis=-1))
