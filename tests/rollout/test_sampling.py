"""Frequencies and truncation of drawn tokens agree with NumPy, up to the edges of [0, 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from echorl_jax.rollout.request import Sampling
from echorl_jax.rollout.sampling import (
    SHARED,
    row_keys,
    sample,
    token_uniforms,
    vocabulary_blocks,
)

DRAWS = 40_000
_sample = jax.jit(sample, static_argnames="sampling")


def make_sampling(vocab_size, **options):
    """Checked settings for drawing single tokens."""
    return Sampling(group_size=1, max_new_tokens=1, **options).checked(vocab_size)


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def draw(logits, seed=0, **options):
    """Many independent draws from one row of logits."""
    sampling = make_sampling(len(logits), **options)
    rows = jnp.arange(DRAWS)
    uniforms = token_uniforms(row_keys(jax.random.key(seed), rows), jnp.zeros(DRAWS, jnp.int32))
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None, :], (DRAWS, len(logits)))
    return jax.device_get(_sample(many, uniforms, sampling=sampling))


def check_frequencies(tokens, probabilities):
    """Chi-square test over tokens expected at least five times; excluded tokens are never drawn."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    expected = probabilities * len(tokens)
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    keep = wanted > 0
    if keep.sum() > 1:
        assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 101, 600])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_frequencies_equal_the_softmax(vocab, temperature):
    logits = np.random.default_rng(vocab).normal(size=vocab) * 1.5
    drawn = draw(logits, temperature=temperature)
    probabilities = softmax(logits, temperature)
    check_frequencies(drawn.token, probabilities)
    logs = np.log(probabilities)
    np.testing.assert_allclose(drawn.logprob, logs[drawn.token], atol=2e-6)
    np.testing.assert_allclose(drawn.entropy, -(probabilities * logs).sum(), atol=2e-6)


def truncated(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned_ids=()):
    """The same distribution by sorting."""
    logits = np.array(logits, np.float64)
    logits[list(banned_ids)] = -np.inf
    p = softmax(logits, temperature)
    if top_k:
        p[np.argsort(-p, kind="stable")[top_k:]] = 0
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p * p.sum()]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 0.95, "temperature": 0.7},
        {"min_p": 0.1},
        {"banned_ids": (0, 5, 17)},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "banned_ids": (3,), "temperature": 1.3},
    ],
)
def test_truncation_equals_sorting(options):
    logits = np.random.default_rng(3).normal(size=90) * 2
    drawn = draw(logits, **options)
    check_frequencies(drawn.token, truncated(logits, **options))
    whole = np.log(softmax(logits, options.get("temperature", 1.0)))  # of all tokens
    np.testing.assert_allclose(drawn.logprob, whole[drawn.token], atol=5e-6)


def test_tied_tokens_are_kept_together():
    logits = np.array([0.0, 2.0, 1.0, 1.0, 1.0, -3.0])
    tokens = draw(logits, top_k=2).token
    assert set(tokens.tolist()) == {1, 2, 3, 4}


def test_a_ban_holds_when_the_banned_token_has_all_the_mass():
    logits = np.zeros(50)
    logits[7] = 300.0  # every other weight underflows beside it
    tokens = draw(logits, banned_ids=(7,)).token
    check_frequencies(tokens, truncated(np.zeros(50), banned_ids=[7]))


def test_greedy_takes_the_first_maximum_and_reports_temperature_one():
    logits = np.array([0.5, 3.0, -1.0, 3.0, 2.0])
    drawn = draw(logits, temperature=0.0)
    assert (drawn.token == 1).all()
    np.testing.assert_allclose(drawn.logprob, np.log(softmax(logits)[1]), atol=1e-6)
    assert (draw(logits, temperature=0.0, banned_ids=(1, 3)).token == 4).all()


def test_prefix_tokens_are_taken_and_scored():
    logits = np.random.default_rng(0).normal(size=(3, 10))
    prefix = jnp.array([4, -1, 9])
    plain = sample(jnp.asarray(logits, jnp.float32), jnp.full((3, 2), 0.3), make_sampling(10))
    drawn = sample(
        jnp.asarray(logits, jnp.float32),
        jnp.full((3, 2), 0.3),
        make_sampling(10),
        prefix=prefix,
    )
    assert drawn.token.tolist() == [4, int(plain.token[1]), 9]
    for row, token in enumerate(drawn.token.tolist()):
        expected = np.log(softmax(logits[row])[token])
        np.testing.assert_allclose(drawn.logprob[row], expected, atol=1e-6)


def test_uniforms_depend_on_row_and_position_only():
    """They come from the documented key, do not depend on the batch, and are all different."""
    key = jax.random.key(5)
    rows, positions = jnp.array([0, 1, 1, 900]), jnp.array([0, 0, 1, 77])
    uniforms = token_uniforms(row_keys(key, rows), positions)
    alone = token_uniforms(row_keys(key, rows[2:3]), positions[2:3])
    np.testing.assert_array_equal(uniforms[2:3], alone)
    bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, 900), 77), (2,))
    np.testing.assert_array_equal(uniforms[3], np.asarray(bits >> 8) / 2.0**24)
    assert len(np.unique(uniforms)) == 8


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([-200.0, -20.0, -1.0, 0.0, 0.5, 30.0]), min_size=37, max_size=37),
    st.sampled_from([0.0, 2.0**-24, 0.5, 1 - 2.0**-24]),
    st.sampled_from([0.0, 2.0**-24, 0.5, 1 - 2.0**-24]),
)
def test_excluded_tokens_are_never_drawn(logits, first, second):
    options = {"vocab_size": 37, "top_p": 0.9, "banned_ids": (0, 36)}
    drawn = _sample(
        jnp.array([logits]), jnp.array([[first, second]]), sampling=make_sampling(**options)
    )
    allowed = truncated(logits, top_p=0.9, banned_ids=[0, 36]) > 0
    # Tokens that tie with the last one kept are kept too.
    smallest = min(value for value, ok in zip(logits, allowed, strict=True) if ok)
    token = int(drawn.token[0])
    assert 0 < token < 36 and logits[token] >= smallest


@given(st.integers(1, 300_000))
def test_blocks_cover_the_vocabulary(vocab):
    blocks, width = vocabulary_blocks(vocab)
    assert vocab <= blocks * width
    assert (blocks - SHARED) * width < vocab
    assert blocks * width == vocab or blocks % SHARED == 0


def test_bf16_logits_are_widened_first():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 30)), jnp.bfloat16)
    uniforms, sampling = jnp.full((4, 2), 0.5), make_sampling(30)
    narrow, wide = (sample(z, uniforms, sampling) for z in (logits, logits.astype(jnp.float32)))
    assert narrow.logprob.dtype == jnp.float32
    np.testing.assert_array_equal(narrow.logprob, wide.logprob)


@pytest.mark.parametrize("temperature", [0.6, 1.3, 1e-12])
def test_min_p_of_one_keeps_the_most_probable(temperature):
    logits = jax.random.normal(jax.random.key(0), (300, 151)) * 5
    uniforms = jax.random.uniform(jax.random.key(1), (300, 2))
    sampling = make_sampling(151, temperature=temperature, min_p=1.0)
    drawn = jax.jit(lambda z, u: sample(z, u, sampling))(logits, uniforms)
    assert jnp.array_equal(drawn.token, logits.argmax(1))
    assert jnp.isfinite(drawn.logprob).all() and jnp.isfinite(drawn.entropy).all()


@pytest.mark.parametrize("vocab", [59, 60, 512, 32_000, 50_257, 128_256, 151_936, 152_064])
def test_blocks_divide_over_as_many_devices_as_the_vocabulary(vocab):
    blocks, width = vocabulary_blocks(vocab)
    assert vocab <= blocks * width < vocab + width + blocks
    for shards in (2, 3, 4, 8, 16, 32):
        if vocab % shards == 0 and blocks * width == vocab:
            assert blocks % shards == 0
