"""Attention over blocks, rings and prefill pieces equals attention over one array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import init_params
from echorl_jax.rollout import cache
from echorl_jax.rollout.prefill import prefill
from echorl_jax.rollout.request import Sampling, make_request
from tests.rollout.conftest import decoder

SHAPE = {"layers": 2, "blocks": 3, "rows": 4, "kv_heads": 2, "block": 8, "head_dim": 6}


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(q, k, v, valid):
    """Softmax attention in NumPy: q [M,KV,R,K], k and v [M,KV,n,K], valid [M,n]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("mhrk,mhnk->mhrn", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(valid[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("mhrn,mhnk->mhrk", weights, v)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_blocks_equal_one_softmax(order):
    q, k, v = random(4, 2, 3, 6), random(4, 2, 24, 6, seed=1), random(4, 2, 24, 6, seed=2)
    valid = np.random.default_rng(3).random((4, 24)) < 0.6
    valid[1, :8] = False  # one row sees no key of this block
    own_k, own_v = random(4, 2, 6, seed=4), random(4, 2, 6, seed=5)
    partial, apart = cache.self_attention(q, own_k, own_v), cache.no_attention(q)
    for at in order:
        part = slice(at * 8, at * 8 + 8)
        block = cache.Cache(jnp.swapaxes(k[:, :, part], 2, 3), v[:, :, part])
        seen = jnp.asarray(valid[:, None, None, part])
        partial = cache.merge_block(partial, q, block, seen)
        if at != 0:
            apart = cache.merge_block(apart, q, block, seen)
    everything = [jnp.concatenate([x, y[:, :, None]], 2) for x, y in ((k, own_k), (v, own_v))]
    expected = plain(q, *everything, np.append(valid, np.ones((4, 1), bool), axis=1))
    np.testing.assert_allclose(cache.finish_attention(partial), expected, atol=1e-5)
    # Keys merged into both partial results count twice, as if they were repeated.
    both = cache.combine(partial, apart)
    twice = [np.concatenate([x, y[:, :, 8:]], 2) for x, y in zip(everything, (k, v), strict=True)]
    seen = np.append(np.append(valid, np.ones((4, 1), bool), axis=1), valid[:, 8:], axis=1)
    np.testing.assert_allclose(cache.finish_attention(both), plain(q, *twice, seen), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("bfloat16", 0.02), ("int8", 0.02)])
def test_written_values_are_read_back(dtype, tolerance):
    """Writes single columns and a piece of blocks; int8 is within half a step of its scale."""
    store = cache.empty_cache(**SHAPE, dtype=dtype)
    k, v = random(2, 4, 24, 2, 6), random(2, 4, 24, 2, 6, seed=1)
    first = cache.encode(k[:, :2, :16], v[:, :2, :16], like=store)
    store = cache.write_piece(store, first, jnp.int32(2), jnp.int32(8))
    for column in (0, 7, 5):
        new = cache.encode(k[:, :, column], v[:, :, column], like=store)
        store = cache.write_column(store, new, jnp.int32(column))

    def read(layer, index):
        block = cache.read_block(store, jnp.int32(layer), jnp.int32(index))
        keys, values = np.asarray(block.k, np.float32), np.asarray(block.v, np.float32)
        if block.k_scale is not None:
            keys = keys * np.asarray(block.k_scale)[:, :, None]
            values = values * np.asarray(block.v_scale)[..., None]
        return np.swapaxes(keys, 2, 3), values

    for layer, kind in itertools.product(range(2), range(2)):
        given = np.asarray((k, v)[kind][layer])
        for column in (0, 7, 5):
            found = read(layer, 0)[kind][:, :, column]
            np.testing.assert_allclose(found, given[:, column], atol=2 * tolerance)
        for index in (1, 2):
            expected = np.moveaxis(given[:2, index * 8 - 8 : index * 8], 1, 2)
            found = read(layer, index)[kind]
            np.testing.assert_allclose(found[2:], expected, atol=2 * tolerance)
            assert not found[:2].any()


def test_int8_scales_keep_zero_and_extremes():
    x = jnp.array([[0.0, 0.0], [127.0, -127.0], [1e-3, 5e-4]])
    like = cache.empty_cache(**SHAPE, dtype="int8")
    coded = cache.encode(x, x, like=like)
    assert coded.k.tolist() == [[0, 0], [127, -127], [127, 64]]
    np.testing.assert_allclose(coded.k_scale, [0, 1, 1e-3 / 127])


def test_rows_are_copied_and_picked():
    source = cache.Cache(random(2, 3, 4, 2, 6, 8), random(2, 3, 4, 2, 8, 6, seed=1))
    copied = cache.copy_row(source, source, jnp.int32(3), jnp.int32(1))
    np.testing.assert_array_equal(copied.k[:, :, 3], source.k[:, :, 1])
    np.testing.assert_array_equal(copied.k[:, :, :3], source.k[:, :, :3])
    picked = cache.pick_rows(source, jnp.array([[1], [0]]))  # of two parts: rows 1 and 2
    np.testing.assert_array_equal(picked.v, source.v[:, :, jnp.array([1, 2])])


@pytest.mark.parametrize("rows, chunk", [(1, 8), (2, 16), (4, 32)])
def test_prefill_in_pieces_equals_prefill_at_once(rows, chunk):
    """One layer has a window. Only columns below each length are compared."""
    model = decoder(windows=(None, 10))
    params = init_params(model, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (4, 32)), jnp.int32)
    lengths = jnp.array([31, 0, 17, 5])
    request = make_request(
        [tokens[row, : length + 1].tolist() for row, length in enumerate(lengths)],
        Sampling(group_size=1, max_new_tokens=1),
        vocab_size=60,
    )
    shape = {"layers": 2, "rows": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}

    def run(block, rows, chunk):
        store = cache.empty_cache(**shape, blocks=32 // block, block=block)
        filled = prefill(model, params, request, store, rows=rows, chunk=chunk)
        # [L, blocks, rows, KV, block, K] -> [L, rows, KV, positions, K]
        return jnp.moveaxis(filled.v, 1, 3).reshape(2, 4, 2, 32, 8)

    whole, pieces = run(32, 4, 32), run(8, rows, chunk)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(pieces[:, row, :, :length], whole[:, row, :, :length], atol=1e-5)
