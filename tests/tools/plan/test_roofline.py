"""The cost of a decode step equals the compiler's count and a count by hand."""

import jax
import jax.numpy as jnp
import pytest

from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.rollout import Sampling, make_request
from echorl_jax.rollout.cache import empty_cache
from echorl_jax.rollout.decode import forward
from echorl_jax.rollout.slots import Queue, first_slots
from echorl_jax.tools.plan.plan import find_target, plan_setup
from echorl_jax.tools.plan.roofline import Lengths, decode_step_cost, step_phases, tower_flops
from tests.integration.test_pictures import shapes_config
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
    sampling = Sampling(group_size=group_size, max_new_tokens=length)
    queue = Queue(
        request=make_request([[1]] * prompts, sampling, vocab_size=2),
        key=jax.random.split(jax.random.key(0), rows),
        last_token=jnp.zeros(prompts, jnp.int32),
        store=empty_cache(**shape, rows=prompts, block=width),
    )
    ring = empty_cache(**shape, rows=rows, block=length)
    return queue, first_slots(queue, slots=rows, stop_window=0, ring=ring)


def test_counted_operations_equal_those_of_the_compiled_step():
    model = decoder(**WIDE)
    queue, slots = queue_and_slots(4, 8, 64, 128)

    def step(params, queue, slots):
        return forward(model, params, queue, slots, platform="cpu")

    compiled = jax.jit(step).lower(model.param_shapes(), queue, slots).compile()
    counted = compiled.cost_analysis()["flops"]
    cost = decode_step_cost(model, slots=32, prompt_tokens=64, completion_tokens=128, group_size=8)
    assert cost.flops == pytest.approx(counted, rel=0.05)


def test_cost_terms_equal_a_count_by_hand():
    model = decoder(**WIDE)
    layer = 256 * (8 + 2 + 2) * 32 + 8 * 32 * 256 + 3 * 256 * 512
    cost = decode_step_cost(model, slots=10, prompt_tokens=40, completion_tokens=6, group_size=4)
    assert cost.matrix_flops == 2 * 10 * (layer + 256 * 1000)
    assert cost.attention_flops == 4 * 10 * 8 * 32 * 46
    assert cost.weight_bytes == 4 * (layer + 256 * 1000)
    assert cost.cache_bytes == 10 * (40 // 4 + 6 + 1) * 2 * 2 * 32 * 4
    narrow = decode_step_cost(
        model, slots=10, prompt_tokens=40, completion_tokens=6, group_size=4, kv_dtype="int8"
    )
    assert narrow.cache_bytes == 10 * 17 * 2 * 2 * (32 + 4)
    assert cost.seconds(flops_per_second=1e12, bytes_per_second=1e9) == cost.bytes / 1e9
    assert cost.seconds(flops_per_second=1e6, bytes_per_second=1e9) == cost.flops / 1e6


def test_the_tower_of_the_7b_model_equals_a_count_by_hand():
    """334 tokens: 1,336 patches of 1,176 numbers; 4 of 32 layers see all of them, the others 64."""
    model = Decoder(architecture("Qwen/Qwen2.5-VL-7B-Instruct"))
    layer = 1280 * 3 * 1280 + 1280 * 1280 + 3 * 1280 * 3420
    merger = 5120 * 5120 + 5120 * 3584
    matrices = 2 * 1336 * (1176 * 1280 + 32 * layer) + 2 * 334 * merger
    attention = 4 * 1280 * 1336 * (4 * 1336 + 28 * 64)
    assert tower_flops(model, tokens=334) == matrices + attention
    # Less than a window: all layers see the same patches.
    few = 2 * 40 * (1176 * 1280 + 32 * layer) + 2 * 10 * merger + 4 * 1280 * 40 * 32 * 40
    assert tower_flops(model, tokens=10) == few


@pytest.mark.parametrize(
    ("changes", "encodes", "backwards"),
    [
        ({}, 2 + 1, 4),  # the sampler's, the update's and the reference's features
        ({"model": {"vision": "frozen"}}, 2 + 1, 0),
        ({"objective": {"kl_coef": 0.0, "mini_batches": 2, "epochs": 2}}, 2 + 1.5, 8),
        ({"lora": {"rank": 4, "modules": "both"}, "model": {"remat": "none"}}, 2 + 1, 2),
        ({"lora": {"rank": 4}}, 2 + 1, 0),
        ({"objective": {"name": "sft"}}, 1, 4),
    ],
)
def test_times_hold_the_tower_as_often_as_it_runs(changes, encodes, backwards):
    config = shapes_config(
        model={"remat": "layer", **changes.get("model", {})},
        objective={"kl_coef": 0.01, **changes.get("objective", {})},
        lora=changes.get("lora", {}),
    )
    setup = plan_setup(config, find_target("h100:1"))
    phases = {phase.name: phase.flops for phase in step_phases(setup, Lengths(20, 10, 9))}
    images = setup.config.optim.sft_rows_per_step if setup.objective.supervised else 4
    one = tower_flops(setup.model, tokens=9) * images
    assert phases["encode"] == encodes * one
    assert phases.get("tower", 0) == backwards * one
