"""The estimate against the bytes of the arrays themselves, and the slots chosen from it."""

import sys

import jax
import jax.numpy as jnp
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import choose_slots, generate, rollout_memory
from echorl_jax.rollout.ahead import lower_decode, lower_prefill
from echorl_jax.rollout.generate import rollout_params
from echorl_jax.rollout.memory import shares_weights
from tests.rollout.conftest import EOS, PROMPTS, decoder

SIZES = {"slots": 8, "prompts": 4, "group_size": 4, "prompt_tokens": 32, "max_new_tokens": 64}


def bytes_on_first_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
@pytest.mark.parametrize("slots", [8, 16])  # of 16 rows
def test_estimate_is_what_is_allocated(model, params, kv_dtype, shape, slots, monkeypatch):
    mesh = None if shape is None else make_mesh(*shape)
    engine = sys.modules["echorl_jax.rollout.generate"]
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
            lanes=1,
            kv_dtype=kv_dtype,
            mesh=mesh,
        )
    sizes = {**SIZES, "slots": slots}
    memory = rollout_memory(model, **sizes, kv_dtype=kv_dtype, mesh=mesh)
    assert memory.weights == bytes_on_first_device(rollout_params(model, params, mesh))
    assert memory.prompts == bytes_on_first_device(held["queue"].store)
    caches = held["slots"].prompt, held["slots"].ring
    assert memory.slots == bytes_on_first_device(caches)
    assert (held["slots"].prompt is None) == (slots == 16)
    output = held["output"]
    assert memory.outputs == bytes_on_first_device((output.token, output.logprob, output.entropy))
    assert memory.total > memory.weights + memory.slots


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
    memory = sys.modules["echorl_jax.rollout.memory"]
    monkeypatch.setattr(memory, "device_bytes", lambda: 150_000)
    scarce = generate(model, params, PROMPTS, jax.random.key(1), **settings)
    assert jnp.array_equal(whole.completion_ids, scarce.completion_ids)


def test_a_refilled_slot_copies_its_own_prompt_only(model):
    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = {"prompts": 8, "group_size": 4, "prompt_tokens": 2048, "max_new_tokens": 16}
    prefill = lower_prefill(model, mesh, **sizes, slots=8)
    # Without EOS a row's end does not depend on what is read, so neither does the new prompt.
    decode = lower_decode(model, mesh, prefill.compile(), prefill, eos_ids=(), temperature=1.0)
    temporary = decode.compile().memory_analysis().temp_size_in_bytes
    memory = rollout_memory(model, **sizes, slots=8)
    assert memory.prompts == 8 * 2048 * 2 * 2 * 2 * 8 * 4  # the slots' copies need as much
    assert temporary < memory.prompts / 4


def test_fresh_weights_need_no_cast(model):
    params = init_params(model, jax.random.key(0))
    assert rollout_params(model, params, None) is params
    assert shares_weights(model, devices=1, platform="cpu")
    assert not shares_weights(model, devices=8, platform="cpu")
    assert not shares_weights(model, devices=1, platform="gpu")
    assert not shares_weights(decoder(dtype="bfloat16"), devices=1, platform="cpu")
