"""One forward pass of the decoder for the latest token of every slot."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from echorl_jax.models import Decoder
from echorl_jax.parallel import constrain, mesh_in_force
from echorl_jax.rollout import attention
from echorl_jax.rollout.attention import Partial
from echorl_jax.rollout.buckets import greatest_divisor
from echorl_jax.rollout.cache import Cache, encode, read_block
from echorl_jax.rollout.prefill import windows
from echorl_jax.rollout.slots import Queue, Slots
from echorl_jax.types import Array, PyTree

Platform = Literal["cpu", "gpu", "tpu"]
# Keys that are read at once on a CPU: what its caches hold next to the values and the scores.
PIECE_BYTES = 1 << 20


def platform_of(mesh: Mesh | None) -> Platform:
    """What programs for the mesh are compiled for; without one, for this machine's default."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return name if name in ("cpu", "gpu") else "tpu"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some of the slots: the ``index``-th of ``count`` equal parts."""

    index: Array | int
    count: int

    def cut(self, x: Array) -> Array:
        """Its rows of ``x``, which has a multiple of ``count`` of them."""
        if self.count == 1:
            return x
        size = x.shape[0] // self.count
        return lax.dynamic_slice_in_dim(x, self.index * size, size)

    def read(self, cache: Cache, layer: Array, block: Array) -> Cache:
        """Its rows of a block, of a cache that has a multiple of ``count`` rows."""
        rows = cache.v.shape[2] // self.count
        return read_block(cache, layer, block, first=self.index * rows, rows=rows)


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
      platform: that it is compiled for. On ``cpu`` and ``tpu`` the blocks to read are counted while
        running; on ``gpu``, whose host looks at the condition of every such loop each time, one of
        several loops of known lengths 1, 2, 4, ... is chosen once a turn. On ``cpu`` slots attend
        in pieces, one after the other, whose keys stay in its caches.

    Returns:
      Logits f32 ``[M, V]``; keys and values ``[L, M, KV, K]``.
    """
    if platform != "gpu":
        pieces = _pieces(queue, slots) if platform == "cpu" else 1
        return _forward(
            model, params, queue, slots, ring_blocks=_filled_blocks(slots, pieces), counted=True
        )
    lengths = [2**power for power in range((slots.ring.blocks - 1).bit_length())]
    lengths.append(slots.ring.blocks)
    branches = [
        functools.partial(_forward, model, ring_blocks=(length,), counted=False)
        for length in lengths
    ]
    which = jnp.searchsorted(jnp.array(lengths), _filled_blocks(slots, 1)[0])
    return lax.switch(which, branches, params, queue, slots)


def _pieces(queue: Queue, slots: Slots) -> int:
    """Parts to attend in: whole groups, where the slots of a group share a stored prompt."""
    mesh = mesh_in_force()
    if mesh is not None and mesh.size > 1:
        return 1  # each device has its part already
    keys, rows = slots.ring.k, slots.row.shape[0]
    group = 1 if slots.prompt is not None else rows // queue.cached.shape[0]
    row_bytes = keys[0, 0, 0].size * keys.dtype.itemsize
    most = max(1, PIECE_BYTES // (row_bytes * group))
    return rows // group // greatest_divisor(rows // group, most=most)


def _forward(
    model: Decoder,
    params: PyTree,
    queue: Queue,
    slots: Slots,
    *,
    ring_blocks: Array | tuple[int],
    counted: bool,
) -> tuple[Array, Cache]:
    # With a slot for each row, slots of a group lie side by side and share the store's prompt.
    prompt, filled = slots.prompt, slots.cached
    if prompt is None:
        prompt, filled = queue.store, queue.cached
    positions = slots.cached + slots.position
    tables = model.rotary(positions[:, None])
    window = jnp.asarray(windows(model)) if any(model.config.windows) else None
    pieces = len(ring_blocks)

    def layer(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, Cache]:
        weights, index = scanned
        q, k, v = model.qkv(weights, x, positions[:, None], tables)
        rows, _, heads, width = q.shape
        q, k, v = q.reshape(rows, k.shape[2], -1, width), k[:, 0], v[:, 0]
        reach = None if window is None else window[index]

        def attend(number: Array | int) -> Array:
            piece = Piece(number, pieces)
            mine, at, cached = piece.cut(q), piece.cut(positions), piece.cut(filled)
            partial = attention.own_position(mine, piece.cut(k), piece.cut(v))
            read = functools.partial(piece.read, slots.ring, index)
            own, blocks = piece.cut(slots.position), ring_blocks[number]
            partial = _attend_ring(partial, mine, read, slots, own, reach, blocks)
            read = functools.partial(piece.read, prompt, index)
            blocks = -(-cached.max() // prompt.block) if counted else prompt.blocks
            partial = _attend_prompt(partial, mine, read, cached, at, reach, blocks)
            return attention.finish(partial)

        out = attend(0) if pieces == 1 else lax.map(attend, jnp.arange(pieces))
        out = out.reshape(rows, 1, heads, width).astype(x.dtype)
        return model.finish_layer(weights, x, out), encode(k, v, like=slots.ring)

    x = constrain(model.embed(params, slots.token[:, None]), "batch", "length", "feature")
    x, new = lax.scan(layer, x, (model.layers(params), jnp.arange(model.config.num_layers)))
    hidden = model.final_norm(params, x)[:, 0]
    logits = jnp.matmul(hidden, model.head(params), preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "vocab"), new


def _filled_blocks(slots: Slots, pieces: int) -> Array:
    """Blocks of the ring that hold something for each piece, counted back from the current one."""
    ring, longest = slots.ring, slots.position.reshape(pieces, -1).max(1)
    before = jnp.maximum(longest - slots.turn % ring.block, 0)  # in earlier blocks
    return jnp.minimum(1 - (-before // ring.block), ring.blocks)


def _attend_ring(
    partial: Partial,
    q: Array,
    read: Callable[[Array], Cache],
    slots: Slots,
    position: Array,
    window: Array | None,
    blocks: Array | int,
) -> Partial:
    """Adds the tokens of the completion. A column's age is its distance to the current position.

    Args:
      partial: attention to the own position.
      q: ``[m, KV, R, K]``, of m slots.
      read: their rows of a block.
      slots: all of them.
      position: i32 ``[m]``, tokens that they have.
      window: see :func:`prefill.windows`.
      blocks: how many to read.
    """
    ring = slots.ring
    turn = slots.turn % ring.length
    oldest = position if window is None else jnp.minimum(position, window - 1)

    def merge(back: Array, partial: Partial) -> Partial:
        index = (turn // ring.block - back) % ring.blocks
        age = (turn - index * ring.block - jnp.arange(ring.block)) % ring.length
        valid = (age >= 1)[None, :] & (age[None, :] <= oldest[:, None])
        return attention.merge_block(partial, q, read(index), valid[:, None, None])

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
      window: see :func:`prefill.windows`.
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
