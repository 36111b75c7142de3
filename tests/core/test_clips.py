"""Steps, mining and echo loss against plain loops, over random cases of every awkward kind."""

import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax import core
from echorl_jax.config_file import load_config
from tests import oracles

ROOT = Path(__file__).parents[2]
ROWS, LENGTH, PROMPTS, VOCABULARY, STEPS = 8, 12, 4, 5, 6
SETTINGS = [
    dict(select="max", top_k=1, min_step_tokens=1, when="any_success"),
    dict(select="max", top_k=3, min_step_tokens=2, when="any_success"),
    dict(select="max", top_k=1, min_step_tokens=1, when="degenerate_only"),
    dict(select="max", top_k=7, min_step_tokens=1, when="any_success"),
    dict(select="min", top_k=2, min_step_tokens=1, when="any_success"),
    dict(select="full", top_k=2, min_step_tokens=2, when="any_success"),
    dict(select="first", top_k=2, min_step_tokens=2, when="any_success"),
    dict(select="last", top_k=2, min_step_tokens=1, when="degenerate_only"),
    dict(select="longest", top_k=2, min_step_tokens=2, when="any_success"),
    dict(select="shortest", top_k=1, min_step_tokens=1, when="any_success"),
]


NORMALISATIONS = ("prompts_with_clip", "all_prompts", "tokens")
mine = jax.jit(
    core.mine_echo_clips,
    static_argnames=("num_groups", "num_steps", "select", "top_k", "min_step_tokens", "when"),
)


@functools.partial(jax.jit, static_argnames="setting")
def mined(case, setting):
    ids = core.step_ids(case["tokens"], case["mask"], case["is_delimiter"])
    clips = core.mine_echo_clips(
        case["entropy"],
        ids,
        case["correct"],
        case["group"],
        num_groups=PROMPTS,
        num_steps=STEPS,
        on_policy=case["on_policy"],
        **dict(setting),
    )
    losses = [core.echo_loss(case["logprobs"], clips, normalise=n).mean() for n in NORMALISATIONS]
    return ids, clips, losses


@st.composite
def cases(draw):
    """One batch: the kinds are drawn by hypothesis, the numbers by NumPy from a drawn seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    delimiters = draw(st.sampled_from([(), (0,), (0, 1), (0, 1, 2, 3, 4)]))
    lengths = rng.integers(0, LENGTH + 1, ROWS)
    if draw(st.booleans()):
        lengths = np.where(rng.random(ROWS) < 0.4, 0, lengths)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    group = rng.integers(0, PROMPTS, ROWS)
    if draw(st.booleans()):
        group = np.sort(group)
    # Quarters: sums are exact, so a tie in the loops is a tie in float32.
    entropy = rng.integers(0, draw(st.sampled_from([1, 3, 40])), (ROWS, LENGTH)) / 4
    return {
        "tokens": rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32),
        "mask": np.arange(LENGTH) < lengths[:, None],
        "is_delimiter": np.isin(np.arange(VOCABULARY), delimiters),
        "entropy": entropy.astype(np.float32),
        "correct": rng.random(ROWS) < share,
        "group": group.astype(np.int32),
        "on_policy": rng.random(ROWS) < draw(st.sampled_from([0.6, 1.0])),
        "logprobs": -rng.random((ROWS, LENGTH)).astype(np.float32),
    }


@given(cases(), st.sampled_from(SETTINGS))
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_against_plain_loops(case, setting):
    ids, clips, losses = mined(case, tuple(setting.items()))
    expected_ids = oracles.step_ids(case["tokens"], case["mask"], case["is_delimiter"])
    np.testing.assert_array_equal(ids, expected_ids)
    expected = oracles.mine(
        case["entropy"],
        expected_ids,
        case["correct"],
        case["group"],
        num_groups=PROMPTS,
        num_steps=STEPS,
        on_policy=case["on_policy"],
        **setting,
    )
    clips = jax.tree.map(np.asarray, clips)
    assert clips.valid.sum(axis=1).tolist() == [len(prompt) for prompt in expected]
    for prompt, rows in enumerate(expected):
        for k, clip in enumerate(rows):
            got = clips.row[prompt, k], clips.step[prompt, k], clips.length[prompt, k]
            assert got == clip[:3]
            assert clips.entropy[prompt, k] == clip[3]
    for field in (clips.row, clips.length, clips.step, clips.entropy):
        assert not field[~clips.valid].any()
    for loss, normalise in zip(losses, NORMALISATIONS, strict=True):
        exact = oracles.echo_loss(case["logprobs"], expected, normalise)
        assert loss == pytest.approx(exact, abs=2e-6)


def test_interior_mask_is_passed_over():
    # 9 delimits; the masked token between the delimiter and the 7 does not hide that a step ended.
    tokens = jnp.array([[7, 9, 5, 7, 9, 9, 7]])
    mask = jnp.array([[1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    ids = core.step_ids(tokens, mask, jnp.arange(10) == 9)
    assert ids.tolist() == [[0, 0, -1, 1, 1, -1, 2]]


def test_ids_outside_the_vocabulary_are_content():
    ids = core.step_ids(jnp.array([[3, 9, -1, 0]]), jnp.ones((1, 4)), jnp.array([True, False]))
    assert ids.tolist() == [[0, 0, 0, 0]]


def test_steps_past_the_bound_join_the_last():
    ids, entropy = jnp.array([[0, 1, 2, 3]]), jnp.array([[1.0, 2.0, 4.0, 9.0]])
    mean, count = core.step_entropy(entropy, ids, 2)
    assert mean.tolist() == [[1.0, 5.0]] and count.tolist() == [[1, 3]]
    assert core.joined_steps(ids, 2).tolist() == [2]


def test_random_selects_among_the_candidates_evenly():
    # Two correct rollouts of two steps: four candidates; of 400 draws each has 100 +- 3 * 8.7.
    ids = jnp.array([[0, 1], [0, 1], [0, 1]])
    correct, group = jnp.array([True, True, False]), jnp.zeros(3, jnp.int32)

    def draw(key):
        clips = mine(
            jnp.zeros((3, 2)),
            ids,
            correct,
            group,
            num_groups=1,
            num_steps=2,
            select="random",
            key=key,
        )
        return clips.row[0, 0] * 2 + clips.step[0, 0]

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 400))
    counts = np.bincount(np.asarray(drawn), minlength=6)
    assert counts[4:].sum() == 0 and (abs(counts[:4] - 100) < 26).all()


@given(cases(), st.integers(0, 99), st.sampled_from([1, 3]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_random_length_cuts_a_success_nearest_to_the_length_of_an_entropy_clip(case, seed, top_k):
    setting = dict(min_step_tokens=2, when="any_success", top_k=top_k)
    ids = oracles.step_ids(case["tokens"], case["mask"], case["is_delimiter"])
    sizes = dict(num_groups=PROMPTS, num_steps=STEPS, on_policy=case["on_policy"])
    batch = case["entropy"], ids, case["correct"], case["group"]
    entropy_clips = oracles.mine(*batch, **sizes, **setting, select="max")
    targets = {clip[2] for prompt in entropy_clips for clip in prompt}
    key = jax.random.key(seed)
    arrays = map(jnp.asarray, batch)
    clips = mine(*arrays, **sizes, **setting, select="random_length", key=key)
    clips = jax.tree.map(np.asarray, clips)
    assert clips.valid.sum(axis=1).tolist() == [len(prompt) for prompt in entropy_clips]
    for prompt, k in np.argwhere(clips.valid):
        allowed = set()
        for row in np.flatnonzero(case["group"] == prompt):
            if case["correct"][row] and case["on_policy"][row]:
                steps = oracles.steps_of(row, case["entropy"], ids, STEPS)
                steps = [s for s in steps if s[2] >= 2]
                for target in targets if steps else ():
                    step = min(steps, key=lambda s: (abs(s[3] - target), s[0]))
                    allowed.add((row, step[0], step[3], step[1]))
        found = (f[prompt, k] for f in (clips.row, clips.step, clips.length, clips.entropy))
        assert tuple(found) in allowed


def mine_steps_of_one_token(entropy, group, key, select):
    """Every token is a step, and every row a success, so that any length can be met."""
    rows, length = entropy.shape
    ids = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    settings = dict(num_groups=3, num_steps=length, select=select, key=key)
    return mine(entropy, ids, jnp.ones(rows, jnp.bool_), group, **settings)


@pytest.fixture
def three_prompts():
    """Entropy peaks at tokens 2, 5 and 9 of the prompts' rows; two rows for each prompt."""
    entropy = np.zeros((6, 9), np.float32)
    entropy[[0, 2, 4], [1, 4, 8]] = 1.0
    return jnp.asarray(entropy), jnp.array([0, 0, 1, 1, 2, 2])


def test_random_length_permutes_the_lengths_of_the_entropy_clips_evenly(three_prompts):
    """Of 600 draws each of the 6 orders has 100 +- 3 * 9.1, each row of a prompt 300 +- 3 * 12."""
    keys = jax.random.split(jax.random.key(3), 600)
    clips = jax.vmap(lambda key: mine_steps_of_one_token(*three_prompts, key, "random_length"))(
        keys
    )
    lengths, rows = np.asarray(clips.length)[:, :, 0], np.asarray(clips.row)[:, :, 0]
    orders, counts = np.unique(lengths, axis=0, return_counts=True)
    assert np.sort(orders, axis=1).tolist() == [[2, 5, 9]] * 6 and (abs(counts - 100) < 28).all()
    assert (rows // 2 == np.arange(3)).all() and (abs((rows % 2).sum(axis=0) - 300) < 37).all()


@pytest.mark.parametrize("select", ["random", "random_length"])
def test_random_clips_do_not_depend_on_how_groups_are_interleaved(three_prompts, select):
    entropy, group = three_prompts
    order = jnp.array([4, 0, 2, 1, 5, 3])  # rows of one group stay in order
    for seed in range(20):
        key = jax.random.key(seed)
        plain = mine_steps_of_one_token(entropy, group, key, select)
        moved = mine_steps_of_one_token(entropy[order], group[order], key, select)
        assert (order[moved.row] == plain.row).all() and (moved.length == plain.length).all()


def test_clips_at_or_below_the_threshold_are_refused_and_counted():
    entropy = jnp.array([[0.25, 0.5], [0.75, 0.25]])
    echo = core.echo_weights(
        entropy,
        jnp.array([[0, 1], [0, 1]]),
        jnp.array([True, True]),
        jnp.array([0, 1]),
        num_groups=2,
        num_steps=2,
        top_k=2,
        min_entropy=0.5,
    )
    # Mined: 0.5 and 0.25 of the first prompt, 0.75 and 0.25 of the second. 0.75 alone is above.
    assert echo.clips.valid.tolist() == [[False, False], [True, False]]
    assert echo.refused.tolist() == [2, 1]
    assert echo.weights.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    for field in (echo.clips.row, echo.clips.length, echo.clips.entropy):
        assert not field[~echo.clips.valid].any()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(select="best"),
        dict(when="always"),
        dict(top_k=0),
        dict(select="random"),
        dict(select="random_length"),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        # Without the tests' checks of signatures, which users do not have.
        inspect.unwrap(core.mine_echo_clips)(
            jnp.zeros((1, 1)),
            jnp.zeros((1, 1), jnp.int32),
            jnp.array([True]),
            jnp.array([0]),
            num_groups=1,
            num_steps=1,
            **wrong,
        )


ENTROPY = jnp.array([[0.1, 0.9, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5], [3.0, 3.0, 3.0, 3.0]])
IDS = jnp.array([[0, 1, 1, 2], [0, 0, 0, 1], [0, 0, 0, 0]])
CORRECT, GROUP = jnp.array([True, True, False]), jnp.zeros(3, jnp.int32)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("token_entropy", ENTROPY[0], "float [N T]"),
        ("token_entropy", ENTROPY > 1, "float [N T]"),
        ("step_ids", IDS[:2], "int [N T]"),
        ("step_ids", IDS[:, :3], "int [N T]"),
        ("correct", jnp.array([1.0, 1.0, 0.0]), "bool [N]"),
        ("correct", [True, True, False], "bool [N]"),
        ("group", GROUP[:, None], "int [N]"),
        ("group", jnp.zeros(1, jnp.int32), "int [N]"),
        ("on_policy", jnp.ones(2, bool), "bool [N]"),
    ],
)
def test_an_array_of_another_shape_or_kind_is_named(name, value, wanted):
    arrays = dict(token_entropy=ENTROPY, step_ids=IDS, correct=CORRECT, group=GROUP)
    with pytest.raises(ValueError) as error:
        core.mine_echo_clips(**{**arrays, name: value}, num_groups=1, num_steps=3)
    assert f"mine_echo_clips: {name} must be {wanted}" in str(error.value)
    assert "\n" not in str(error.value)


def test_friends_of_mine_echo_clips_name_their_argument_too():
    clips = core.mine_echo_clips(ENTROPY, IDS, CORRECT, GROUP, num_groups=1, num_steps=3)
    with pytest.raises(ValueError, match=r"echo_loss: logprobs must be float \[N T\]; got .*\[4\]"):
        core.echo_loss(jnp.zeros(4), clips)
    with pytest.raises(ValueError, match=r"step_ids: is_delimiter must be bool \[V\]"):
        core.step_ids(IDS, IDS >= 0, jnp.array([9]))
    with pytest.raises(ValueError, match=r"step_entropy: step_ids must be int \[N T\]"):
        core.step_entropy(ENTROPY, IDS[:1], 3)


def longest_steps(step_entropy, step_ids, *, step_tokens):
    return step_tokens.astype(jnp.float32)


def test_a_custom_rule_ends_clips_at_the_steps_of_highest_score():
    # Steps have 1, 2, 1 and 3, 1 tokens; row 2 is wrong, so its step of 4 tokens does not compete.
    clips = mine(ENTROPY, IDS, CORRECT, GROUP, num_groups=1, num_steps=3, select=longest_steps)
    assert (clips.row.item(), clips.step.item(), clips.length.item()) == (1, 0, 3)
    assert clips.entropy.item() == 0.5

    def not_the_first_row(step_entropy, step_ids, group, key):
        assert step_ids.shape == IDS.shape and group.shape == GROUP.shape and key is None
        nothing = jnp.array([jnp.nan, -jnp.inf, 0.0])[:, None]
        return jnp.where(jnp.arange(3)[:, None] < 1, nothing, step_entropy)

    clips = mine(
        ENTROPY, IDS, CORRECT, GROUP, num_groups=1, num_steps=3, select=not_the_first_row, top_k=3
    )
    # Steps of equal entropy, in order; the steps scored NaN are left out.
    assert clips.row[clips.valid].tolist() == [1, 1] and clips.step[clips.valid].tolist() == [0, 1]


@settings(deadline=None, max_examples=20)
@given(cases())
def test_the_entropy_as_a_custom_rule_is_the_rule_max(case):
    ids = core.step_ids(case["tokens"], case["mask"], case["is_delimiter"])
    arrays = case["entropy"], ids, case["correct"], case["group"]
    sizes = dict(num_groups=PROMPTS, num_steps=STEPS, on_policy=case["on_policy"], top_k=2)
    custom = mine(*arrays, **sizes, select=by_entropy)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, custom, mine(*arrays, **sizes)))


def by_entropy(step_entropy, step_ids):
    return step_entropy


def test_a_score_of_another_shape_is_named():
    def one_per_row(step_entropy, step_ids):
        return step_entropy[:, 0]

    with pytest.raises(ValueError, match=r"one_per_row must give a score \[3, 5\], .* got \[3\]"):
        core.mine_echo_clips(
            ENTROPY, IDS, CORRECT, GROUP, num_groups=1, num_steps=5, select=one_per_row
        )


def test_the_documented_options_for_vapos_positive_nll_are_its_term():
    """0.1 times the mean over all tokens of all correct rows; each is a clip exactly once."""
    options = re.findall(r"--config\.(echo\.\w+)=(\w[\w.]*)", (ROOT / "docs/method.md").read_text())
    config = load_config(str(ROOT / "configs" / "countdown.py"), dict(options))
    rows, length = 4 * config.rollout.group_size, 6
    rng = np.random.default_rng(0)
    logprobs = -rng.random((rows, length)).astype(np.float32)
    correct = rng.random(rows) < np.repeat([0.0, 0.3, 0.7, 1.0], config.rollout.group_size)
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    echo = core.echo_weights(
        jnp.asarray(rng.random((rows, length)), jnp.float32),
        jnp.where(mask, np.arange(length) // 2, -1),
        jnp.asarray(correct),
        jnp.repeat(jnp.arange(4), config.rollout.group_size),
        num_groups=4,
        num_steps=3,
        **{name: getattr(config.echo, name) for name in ("select", "top_k", "when", "normalise")},
        coef=config.echo.coef,
    )
    clips = jax.tree.map(np.asarray, echo.clips)
    assert sorted(clips.row[clips.valid]) == np.flatnonzero(correct).tolist()
    assert (clips.length[clips.valid] == mask.sum(axis=1)[clips.row[clips.valid]]).all()
    loss = float(echo.coef * (echo.weights * -logprobs).sum())
    assert loss == pytest.approx(0.1 * -logprobs[correct[:, None] & mask].mean(), rel=1e-5)


def test_window():
    coefs = core.active_coef(jnp.arange(5), 0.25, start_step=2, end_step=4)
    assert coefs.tolist() == [0.0, 0.0, 0.25, 0.25, 0.0]
    assert core.active_coef(7, 0.25).item() == 0.25


def test_overlapping_clips_of_one_rollout_add_up():
    rollouts = jnp.array([[0.1, 0.9, 0.5]])
    clips = mine(
        rollouts,
        jnp.array([[0, 1, 2]]),
        jnp.array([True]),
        jnp.array([0]),
        num_groups=1,
        num_steps=3,
        top_k=2,
    )
    # Clips of 2 and 3 tokens, each half of the prompt: 1/4 + 1/6, 1/4 + 1/6, 1/6.
    np.testing.assert_allclose(core.clip_weights(clips, (1, 3)), [[5 / 12, 5 / 12, 1 / 6]])


def test_an_empty_step_axis_and_no_prompt_with_clip():
    clips = mine(
        jnp.zeros((2, 3)),
        jnp.full((2, 3), -1),
        jnp.array([True, True]),
        jnp.array([0, 1]),
        num_groups=3,
        num_steps=2,
    )
    assert not clips.valid.any()
    value, slope = jax.value_and_grad(lambda x: core.echo_loss(x, clips).mean())(
        jnp.full((2, 3), jnp.nan)
    )
    assert value.item() == 0.0 and not slope.any()
