"""One forward pass of the decoder for the latest token of every slot."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, constrain
from echorl_jax.precision import wide_einsum
from echorl_jax.rollout import attention, kernel
from echorl_jax.rollout.attention import Partial
from echorl_jax.rollout.cache import Cache, encode, read_block
from echorl_jax.rollout.slots import Queue, Slots
from echorl_jax.rollout.weights import over_layers, windows
from echorl_jax.types import Array, PyTree

# Attention of a layer's queries [M, KV, R, K] to their own keys and values [M, KV, K] and to both
# caches, [M, KV, R, K]: (q, k, v, layer, window).
Attend = Callable[[Array, Array, Array, Array, Array | None], Array]


def forward(
    model: Decoder, params: PyTree, queue: Queue, slots: Slots, *, platform: Platform
) -> tuple[Array, Cache]:
    """Logits after each slot's latest token, and what it adds to the ring.

    The caches are only read here: a token attends to itself directly, and its keys and values are
    written afterwards, for all layers at once. So no layer copies a cache.

    Args:
      model: the decoder.
      params: its weights.
      queue: the work.
      slots: M of them.
      platform: that it is compiled for; on ``gpu`` a kernel reads the caches if it can.

    Returns:
      Logits f32 ``[M, V]``; keys and values ``[L, M, KV, K]``.
    """
    by_kernel = platform == "gpu" and kernel.fits(model.config.head_dim)
    attend = (_by_kernel if by_kernel else _by_blocks)(queue, slots)
    tables = model.rotary((slots.cached + slots.position)[:, None])
    window = jnp.asarray(windows(model)) if any(model.config.windows) else None

    def layer(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, Cache]:
        weights, index = scanned
        q, k, v = model.qkv(weights, x, tables)
        rows, _, heads, width = q.shape
        q, k, v = q.reshape(rows, k.shape[2], -1, width), k[:, 0], v[:, 0]
        out = attend(q, k, v, index, None if window is None else window[index])
        out = out.reshape(rows, 1, heads, width).astype(x.dtype)
        return model.finish_layer(weights, x, out), encode(k, v, like=slots.ring)

    x = constrain(model.embed(params, slots.token[:, None]), "batch", "length", "feature")
    x, new = over_layers(model, layer, x, params, np.arange(model.config.num_layers))
    hidden = model.final_norm(params, x)[:, 0]
    logits = wide_einsum("md,dv->mv", hidden, model.head(params))
    if platform == "cpu" and not model.config.tied_embeddings:
        # Sampling transposes the logits. XLA would fold that into the product, which then reads a
        # head [D, V] across its rows: 2 to 5 times slower, and not implemented for bf16 operands.
        logits = lax.optimization_barrier(logits)
    return constrain(logits, "batch", "vocab"), new


def _by_kernel(queue: Queue, slots: Slots) -> Attend:
    """Every row reads what it has filled."""
    ring, prompt, row = slots.ring, slots.prompt, None
    if prompt is None:
        prompt = queue.store
        row = jnp.arange(slots.row.shape[0]) // (slots.row.shape[0] // prompt.v.shape[2])

    def attend(q: Array, k: Array, v: Array, layer: Array, window: Array | None) -> Array:
        written, unseen = slots.position, jnp.zeros_like(slots.cached)
        if window is not None:
            written = jnp.minimum(written, window - 1)
            unseen = jnp.clip(slots.cached + slots.position - window + 1, 0, slots.cached)
        latest = kernel.Span((slots.step - written) % ring.length, written)
        early = kernel.Span(unseen, slots.cached - unseen, row)
        return kernel.attend(q, k, v, layer, (prompt, ring), (early, latest))

    return attend


def _by_blocks(queue: Queue, slots: Slots) -> Attend:
    """All rows read as many blocks as the longest of them has filled."""
    # With a slot for each row, slots of a group lie side by side and share the store's prompt.
    prompt, filled = slots.prompt, slots.cached
    if prompt is None:
        prompt, filled = queue.store, queue.cached
    prompt_blocks = -(-filled.max() // prompt.block) if prompt.blocks > 1 else 1
    ring_blocks = _filled_blocks(slots) if slots.ring.blocks > 1 else 1
    positions = slots.cached + slots.position

    def attend(q: Array, k: Array, v: Array, layer: Array, window: Array | None) -> Array:
        partial = attention.own_position(q, k, v)
        partial = _attend_ring(partial, q, slots, layer, window, ring_blocks)
        read = functools.partial(read_block, prompt, layer)
        partial = _attend_prompt(partial, q, read, filled, positions, window, prompt_blocks)
        return attention.finish(partial)

    return attend


def _filled_blocks(slots: Slots) -> Array:
    """Blocks of the ring that hold something, counted back from the current one."""
    ring = slots.ring
    before = jnp.maximum(slots.position.max() - slots.step % ring.block, 0)  # in earlier blocks
    return jnp.minimum(1 - (-before // ring.block), ring.blocks)


def _attend_ring(
    partial: Partial,
    q: Array,
    slots: Slots,
    layer: Array,
    window: Array | None,
    blocks: Array | int,
) -> Partial:
    """Adds the tokens of the completion. A column's age is its distance to the current position."""
    ring = slots.ring
    step = slots.step % ring.length
    oldest = slots.position if window is None else jnp.minimum(slots.position, window - 1)

    def merge(back: Array, partial: Partial) -> Partial:
        index = (step // ring.block - back) % ring.blocks
        age = (step - index * ring.block - jnp.arange(ring.block)) % ring.length
        valid = (age >= 1)[None, :] & (age[None, :] <= oldest[:, None])
        block = read_block(ring, layer, index)
        return attention.merge_block(partial, q, block, valid[:, None, None])

    return lax.fori_loop(0, blocks, merge, partial)


def _attend_prompt(
    partial: Partial,
    q: Array,
    read: Callable[[Array], Cache],
    filled: Array,
    positions: Array,
    window: Array | None,
    blocks: Array | int,
) -> Partial:
    """Adds the prompts, all but their last tokens, which are in the ring.

    Args:
      partial: attention to the completion.
      q: ``[M, KV, R, K]``.
      read: block of a number, with C rows; row c serves M / C slots that lie side by side.
      filled: i32 ``[C]``, positions that are filled.
      positions: i32 ``[M]``, of the queries.
      window: see :func:`windows`.
      blocks: how many to read.
    """
    rows, heads, group, width = q.shape
    count = filled.shape[0]
    split = count, rows // count, heads, group
    shared = q.reshape(*split, width).swapaxes(1, 2).reshape(count, heads, -1, width)
    at = jnp.repeat(positions, group).reshape(count, -1)

    def merge(index: Array, partial: Partial) -> Partial:
        block = read(index)
        column = index * block.v.shape[2] + jnp.arange(block.v.shape[2])
        valid = (column[None, :] < filled[:, None])[:, None, None]
        if window is not None:
            valid &= (at[:, :, None] - column[None, None, :] < window)[:, None]
        return attention.merge_block(partial, shared, block, valid)

    seen = lax.fori_loop(0, blocks, merge, attention.nothing(shared))

    def apart(x: Array) -> Array:
        x = x.reshape(count, heads, rows // count, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(rows, heads, group, *x.shape[4:])

    return attention.combine(partial, jax.tree.map(apart, seen))
