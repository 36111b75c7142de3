"""Attention of a decode step on GPU: one kernel that reads the caches in place.

XLA copies each block out of a cache before it multiplies, and starts about ten kernels for it. Here
each program of the grid takes one key head of one row, visits the blocks that hold keys for it, and
keeps the running softmax in registers (:func:`cache.merge_block`, in Triton through Pallas). Unused
columns are not read, and the host need not know their number. Rows of a group read the same prompt,
so all but one find it in the GPU's cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from echorl_jax.precision import wide_einsum
from echorl_jax.rollout.cache import NEVER, Cache, Partial
from echorl_jax.types import Array, pytree

try:
    from jax.experimental.pallas import triton
except ImportError:  # a JAX without it
    triton = None

# Programs that keep a large GPU busy; with fewer rows and heads, blocks are split over programs.
PROGRAMS = 128
# Bytes of keys and values in flight per program; two programs fit a multiprocessor.
IN_FLIGHT = 96 << 10
# Smallest side of a matrix product in Triton.
SMALLEST = 16
# Interpret mode, for tests without a GPU.
INTERPRET = False


@pytree
class Span:
    """For each of M rows, the visible columns of a cache: ``count`` from ``start``, wrapping past
    its end.
    """

    start: Array  # i32 [M], in [0, length)
    count: Array  # i32 [M], up to the length
    row: Array | None = None  # i32 [M], row of the cache that each row reads; None: the same
    table: Array | None = None  # i32 [M, n], rows of a cache of one block that follow each other


def fits(head_dim: int) -> bool:
    """True if there is a kernel for heads of this size: Triton's blocks are powers of two."""
    return triton is not None and head_dim >= SMALLEST and head_dim & (head_dim - 1) == 0


def attend(
    q: Array,
    k: Array,
    v: Array,
    layer: Array | int,
    caches: tuple[Cache, ...],
    spans: tuple[Span, ...],
) -> Array:
    """Attention of each row to its own position and to its span of each cache.

    Args:
      q: ``[M, KV, R, K]``.
      k: ``[M, KV, K]``, of the own position.
      v: ``[M, KV, K]``.
      layer: of the caches.
      caches: positions in blocks of a power of two, 16 or more.
      spans: one for each cache.

    Returns:
      ``[M, KV, R, K]``, in q's type or f32.
    """
    assert triton is not None
    rows, heads, group, width = q.shape
    layer = jnp.full(1, layer, jnp.int32)
    most = max(_blocks(cache, span) for cache, span in zip(caches, spans, strict=True))
    parts = max(1, min(most, PROGRAMS // (rows * heads)))
    block = max(cache.block for cache in caches)
    stages = max(1, min(4, IN_FLIGHT // (2 * block * width * q.dtype.itemsize)))
    shape = (parts, rows, heads, group)
    out, log_mass = pl.pallas_call(
        functools.partial(_kernel, group=group, parts=parts),
        grid=(rows, heads, parts),
        out_shape=(
            jax.ShapeDtypeStruct((*shape, width), q.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
        interpret=INTERPRET,
        name="attend",
    )(layer, q, k, v, caches, spans)
    if parts == 1:
        return out[0]
    weight = jax.nn.softmax(log_mass, axis=0)
    return (out * weight[..., None]).sum(0)


def _blocks(cache: Any, span: Span) -> int:
    """Blocks that a row of the cache has, or the table."""
    return cache.v.shape[1] if span.table is None else span.table.shape[1]


def _kernel(
    layer_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    caches: tuple[Any, ...],
    spans: tuple[Any, ...],
    out_ref: Any,
    log_mass_ref: Any,
    *,
    group: int,
    parts: int,
) -> None:
    """Attention to every ``parts``-th block of one key head of one row, and the logarithm of the
    sum of exp(score), the weight of the part.
    """
    row, head, part = (pl.program_id(axis) for axis in range(3))
    # Triton needs at least 16 queries: repeat the last one; the duplicates write the same values.
    queries = pl.next_power_of_2(max(SMALLEST, group))
    query = jnp.minimum(lax.iota(jnp.int32, queries), group - 1)
    q = q_ref[row, head, query, :]
    # The own position belongs to the first part.
    own = jnp.sum(q.astype(jnp.float32) * k_ref[row, head, :].astype(jnp.float32)[None, :], axis=1)
    value = jnp.broadcast_to(v_ref[row, head, :].astype(jnp.float32)[None, :], q.shape)
    partial = Partial(
        mixed=jnp.where(part == 0, value, 0.0),
        mass=jnp.where(part == 0, jnp.ones_like(own), 0.0),
        top=jnp.where(part == 0, own * q.shape[1] ** -0.5, 2 * NEVER),
    )
    for cache, span in zip(caches, spans, strict=True):
        place = layer_ref[0], row, head
        partial = _walk(partial, q, cache, span, place, (part, parts))
    mass = jnp.maximum(partial.mass, jnp.finfo(jnp.float32).tiny)  # a part may have no key
    out_ref[part, row, head, query, :] = (partial.mixed / mass[:, None]).astype(out_ref.dtype)
    log_mass_ref[part, row, head, query] = partial.top + jnp.log(mass)


def _walk(
    partial: Partial,
    q: Array,
    cache: Any,
    span: Any,
    place: tuple[Array, Array, Array],
    share: tuple[Array, int],
) -> Partial:
    """Adds the keys of one span.

    Args:
      partial: attention so far, without the axes of rows and heads.
      q: ``[queries, K]``.
      cache: references to a cache.
      span: references to the span of each row.
      place: layer, row and key head.
      share: the index of the part and the number of parts.
    """
    (layer, row, head), (part, parts) = place, share
    start, count = span.start[row], span.count[row]
    blocks, block = _blocks(cache, span), cache.v.shape[4]
    source = row if span.row is None else span.row[row]

    def merge(step: Array, partial: Partial) -> Partial:
        index = start // block + part + step * parts
        index = jnp.where(index >= blocks, index - blocks, index)
        if span.table is None:
            at = layer, index, source, head
        else:
            at = layer, 0, span.table[row, index], head
        distance = index * block + lax.iota(jnp.int32, block) - start
        distance = jnp.where(distance < 0, distance + blocks * block, distance)
        keys, values = (x[*at, :, :].astype(q.dtype) for x in (cache.k, cache.v))
        scores = wide_einsum("qk,kb->qb", q, keys) * q.shape[1] ** -0.5
        if cache.k_scale is not None:
            scores *= cache.k_scale[*at, :][None, :]
        scores = jnp.where((distance < count)[None, :], scores, NEVER)
        top = jnp.maximum(partial.top, jnp.max(scores, axis=1))
        weight, shrink = jnp.exp(scores - top[:, None]), jnp.exp(partial.top - top)
        mass = partial.mass * shrink + jnp.sum(weight, axis=1)
        if cache.v_scale is not None:
            weight *= cache.v_scale[*at, :][None, :]
        mixed = wide_einsum("qb,bk->qk", weight.astype(q.dtype), values)
        return Partial(mixed=partial.mixed * shrink[:, None] + mixed, mass=mass, top=top)

    filled = jnp.where(count > 0, (start % block + count + block - 1) // block, 0)
    steps = (jnp.minimum(filled, blocks) - part + parts - 1) // parts
    return lax.fori_loop(0, steps, merge, partial)
