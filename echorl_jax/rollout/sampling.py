"""From logits to a token, its log-probability and its entropy, with one random number generator call per token.

Drawing by the largest of V Gumbel variates would need V random numbers a token. Here a uniform number is looked up in the
cumulative distribution, in two levels: which block of the vocabulary, then which token of the block. Only block sums and one block
are scanned, and with the vocabulary split over devices only block sums travel.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.rollout.settings import Sampling
from echorl_jax.types import Array, pytree


@pytree
class Sampled:
    """One token a row."""

    token: Array  # i32 [M]
    logprob: Array  # f32 [M], of the whole distribution at the sampling temperature
    entropy: Array  # f32 [M], likewise


def token_uniforms(key: Array, row: Array, position: Array) -> Array:
    """The two uniform numbers that belong to token ``position`` of row ``row``, whatever slot computes it.

    Args:
      key: one PRNG key for the call.
      row, position: i32 ``[M]``.

    Returns:
      f32 ``[M, 2]`` in ``[0, 1)``, from the key ``fold_in(fold_in(key, row), position)``.
    """

    def bits(row: Array, position: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), position), (2,))

    return (jax.vmap(bits)(row, position) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def sample(
    logits: Array, uniforms: Array, sampling: Sampling, *, forced: Array | None = None
) -> Sampled:
    """Draws a token from each row of logits.

    With ``z = logits / temperature``: ``logprob = z[token] - logsumexp(z)``, ``entropy = -sum p log p``, p = softmax(z). These are of the
    untruncated distribution; bans and truncation only decide what can be drawn.

    Args:
      logits: ``[M, V]``.
      uniforms: f32 ``[M, 2]`` from :func:`token_uniforms`.
      sampling: the settings.
      forced: i32 ``[M]``, a token to take whatever was drawn; -1 leaves the draw.
    """
    z = logits.astype(jnp.float32) / sampling.scale
    z = z - z.max(-1, keepdims=True)
    rows, vocab = z.shape
    blocks, width = vocabulary_blocks(vocab)
    z = _pad(z, blocks * width).reshape(rows, blocks, width)
    weight = jnp.exp(z)
    # The padding's weight is exactly 0, and 0 * finite is 0: no mask is needed.
    block_sums = weight.sum(-1)
    total = block_sums.sum(-1)
    entropy = jnp.log(total) - (weight * z).sum((-2, -1)) / total
    if sampling.greedy:
        token = _greedy(z, sampling.banned_ids)
    else:
        weight, block_sums = _truncate(z, weight, block_sums, sampling)
        token = _draw(weight, block_sums, uniforms)
    if forced is not None:
        token = jnp.where(forced >= 0, forced, token)
    chosen = jnp.take_along_axis(z.reshape(rows, -1), token[:, None], axis=1)[:, 0]
    return Sampled(token=token, logprob=chosen - jnp.log(total), entropy=jnp.maximum(entropy, 0.0))


def vocabulary_blocks(vocab: int) -> tuple[int, int]:
    """Splits the vocabulary into blocks for the two-level search.

    Returns:
      ``(blocks, width)`` with ``blocks * width >= vocab``: the divisor pair nearest the square root if one is near, else padded.

    >>> vocabulary_blocks(32_000), vocabulary_blocks(151_936), vocabulary_blocks(50_257)
    ((200, 160), (1187, 128), (225, 224))
    """
    root = max(1, math.isqrt(vocab))
    for width in range(root, max(1, root // 4), -1):
        if vocab % width == 0:
            return vocab // width, width
    return -(-vocab // root), root


_NEVER = -1e30  # exp of it is exactly 0 in float32


def _pad(z: Array, size: int) -> Array:
    extra = size - z.shape[1]
    return z if extra == 0 else jnp.pad(z, ((0, 0), (0, extra)), constant_values=_NEVER)


def _banned_mask(shape: tuple[int, ...], banned_ids: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(math.prod(shape), bool)
    mask[list(banned_ids)] = True
    return mask.reshape((1, *shape))


def _greedy(z: Array, banned_ids: tuple[int, ...]) -> Array:
    if banned_ids:
        z = jnp.where(_banned_mask(z.shape[1:], banned_ids), -jnp.inf, z)
    return jnp.argmax(z.reshape(z.shape[0], -1), axis=-1).astype(jnp.int32)


def _truncate(
    z: Array, weight: Array, block_sums: Array, sampling: Sampling
) -> tuple[Array, Array]:
    """Weights ``[M, blocks, width]`` with 0 where a token may not be drawn, and their block sums."""
    if sampling.banned_ids:
        # The maximum again, of what is allowed: nearly all the mass may lie on banned tokens.
        z = jnp.where(_banned_mask(z.shape[1:], sampling.banned_ids), _NEVER, z)
        weight = jnp.exp(z - z.max((-2, -1), keepdims=True))
    if sampling.top_k:
        weight = _keep_from(weight, lambda kept: (kept > 0).sum((-2, -1)) >= sampling.top_k)
    if sampling.top_p < 1:
        wanted = sampling.top_p * weight.sum((-2, -1))
        weight = _keep_from(weight, lambda kept: kept.sum((-2, -1)) >= wanted)
    if sampling.min_p:
        weight = jnp.where(
            weight >= sampling.min_p * weight.max((-2, -1), keepdims=True), weight, 0.0
        )
    changed = sampling.banned_ids or sampling.top_k or sampling.top_p < 1 or sampling.min_p
    return weight, weight.sum(-1) if changed else block_sums


def _keep_from(weight: Array, enough: Callable[[Array], Array]) -> Array:
    """Zeroes all weights below the largest threshold at which ``enough(kept weights) [M]`` still holds.

    The order of non-negative floats is that of their bit patterns, so the threshold is found exactly by bisection of 30 bits:
    no sort, and no vocabulary gathered where it is split over devices.
    """
    bits = lax.bitcast_convert_type(weight, jnp.int32)

    def kept(threshold: Array) -> Array:
        return jnp.where(bits >= threshold[:, None, None], weight, 0.0)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        good = enough(kept(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    rows = weight.shape[:1]
    one = np.float32(1.0).view(np.int32)
    bounds = (jnp.zeros(rows, jnp.int32), jnp.full(rows, one, jnp.int32))
    low, _ = lax.fori_loop(0, 31, halve, bounds)
    return kept(low)


def _draw(weight: Array, block_sums: Array, uniforms: Array) -> Array:
    block = _search(block_sums, uniforms[:, 0])
    inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
    return (block * weight.shape[2] + _search(inside, uniforms[:, 1])).astype(jnp.int32)


def _search(weight: Array, uniform: Array) -> Array:
    """First index whose cumulative weight passes ``uniform`` times the whole; never one of weight 0. ``[M, n]``, ``[M]`` -> ``[M]``."""
    cumulative = jnp.cumsum(weight, axis=-1)
    passed = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weight > 0)
    # A parallel prefix sum may round past its own end; then nothing passes, and the likeliest stands in.
    return jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), jnp.argmax(weight, axis=-1))
