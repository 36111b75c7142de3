"""Rows decoded in parts side by side: the same samples, told to the caller as from one part."""

import sys
import threading

import jax
import pytest

from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import generate
from echorl_jax.rollout.lanes import LANE_WEIGHT_BYTES, choose_lanes, lane_slots
from echorl_jax.rollout.memory import position_bytes, weight_bytes
from tests.rollout.conftest import EOS, PROMPTS, check_equal, completions, decoder

SETTINGS = {
    "group_size": 3,
    "max_new_tokens": 20,
    "eos_ids": EOS,
    "row_limits": [20 - row for row in range(12)],
    "row_ids": [100 - 7 * row for row in range(12)],
    "prefixes": [[row + 10] * (row % 3) for row in range(12)],
}
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def base(model, params):
    """All rows in one lane."""
    return generate(model, params, PROMPTS, KEY, **SETTINGS, lanes=1)


@pytest.mark.parametrize("lanes, slots", [(2, 0), (2, 4), (3, 5), (4, 0), (9, 1)])
def test_samples_do_not_depend_on_lanes(model, params, base, lanes, slots):
    """Prompts are dealt to lanes, three to four lanes included, and slots to the last one."""
    told, looks, threads = {}, [], set()

    def finished(rows, tokens):
        threads.add(threading.current_thread())
        for row, ids in zip(rows, tokens, strict=True):
            assert row not in told
            told[row] = ids.tolist()

    rollouts = generate(
        model,
        params,
        PROMPTS,
        KEY,
        **SETTINGS,
        lanes=lanes,
        slots=slots,
        turns_per_visit=4,
        finished=finished,
        progress=looks.append,
    )
    check_equal(rollouts, base)
    assert [told[row] for row in range(12)] == completions(base)
    assert threads == {threading.current_thread()}
    assert all(look.rows == 12 for look in looks) and looks[-1].rows_done == 12
    assert [look.tokens for look in looks] == sorted(look.tokens for look in looks)
    assert looks[-1].tokens == sum(map(len, completions(base)))
    assert 0 < looks[-1].occupancy <= 1


def test_one_device_of_a_mesh_has_lanes_and_several_have_not(model, params, base):
    mesh = make_mesh(devices=jax.devices()[:1])
    check_equal(generate(model, params, PROMPTS, KEY, **SETTINGS, lanes=2, mesh=mesh), base)
    with pytest.raises(ValueError, match="lanes=2: a mesh of 8 devices has one"):
        generate(model, params, PROMPTS, KEY, **SETTINGS, lanes=2, mesh=make_mesh(2, 2, 2))


def test_what_the_caller_raises_ends_the_call(model, params):
    def finished(rows, tokens):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        generate(model, params, PROMPTS, KEY, **SETTINGS, lanes=2, finished=finished)


def test_small_models_on_cpu_have_a_lane_for_each_core(model, monkeypatch):
    monkeypatch.setattr(sys.modules["echorl_jax.rollout.lanes"], "_cores", lambda: 6)
    many = {"prompts": 32, "slots": 256, "max_new_tokens": 64, "mesh": None}
    assert choose_lanes(model, **many) == 6
    assert choose_lanes(model, **{**many, "prompts": 4}) == 4
    assert choose_lanes(model, **{**many, "slots": 24}) == 3
    assert choose_lanes(model, **{**many, "slots": 1}) == 1
    assert choose_lanes(model, **{**many, "mesh": make_mesh(devices=jax.devices()[:1])}) == 6
    assert choose_lanes(model, **{**many, "mesh": make_mesh(8)}) == 1
    large = decoder(vocab_size=600_000)
    assert weight_bytes(large, None) > LANE_WEIGHT_BYTES > weight_bytes(model, None)
    assert choose_lanes(large, **many) == 1
    twice = 2 * weight_bytes(large, None) // (256 * position_bytes(large, None))
    assert choose_lanes(large, **{**many, "max_new_tokens": twice - 1}) == 2
    assert choose_lanes(large, **{**many, "max_new_tokens": twice + 1}) == 3
    assert choose_lanes(large, **{**many, "max_new_tokens": twice + 1}, kv_dtype="bfloat16") == 2
    monkeypatch.setattr(sys.modules["echorl_jax.rollout.lanes"], "_cores", lambda: 64)
    assert choose_lanes(model, **many) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_lanes(model, **many) == 1


def test_slots_are_shared_by_lanes_and_shards():
    assert lane_slots(96, 64, lanes=2) == 32
    assert lane_slots(96, 65, lanes=2) == 33
    assert lane_slots(96, 500, lanes=4) == 24
    assert lane_slots(96, 5, lanes=1, shards=4) == 8
