"""Prompts to keys and values, once per prompt, in pieces of bounded size."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel.layout import constrain
from echorl_jax.rollout import cache as kv
from echorl_jax.rollout.cache import Cache
from echorl_jax.types import Array, PyTree

# Stands for "no sliding window": longer than any sequence.
UNBOUNDED = 2**30


def windows(model: Decoder) -> np.ndarray:
    """i32 ``[L]``: latest positions each layer attends to, itself included."""
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

    A piece is ``rows`` prompts by ``chunk`` positions. It attends to itself and to the blocks before it, so memory for activations
    does not grow with the number or the length of prompts, and pieces past the longest prompt of their rows are not computed.

    Args:
      model, params: the decoder.
      tokens: i32 ``[P, S]``, padded on the right; P a multiple of ``rows``, S of ``chunk``.
      lengths: i32 ``[P]``; columns from there on are left with values that nobody may read.
      store: cache for P rows and S positions; ``chunk`` is a multiple of its block.
      rows, chunk: size of a piece.
    """

    def piece(row: Array, position: Array, store: Cache) -> Cache:
        part = lax.dynamic_slice(tokens, (row, position), (rows, chunk))
        return _prefill_piece(model, params, part, row, position, store)

    def batch(index: Array, store: Cache) -> Cache:
        row = index * rows
        longest = lax.dynamic_slice(lengths, (row,), (rows,)).max()
        return lax.fori_loop(
            0, -(-longest // chunk), lambda c, store: piece(row, c * chunk, store), store
        )

    return lax.fori_loop(0, tokens.shape[0] // rows, batch, store)


def _prefill_piece(
    model: Decoder, params: PyTree, tokens: Array, row: Array, position: Array, store: Cache
) -> Cache:
    """Keys and values of ``tokens [rows, chunk]`` at ``[row:, position:]``, given those of the positions before."""
    rows, chunk = tokens.shape
    positions = jnp.broadcast_to((position + jnp.arange(chunk))[None, :], (rows, chunk))
    tables = model.rotary(positions)

    def layer(x: Array, scanned: tuple[PyTree, Array, Array]) -> tuple[Array, Cache]:
        weights, window, index = scanned
        q, k, v = model.qkv(weights, x, positions, tables)
        new = kv.encode(k, v, like=store)  # [rows, chunk, KV, K]
        part = _attend_piece(q, new, store, index, window, row, position)
        return model.finish_layer(weights, x, part), new

    x = constrain(model.embed(params, tokens), "batch", "length", "feature")
    scanned = (
        model.layers(params),
        jnp.asarray(windows(model)),
        jnp.arange(model.config.num_layers),
    )
    _, new = lax.scan(layer, x, scanned)
    at = (0, position // store.block, row, 0, 0, 0)
    return jax.tree.map(
        lambda whole, part: lax.dynamic_update_slice(
            whole, _to_blocks(part, store.block), at[: whole.ndim]
        ),
        store,
        new,
    )


def _to_blocks(x: Array, block: int) -> Array:
    """``[L, rows, chunk, KV, ...]`` -> ``[L, chunk / block, rows, KV, block, ...]``."""
    layers, rows, chunk, *rest = x.shape
    x = x.reshape(layers, rows, chunk // block, block, *rest)
    return jnp.moveaxis(x, (1, 2, 3, 4), (2, 1, 4, 3))


def _attend_piece(
    q: Array, new: Cache, store: Cache, layer: Array, window: Array, row: Array, position: Array
) -> Array:
    """Causal attention of a piece to itself and to the blocks of ``store`` before it. -> ``[rows, chunk, H, K]``."""
    rows, chunk, heads, width = q.shape
    kv_heads = new.k.shape[2]
    per_key = heads // kv_heads
    # [rows, chunk, KV, per_key, K] -> [rows, KV, chunk * per_key, K]: query heads of one key head share its block.
    grouped = q.reshape(rows, chunk, kv_heads, per_key, width).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(rows, kv_heads, chunk * per_key, width)
    at = position + jnp.repeat(jnp.arange(chunk), per_key)  # position of each query

    def merge(partial: kv.Partial, block: Cache, first: Array) -> kv.Partial:
        distance = at[:, None] - (first + jnp.arange(block.k.shape[2]))[None, :]
        valid = (distance >= 0) & (distance < window)
        return kv.attend_block(partial, grouped, block, valid[None, None])

    def earlier(index: Array, partial: kv.Partial) -> kv.Partial:
        block = kv.read_block(store, layer, index)
        block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, rows), block)
        return merge(partial, block, index * store.block)

    shape = (rows, kv_heads, chunk * per_key)
    nothing = kv.Partial(
        mixed=jnp.zeros((*shape, width), jnp.float32),
        mass=jnp.zeros(shape, jnp.float32),
        top=jnp.full(shape, -jnp.inf, jnp.float32),
    )
    # Itself first: every position sees at least itself there, so `top` is finite from here on.
    own = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), new)
    partial = merge(nothing, own, position)
    partial = lax.fori_loop(0, position // store.block, earlier, partial)
    out = kv.finish(partial).reshape(rows, kv_heads, chunk, per_key, width)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)
