"""Attention on TPU by JAX's Pallas splash kernel, once for each shard of rows and heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from echorl_jax.parallel import mesh_in_force, partition_spec
from echorl_jax.types import Array

_LANES = 128
_LARGEST_BLOCK = 512


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    segment_ids: Array | None,
    *,
    window: int | None,
    interpret: bool = False,
) -> Array:
    """:func:`attention.attend` on TPU; ``interpret`` runs the kernel on any platform, for tests.

    XLA cannot split a Pallas call, so under a mesh (``jax.set_mesh``) it runs in a ``shard_map``
    over rows and heads.
    """
    batch, length, heads, width = q.shape
    block = min(_LARGEST_BLOCK, -(-length // _LANES) * _LANES)
    padded = -(-length // block) * block
    call = functools.partial(
        _rows, group=heads // k.shape[2], window=window, block=block, interpret=interpret
    )
    q, k, v = (_heads_first(x, padded) for x in (q * q.dtype.type(width**-0.5), k, v))
    segments = _segments(batch, length, padded, lengths, segment_ids)
    mesh = mesh_in_force()
    if mesh is not None:
        q_spec = partition_spec(("batch", "heads", "length", "head_dim"), q.shape, mesh)
        kv_spec = partition_spec(("batch", "kv_heads", "length", "head_dim"), k.shape, mesh)
        row_spec = partition_spec(("batch", "length"), segments.shape, mesh)
        call = jax.shard_map(
            functools.partial(call, all_kv_heads=kv_spec[1] is None and q_spec[1] is not None),
            mesh=mesh,
            in_specs=(q_spec, kv_spec, kv_spec, row_spec),
            out_specs=q_spec,
            check_vma=False,
        )
    out = call(q, k, v, segments)  # [B, H, padded, K]
    return out[:, :, :length].transpose(0, 2, 1, 3)


def _heads_first(x: Array, padded: int) -> Array:
    """``[B, T, heads, K]`` to ``[B, heads, padded, K]``."""
    x = jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3)


def _segments(
    batch: int, length: int, padded: int, lengths: Array | None, segment_ids: Array | None
) -> Array:
    """Segments for the kernel, i32 ``[B, padded]``: ids plus one, and 0 for padding."""
    position = jnp.arange(padded, dtype=jnp.int32)[None, :]
    last = jnp.full((batch, 1), length) if lengths is None else lengths[:, None]
    if segment_ids is None:
        return (position < last).astype(jnp.int32)
    segment = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padded - length)))
    return jnp.where(position < last, segment + 1, 0)


def _rows(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    group: int,
    window: int | None,
    block: int,
    interpret: bool,
    all_kv_heads: bool = False,
) -> Array:
    """The kernel over the rows and heads of one device.

    ``all_kv_heads``: the query heads are a shard, but the KV heads, too few to split, are complete.
    """
    _, heads, length, _ = q.shape
    if all_kv_heads:
        k, v = (_local_kv_heads(x, heads, group) for x in (k, v))
    shape = (length, length)
    if window is None:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(block),
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        out = kernel(q, k, v, segment_ids=splash.SegmentIds(q=segments, kv=segments))
        return jnp.asarray(out)

    return jax.vmap(row)(q, k, v, segments)


def _local_kv_heads(x: Array, heads: int, group: int) -> Array:
    """The KV heads for the query heads of this device: one if they share it, else one for each."""
    first = jax.lax.axis_index("tensor") * heads
    if group % heads == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=1)
    return jnp.take(x, (first + jnp.arange(heads)) // group, axis=1)


def _block_sizes(block: int) -> splash.BlockSizes:
    forward, backward = "q kv kv_compute", "q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    names = [*forward.split(), *backward.split()]
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    return splash.BlockSizes(**sizes)
