"""The stream of prompts: order, epochs, checkpoints, lengths.

How processes share it is in tests/parallel/test_processes.py.
"""

import collections
import json

import pytest

from echorl_jax.data import DataError, PromptStream, load_rows, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:countdown")


@pytest.fixture
def stream(tokenizer):
    def stream(spec="countdown:count=10", **changes):
        settings = {"prompts_per_step": 4, "seed": 0, "max_prompt_tokens": 64, **changes}
        return PromptStream(load_rows(spec), tokenizer, **settings)

    return stream


def indices(stream, steps):
    return [[prompt.index for prompt in next(stream)] for _ in range(steps)]


def test_each_epoch_holds_every_row_once_in_another_order(stream):
    drawn = sum(indices(stream(), 5), [])
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != sorted(first)


def test_the_order_depends_on_the_seed_alone(stream):
    assert indices(stream(), 5) == indices(stream(), 5) != indices(stream(seed=1), 5)


def test_prompts_carry_ids_and_row(stream, tokenizer):
    prompt = next(stream())[0]
    assert tokenizer.decode(prompt.ids) == prompt.row["prompt"][0]["content"] + "\n"
    assert prompt.row["extra_info"]["index"] == prompt.index


def test_a_restored_stream_goes_on_exactly(stream):
    whole = stream()
    indices(whole, 3)
    state = json.loads(json.dumps(whole.get_state()))
    expected = indices(whole, 5)
    restored = stream()
    next(restored)
    restored.set_state(state)
    assert indices(restored, 5) == expected


def test_a_state_of_other_rows_is_refused(stream):
    with pytest.raises(DataError, match="had 10 rows, this one has 11"):
        stream("countdown:count=11").set_state(stream().get_state())


def test_long_prompts_are_left_out_and_counted(stream, tokenizer):
    lengths = [len(prompt.ids) for prompt in next(stream(prompts_per_step=10))]
    limit = sorted(lengths)[4]
    fitting = sum(length <= limit for length in lengths)
    short = stream(max_prompt_tokens=limit, prompts_per_step=fitting)
    for _ in range(3):
        assert all(len(prompt.ids) <= limit for prompt in next(short))
    assert 2 * (10 - fitting) <= short.too_long <= 3 * (10 - fitting)
    resumed = stream(max_prompt_tokens=limit, prompts_per_step=fitting)
    resumed.set_state(short.get_state())
    assert resumed.too_long == short.too_long


def test_no_prompt_short_enough_is_an_error_not_a_hang(stream):
    with pytest.raises(DataError, match="no prompt is within max_prompt_tokens=3"):
        next(stream(max_prompt_tokens=3))


def test_retired_prompts_are_passed_over_and_the_others_keep_their_order(stream):
    everything = sum(indices(stream(), 10), [])
    retired = {2, 5, 7}
    kept = stream(retired=retired.__contains__)
    found = sum(indices(kept, 7), [])
    assert found == [index for index in everything if index not in retired][:28]
    # The place in the stream does not hold what is retired: the caller restores that.
    state = json.loads(json.dumps(kept.get_state()))
    retired.add(1)
    expected = indices(kept, 3)
    resumed = stream(retired=retired.__contains__)
    resumed.set_state(state)
    assert indices(resumed, 3) == expected and 1 not in sum(expected, [])


def test_no_prompt_left_is_an_error_not_a_hang(stream):
    with pytest.raises(DataError, match="no prompt is left.*data.retire_above"):
        next(stream(retired=lambda place: True))


def test_weights_set_the_shares(stream):
    mixed = stream("countdown:count=30@0.75,countdown:count=5&seed=2@0.25", prompts_per_step=40)
    counts = collections.Counter(index >= 30 for index in sum(indices(mixed, 3), []))
    assert counts == {False: 90, True: 30}
    state, expected = mixed.get_state(), indices(mixed, 1)
    mixed.set_state(state)
    assert indices(mixed, 1) == expected


def test_a_step_has_a_prompt(stream):
    with pytest.raises(DataError, match="prompts_per_step=0: must be at least 1"):
        stream(prompts_per_step=0)


def test_no_rows_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no rows"):
        PromptStream([], tokenizer, prompts_per_step=1, seed=0, max_prompt_tokens=9)
