"""Chunked log-probabilities and entropies: values, gradients, memory, sharding."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType

from echorl_jax import core
from tests import oracles

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 10, 8, 24


def inputs(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH))
    head = rng.normal(size=(WIDTH, VOCABULARY))
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, jnp.float32), jnp.asarray(tokens)


def weighted(hidden, head, tokens, chunk_size, temperature=0.7, data_shards=1):
    """A scalar in which every log-probability and entropy has its own weight."""
    logprobs, entropy = core.logprobs_and_entropy(
        hidden,
        head,
        tokens,
        temperature=temperature,
        chunk_size=chunk_size,
        data_shards=data_shards,
    )
    scale = jnp.arange(tokens.size, dtype=jnp.float32).reshape(tokens.shape) / tokens.size
    return jnp.sum(logprobs * scale) + jnp.sum(entropy * (1.0 - 2.0 * scale))


def dense_weighted(hidden, head, tokens):
    logprobs, entropy = oracles.logprobs_and_entropy(hidden, head, tokens, 0.7)
    scale = np.arange(tokens.size).reshape(tokens.shape) / tokens.size
    return (logprobs * scale).sum() + (entropy * (1 - 2 * scale)).sum()


@pytest.mark.parametrize("chunk_size", [1, 2, 12, 1000])
def test_values_and_gradients_against_float64(chunk_size):
    hidden, head, tokens = inputs()
    got = core.logprobs_and_entropy(hidden, head, tokens, temperature=0.7, chunk_size=chunk_size)
    dense = tuple(np.asarray(x) for x in (hidden, head, tokens))
    expected = oracles.logprobs_and_entropy(*dense, 0.7)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    slopes = jax.jit(jax.grad(weighted, (0, 1)), static_argnums=3)(hidden, head, tokens, chunk_size)
    wide = [x.astype(np.float64) for x in dense[:2]]
    for which in (0, 1):
        numeric = np.zeros(wide[which].size)
        for i in range(numeric.size):
            pair = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in wide]
                moved[which].flat[i] += step
                pair.append(dense_weighted(*moved, dense[2]))
            numeric[i] = (pair[0] - pair[1]) / 2e-5
        np.testing.assert_allclose(slopes[which].ravel(), numeric, atol=2e-5)


def test_from_logits_against_float64():
    hidden, head, tokens = inputs()
    logits = hidden @ head
    expected = oracles.logprobs_and_entropy(*map(np.asarray, (hidden, head, tokens)), 0.7)
    got = (
        core.token_logprobs(logits, tokens, temperature=0.7),
        core.token_entropy(logits, temperature=0.7),
    )
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_half_precision_accumulates_in_float32():
    hidden, head, tokens = inputs(dtype=jnp.bfloat16)
    logprobs, entropy = core.logprobs_and_entropy(hidden, head, tokens, chunk_size=8)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    rounded = np.asarray(head.astype(jnp.bfloat16), np.float32)
    expected = oracles.logprobs_and_entropy(np.asarray(hidden, np.float32), rounded, tokens, 1.0)
    np.testing.assert_allclose((logprobs, entropy), expected, atol=1e-5)
    slope = jax.grad(weighted, 1)(hidden, head, tokens, 8)
    exact = jax.grad(weighted, 1)(hidden.astype(jnp.float32), jnp.asarray(rounded), tokens, 8)
    assert slope.dtype == jnp.float32
    # Each of 40 products rounds d_logits to 8 bits.
    np.testing.assert_allclose(slope, exact, atol=0.02)


@pytest.mark.parametrize("chunk_size", [8, 1000], ids=["pieces", "one piece"])
def test_half_precision_gradient_of_a_tied_head(chunk_size):
    """The embedding table is the head transposed; XLA cannot do every bf16 product on CPU."""
    hidden, head, tokens = inputs(dtype=jnp.bfloat16)

    def of_table(table):
        return weighted(hidden, table.T, tokens, chunk_size)

    slope = jax.jit(jax.grad(of_table))(head.T)
    exact = jax.grad(weighted, 1)(hidden.astype(jnp.float32), head, tokens, chunk_size)
    np.testing.assert_allclose(slope, exact.T, atol=0.05)


def test_impossible_tokens_have_no_part_in_the_entropy():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    value, slope = jax.value_and_grad(lambda x: core.token_entropy(x)[0])(logits)
    assert value == pytest.approx(np.log(2)) and np.isfinite(slope).all()


@pytest.mark.parametrize("data_shards", [1, 4])
def test_batch_and_vocabulary_sharded(data_shards):
    hidden, head, tokens = inputs()
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = functools.partial(jax.NamedSharding, mesh)
    run = jax.jit(jax.value_and_grad(weighted, (0, 1)), static_argnums=(3, 4, 5))
    spread = (
        jax.device_put(hidden, place(jax.P("fsdp"))),
        jax.device_put(head, place(jax.P("fsdp", "tensor"))),
        jax.device_put(tokens, place(jax.P("fsdp"))),
    )
    expected = run(hidden, head, tokens, 12, 0.7, 1)
    compiled = run.lower(*spread, 12, 0.7, data_shards).compile()
    for got, want in zip(
        jax.tree.leaves(compiled(*spread)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_memory_is_an_eighth_of_dense_at_most():
    shapes = (
        jax.ShapeDtypeStruct((8, 1024, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 151_936), jnp.float32),
        jax.ShapeDtypeStruct((8, 1024), jnp.int32),
    )

    def dense(hidden, head, tokens):
        logp = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(logp, tokens[..., None], axis=-1)
        return jnp.sum(picked) - jnp.sum(jnp.exp(logp) * logp)

    def chunked(hidden, head, tokens):
        return sum(map(jnp.sum, core.logprobs_and_entropy(hidden, head, tokens)))

    def peak(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(chunked) * 8 < peak(dense)


def test_nothing_of_the_size_of_the_logits_exists():
    hidden, head, tokens = inputs()
    text = str(
        jax.make_jaxpr(jax.grad(weighted, (0, 1)), static_argnums=3)(hidden, head, tokens, 4)
    )
    assert f"[{ROWS},{LENGTH},{VOCABULARY}]" not in text
    assert f"[{ROWS},1,{VOCABULARY}]" in text


@pytest.mark.parametrize(
    "change",
    [
        dict(temperature=0.0),
        dict(chunk_size=0),
        dict(data_shards=3),
        dict(head=jnp.zeros((WIDTH + 1, VOCABULARY))),
        dict(tokens=jnp.zeros((ROWS, LENGTH + 1), jnp.int32)),
    ],
)
def test_wrong_arguments_are_refused(change):
    hidden, head, tokens = inputs()
    # Without the tests' checks of signatures, which users do not have.
    plain = inspect.unwrap(core.logprobs_and_entropy)
    arguments = dict(hidden=hidden, head=head, tokens=tokens) | change
    with pytest.raises(ValueError):
        plain(**arguments)
    if {"head", "tokens"} & {*change}:
        with pytest.raises(jaxtyping.TypeCheckError, match="checking the parameters"):
            core.logprobs_and_entropy(**arguments)


def test_an_empty_batch():
    logprobs, entropy = core.logprobs_and_entropy(
        jnp.zeros((2, 0, 3)), jnp.zeros((3, 4)), jnp.zeros((2, 0), jnp.int32)
    )
    assert logprobs.shape == entropy.shape == (2, 0)
