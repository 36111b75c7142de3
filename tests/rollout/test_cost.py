"""The formula against what the compiler counts for one layer, where no loop hides its length."""

import jax
import jax.numpy as jnp
import pytest

from echorl_jax.rollout import turn_cost
from echorl_jax.rollout.cache import empty_cache
from echorl_jax.rollout.slots import Queue, first_slots
from echorl_jax.rollout.step import forward
from tests.rollout.conftest import decoder

WIDE = {
    "num_layers": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
}


def queue_and_slots(prompts: int, group_size: int, width: int, length: int):
    shape = {"layers": 1, "blocks": 1, "kv_heads": 2, "head_dim": 32, "dtype": "float32"}
    rows = prompts * group_size
    numbers = jnp.zeros(prompts, jnp.int32)
    queue = Queue(
        key=jax.random.split(jax.random.key(0), rows),
        count=jnp.int32(rows),
        group=jnp.repeat(jnp.arange(prompts), group_size),
        limit=jnp.full(rows, length),
        cached=numbers,
        last_token=numbers,
        forced=jnp.zeros((rows, 0), jnp.int32),
        forced_length=jnp.zeros(rows, jnp.int32),
        store=empty_cache(**shape, rows=prompts, block=width),
    )
    ring = empty_cache(**shape, rows=rows, block=length)
    return queue, first_slots(queue, slots=rows, memory=0, ring=ring)


def test_operations_are_those_of_the_compiled_turn():
    model = decoder(**WIDE)
    queue, slots = queue_and_slots(4, 8, 64, 128)

    def turn(params, queue, slots):
        return forward(model, params, queue, slots, platform="cpu")

    compiled = jax.jit(turn).lower(model.param_shapes(), queue, slots).compile()
    counted = compiled.cost_analysis()["flops"]
    cost = turn_cost(model, slots=32, prompt_tokens=64, completion_tokens=128, group_size=8)
    assert cost.flops == pytest.approx(counted, rel=0.05)


def test_terms_by_hand():
    model = decoder(**WIDE)
    layer = 256 * (8 + 2 + 2) * 32 + 8 * 32 * 256 + 3 * 256 * 512
    cost = turn_cost(model, slots=10, prompt_tokens=40, completion_tokens=6, group_size=4)
    assert cost.matrix_flops == 2 * 10 * (layer + 256 * 1000)
    assert cost.attention_flops == 4 * 10 * 8 * 32 * 46
    assert cost.weight_bytes == 4 * (layer + 256 * 1000)
    assert cost.cache_bytes == 10 * (40 // 4 + 6 + 1) * 2 * 2 * 32 * 4
    narrow = turn_cost(
        model, slots=10, prompt_tokens=40, completion_tokens=6, group_size=4, kv_dtype="int8"
    )
    assert narrow.cache_bytes == 10 * 17 * 2 * 2 * (32 + 4)
    assert cost.seconds(flops_per_second=1e12, bytes_per_second=1e9) == cost.bytes / 1e9
    assert cost.seconds(flops_per_second=1e6, bytes_per_second=1e9) == cost.flops / 1e6
