"""Samples and reported numbers agree with full forward passes; rows end where they should."""

import logging

import jax
import numpy as np
import pytest
from scipy import stats

from echorl_jax.models import init_params
from echorl_jax.rollout import cache, generate, host, score_rollouts
from tests.rollout.conftest import (
    EOS,
    PROMPTS,
    VOCAB,
    check_equal,
    check_scores,
    completions,
    decoder,
    full_forward,
)

SETTINGS = {"group_size": 3, "max_new_tokens": 20, "eos_ids": EOS}
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def base(model, params):
    """The rollouts with a slot for each row."""
    return generate(model, params, PROMPTS, KEY, **SETTINGS)


def test_reported_numbers_equal_a_full_forward_pass(model, params, base):
    check_scores(model, params, PROMPTS, base)


def test_a_row_ends_at_its_first_eos_or_its_limit(base):
    """EOS is kept and counted, padding follows, and only rows without EOS are truncated."""
    ends = {"eos": 0, "limit": 0}
    for row, completion in enumerate(completions(base)):
        stopped = completion[-1] in EOS
        assert not set(completion[:-1]) & set(EOS)
        assert len(completion) == 20 or stopped
        assert bool(base.truncated[row]) == (not stopped)
        assert not np.asarray(base.completion_ids[row, len(completion) :]).any()
        ends["eos" if stopped else "limit"] += 1
    assert min(ends.values()) > 0
    assert base.group.tolist() == np.repeat(np.arange(4), 3).tolist()
    for row, prompt in zip(base.prompt_ids, PROMPTS, strict=True):
        assert np.asarray(row)[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("slots", [5, 1])
def test_samples_do_not_depend_on_slots(model, params, base, slots):
    check_equal(generate(model, params, PROMPTS, KEY, **SETTINGS, slots=slots), base)


def test_samples_do_not_depend_on_how_often_the_host_polls(model, params, base):
    check_equal(generate(model, params, PROMPTS, KEY, **SETTINGS, steps_per_poll=3), base)


@pytest.mark.parametrize("slots, steps", [(0, 3), (5, 4), (2, 128)])
def test_finished_is_called_once_per_row_at_its_end(model, params, base, slots, steps, monkeypatch):
    monkeypatch.setattr(host, "FETCH_ROWS", 3)
    told, polls = {}, []

    def finished(rows, tokens):
        for row, ids in zip(rows, tokens, strict=True):
            assert row not in told
            told[row] = ids.tolist()

    rollouts = generate(
        model,
        params,
        PROMPTS,
        KEY,
        **SETTINGS,
        slots=slots,
        steps_per_poll=steps,
        finished=finished,
        progress=lambda now: polls.append((now.rows_done, len(told))),
    )
    check_equal(rollouts, base)
    assert [told[row] for row in range(12)] == completions(base)
    # At each poll the rows of all earlier polls have been reported.
    assert [count for _, count in polls][1:] == [done for done, _ in polls][:-1]


def test_samples_do_not_depend_on_other_rows(model, params, base):
    """Samples the first prompt alone, whose rows 0 to 2 keep their keys."""
    alone = generate(model, params, PROMPTS[:1], KEY, **SETTINGS)
    assert completions(alone) == completions(base)[:3]


def test_row_ids_give_the_same_samples_in_other_calls(model, params, base):
    call = {**SETTINGS, "group_size": 1}
    rows = [7, 3, 10]  # row i of the whole call answers prompt i // 3
    prompts = [PROMPTS[i // 3] for i in rows]
    part = generate(model, params, prompts, KEY, **call, row_ids=rows)
    for place, row in enumerate(rows):
        assert completions(part)[place] == completions(base)[row]


def test_another_key_gives_other_samples(model, params, base):
    other = generate(model, params, PROMPTS, jax.random.key(2), **SETTINGS)
    assert completions(other) != completions(base)
    raw = generate(model, params, PROMPTS, jax.random.PRNGKey(1), **SETTINGS)
    check_equal(raw, base)


def test_greedy_is_the_argmax_of_a_full_forward_pass(model, params):
    rollouts = generate(
        model, params, PROMPTS, KEY, group_size=1, max_new_tokens=12, temperature=0, eos_ids=EOS
    )
    for prompt, completion in zip(PROMPTS, completions(rollouts), strict=True):
        table = full_forward(model, params, prompt, completion)
        assert table.argmax(-1).tolist() == completion
    check_scores(model, params, PROMPTS, rollouts)


def test_first_two_tokens_follow_the_distribution(model, params):
    """Chi-square test of the first token, and of the second after the most frequent first one."""
    rollouts = generate(
        model,
        params,
        PROMPTS[:1],
        KEY,
        group_size=4096,
        max_new_tokens=2,
        temperature=0.6,
        eos_ids=(),
    )
    tokens = np.asarray(rollouts.completion_ids)
    first = int(np.bincount(tokens[:, 0]).argmax())
    table = full_forward(model, params, PROMPTS[0], [first, 0], temperature=0.6)
    chosen = tokens[tokens[:, 0] == first, 1]
    for drawn, logs in ((tokens[:, 0], table[0]), (chosen, table[1])):
        assert len(drawn) > 200
        expected = np.exp(logs) * len(drawn)
        counts = np.bincount(drawn, minlength=VOCAB)
        often = expected >= 5
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        assert stats.chisquare(observed, wanted).pvalue > 1e-4
    check_scores(
        model,
        params,
        PROMPTS,
        jax.tree.map(lambda x: x[:20] if x.shape[0] == 4096 else x, rollouts),
        temperature=0.6,
    )


def test_stop_sequences_bans_and_limits(model, params, base):
    """The most frequent pair of tokens ends a row; banned tokens are never drawn; limits hold."""
    pairs = [pair for ids in completions(base) for pair in zip(ids, ids[1:], strict=False)]
    stop = max(set(pairs), key=pairs.count)
    limits = [1 + row % 7 for row in range(12)]
    settings = {**SETTINGS, "eos_ids": EOS[0], "stop_sequences": [stop, (9, 9, 9)]}
    rollouts = generate(
        model, params, PROMPTS, KEY, **settings, banned_ids=[EOS[1], 20], row_limits=limits, slots=5
    )
    for row, ids in enumerate(completions(rollouts)):
        found = list(zip(ids, ids[1:], strict=False))
        assert stop not in found[:-1]
        ended = ids[-1] == EOS[0] or found[-1:] == [stop]
        assert bool(rollouts.truncated[row]) == (not ended)
        assert len(ids) == limits[row] or ended
        assert not {EOS[1], 20} & set(ids)
    check_scores(model, params, PROMPTS, rollouts)


def test_prefixes_are_written_first_and_scored(model, params):
    """Prefix tokens are scored like drawn ones."""
    prefixes = [[int(t) for t in range(40, 40 + row % 4)] for row in range(12)]
    rollouts = generate(model, params, PROMPTS, KEY, **SETTINGS, prefixes=prefixes)
    for prefix, ids in zip(prefixes, completions(rollouts), strict=True):
        assert ids[: len(prefix)] == prefix
    check_scores(model, params, PROMPTS, rollouts)


def test_long_rows_wrap_the_ring_and_windows_cut(model):
    """The call has more decode steps than ring columns, several blocks, and a window in a layer."""
    windowed = decoder(model_type="qwen3", qk_norm=True, qkv_bias=False, windows=(None, 50))
    params = init_params(windowed, jax.random.key(3))
    prompts = [list(range(5, 55)), [9, 8, 7] * 27]
    limits = [150, 90, 30, 150, 64, 65]
    polls = []
    rollouts = generate(
        windowed,
        params,
        prompts,
        KEY,
        group_size=3,
        max_new_tokens=150,
        row_limits=limits,
        eos_ids=(),
        slots=2,
        progress=polls.append,
    )
    assert rollouts.completion_length.tolist() == limits
    assert polls[-1].tokens == sum(limits) and polls[-1].rows_done == 6
    check_scores(windowed, params, prompts, rollouts)


@pytest.mark.parametrize("workers", [1, 2])
def test_slots_stay_busy_with_long_tailed_lengths(model, params, workers):
    """Lengths are log-normal, their mean a quarter of the maximum; the slots shrink at the end."""
    rng = np.random.default_rng(0)
    limits = np.clip(rng.lognormal(np.log(24) - 0.32, 0.8, 192), 1, 96).astype(int)
    seen = []
    rollouts = generate(
        model,
        params,
        PROMPTS[:3],
        KEY,
        group_size=64,
        max_new_tokens=96,
        row_limits=limits,
        eos_ids=(),
        slots=32 * workers,
        cpu_workers=workers,
        steps_per_poll=16,
        progress=seen.append,
    )
    np.testing.assert_array_equal(rollouts.completion_length, limits)
    last = seen[-1]
    assert last.occupancy >= 0.85
    assert {step.slots for step in seen} >= ({32, 16, 8} if workers == 1 else {64, 16})
    done = [step.rows_done for step in seen]
    assert done == sorted(done) and done[-1] == 192 == last.rows
    assert last.tokens == limits.sum() and last.tokens_per_second > 0
    check_scores(
        model, params, PROMPTS, jax.tree.map(lambda x: x[:9] if x.shape[0] == 192 else x, rollouts)
    )


@pytest.mark.parametrize("slots", [5, 8])
def test_samples_do_not_depend_on_the_platform(model, params, monkeypatch, slots):
    """These heads are too small for the kernel, so blocks are read in a loop on GPU too."""
    settings = {"group_size": 2, "max_new_tokens": 40, "eos_ids": EOS, "slots": slots}
    monkeypatch.setattr(cache, "BLOCK", dict.fromkeys(("cpu", "gpu", "tpu"), 16))
    expected = generate(model, params, PROMPTS, KEY, **settings)
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=platform: name)
        check_equal(generate(model, params, PROMPTS, KEY, **settings), expected)


def test_a_second_call_of_the_same_shapes_compiles_nothing(model, params, base, caplog):
    other = [[6, 7], [8], [9] * 20, [1]]
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        generate(model, params, other, jax.random.key(9), **SETTINGS)
        assert "Compiling" not in caplog.text
        generate(model, params, [[1], [2], [3], [4]], KEY, **SETTINGS, prompt_tokens=32)
        assert "Compiling" not in caplog.text
        generate(model, params, PROMPTS, KEY, **SETTINGS, prompt_tokens=33)
        assert "Compiling jit(decode)" in caplog.text


@pytest.mark.parametrize("kv_dtype, bound", [("bfloat16", 0.1), ("int8", 0.3)])
def test_narrow_caches_stay_close(model, params, kv_dtype, bound):
    """The sampler reports its own numbers; those of the trainer differ by the cache's rounding."""
    rollouts = generate(model, params, PROMPTS, KEY, **SETTINGS, kv_dtype=kv_dtype, slots=5)
    logprobs, entropy = score_rollouts(model, params, rollouts)
    gap = np.abs(np.asarray(logprobs - rollouts.rollout_logprobs))
    assert 0 < gap.max() < bound and gap.mean() < bound / 5
    assert np.abs(np.asarray(entropy - rollouts.token_entropy)).max() < bound


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings", [{}, {"slots": 5}, {"cpu_workers": 2}, {"kv_dtype": "int8"}], ids=str
)
def test_bf16_model_agrees_with_its_trainer(tied, settings):
    """XLA's CPU backend has no transposed product of a bf16 head ``[D, V]`` with an f32 result."""
    model = decoder(dtype="bfloat16", tied_embeddings=tied)
    params = init_params(model, jax.random.key(0))
    rollouts = generate(model, params, PROMPTS, KEY, **SETTINGS, **settings)
    logprobs, _ = score_rollouts(model, params, rollouts)
    gap = np.abs(np.asarray(logprobs - rollouts.rollout_logprobs))
    assert gap.max() < 0.3 and gap.mean() < 0.03


HOSTILE = {
    "temperature": [-1.0, float("nan"), float("inf")],
    "top_k": [-1],
    "top_p": [0.0, 1.5, float("nan")],
    "min_p": [-0.1, 2.0],
    "eos_ids": [VOCAB, [-1]],
    "stop_sequences": [[[]], [[VOCAB]]],
    "banned_ids": [[VOCAB], range(VOCAB)],
    "group_size": [0],
    "max_new_tokens": [0],
    "slots": [-1],
    "cpu_workers": [-1],
    "steps_per_poll": [0],
    "prompt_tokens": [-1],
    "kv_dtype": ["float16"],
    "row_limits": [[1], [0] * 12, [21] * 12],
    "row_ids": [[1], [-1] * 12, [2**31] * 12],
    "prefixes": [[[1]], [[VOCAB]] * 12, [[1] * 21] * 12],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in HOSTILE.items() for value in values]
)
def test_hostile_settings_are_refused_by_name(model, params, name, value):
    with pytest.raises(ValueError, match=name):
        generate(model, params, PROMPTS, KEY, **{**SETTINGS, name: value})


@pytest.mark.parametrize("prompts", [[], [[1], []], [[VOCAB]], [[-1]]])
def test_hostile_prompts_are_refused(model, params, prompts):
    with pytest.raises(ValueError, match="prompts"):
        generate(model, params, prompts, KEY, **SETTINGS)


def test_dynamic_rope_is_refused_past_its_context():
    from echorl_jax.models import RopeConfig

    model = decoder(rope=RopeConfig(kind="dynamic", factor=2.0), max_position_embeddings=30)
    with pytest.raises(ValueError, match="dynamic rope"):
        generate(model, init_params(model, KEY), PROMPTS, KEY, **SETTINGS)


def test_stop_sequences_do_not_match_tokens_of_the_previous_row_in_the_slot(model, params):
    """Twelve rows of three tokens share two slots; a search in Python finds the expected ends."""
    alphabet = (20, 21, 22)
    stops = ((20, 21, 20), (21, 21))
    rollouts = generate(
        model,
        params,
        PROMPTS[:3],
        jax.random.key(5),
        group_size=4,
        max_new_tokens=12,
        eos_ids=(),
        stop_sequences=stops,
        banned_ids=[token for token in range(model.config.vocab_size) if token not in alphabet],
        slots=2,
        cpu_workers=1,
    )
    for ids, length, truncated in zip(
        rollouts.completion_ids.tolist(),
        rollouts.completion_length.tolist(),
        rollouts.truncated.tolist(),
        strict=True,
    ):
        ends = [
            end
            for end in range(1, length + 1)
            if any(tuple(ids[max(0, end - len(stop)) : end]) == stop for stop in stops)
        ]
        assert ends == ([] if truncated else [length])
        assert not truncated or length == 12
    assert 0 < rollouts.truncated.sum() < 12 or not rollouts.truncated.any()


def test_samples_do_not_depend_on_slots_with_keys_of_another_generator(model, params):
    settings = {"group_size": 3, "max_new_tokens": 8, "eos_ids": EOS, "cpu_workers": 1}
    key = jax.random.key(3, impl="rbg")
    whole = generate(model, params, PROMPTS, key, **settings)
    in_four_slots = generate(model, params, PROMPTS, key, **settings, slots=4)
    assert np.array_equal(whole.completion_ids, in_four_slots.completion_ids)


def test_unusable_settings_are_refused_in_one_line(model, params):
    settings = {"group_size": 1, "max_new_tokens": 4}
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"prompts\[0\]: token ids must be whole numbers"):
        generate(model, params, [[1.5, 2.0]], key, eos_ids=EOS, **settings)
    with pytest.raises(ValueError, match="temperature=1e-40: must be 0"):
        generate(model, params, [[1]], key, eos_ids=EOS, temperature=1e-40, **settings)
    one = generate(model, params, [[1]], key, eos_ids=np.int64(3), **settings)
    assert one.completion_ids.shape == (1, 4)
