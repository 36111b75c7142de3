"""Causal self-attention over right-padded rows; the platform selects the kernel."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from echorl_jax.choices import Kernel
from echorl_jax.models.config import ModelError
from echorl_jax.precision import precision_of, wide_einsum
from echorl_jax.types import Array

# Score of hidden keys; finite, so that a row without a visible key gives an average and not NaN.
HIDDEN = -1e30


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    lengths: Array | None = None,
    segment_ids: Array | None = None,
    window: int | None = None,
    kernel: Kernel = "auto",
) -> Array:
    """``softmax(q k^T / sqrt(head_dim)) v`` under a causal mask.

    Position i sees position j if ``i - window < j <= i``, j is not padding, and both belong to one
    segment. Scores and softmax are f32 in every kernel.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, T, KV, K]``, H a multiple of KV; query head h uses KV head ``h // (H / KV)``, which
        is never repeated in memory.
      v: ``[B, T, KV, K]``.
      lengths: i32 ``[B]``, real tokens in each row; all unless given.
      segment_ids: i32 ``[B, T]``, 0 or more, for several sequences packed into one row.
      window: latest visible positions, the current one included; all unless given.
      kernel: ``auto`` is splash on TPU, cuDNN on GPU where it is supported, plain XLA elsewhere.
        The platform is that of ``jax.default_backend()``: name the kernel to compile for another.

    Returns:
      ``[B, T, H, K]`` in q's dtype; finite but meaningless at padding positions.

    Raises:
      ModelError: the named kernel does not support these inputs.
    """
    if kernel == "auto":
        kernel = _for_platform(q, segment_ids)
    if kernel == "splash":
        from echorl_jax.models.splash import splash_attention  # half a second, on TPU alone

        return splash_attention(q, k, v, lengths, segment_ids, window=window)
    if kernel == "cudnn":
        refusal = _cudnn_refusal(q, segment_ids)
        if refusal:
            raise ModelError(f"attention kernel cudnn does not support {refusal}")
        return _fused(q, k, v, lengths, window)
    block = _block_size(q.shape[1])
    if q.shape[1] <= block:
        return _direct(q, k, v, lengths, segment_ids, window)
    return blockwise_attention(q, k, v, lengths, segment_ids, window=window, block=block)


def _for_platform(q: Array, segment_ids: Array | None) -> Kernel:
    platform = jax.default_backend()
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and _cudnn_refusal(q, segment_ids) is None:
        return "cudnn"
    return "xla"


def _block_size(length: int) -> int:
    """Block size: small on CPU, to stay in cache (measured); large on other chips, to fill them."""
    if jax.default_backend() != "cpu":
        return 512
    return 64 if length <= 1024 else 128


def _cudnn_refusal(q: Array, segment_ids: Array | None) -> str | None:
    """The reason why the cuDNN kernel cannot be used, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype}; it needs bfloat16 or float16"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]}; it needs a multiple of 8 up to 128"
    if segment_ids is not None:
        return "segment_ids"
    return None


def _fused(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """cuDNN's flash attention by JAX's function, which also shards it.

    That function has a plain implementation too, with which tests check the arguments.
    """
    # A row without tokens would attend to no key.
    real = None if lengths is None else jnp.maximum(lengths.astype(jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=real,
        key_value_seq_lengths=real,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _direct(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    segment_ids: Array | None,
    window: int | None,
) -> Array:
    """All scores at once, for rows of a single block."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = wide_einsum("bqngk,bsnk->bngqs", grouped, k)
    visible = _visible(length, lengths, segment_ids, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * width**-0.5, HIDDEN), axis=-1)
    out = jnp.einsum(
        "bngqs,bsnk->bqngk", weights.astype(v.dtype), v, precision=precision_of(v.dtype)
    )
    return out.reshape(q.shape)


def _visible(
    length: int, lengths: Array | None, segment_ids: Array | None, window: int | None
) -> Array:
    """bool ``[1 or B, T, T]``."""
    query = jnp.arange(length)[None, :, None]
    key = jnp.arange(length)[None, None, :]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if lengths is not None:
        visible &= key < lengths[:, None, None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return visible


class _Mask(NamedTuple):
    """Data for hiding keys: i32 ``[B]`` and i32 ``[blocks, B, block]``."""

    lengths: Array | None
    segments: Array | None


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    segment_ids: Array | None,
    *,
    window: int | None,
    block: int,
) -> Array:
    """:func:`attend` in memory that grows with ``T * block`` instead of ``T^2``.

    Scores exist for one block of queries and one block of keys at a time; the softmax is kept as a
    running maximum and sum, and the backward pass computes the scores again. Blocks that the causal
    mask or the window hides entirely are never visited. Sources: arXiv 2112.05682, 2307.08691.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    padded = -(-length // block) * block
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    segments = None if segment_ids is None else _blocks(segment_ids, padded, block)
    out: Array = _blockwise(
        _blocks(grouped, padded, block).transpose(0, 1, 3, 4, 2, 5),  # [n, B, KV, R, block, K]
        _blocks(k, padded, block).transpose(0, 1, 3, 2, 4),  # [n, B, KV, block, K]
        _blocks(v, padded, block).transpose(0, 1, 3, 2, 4),
        _Mask(lengths, segments),
        window,
    )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, heads, width)
    return out[:, :length]


def _blocks(x: Array, padded: int, block: int) -> Array:
    """``[B, T, ...]`` to ``[blocks, B, block, ...]``, padded with zeros."""
    filler = [(0, 0)] * x.ndim
    filler[1] = (0, padded - x.shape[1])
    x = jnp.pad(x, filler)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _first_block(i: Array, block: int, window: int | None) -> Array:
    """The first block of keys that the queries of block ``i`` can see."""
    if window is None:
        return jnp.zeros_like(i)
    return jnp.maximum(i * block - window + 1, 0) // block


def _scores(q: Array, k: Array, mask: _Mask, i: Array, j: Array, window: int | None) -> Array:
    """Scores of queries i and keys j, f32 ``[B, KV, R, block, block]``; hidden ones are HIDDEN."""
    block = q.shape[-2]
    query = (i * block + jnp.arange(block))[None, :, None]
    key = (j * block + jnp.arange(block))[None, None, :]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if mask.lengths is not None:
        visible &= key < mask.lengths[:, None, None]
    if mask.segments is not None:
        visible &= mask.segments[i][:, :, None] == mask.segments[j][:, None, :]
    scores = wide_einsum("bngqk,bnsk->bngqs", q, k)
    return jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, HIDDEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: Array, k: Array, v: Array, mask: _Mask, window: int | None) -> Array:
    return _forward(q, k, v, mask, window)[0]


def _forward(q: Array, k: Array, v: Array, mask: _Mask, window: int | None):
    """Attention of all blocks of queries, and the inputs of the backward pass."""

    def queries(i: Array) -> tuple[Array, Array]:
        def keys(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, peak, norm = state
            scores = _scores(q[i], k[j], mask, i, j, window)
            new_peak = jnp.maximum(peak, scores.max(axis=-1))
            shrink = jnp.exp(peak - new_peak)
            weights = jnp.exp(scores - new_peak[..., None])
            part = wide_einsum("bngqs,bnsk->bngqk", weights.astype(v.dtype), v[j])
            norm = norm * shrink + weights.sum(axis=-1)
            return total * shrink[..., None] + part, new_peak, norm

        rows = q.shape[1:-1]
        start = (
            jnp.zeros((*rows, q.shape[-1]), jnp.float32),
            jnp.full(rows, HIDDEN, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        first = _first_block(i, q.shape[-2], window)
        total, peak, norm = jax.lax.fori_loop(first, i + 1, keys, start)
        return (total / norm[..., None]).astype(q.dtype), peak + jnp.log(norm)

    out, log_norm = jax.lax.map(queries, jnp.arange(q.shape[0]))
    return out, (q, k, v, mask, out, log_norm)


def _backward(window: int | None, saved, d_out: Array):
    """With p the weights: dv = p^T do, ds = p (do v^T - do . o), dq = ds k, dk = ds^T q."""
    q, k, v, mask, out, log_norm = saved
    scale = q.shape[-1] ** -0.5

    def queries(sums: tuple[Array, Array], i: Array):
        dot = jnp.sum(d_out[i].astype(jnp.float32) * out[i].astype(jnp.float32), axis=-1)

        def keys(j: Array, state: tuple[Array, Array, Array]):
            dq, dk, dv = state
            scores = _scores(q[i], k[j], mask, i, j, window)
            weights = jnp.exp(scores - log_norm[i][..., None])
            d_weights = wide_einsum("bngqk,bnsk->bngqs", d_out[i], v[j])
            d_scores = (weights * (d_weights - dot[..., None]) * scale).astype(q.dtype)
            # The gradient of a KV head is a sum over the query heads that share it.
            weights = weights.astype(v.dtype)
            dv = dv.at[j].add(wide_einsum("bngqs,bngqk->bnsk", weights, d_out[i]))
            dk = dk.at[j].add(wide_einsum("bngqs,bngqk->bnsk", d_scores, q[i]))
            dq += wide_einsum("bngqs,bnsk->bngqk", d_scores, k[j])
            return dq, dk, dv

        start = (jnp.zeros(q.shape[1:], jnp.float32), *sums)
        first = _first_block(i, q.shape[-2], window)
        dq, dk, dv = jax.lax.fori_loop(first, i + 1, keys, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), jnp.arange(q.shape[0]))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)
