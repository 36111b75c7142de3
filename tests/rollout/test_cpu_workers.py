"""Several workers give the samples and the callbacks of one worker."""

import threading

import jax
import pytest

from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import generate, host
from echorl_jax.rollout.host import SHARED_WEIGHT_BYTES, choose_cpu_workers, worker_slots
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
    """The rollouts of one worker."""
    return generate(model, params, PROMPTS, KEY, **SETTINGS, cpu_workers=1)


@pytest.mark.parametrize("workers, slots", [(2, 0), (2, 4), (3, 5), (4, 0), (9, 1)])
def test_samples_do_not_depend_on_workers(model, params, base, workers, slots):
    """Cases include more workers than prompts, and fewer slots than workers."""
    told, polls, threads = {}, [], set()

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
        cpu_workers=workers,
        slots=slots,
        steps_per_poll=4,
        finished=finished,
        progress=polls.append,
    )
    check_equal(rollouts, base)
    assert [told[row] for row in range(12)] == completions(base)
    assert threads == {threading.current_thread()}
    assert all(poll.rows == 12 for poll in polls) and polls[-1].rows_done == 12
    assert [poll.tokens for poll in polls] == sorted(poll.tokens for poll in polls)
    assert polls[-1].tokens == sum(map(len, completions(base)))
    assert 0 < polls[-1].occupancy <= 1


def test_a_mesh_of_several_devices_has_one_worker(model, params, base):
    mesh = make_mesh(devices=jax.devices()[:1])
    check_equal(generate(model, params, PROMPTS, KEY, **SETTINGS, cpu_workers=2, mesh=mesh), base)
    with pytest.raises(ValueError, match="cpu_workers=2: a mesh of 8 devices has one"):
        generate(model, params, PROMPTS, KEY, **SETTINGS, cpu_workers=2, mesh=make_mesh(2, 2, 2))


def test_an_exception_in_a_callback_ends_the_call(model, params):
    def finished(rows, tokens):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        generate(model, params, PROMPTS, KEY, **SETTINGS, cpu_workers=2, finished=finished)


def test_small_models_on_cpu_have_one_worker_per_core(model, monkeypatch):
    monkeypatch.setattr(host, "_cores", lambda: 6)
    many = {"prompts": 32, "slots": 256, "max_new_tokens": 64, "mesh": None}
    assert choose_cpu_workers(model, **many) == 6
    assert choose_cpu_workers(model, **{**many, "prompts": 4}) == 4
    assert choose_cpu_workers(model, **{**many, "slots": 24}) == 3
    assert choose_cpu_workers(model, **{**many, "slots": 1}) == 1
    assert choose_cpu_workers(model, **{**many, "mesh": make_mesh(devices=jax.devices()[:1])}) == 6
    assert choose_cpu_workers(model, **{**many, "mesh": make_mesh(8)}) == 1
    large = decoder(vocab_size=600_000)
    assert weight_bytes(large, None) > SHARED_WEIGHT_BYTES > weight_bytes(model, None)
    assert choose_cpu_workers(large, **many) == 1
    twice = 2 * weight_bytes(large, None) // (256 * position_bytes(large, None))
    shorter, longer = ({**many, "max_new_tokens": twice + n} for n in (-1, 1))
    assert choose_cpu_workers(large, **shorter) == 2
    assert choose_cpu_workers(large, **longer) == 3
    assert choose_cpu_workers(large, **longer, kv_dtype="bfloat16") == 2
    monkeypatch.setattr(host, "_cores", lambda: 64)
    assert choose_cpu_workers(model, **many) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_cpu_workers(model, **many) == 1


def test_slots_are_split_over_workers_and_shards():
    assert worker_slots(96, 64, workers=2) == 32
    assert worker_slots(96, 65, workers=2) == 33
    assert worker_slots(96, 500, workers=4) == 24
    assert worker_slots(96, 5, workers=1, shards=4) == 8
