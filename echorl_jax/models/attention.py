"""Causal self-attention over right-padded rows; the platform selects the kernel."""

from typing import Literal

import jax
import jax.numpy as jnp

from echorl_jax.choices import Kernel
from echorl_jax.models.blockwise import HIDDEN, blockwise_attention
from echorl_jax.models.config import ModelError
from echorl_jax.models.splash import splash_attention
from echorl_jax.precision import precision_of, wide_einsum
from echorl_jax.types import Array


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
