"""The memory estimate equals the allocated arrays; slots and weights follow from it."""

import jax
import jax.numpy as jnp
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import (
    Resources,
    Sampling,
    choose_slots,
    engine,
    generate,
    memory,
    rollout_memory,
    rollout_params,
)
from echorl_jax.rollout.engine import lower_decode, lower_prefill
from echorl_jax.rollout.memory import shares_weights
from tests.rollout.conftest import EOS, PROMPTS, decoder

SIZES = {"slots": 8, "prompts": 4, "group_size": 4, "prompt_tokens": 32, "max_new_tokens": 64}


def bytes_on_first_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
@pytest.mark.parametrize("slots", [8, 16])  # of 16 rows
def test_estimate_equals_allocated_bytes(model, params, kv_dtype, shape, slots, monkeypatch):
    mesh = None if shape is None else make_mesh(*shape)
    held = {}
    begin = engine.begin_call

    def keep(*arguments, **settings):
        held["queue"], held["slots"], held["output"] = begin(*arguments, **settings)
        raise InterruptedError

    monkeypatch.setattr(engine, "begin_call", keep)
    with pytest.raises(InterruptedError):
        generate(
            model,
            params,
            [[5] * 20] * 4,
            jax.random.key(0),
            group_size=4,
            max_new_tokens=64,
            eos_ids=EOS,
            slots=slots,
            cpu_workers=1,
            kv_dtype=kv_dtype,
            mesh=mesh,
        )
    sizes = {**SIZES, "slots": slots}
    estimate = rollout_memory(model, **sizes, kv_dtype=kv_dtype, mesh=mesh)
    assert estimate.weights == bytes_on_first_device(rollout_params(model, params, mesh))
    assert estimate.prompts == bytes_on_first_device(held["queue"].store)
    caches = held["slots"].prompt, held["slots"].ring
    assert estimate.slots == bytes_on_first_device(caches)
    assert (held["slots"].prompt is None) == (slots == 16)
    output = held["output"]
    assert estimate.outputs == bytes_on_first_device((output.token, output.logprob, output.entropy))
    assert estimate.total > estimate.weights + estimate.slots


def test_a_bf16_model_halves_matrices_and_keeps_norms():
    wide, narrow = decoder(), decoder(dtype="bfloat16")
    norms = 4 * (2 * 2 * 32 + 32)
    whole = rollout_memory(wide, **SIZES).weights
    assert rollout_memory(narrow, **SIZES).weights == (whole - norms) // 2 + norms


def test_slots_are_all_rows_or_what_fits(model):
    sizes = {"prompt_tokens": 32, "max_new_tokens": 64, "kv_dtype": "float32"}
    each = (32 + 64) * 2 * 2 * 2 * 8 * 4  # positions, k and v, layers, heads, head size, bytes
    assert choose_slots(model, rows=100, **sizes) == 100
    assert choose_slots(model, rows=100, **sizes, slot_bytes=100 * each) == 100
    assert choose_slots(model, rows=100, **sizes, slot_bytes=100 * each - 1) == 96
    assert choose_slots(model, rows=100, **sizes, slot_bytes=each) == 1
    with pytest.raises(ValueError, match="more than the"):
        choose_slots(model, rows=100, **sizes, slot_bytes=each - 1)
    mesh = make_mesh(2, 2, 2)  # four parts of the rows, heads split by two
    assert choose_slots(model, rows=100, **sizes, mesh=mesh, slot_bytes=3 * each) == 24


def test_memory_does_not_change_samples(model, params, monkeypatch):
    settings = {"group_size": 3, "max_new_tokens": 20, "eos_ids": EOS}
    whole = generate(model, params, PROMPTS, jax.random.key(1), **settings)
    monkeypatch.setattr(memory, "device_bytes", lambda: 150_000)
    scarce = generate(model, params, PROMPTS, jax.random.key(1), **settings)
    assert jnp.array_equal(whole.completion_ids, scarce.completion_ids)


def test_a_refilled_slot_copies_its_own_prompt_only(model):
    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = {"prompts": 8, "prompt_tokens": 2048}
    # Without EOS a row's end does not depend on what is read, so neither does the new prompt.
    sampling, resources = Sampling(4, 16), Resources(slots=8, mesh=mesh)
    prefill = lower_prefill(model, sampling, resources, **sizes)
    decode = lower_decode(model, sampling, resources, prefill, prefill.compile())
    temporary = decode.compile().memory_analysis().temp_size_in_bytes
    estimate = rollout_memory(model, **sizes, group_size=4, max_new_tokens=16, slots=8)
    assert estimate.prompts == 8 * 2048 * 2 * 2 * 2 * 8 * 4  # the slots' copies need as much
    assert temporary < estimate.prompts / 4


def test_weights_of_the_compute_dtype_are_shared(model):
    params = init_params(model, jax.random.key(0))
    assert rollout_params(model, params, None) is params
    assert shares_weights(model, devices=1, platform="cpu")
    assert not shares_weights(model, devices=8, platform="cpu")
    assert not shares_weights(model, devices=1, platform="gpu")
    assert not shares_weights(decoder(dtype="bfloat16"), devices=1, platform="cpu")
