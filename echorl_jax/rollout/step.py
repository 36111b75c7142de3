"""One forward pass of the decoder for the latest token of every slot."""

import jax.numpy as jnp
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel import constrain
from echorl_jax.rollout import attention
from echorl_jax.rollout.attention import Partial
from echorl_jax.rollout.cache import Cache, encode, read_block
from echorl_jax.rollout.prefill import windows
from echorl_jax.rollout.slots import Queue, Slots
from echorl_jax.types import Array, PyTree


def forward(model: Decoder, params: PyTree, slots: Slots, *, dynamic: bool) -> tuple[Array, Cache]:
    """Logits after each slot's latest token, and what it adds to the ring.

    The caches are only read here: a token attends to itself directly, and its keys and values are
    written afterwards, for all layers at once. So no layer copies a cache.

    Args:
      model: the decoder.
      params: its weights.
      queue: the work.
      slots: M of them.
      dynamic: read only blocks that hold something; else all, in loops of known length.

    Returns:
      Logits f32 ``[M, V]``; keys and values ``[L, M, KV, K]``.
    """
    prompt = Prompt.of(queue, slots)
    ring_blocks = _filled_ring(slots) if dynamic else slots.ring.blocks
    prompt_blocks = -(-prompt.filled.max() // prompt.cache.block) if dynamic else prompt.cache.blocks
    positions = (slots.cached + slots.position)[:, None]
    tables = model.rotary(positions)
    window = jnp.asarray(windows(model)) if any(model.config.windows) else None

    def layer(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, Cache]:
        weights, index = scanned
        q, k, v = model.qkv(weights, x, positions, tables)
        rows, _, heads, width = q.shape
        q, k, v = q.reshape(rows, k.shape[2], -1, width), k[:, 0], v[:, 0]
        reach = None if window is None else window[index]
        partial = attention.own_position(q, k, v)
        partial = _attend_ring(partial, q, slots, index, reach, ring_blocks)
        partial = _attend_prompt(partial, q, prompt, slots, index, reach, prompt_blocks)
        out = attention.finish(partial).reshape(rows, 1, heads, width).astype(x.dtype)
        return model.finish_layer(weights, x, out), encode(k, v, like=slots.ring)

    x = constrain(model.embed(params, slots.token[:, None]), "batch", "length", "feature")
    x, new = lax.scan(layer, x, (model.layers(params), jnp.arange(model.config.num_layers)))
    hidden = model.final_norm(params, x)[:, 0]
    logits = jnp.matmul(hidden, model.head(params), preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "vocab"), new


def _filled(slots: Slots, dynamic: bool) -> tuple[Array | int, Array | int]:
    """How many blocks to read: of the ring, counted back from the current one, and of prompts."""
    ring, prompt = slots.ring, slots.prompt
    if not dynamic:
        return ring.blocks, prompt.blocks
    before = jnp.maximum(slots.position.max() - slots.turn % ring.block, 0)  # in earlier blocks
    latest = 1 - (-before // ring.block)
    return jnp.minimum(latest, ring.blocks), -(-slots.cached.max() // prompt.block)


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
    turn = slots.turn % ring.length
    oldest = slots.position if window is None else jnp.minimum(slots.position, window - 1)

    def merge(back: Array, partial: Partial) -> Partial:
        index = (turn // ring.block - back) % ring.blocks
        age = (turn - index * ring.block - jnp.arange(ring.block)) % ring.length
        valid = (age >= 1)[None, :] & (age[None, :] <= oldest[:, None])
        block = read_block(ring, layer, index)
        return attention.merge_block(partial, q, block, valid[:, None, None])

    return lax.fori_loop(0, blocks, merge, partial)


def _attend_prompt(
    partial: Partial,
    q: Array,
    slots: Slots,
    layer: Array,
    window: Array | None,
    blocks: Array | int,
) -> Partial:
    """Adds the prompt, all but its last token, which is in the ring."""
    prompt = slots.prompt
    current = slots.cached + slots.position

    def merge(index: Array, partial: Partial) -> Partial:
        column = (index * prompt.block + jnp.arange(prompt.block))[None, :]
        valid = column < slots.cached[:, None]
        if window is not None:
            valid &= current[:, None] - column < window
        block = read_block(prompt, layer, index)
        return attention.merge_block(partial, q, block, valid[:, None, None])

    return lax.fori_loop(0, blocks, merge, partial)
