"""The memory estimate equals the allocated arrays; slots and weights follow from it."""

import jax
import jax.numpy as jnp
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import (
    Resources,
    Sampling,
    cache,
    choose_capacity,
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
@pytest.mark.parametrize("page_tokens", [0, 288])
def test_estimate_equals_allocated_bytes(model, params, kv_dtype, shape, page_tokens, monkeypatch):
    mesh = None if shape is None else make_mesh(*shape)
    held = {}
    begin = engine.begin_call

    def keep(*arguments, **settings):
        held["queue"], held["slots"], held["output"] = begin(*arguments, **settings)
        raise InterruptedError

    monkeypatch.setattr(engine, "begin_call", keep)
    if page_tokens:
        monkeypatch.setattr(cache, "BLOCK", {"cpu": 8})
    with pytest.raises(InterruptedError):
        generate(
            model,
            params,
            [[5] * 20] * 4,
            jax.random.key(0),
            group_size=4,
            max_new_tokens=64,
            eos_ids=EOS,
            slots=8,
            page_tokens=page_tokens,
            cpu_workers=1,
            kv_dtype=kv_dtype,
            mesh=mesh,
        )
    sizes = {**SIZES, "page_tokens": -(-page_tokens // 256) * 256, "block": 8}
    estimate = rollout_memory(model, **sizes, kv_dtype=kv_dtype, mesh=mesh)
    assert estimate.weights == bytes_on_first_device(rollout_params(model, params, mesh))
    assert estimate.prompts == bytes_on_first_device(held["queue"].store)
    caches = held["slots"].ring, held["slots"].pool
    assert estimate.slots == bytes_on_first_device(caches)
    assert (held["slots"].pool is not None) == (page_tokens > 0)
    output = held["output"]
    assert estimate.outputs == bytes_on_first_device((output.token, output.logprob, output.entropy))
    assert estimate.total > estimate.weights + estimate.slots


def test_a_bf16_model_halves_matrices_and_keeps_norms():
    wide, narrow = decoder(), decoder(dtype="bfloat16")
    norms = 4 * (2 * 2 * 32 + 32)
    whole = rollout_memory(wide, **SIZES).weights
    assert rollout_memory(narrow, **SIZES).weights == (whole - norms) // 2 + norms


def test_slots_are_all_rows_or_what_fits(model):
    sizes = {"max_new_tokens": 64, "block": 64, "kv_dtype": "float32"}
    each = 64 * 2 * 2 * 2 * 8 * 4  # positions, k and v, layers, heads, head size, bytes

    def slots(rows=100, **settings):
        found = choose_capacity(model, rows=rows, **sizes, **settings)
        assert found.page_tokens == 0
        return found.slots

    assert slots() == 100
    assert slots(slot_bytes=100 * each) == 100
    assert slots(slot_bytes=100 * each - 1) == 96
    assert slots(slot_bytes=60 * each) == 56
    assert slots(slot_bytes=7 * each) == 7
    assert slots(slot_bytes=each) == 1
    assert slots(slots=30, slot_bytes=each) == 30
    with pytest.raises(ValueError, match="more than the"):
        slots(slot_bytes=each - 1)
    mesh = make_mesh(2, 2, 2)  # four parts of the rows, heads split by two
    assert slots(mesh=mesh, slot_bytes=3 * each // 2) == 12


def test_slots_and_pages_are_those_of_the_expected_length(model):
    """A slot takes its block of 64 positions and 0.6 * 1.25 times the expected length in pages,
    after those of one whole row that begins within a page.
    """
    sizes = {"max_new_tokens": 2048, "block": 64, "kv_dtype": "float32"}
    position = 2 * 2 * 2 * 8 * 4
    whole = 2048 + 64

    def capacity(positions, **settings):
        found = choose_capacity(
            model, rows=512, **sizes, **settings, slot_bytes=positions * position
        )
        return found.slots, found.page_tokens

    # A quarter of the limit is expected: 512 tokens, 384 in pages.
    slots, pages = capacity(whole + 100 * (64 + 384))
    assert slots == 96 and pages == 2048 * -(-(whole + 100 * 448 - 96 * 64) // 2048)
    # Short completions: more slots in the same memory.
    slots, pages = capacity(whole + 100 * (64 + 384), expected_tokens=100)
    assert slots == 320  # 100 * 448 / (64 + 75) is 322
    # With room for all rows there are only pages that they need: 5% more than they fill.
    slots, pages = capacity(10**6, expected_tokens=100)
    assert slots == 512 and pages == 2048 * -(-(whole + 512 * 125 * 20 // 19) // 2048)
    # With slots that were asked for, what is left is for pages, but one row always finds its own.
    slots, pages = capacity(5 * whole, slots=512)
    assert slots == 512 and pages == 4096
    # The ring, unless it is read up to the longest row: then pages for rows of any length.
    assert capacity(10**7) == (512, 0)
    slots, pages = capacity(10**7, reads_longest=True)
    assert slots == 512 and pages == 2048 * -(-(whole + 512 * 2048 * 20 // 19) // 2048)


def test_memory_does_not_change_samples(model, params, monkeypatch):
    settings = {"group_size": 3, "max_new_tokens": 20, "eos_ids": EOS}
    whole = generate(model, params, PROMPTS, jax.random.key(1), **settings)
    monkeypatch.setattr(memory, "device_bytes", lambda: 150_000)
    scarce = generate(model, params, PROMPTS, jax.random.key(1), **settings)
    assert jnp.array_equal(whole.completion_ids, scarce.completion_ids)


def test_slots_do_not_copy_prompts(model):
    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = {"prompts": 8, "prompt_tokens": 2048}
    # Without EOS a row's end does not depend on what is read, so neither does the new prompt.
    sampling, resources = Sampling(4, 16), Resources(slots=8, mesh=mesh)
    prefill = lower_prefill(model, sampling, resources, **sizes)
    decode = lower_decode(model, sampling, resources, prefill, prefill.compile())
    temporary = decode.compile().memory_analysis().temp_size_in_bytes
    estimate = rollout_memory(model, **sizes, group_size=4, max_new_tokens=16, slots=8)
    assert estimate.prompts == 8 * 2048 * 2 * 2 * 2 * 8 * 4
    assert temporary < estimate.prompts / 4


def test_weights_of_the_compute_dtype_are_shared(model):
    params = init_params(model, jax.random.key(0))
    assert rollout_params(model, params, None) is params
    assert shares_weights(model, devices=1, platform="cpu")
    assert not shares_weights(model, devices=8, platform="cpu")
    assert not shares_weights(model, devices=1, platform="gpu")
    assert not shares_weights(decoder(dtype="bfloat16"), devices=1, platform="cpu")
