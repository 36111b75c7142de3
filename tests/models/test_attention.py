"""Attention kernels equal a softmax in NumPy, and their gradients a softmax in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import ModelError, attend
from echorl_jax.models.attention import _fused, blockwise_attention
from echorl_jax.models.splash import splash_attention

BATCH, WIDTH = 4, 8


def _inputs(length: int, heads: int, kv_heads: int, dtype=jnp.float32):
    rng = np.random.default_rng(length + heads)
    q, k, v, d = (
        rng.standard_normal((BATCH, length, n, WIDTH), np.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    lengths = np.array([length, length // 2, 1, 0])
    real = (np.arange(length)[None, :] < lengths[:, None])[:, :, None, None]
    # Padding holds values that would swamp everything, were they attended to.
    q, k, v = (jnp.asarray(np.where(real, x, 50), dtype) for x in (q, k, v))
    return q, k, v, jnp.asarray(np.where(real, d, 0)), jnp.asarray(lengths, jnp.int32), real


def _segments(length: int) -> jax.Array:
    return jnp.tile((jnp.arange(length) // (length // 3 + 1))[None, :], (BATCH, 1))


def _visible(length, lengths, segments, window) -> np.ndarray:
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    visible = np.broadcast_to(j <= i, (BATCH, length, length)).copy()
    visible &= j[None] < np.asarray(lengths)[:, None, None]
    if window is not None:
        visible &= (i - j < window)[None]
    if segments is not None:
        segments = np.asarray(segments)
        visible &= segments[:, :, None] == segments[:, None, :]
    return visible


def _oracle(q, k, v, visible) -> np.ndarray:
    """Attention of one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(visible[b, i])
        if keys.size == 0:
            continue
        scores = k[b, keys, h // group] @ q[b, i, h] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, keys, h // group] / weights.sum()
    return out


def _plain(q, k, v, visible) -> jax.Array:
    """A differentiable reference that repeats the KV heads."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(WIDTH)
    weights = jax.nn.softmax(jnp.where(jnp.asarray(visible)[:, None], scores, -1e9), axis=-1)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v)


KERNELS = {
    "direct": lambda q, k, v, lengths, segments, window: attend(
        q, k, v, lengths=lengths, segment_ids=segments, window=window, kernel="xla"
    ),
    "blockwise": functools.partial(blockwise_attention, block=16),
    "splash": functools.partial(splash_attention, interpret=True),
}
CASES = [
    # kernel, length, heads, kv_heads, window, packed
    ("direct", 40, 4, 2, None, False),
    ("direct", 33, 4, 1, 7, True),
    ("blockwise", 64, 4, 4, None, False),
    ("blockwise", 50, 6, 2, None, True),
    ("blockwise", 50, 4, 2, 20, False),
    ("blockwise", 70, 2, 1, 1, True),
    ("splash", 140, 4, 2, None, False),
    ("splash", 100, 2, 2, 30, True),
]


@pytest.mark.parametrize("kernel,length,heads,kv_heads,window,packed", CASES)
def test_kernel_equals_plain_attention(kernel, length, heads, kv_heads, window, packed):
    q, k, v, d_out, lengths, real = _inputs(length, heads, kv_heads)
    segments = _segments(length) if packed else None
    visible = _visible(length, lengths, segments, window)

    def total(q, k, v):
        out = KERNELS[kernel](q, k, v, lengths, segments, window=window)
        return (out * d_out).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(
        np.where(real, out, 0), np.where(real, _oracle(q, k, v, visible), 0), atol=2e-5
    )
    assert np.isfinite(out).all()
    plain = jax.grad(lambda *x: (_plain(*x, visible) * d_out).sum(), (0, 1, 2))
    expected = jax.jit(plain)(q, k, v)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(np.where(real, ours, 0), np.where(real, theirs, 0), atol=5e-5)


def test_bfloat16_blocks_stay_within_rounding():
    q, k, v, _, lengths, real = _inputs(80, 4, 2, jnp.bfloat16)
    out = blockwise_attention(q, k, v, lengths, None, window=None, block=16)
    assert out.dtype == jnp.bfloat16
    expected = _oracle(q, k, v, _visible(80, lengths, None, None))
    np.testing.assert_allclose(
        np.where(real, out.astype(jnp.float32), 0), np.where(real, expected, 0), atol=0.03
    )


@pytest.mark.parametrize("window", [None, 9])
def test_arguments_of_the_fused_kernel_are_correct(window):
    """Passes the arguments for cuDNN to the plain implementation of the same JAX function."""
    q, k, v, _, lengths, real = _inputs(40, 4, 2)
    out = _fused(q, k, v, lengths, window, implementation="xla")
    expected = _oracle(q, k, v, _visible(40, lengths, None, window))
    np.testing.assert_allclose(np.where(real, out, 0), np.where(real, expected, 0), atol=2e-5)


def test_a_kernel_that_does_not_support_its_inputs_is_refused():
    q, k, v, _, lengths, _ = _inputs(16, 2, 2)
    with pytest.raises(ModelError, match="float32; it needs bfloat16"):
        attend(q, k, v, lengths=lengths, kernel="cudnn")
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    with pytest.raises(ModelError, match="segment_ids"):
        attend(q, k, v, segment_ids=_segments(16), kernel="cudnn")


@pytest.mark.parametrize("length", [1024, 4096])
def test_memory_of_long_rows_grows_with_the_length_only(length):
    """No array ``[H, T, T]`` exists: 4 heads of f32 scores would take 4 * 4 * T^2 bytes."""
    shape = jax.ShapeDtypeStruct((1, length, 4, WIDTH), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.float32)
    gradient = jax.grad(lambda q, k, v: attend(q, k, v, kernel="xla").sum(), (0, 1, 2))
    memory = jax.jit(gradient).lower(shape, kv, kv).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2_500_000 + 40 * 4 * WIDTH * 4 * length
    assert memory.temp_size_in_bytes < 4 * 4 * length**2 / 4


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
def test_cudnn_equals_plain_attention():
    q, k, v, _, lengths, real = _inputs(256, 4, 2, jnp.bfloat16)
    out = attend(q, k, v, lengths=lengths, kernel="cudnn")
    expected = _oracle(q, k, v, _visible(256, lengths, None, None))
    np.testing.assert_allclose(
        np.where(real, out.astype(jnp.float32), 0), np.where(real, expected, 0), atol=0.03
    )


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")
def test_splash_on_tpu_equals_plain_attention():
    q, k, v, _, lengths, real = _inputs(256, 4, 2, jnp.bfloat16)
    out = attend(q, k, v, lengths=lengths, kernel="splash")
    expected = _oracle(q, k, v, _visible(256, lengths, None, None))
    np.testing.assert_allclose(
        np.where(real, out.astype(jnp.float32), 0), np.where(real, expected, 0), atol=0.03
    )
