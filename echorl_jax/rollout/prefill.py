"""Prompts to keys and values, once per prompt, in pieces of bounded size."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel import constrain
from echorl_jax.rollout import attention
from echorl_jax.rollout.cache import Cache, as_blocks, encode, read_block, write_piece
from echorl_jax.rollout.layers import over_layers
from echorl_jax.types import Array, PyTree

# Stands for "no sliding window": longer than any sequence.
UNBOUNDED = 2**30


def windows(model: Decoder) -> np.ndarray:
    """i32 ``[L]``: latest positions that each layer attends to, its own included."""
    return np.array([UNBOUNDED if w is None else w for w in model.config.windows], np.int32)


def prefill(
    model: Decoder,
    params: PyTree,
    tokens: Array,
    lengths: Array,
    store: Cache,
    *,
    rows: int,
    chunk: int,
) -> Cache:
    """Fills ``store`` with the keys and values of the prompts.

    A piece is ``rows`` prompts by ``chunk`` positions. It attends to itself and to the blocks
    before it, so memory for activations grows neither with the number nor with the length of
    prompts, and pieces past the longest prompt of their rows are not computed.

    Args:
      model: the decoder.
      params: its weights.
      tokens: i32 ``[P, S]``, padded on the right; P a multiple of ``rows``, S of ``chunk``.
      lengths: i32 ``[P]``; columns from there on get values that nobody may read.
      store: cache for P rows and S positions; ``chunk`` is a multiple of its block.
      rows: prompts in a piece.
      chunk: positions in a piece.
    """

    def batch(index: Array, store: Cache) -> Cache:
        row = index * rows
        longest = lax.dynamic_slice(lengths, (row,), (rows,)).max()

        def piece(number: Array, store: Cache) -> Cache:
            position = number * chunk
            part = lax.dynamic_slice(tokens, (row, position), (rows, chunk))
            return _prefill_piece(model, params, part, row, position, store)

        return lax.fori_loop(0, -(-longest // chunk), piece, store)

    return lax.fori_loop(0, tokens.shape[0] // rows, batch, store)


def _prefill_piece(
    model: Decoder, params: PyTree, tokens: Array, row: Array, position: Array, store: Cache
) -> Cache:
    """Writes ``tokens [rows, chunk]`` at ``[row, position]``; the positions before are there."""
    rows, chunk = tokens.shape
    positions = jnp.broadcast_to((position + jnp.arange(chunk))[None, :], (rows, chunk))
    tables = model.rotary(positions)

    def layer(x: Array, scanned: tuple[PyTree, Array, Array]) -> tuple[Array, Cache]:
        weights, window, index = scanned
        q, k, v = model.qkv(weights, x, tables)
        new = encode(k, v, like=store)  # [rows, chunk, KV, K]
        out = _attend_piece(q, new, store, index, window, row, position)
        return model.finish_layer(weights, x, out), new

    x = constrain(model.embed(params, tokens), "batch", "length", "feature")
    layers = np.arange(model.config.num_layers)
    _, new = over_layers(model, layer, x, params, windows(model), layers)
    return write_piece(store, new, row, position)


def _attend_piece(
    q: Array, new: Cache, store: Cache, layer: Array, window: Array, row: Array, position: Array
) -> Array:
    """Causal attention to the piece itself and the blocks before it: ``[rows, chunk, H, K]``."""
    rows, chunk, heads, width = q.shape
    kv_heads = new.k.shape[2]
    group = heads // kv_heads
    split = q.reshape(rows, chunk, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    grouped = split.reshape(rows, kv_heads, chunk * group, width)
    at = position + jnp.repeat(jnp.arange(chunk), group)  # position of each query

    def merge(partial: attention.Partial, block: Cache, first: Array) -> attention.Partial:
        distance = at[:, None] - (first + jnp.arange(block.v.shape[2]))[None, :]
        valid = (distance >= 0) & (distance < window)
        return attention.merge_block(partial, grouped, block, valid[None, None])

    def earlier(index: Array, partial: attention.Partial) -> attention.Partial:
        block = read_block(store, layer, index)
        block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, rows), block)
        return merge(partial, block, index * store.block)

    own = jax.tree.map(lambda x: x[0], as_blocks(new, axis=1, block=chunk))
    partial = merge(attention.nothing(grouped), own, position)
    partial = lax.fori_loop(0, position // store.block, earlier, partial)
    out = attention.finish(partial).reshape(split.shape).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype)
