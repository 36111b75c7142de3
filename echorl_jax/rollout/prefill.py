"""The first program of a call: prefills each prompt once, in pieces of bounded size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.choices import KVDtype
from echorl_jax.models import Decoder
from echorl_jax.models.decoder import placed
from echorl_jax.parallel import constrain
from echorl_jax.rollout.cache import (
    Cache,
    Partial,
    as_blocks,
    empty_cache,
    encode,
    finish_attention,
    merge_block,
    no_attention,
    place,
    read_block,
    write_piece,
)
from echorl_jax.rollout.decode import Output, empty_output
from echorl_jax.rollout.request import Request, greatest_divisor
from echorl_jax.rollout.sampling import row_keys
from echorl_jax.rollout.slots import Queue, Slots, first_slots
from echorl_jax.rollout.weights import over_layers, windows
from echorl_jax.types import Array, PyTree

# Limits of one prefill piece: positions, and prompts times positions.
PREFILL_CHUNK = 512
PREFILL_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """Static settings of the prefill program."""

    slots: int
    length: int  # T
    stop_window: int  # W
    block: int  # positions in a block of the prompts' cache
    ring_block: int  # positions in a block of the completions' cache
    pages: int  # of all parts; 0: the ring holds whole completions
    pad_id: int
    kv_dtype: KVDtype
    shards: int


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def begin_call(
    model: Decoder, params: PyTree, request: Request, key: Array, *, spec: PrefillSpec
) -> tuple[Queue, Slots, Output]:
    """Prefills each prompt once and gives the first rows to the slots."""
    config = model.config
    cache = functools.partial(
        empty_cache,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=spec.kv_dtype,
    )
    prompts, width = request.tokens.shape
    block, cached = spec.block, request.length - 1
    chunk = block * greatest_divisor(width // block, most=PREFILL_CHUNK // block)
    most = max(1, PREFILL_TOKENS // (chunk * spec.shards))
    store = prefill(
        model,
        params,
        request,
        cache(blocks=width // block, rows=prompts, block=block, whole=True),
        rows=spec.shards * greatest_divisor(prompts // spec.shards, most=most),
        chunk=chunk,
    )
    queue = Queue(
        request=request,
        key=row_keys(key, request.row_id),
        last_token=jnp.take_along_axis(request.tokens, cached[:, None], axis=1)[:, 0],
        store=place(store, None),
    )
    completions = functools.partial(cache, block=spec.ring_block)
    ring_blocks = 1 if spec.pages else -(-spec.length // spec.ring_block)
    slots = first_slots(
        queue,
        slots=spec.slots,
        stop_window=spec.stop_window,
        ring=completions(blocks=ring_blocks, rows=spec.slots),
        pool=completions(blocks=1, rows=spec.pages) if spec.pages else None,
        parts=spec.shards,
    )
    return queue, slots, empty_output(request.rows, spec.length, spec.pad_id)


def prefill(
    model: Decoder,
    params: PyTree,
    request: Request,
    store: Cache,
    *,
    rows: int,
    chunk: int,
) -> Cache:
    """Fills ``store`` with the keys and values of the prompts.

    A piece is ``rows`` prompts by ``chunk`` positions. It attends to itself and to the blocks
    before it, so memory for activations does not grow with the number or length of prompts. Pieces
    past the longest prompt of their rows are skipped.

    Args:
      model, params: the decoder and its weights.
      request: P prompts, a multiple of ``rows``, of S tokens, a multiple of ``chunk``. The last
        token of each is the first input of decoding: it is not needed in the store, and what is
        written there must not be read.
      store: cache for P rows and S positions; ``chunk`` is a multiple of its block.
      rows: prompts in a piece.
      chunk: positions in a piece.
    """

    def batch(index: Array, store: Cache) -> Cache:
        row = index * rows
        longest = lax.dynamic_slice(request.length, (row,), (rows,)).max() - 1

        def piece(number: Array, store: Cache) -> Cache:
            position = number * chunk
            x, positions = _inputs(model, params, request, row, position, (rows, chunk))
            return _prefill_piece(model, params, x, positions, row, position, store)

        return lax.fori_loop(0, -(-longest // chunk), piece, store)

    return lax.fori_loop(0, request.tokens.shape[0] // rows, batch, store)


def _inputs(
    model: Decoder,
    params: PyTree,
    request: Request,
    row: Array,
    position: Array,
    size: tuple[int, int],
) -> tuple[Array, Array]:
    """Embeddings ``[rows, chunk, D]`` of a piece, images among them, and its positions."""

    def piece(array: Array) -> Array:
        start = (row, position, *(0,) * (array.ndim - 2))
        return lax.dynamic_slice(array, start, (*size, *array.shape[2:]))

    x = model.embed(params, piece(request.tokens))
    if request.images is None:
        return x, jnp.broadcast_to((position + jnp.arange(size[1]))[None, :], size)
    x = placed(x, request.images.features, piece(request.images.index))
    return x, piece(request.images.positions)


def _prefill_piece(
    model: Decoder,
    params: PyTree,
    x: Array,
    positions: Array,
    row: Array,
    position: Array,
    store: Cache,
) -> Cache:
    """Writes the piece ``x [rows, chunk, D]`` at ``[row, position]``; earlier ones are filled."""
    tables = model.rotary(positions)

    def layer(x: Array, scanned: tuple[PyTree, Array, Array]) -> tuple[Array, Cache]:
        weights, window, index = scanned
        q, k, v = model.qkv(weights, x, tables)
        new = encode(k, v, like=store)  # [rows, chunk, KV, K]
        out = _attend_piece(q, new, store, index, window, row, position)
        return model.finish_layer(weights, x, out), new

    x = constrain(x, "batch", "length", "feature")
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

    def merge(partial: Partial, block: Cache, first: Array) -> Partial:
        distance = at[:, None] - (first + jnp.arange(block.v.shape[2]))[None, :]
        valid = (distance >= 0) & (distance < window)
        return merge_block(partial, grouped, block, valid[None, None])

    def earlier(index: Array, partial: Partial) -> Partial:
        # All devices slice the same rows: with rows split over devices, the compiler would gather
        # the whole store over "tensor" first.
        block = jax.tree.map(
            lambda x: constrain(x, None, "kv_heads", *(None,) * (x.ndim - 2)),
            read_block(store, layer, index, row, rows),
        )
        return merge(partial, block, index * store.block)

    piece = jax.tree.map(lambda x: x[0], as_blocks(new, axis=1, block=chunk))
    partial = merge(no_attention(grouped), piece, position)
    partial = lax.fori_loop(0, position // store.block, earlier, partial)
    out = finish_attention(partial).reshape(split.shape).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype)
