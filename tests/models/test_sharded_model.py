"""Results on one device and on eight are equal on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import Decoder, DecoderConfig, init_params, param_shardings
from echorl_jax.parallel import ShardingError, make_mesh

CONFIG = DecoderConfig(
    "qwen3",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    qkv_bias=True,
    initializer_range=0.3,
)
MODEL = Decoder(CONFIG, dtype="float32", attention="xla")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (4, 80)))
LENGTHS = jnp.array([80, 41, 7, 1])


def _loss(params, tokens, lengths):
    logprobs = jax.nn.log_softmax(MODEL.logits(params, tokens, lengths=lengths)[:, :-1])
    picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    real = jnp.arange(tokens.shape[1] - 1)[None, :] < lengths[:, None] - 1
    return -jnp.where(real, picked, 0.0).mean()


@pytest.fixture(scope="module")
def single():
    params = init_params(MODEL, jax.random.key(0))
    return params, *jax.jit(jax.value_and_grad(_loss))(params, TOKENS, LENGTHS)


# Tensor 4 does not divide the two KV heads, which are then whole on every device.
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(sizes, single):
    mesh = make_mesh(*sizes)
    params, loss, gradients = single
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(MODEL, mesh))
        step = jax.jit(jax.value_and_grad(_loss))
        loss_8, gradients_8 = step(sharded, TOKENS, LENGTHS)
    np.testing.assert_allclose(loss_8, loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), gradients_8, gradients
    )


def test_initial_weights_do_not_depend_on_the_mesh_and_are_split(single):
    params = init_params(MODEL, jax.random.key(0), make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, params, single[0])
    gate = params["layers"]["mlp"]["gate"]["kernel"]  # [2, 32, 48] over fsdp and tensor
    assert gate.addressable_shards[0].data.shape == (2, 16, 24)
    assert params["embed"]["table"].addressable_shards[0].data.shape == (24, 16)


def test_rollout_layout_does_not_split_embed(single):
    mesh = make_mesh(1, 4, 2)
    shardings = param_shardings(MODEL, mesh, layout="rollout")
    params = jax.device_put(single[0], param_shardings(MODEL, mesh))
    bf16 = dataclasses.replace(MODEL, dtype="bfloat16")
    cast = jax.jit(bf16.cast, out_shardings=shardings)(params)
    gate = cast["layers"]["mlp"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (2, 32, 24)
    assert gate.dtype == jnp.bfloat16
    assert cast["layers"]["mlp_norm"]["scale"].dtype == jnp.float32


def test_indivisible_heads_are_refused_with_the_allowed_sizes():
    mesh = make_mesh(1, 1, 8)
    model = dataclasses.replace(
        MODEL, config=dataclasses.replace(CONFIG, num_heads=28, num_kv_heads=4)
    )
    with pytest.raises(ShardingError, match=r"heads of size 28 .* tensor=8.* 1, 2, 4, 7, 14, 28"):
        param_shardings(model, mesh)
