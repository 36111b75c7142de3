"""The GPU kernel, in interpret mode, equals NumPy and attention over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import engine, generate, host, kernel, weights
from echorl_jax.rollout.cache import as_blocks, empty_cache, encode
from echorl_jax.rollout.weights import split_layers
from tests.rollout.conftest import EOS, PROMPTS, check_equal, check_scores, decoder

KEY = jax.random.key(1)


@pytest.fixture
def gpu(monkeypatch):
    """Makes the sampler compile as for a GPU, with the kernel in interpret mode."""
    monkeypatch.setattr(kernel, "INTERPRET", jax.default_backend() != "gpu")
    for module in (engine, host, weights):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "gpu")


def random_cache(rng, kv_dtype, *, rows, heads, width, length, block):
    """A cache of two layers, and the second layer's content ``[rows, length, heads, width]``."""
    shape = 2, rows, length, heads, width
    like = empty_cache(
        layers=1, blocks=1, rows=1, kv_heads=1, block=1, head_dim=width, dtype=kv_dtype
    )
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    new = encode(k, v, like=like)
    held = []
    for x, scale in ((new.k, new.k_scale), (new.v, new.v_scale)):
        x = np.asarray(x[1].astype(jnp.float32), np.float64)
        held.append(x if scale is None else x * np.asarray(scale[1])[..., None])
    return as_blocks(new, axis=2, block=block), *held


@pytest.mark.parametrize(
    "dtype, kv_dtype, heads, group, width, bound",
    [
        ("float32", "float32", 2, 6, 16, 1e-5),
        ("float32", "int8", 2, 1, 16, 1e-5),
        ("bfloat16", "bfloat16", 1, 17, 32, 5e-3),
    ],
)
@pytest.mark.parametrize("shared", [False, True], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("programs", [1, 64], ids=["one part", "parts"])
def test_attention_equals_the_formula(
    dtype, kv_dtype, heads, group, width, bound, shared, programs, monkeypatch
):
    monkeypatch.setattr(kernel, "INTERPRET", jax.default_backend() != "gpu")
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    rng, rows, length, prompt_length = np.random.default_rng(0), 6, 128, 96
    prompts = rows // 2 if shared else rows
    shape = {"heads": heads, "width": width}
    ring, *ring_held = random_cache(rng, kv_dtype, rows=rows, length=length, block=32, **shape)
    prompt, *prompt_held = random_cache(
        rng, kv_dtype, rows=prompts, length=prompt_length, block=16, **shape
    )
    q = jnp.asarray(rng.normal(size=(rows, heads, group, width)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(rows, heads, width)), dtype) for _ in range(2))
    # Nothing, everything, one column, past the end, at the edge of a block, inside a block.
    start = np.array([5, 77, 127, 100, 32, 40], np.int32)
    count = np.array([0, 128, 1, 90, 32, 7], np.int32)
    first = np.array([0, 3, 16, 95, 10, 0], np.int32)
    number = np.array([0, 93, 32, 1, 50, 96], np.int32)
    row = np.arange(rows, dtype=np.int32) // 2 if shared else None
    got = jax.jit(kernel.attend, static_argnums=3)(
        q, k, v, 1, (prompt, ring), (kernel.Span(first, number, row), kernel.Span(start, count))
    )
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    for m in range(rows):
        columns = (start[m] + np.arange(count[m])) % length
        early = m // 2 if shared else m, first[m] + np.arange(number[m])
        keys, values = (
            np.concatenate([own[m][None], of_ring[m, columns], of_prompt[early]])
            for own, of_ring, of_prompt in zip((k, v), ring_held, prompt_held, strict=True)
        )
        scores = np.einsum("hrk,nhk->hrn", q[m], keys) / np.sqrt(width)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = np.einsum("hrn,nhk->hrk", weight / weight.sum(-1, keepdims=True), values)
        np.testing.assert_allclose(np.asarray(got[m].astype(jnp.float32)), wanted, atol=4 * bound)


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({}, {}),
        ({}, {"slots": 3, "kv_dtype": "int8"}),
        ({"windows": (6, None)}, {"slots": 5}),
        ({"qk_norm": True, "qkv_bias": False}, {"prefixes": [[5, 6]] * 8}),
        ({"head_dim": 24}, {"slots": 5}),  # no power of two: blocks
    ],
    ids=["all slots", "few slots, int8", "windows", "prefixes", "no kernel"],
)
def test_samples_equal_those_of_the_blocks(gpu, changes, settings, monkeypatch):
    model = decoder(**{"head_dim": 16, **changes})
    params = init_params(model, jax.random.key(0))
    settings = {"group_size": 2, "max_new_tokens": 40, "eos_ids": EOS, **settings}
    rollouts = generate(model, params, PROMPTS, KEY, **settings)
    monkeypatch.undo()
    check_equal(rollouts, generate(model, params, PROMPTS, KEY, **settings))
    if "kv_dtype" not in settings:
        check_scores(model, params, PROMPTS, rollouts)


@pytest.mark.parametrize("slots", [0, 8])
def test_samples_do_not_depend_on_the_mesh(gpu, slots):
    model = decoder(head_dim=16)
    settings = {"group_size": 6, "max_new_tokens": 20, "eos_ids": EOS}
    base = generate(model, init_params(model, jax.random.key(0)), PROMPTS, KEY, **settings)
    mesh = make_mesh(2, 2, 2)
    params = init_params(model, jax.random.key(0), mesh)
    check_equal(generate(model, params, PROMPTS, KEY, **settings, slots=slots, mesh=mesh), base)


def test_matrices_with_the_same_input_are_concatenated():
    model = decoder(hidden_size=64, intermediate_size=96)
    params = jax.eval_shape(lambda p: split_layers(p, join=True), model.param_shapes())
    layer = params["layers"][0]
    assert layer["attention"]["joined"].shape == (64, 8 * (4 + 2 + 2))
    assert layer["mlp"]["joined"].shape == (64, 2 * 96)
    assert "kernel" not in layer["mlp"]["gate"] and "kernel" in layer["mlp"]["down"]
    assert layer["attention"]["q"].keys() == {"bias"}
