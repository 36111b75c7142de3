"""Keys for an int8 cache whose biases are as large as Qwen2.5's in a few channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import generate, rollout_params, score_rollouts
from echorl_jax.rollout.memory import shares_weights
from echorl_jax.rollout.weights import balance_keys
from tests.rollout.conftest import decoder

LARGEST = 211.0
TOKENS = 48


@pytest.fixture(scope="module")
def biased():
    """A model with one pair of large key biases in each head, whose queries are small there: in
    trained models attention does not hang on one channel.
    """
    model = decoder(hidden_size=64, num_kv_heads=2, num_heads=4, head_dim=32, initializer_range=0.1)
    params = init_params(model, jax.random.key(0))
    attention = params["layers"]["attention"]
    rng = np.random.default_rng(0)
    key_bias = rng.normal(size=(2, 2, 32)).astype(np.float32)
    key_bias[:, :, 12] = [[LARGEST, -120.0], [-60.0, 90.0]]
    key_bias[:, :, 12 + 16] = [[-30.0, 180.0], [15.0, 0.0]]
    query = attention["q"]["kernel"].at[..., [12, 28]].divide(50.0)
    attention = {
        **attention,
        "q": {**attention["q"], "kernel": query},
        "k": {**attention["k"], "bias": jnp.asarray(key_bias)},
    }
    return model, {**params, "layers": {**params["layers"], "attention": attention}}


def gaps(model, params, kv_dtype):
    """|trainer - sampler| of each sampled token, nats."""
    prompts = np.random.default_rng(1).integers(5, 60, (4, 24)).tolist()
    settings = {"group_size": 4, "max_new_tokens": TOKENS, "eos_ids": (), "kv_dtype": kv_dtype}
    rollouts = generate(model, params, prompts, jax.random.key(1), **settings)
    logprobs, _ = score_rollouts(model, params, rollouts)
    return np.abs(np.asarray(logprobs - rollouts.rollout_logprobs))


def test_balanced_keys_change_no_logit(biased):
    """Bit for bit: products with powers of two are exact."""
    model, params = biased
    balanced = balance_keys(params)
    tokens = jnp.asarray(np.random.default_rng(2).integers(5, 60, (2, 40)), jnp.int32)
    logits = jax.jit(model.logits)
    assert (logits(balanced, tokens) == logits(params, tokens)).all()
    bias = np.abs(balanced["layers"]["attention"]["k"]["bias"])
    assert bias.max() < LARGEST / 16
    factor = (
        params["layers"]["attention"]["k"]["bias"] / balanced["layers"]["attention"]["k"]["bias"]
    )
    ordinary = np.delete(np.asarray(factor), [12, 28], axis=-1)
    assert (ordinary == 1).mean() > 0.8 and ordinary.max() <= 2


def test_large_biases_cost_an_int8_cache_no_accuracy(biased):
    """Without balanced keys: largest 0.98, mean 0.137, and 23% past 0.2."""
    gap = gaps(*biased, "int8")
    assert gap.max() < 0.2 and gap.mean() < 0.02
    assert gaps(*biased, "float32").max() < 1e-3


def test_a_mesh_balances_alike(biased):
    model, params = biased
    alone = rollout_params(model, params, None, kv_dtype="int8")
    spread = rollout_params(model, params, make_mesh(2, 2, 2), kv_dtype="int8")
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: bool((a == jax.device_get(b)).all()), alone, spread)
        )
    )


def test_only_int8_keys_with_biases_need_weights_of_their_own(biased):
    model, params = biased
    place = {"devices": 1, "platform": "cpu"}
    assert not shares_weights(model, **place, kv_dtype="int8")
    assert shares_weights(model, **place, kv_dtype="bfloat16")
    assert rollout_params(model, params, None, kv_dtype="float32") is params
    for change in ({"qkv_bias": False}, {"qk_norm": True}):
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
        assert shares_weights(other, **place, kv_dtype="int8")
