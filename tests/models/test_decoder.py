"""The decoder handles padding, packing and remat, and compiles in time independent of depth."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import Decoder, DecoderConfig, ModelError, RopeConfig, attend, init_params

CONFIG = DecoderConfig(
    "qwen3",
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    tied_embeddings=True,
    windows=(6, None, 6),
    initializer_range=0.3,
)
MODEL = Decoder(CONFIG, dtype="float32", attention="xla")


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(1))


def _tokens(rows: int, length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows + length).integers(0, 40, (rows, length)))


def test_the_model_is_static_and_its_weights_a_plain_pytree(params):
    assert hash(MODEL) == hash(dataclasses.replace(MODEL))
    logits = jax.jit(Decoder.logits, static_argnums=0)(MODEL, params, _tokens(1, 5))
    assert logits.shape == (1, 5, 40) and logits.dtype == jnp.float32
    assert all(type(leaf) is type(logits) for leaf in jax.tree.leaves(params))
    assert params["layers"]["mlp"]["gate"]["kernel"].shape == (3, 24, 32)


def test_initial_weights_have_the_scale_of_the_config(params):
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert abs(float(kernel.std()) - 0.3) < 0.02
    assert not np.array_equal(kernel[0], kernel[1])
    assert (params["layers"]["mlp_norm"]["scale"] == 1).all()
    bfloat16 = init_params(dataclasses.replace(MODEL, param_dtype="bfloat16"), jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(bfloat16)} == {jnp.dtype("bfloat16")}


def test_padding_changes_no_bit_of_a_real_position(params):
    tokens = _tokens(2, 90)
    lengths = jnp.array([90, 37])
    run = jax.jit(lambda tokens: MODEL.hidden(params, tokens, lengths=lengths))
    other = jnp.where(jnp.arange(90)[None, :] < lengths[:, None], tokens, 39 - tokens)
    a, b = run(tokens), run(other)
    np.testing.assert_array_equal(a[1, :37], b[1, :37])
    np.testing.assert_array_equal(a[0], b[0])


def test_packed_rows_equal_separate_rows(params):
    tokens = _tokens(1, 70)
    cuts = [0, 20, 65]
    segments = jnp.asarray(np.repeat([0, 1, 2], [20, 45, 5]))[None, :]
    positions = jnp.asarray(np.concatenate([np.arange(20), np.arange(45), np.arange(5)]))[None, :]
    hidden = jax.jit(MODEL.hidden)
    packed = hidden(
        params,
        tokens,
        lengths=jnp.array([65]),
        segment_ids=segments,
        positions=positions.astype(jnp.int32),
    )
    for start, end in zip(cuts, cuts[1:], strict=False):
        alone = hidden(params, tokens[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)


def test_decoding_step_by_step_equals_a_full_forward_pass(params):
    """Decodes one token at a time with kept keys and values, as a sampler does."""
    tokens = _tokens(2, 9)
    whole = jax.jit(MODEL.hidden)(params, tokens)
    windows = jnp.array([window or 99 for window in CONFIG.windows])
    cache = jnp.zeros((2, 3, 2, 9, 2, 8))  # k or v, layer, row, position, head, width

    @jax.jit
    def step(cache, column, t):
        tables = MODEL.rotary(jnp.full((2, 1), t))

        def layer(x, scanned):
            weights, window, k_seen, v_seen = scanned
            q, k, v = MODEL.qkv(weights, x, tables)
            k_seen = jax.lax.dynamic_update_slice_in_dim(k_seen, k, t, axis=1)
            v_seen = jax.lax.dynamic_update_slice_in_dim(v_seen, v, t, axis=1)
            grouped = q.reshape(2, 2, 2, 8)
            logits = jnp.einsum("bngk,bsnk->bngs", grouped, k_seen) / np.sqrt(8)
            seen = jnp.arange(9)
            visible = (seen <= t) & (seen > t - window)
            weight = jax.nn.softmax(jnp.where(visible[None, None, None], logits, -1e30), axis=-1)
            out = jnp.einsum("bngs,bsnk->bngk", weight, v_seen).reshape(2, 1, 4, 8)
            return MODEL.finish_layer(weights, x, out), (k_seen, v_seen)

        x = MODEL.embed(params, column)
        x, cache = jax.lax.scan(layer, x, (MODEL.layers(params), windows, cache[0], cache[1]))
        return jnp.stack(cache), MODEL.final_norm(params, x)

    for t in range(9):
        cache, out = step(cache, tokens[:, t : t + 1], t)
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=2e-5)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_policies_give_the_same_gradient(params, remat):
    tokens = _tokens(2, 12)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.square(model.hidden(p, tokens)[:, :, :3]).sum()))

    plain = gradient(dataclasses.replace(MODEL, remat="none"))(params)
    again = gradient(dataclasses.replace(MODEL, remat=remat))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def test_remat_saves_memory():
    config = dataclasses.replace(CONFIG, num_layers=8, windows=(None,) * 8)

    def temporary(remat: str) -> int:
        model = Decoder(config, "float32", remat=remat, attention="xla")
        gradient = jax.grad(lambda p, t: model.hidden(p, t).sum())
        tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        compiled = jax.jit(gradient).lower(model.param_shapes(), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, layer = (temporary(remat) for remat in ("none", "dots", "layer"))
    assert layer < dots < none


def test_compile_time_does_not_grow_with_depth():
    """Compares processor seconds of 48 and of 4 layers; other programs hardly change them."""

    def seconds(layers: int) -> float:
        config = dataclasses.replace(CONFIG, num_layers=layers, windows=(None,) * layers)
        model = Decoder(config, "float32", attention="xla")
        step = jax.jit(jax.grad(lambda p, t: model.hidden(p, t).sum()))
        start = time.process_time()
        step.lower(model.param_shapes(), jax.ShapeDtypeStruct((2, 16), jnp.int32)).compile()
        return time.process_time() - start

    seconds(3)
    assert seconds(48) < 1.3 * max(seconds(4), seconds(5))


def test_dynamic_rope_depends_on_each_row_alone():
    """A row's results do not depend on a longer row of the batch, beyond the limit or not."""
    rope = RopeConfig(kind="dynamic", factor=2.0)
    config = dataclasses.replace(CONFIG, rope=rope, max_position_embeddings=8)
    model = Decoder(config, "float32", attention="xla")
    params = init_params(model, jax.random.key(0))
    tokens = _tokens(2, 14)
    logits = jax.jit(model.logits)
    both = logits(params, tokens, lengths=jnp.array([14, 10]))
    np.testing.assert_allclose(both[1:, :10], logits(params, tokens[1:, :10]), atol=2e-5)


def test_cast_weights_keep_norms_and_give_the_same_logits(params):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    tokens = _tokens(2, 9)
    cast = model.cast(params)
    assert cast["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert cast["layers"]["attention"]["q_norm"]["scale"].dtype == jnp.float32
    run = jax.jit(model.hidden)
    np.testing.assert_array_equal(run(params, tokens), run(cast, tokens))


def test_impossible_architectures_are_refused():
    with pytest.raises(ModelError, match="num_attention_heads=4 is not a multiple"):
        dataclasses.replace(CONFIG, num_kv_heads=3)
    with pytest.raises(ModelError, match="1 layer_types for 3 layers"):
        dataclasses.replace(CONFIG, windows=(None,))


def test_attend_is_exported_and_jits():
    q = jnp.ones((1, 3, 2, 8))
    np.testing.assert_allclose(jax.jit(attend)(q, q, q), q, atol=1e-6)
