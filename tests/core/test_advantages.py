"""Advantages, filters, weights and hints: conventions, properties and hand-worked values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax import core
from echorl_jax.training.batch import step_advantages
from echorl_jax.types import Graded, Rollouts, StepData

ESTIMATORS = [name for name in core.OBJECTIVES if name != "sft"]


def estimate(name, rewards, group, lengths=None, num_groups=4):
    lengths = jnp.ones(len(rewards), jnp.int32) if lengths is None else lengths
    rewards, group = jnp.asarray(rewards, jnp.float32), jnp.asarray(group)
    step = StepData.plain(rewards=rewards, group=group, num_groups=num_groups, lengths=lengths)
    return core.compute_advantages(step, core.OBJECTIVES[name])


@pytest.mark.parametrize(
    "name",
    "grpo dr_grpo rloo opo maxrl ordergrad curverl lite_ppo scale_rl mcpo".split(),
)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_are_exactly_zero(name, size):
    # 0.1 and 0.7 have no exact float32, so a mean by division would be off by a rounding.
    rewards = [0.1] * size + [0.7] * size
    lengths = jnp.arange(2 * size) + 1
    assert not estimate(name, rewards, [0] * size + [1] * size, lengths).any()


@pytest.mark.parametrize("value, rows", [(0.9, 8), (-0.3, 1024)])
def test_whitening_equal_rewards_gives_exactly_zero(value, rows):
    lengths = jnp.arange(rows) % 7
    assert not estimate("reinforce_pp", [value] * rows, [0] * rows, lengths).any()


@pytest.mark.parametrize("name", "grpo dr_grpo rloo opo luffy maxrl ordergrad avspo mcpo".split())
def test_a_group_of_one_keeps_its_reward(name):
    assert estimate(name, [0.7, 1.0, 0.0], [2, 0, 0])[0] == np.float32(0.7)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_row_order_does_not_matter(name):
    rng = np.random.default_rng(0)
    rewards, group = rng.random(12), rng.integers(0, 4, 12)
    lengths, order = rng.integers(1, 9, 12), rng.permutation(12)
    straight = estimate(name, rewards, group, jnp.asarray(lengths))
    shuffled = estimate(name, rewards[order], group[order], jnp.asarray(lengths[order]))
    np.testing.assert_allclose(straight[order], shuffled, atol=1e-5)


def test_whitening_weighs_rewards_by_tokens():
    # Tokens carry 1, 1, 1, 0: mean 3/4, squares 3/16 + 9/16 = 3/4 over n - 1 = 3: deviation 1/2.
    ours = estimate("reinforce_pp", [1.0, 0.0], [0, 0], jnp.array([3, 1]))
    np.testing.assert_allclose(ours, [0.5, -1.5], atol=1e-6)


def test_whitening_of_nothing_is_finite():
    assert np.isfinite(estimate("reinforce_pp", [1.0, 0.0], [0, 0], jnp.array([0, 0]))).all()


def test_leave_one_out_by_hand():
    # 1 - (0 + 4) / 2, 0 - (1 + 4) / 2, 4 - (1 + 0) / 2.
    assert estimate("rloo", [1.0, 0.0, 4.0], [0, 0, 0]).tolist() == [-1.0, -2.5, 3.5]


def test_the_mean_is_of_the_rows_that_baseline_names():
    """An expert's success among two failures and a success of the policy's."""
    rewards, group = jnp.array([0.0, 0.0, 1.0, 1.0]), np.zeros(4, np.int32)
    own = jnp.array([True, True, True, False])

    def score(objective):
        return step_scores(objective, rewards, group, on_policy=own)

    luffy = core.load_objective("luffy")
    assert score(luffy).tolist() == [-0.5, -0.5, 0.5, 0.5]
    luffy = core.load_objective("luffy", baseline="on_policy")
    np.testing.assert_allclose(score(luffy), np.array([-1, -1, 2, 2]) / 3, rtol=1e-6)
    # An objective of one's own is told which rows the policy wrote, whatever the baseline.
    told = core.Objective(advantages=lambda step, _: jnp.where(step.on_policy, step.rewards, 0))
    assert score(told).tolist() == [0.0, 0.0, 1.0, 0.0]


def step_scores(objective, rewards, group, *, lengths=None, on_policy=None, judged=None):
    """``step_advantages`` of rows that have nothing else; a name is an objective of the table."""
    rows, groups = len(rewards), int(max(group)) + 1
    rollouts: Any = dict.fromkeys(field.name for field in dataclasses.fields(Rollouts))
    rollouts |= {"group": jnp.asarray(group), "prompt_ids": jnp.zeros((groups, 1), jnp.int32)}
    lengths = np.ones(rows) if lengths is None else np.asarray(lengths)
    rollouts["completion_length"] = jnp.asarray(lengths, int)
    rollouts["completion_ids"] = jnp.zeros((rows, int(lengths.max())), jnp.int32)
    rollouts["token_entropy"] = 0.1 + jnp.zeros(rollouts["completion_ids"].shape)
    graded = Graded(
        rewards=jnp.asarray(rewards, jnp.float32),
        correct=jnp.zeros(rows, bool),
        on_policy=jnp.ones(rows, bool) if on_policy is None else on_policy,
        judged=None if judged is None else np.array(judged, bool),
    )
    objective = core.OBJECTIVES[objective] if isinstance(objective, str) else objective
    made, in_policy = Rollouts(**rollouts), np.ones(rows, bool)
    # Operations of one shape are compiled once for all objectives, not a program for each.
    with jax.disable_jit():
        return np.asarray(step_advantages(made, graded, in_policy, objective=objective))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Judged rewards 1, 0, 4 of 1, 2 and 1 tokens. Mean 5/3; differences -2/3, -5/3, 7/3;
        # variance (4 + 25 + 49) / 9 / 2 = 13/3, deviation 2.08167.
        ("grpo", [-0.320256, -0.800641, 1.120897]),
        ("dr_grpo", [-0.666667, -1.666667, 2.333333]),
        # 1 - (0 + 4) / 2, 0 - (1 + 4) / 2, 4 - (1 + 0) / 2.
        ("rloo", [-1.0, -2.5, 3.5]),
        # (1 * 1 + 2 * 0 + 1 * 4) / 4 tokens = 1.25.
        ("opo", [-0.25, -1.25, 2.75]),
        # Tokens carry 1, 0, 0, 4: mean 1.25; squares (1 + 25 + 25 + 121) / 16 = 10.75 over 3,
        # deviation 1.892969. A group's mean moves all of them alike.
        ("reinforce_pp", [-0.132067, -0.660338, 1.452744]),
        ("reinforce_pp_baseline", [-0.132067, -0.660338, 1.452744]),
    ],
)
def test_a_group_of_four_with_an_unjudged_row_is_a_group_of_three(name, expected):
    for place in range(4):
        rewards, lengths = np.insert([1.0, 0.0, 4.0], place, 9.0), np.insert([1, 2, 1], place, 7)
        judged = np.arange(4) != place
        found = step_scores(name, rewards, [0] * 4, lengths=lengths, judged=judged)
        assert found[place] == 0.0
        np.testing.assert_allclose(found[judged], expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_unjudged_rows_change_nothing_for_the_others(name):
    """Three groups of four: one judged in full, one in part, one not at all."""
    rng = np.random.default_rng(0)
    rewards, lengths, group = rng.random(12), rng.integers(1, 9, 12), np.repeat([0, 1, 2], 4)
    judged = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    found = step_scores(name, rewards, group, lengths=lengths, judged=judged)
    alone = step_scores(name, rewards[judged], group[judged], lengths=lengths[judged])
    assert not found[~judged].any()
    np.testing.assert_allclose(found[judged], alone, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_only_judged_row_of_a_group_has_nothing_to_be_compared_with(name):
    rewards, group = [0.7, 0.0, 0.0, 1.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1]
    judged = [True, False, False, True, True, True]
    found = step_scores(name, rewards, group, judged=judged)
    assert not found[:3].any()
    np.testing.assert_allclose(found[3:], step_scores(name, rewards[3:], [0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_no_judged_row_gives_no_advantage(name):
    assert not step_scores(name, [0.5] * 4, [0, 0, 1, 1], judged=[False] * 4).any()


def test_a_baseline_of_the_policys_rows_needs_two_that_are_judged():
    luffy = core.load_objective("luffy", baseline="on_policy")
    own = jnp.array([True, True, True, False] * 2)
    # The policy's 0 and 1 have the mean 1/2; a single 1 has nothing to be compared with.
    found = step_scores(
        luffy,
        [0.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0, 0.5],
        np.repeat([0, 1], 4),
        on_policy=own,
        judged=[True, False, True, True, True, False, False, True],
    )
    assert found.tolist() == [-0.5, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_all_rows_judged_is_no_other_computation():
    rng = np.random.default_rng(1)
    rewards, lengths, group = rng.random(12), rng.integers(1, 9, 12), np.repeat([0, 1, 2], 4)
    for name in ESTIMATORS:
        judged = step_scores(name, rewards, group, lengths=lengths, judged=np.ones(12, bool))
        assert (judged == step_scores(name, rewards, group, lengths=lengths)).all()


@pytest.mark.parametrize("name", ["rloo", "opo", "reinforce_pp", "reinforce_pp_baseline", "sft"])
def test_a_baseline_that_does_nothing_is_refused(name):
    core.load_objective(name, baseline="all")
    with pytest.raises(ValueError, match=f"'{name}' has no use for baseline"):
        core.load_objective(name, baseline="on_policy")


def decoupled(parts, group, weights, **settings):
    objective = dataclasses.replace(core.OBJECTIVES["grpo"], normalise_each=True, **settings)
    parts, weights = jnp.asarray(parts, jnp.float32), jnp.asarray(weights, jnp.float32)
    step = StepData.plain(
        rewards=jnp.nan_to_num(parts) @ weights,
        group=jnp.asarray(group),
        num_groups=max(group) + 1,
        reward_parts=parts,
        reward_weights=weights,
    )
    return np.asarray(core.compute_advantages(step, objective))


def test_each_reward_is_normalised_in_its_group_and_the_sum_over_the_batch():
    """Against the formula of arXiv 2601.05242 in NumPy, with rewards that do not apply left out."""
    rng = np.random.default_rng(3)
    parts, weights = rng.random((12, 3)), np.array([1.0, 0.2, -0.5])
    parts[[1, 2, 7], [1, 1, 2]] = np.nan
    each = np.zeros((12, 3))
    for start in (0, 4, 8):
        rows = parts[start : start + 4]
        spread = np.nanstd(rows, axis=0, ddof=1)
        each[start : start + 4] = np.nan_to_num((rows - np.nanmean(rows, axis=0)) / (spread + 1e-6))
    total = each @ weights
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-6)
    found = decoupled(parts, [0] * 4 + [1] * 4 + [2] * 4, weights)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rewards_of_one_sum_are_told_apart():
    """The first two rows have one sum, and by GRPO one score."""
    parts = [[1, 0], [0, 1], [0, 1], [0, 1], [0, 0]]
    grpo = estimate("grpo", np.sum(parts, axis=1), [0] * 5)
    assert grpo[0] == grpo[1]
    ours = decoupled(parts, [0] * 5, [1, 1])
    assert ours[0] > ours[1] + 0.1  # the first reward is the rarer one


def test_groups_with_nothing_to_compare_stay_at_zero_beside_others():
    """Equal rewards, and a reward that applies to one row of its group."""
    parts = [[0.1, 0.7]] * 3 + [[np.nan, 0.2], [0.4, 0.2], [np.nan, 0.2]] + [[1, 0], [0, 1], [1, 0]]
    found = decoupled(parts, [0] * 3 + [1] * 3 + [2] * 3, [0.9, 0.1])
    assert not found[:6].any() and found[6:].all()


def test_one_reward_is_normalised_twice():
    rewards, group = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1]
    grpo = np.asarray(estimate("grpo", rewards, group, num_groups=2))
    found = decoupled(np.array(rewards)[:, None], group, [3.0])
    np.testing.assert_allclose(found, grpo / grpo.std(ddof=1), rtol=1e-5)


def test_expert_is_scored_against_the_policys_rows():
    own = jnp.array([True, True, True, False])
    group = jnp.zeros(4, jnp.int32)
    split = core.group_advantages(
        jnp.array([0.1, 0.1, 0.1, 1.0]), group, num_groups=1, on_policy=own
    )
    # The policy's rows agree: deviation 1 by convention, and exactly zero for them.
    assert split[:3].tolist() == [0.0] * 3 and split[3].item() == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("bad", [jnp.zeros((2, 2)), jnp.zeros(3)])
def test_shapes_are_checked(bad):
    with pytest.raises(ValueError):
        core.group_advantages(bad, jnp.array([0, 0]), num_groups=1)


def test_mixed_groups():
    correct = jnp.array([True, True, False, True, False, False])
    group = jnp.array([0, 0, 1, 1, 2, 4])
    mixed = core.mixed_groups(correct, group, num_groups=5)
    # All right, one of each, a group of one, no rows, a group of one.
    assert mixed.tolist() == [False, True, True, False, True]


def test_overlong_punishment_without_a_slope():
    punished = core.overlong_punishment(jnp.array([9, 10, 11]), max_tokens=10, buffer_tokens=0)
    assert punished.tolist() == [0.0, 0.0, -1.0]
    with pytest.raises(ValueError):
        core.overlong_punishment(jnp.array([1]), max_tokens=10, buffer_tokens=11)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [[0.25, 0.25, 0.25], [0.25, 0, 0], [0, 0, 0]]),
        ("seq-mean-token-sum", [[0.5, 0.5, 0.5], [0.5, 0, 0], [0, 0, 0]]),
        ("seq-mean-token-mean", [[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0], [0, 0, 0]]),
        ("seq-mean-token-sum-norm", [[0.1, 0.1, 0.1], [0.1, 0, 0], [0, 0, 0]]),
        ("token-sum-norm", [[0.2, 0.2, 0.2], [0.2, 0, 0], [0, 0, 0]]),
        ("token-sum", [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
    ],
)
def test_aggregation_weights(mode, expected):
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(core.aggregation_weights(mask, mode=mode, max_tokens=5), expected)
    assert not core.aggregation_weights(0.0 * mask, mode=mode, max_tokens=5).any()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="token-mean"):
        core.aggregation_weights(jnp.ones((1, 1)), mode="mean", max_tokens=1)


def test_covariance_picks_the_largest():
    rng = np.random.default_rng(0)
    logprobs, advantages = rng.normal(size=(6, 50)), rng.normal(size=6)
    mask = rng.random((6, 50)) < 0.7
    own, logp = np.broadcast_to(advantages[:, None], mask.shape)[mask], logprobs[mask]
    covariance = (own - own.mean()) * (logp - logp.mean())
    picked = core.kl_cov_selection(
        jnp.asarray(logprobs, jnp.float32),
        jnp.asarray(advantages, jnp.float32),
        jnp.asarray(mask),
        fraction=0.05,
    )
    best = np.sort(covariance)[::-1][: int(0.05 * mask.sum())]
    np.testing.assert_allclose(np.sort(covariance[np.asarray(picked)[mask]])[::-1], best)
    assert not (picked & ~mask).any()


def test_clip_cov_picks_from_the_band_only():
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(rng.normal(size=(8, 100)), jnp.float32)
    advantages, mask = jnp.asarray(rng.normal(size=8), jnp.float32), jnp.ones((8, 100))
    covariance = core.token_covariance(logprobs, advantages, mask)
    args = logprobs, logprobs - 0.01, advantages, mask
    picked = core.clip_cov_selection(*args, jax.random.key(0), fraction=0.01, low=0.5, high=2.0)
    assert picked.sum() == 8 and ((covariance > 0.5) & (covariance < 2.0))[picked].all()
    other = core.clip_cov_selection(*args, jax.random.key(1), fraction=0.01, low=0.5, high=2.0)
    assert (picked != other).any()
    none = core.clip_cov_selection(*args, jax.random.key(0), fraction=0.01, low=90.0, high=91.0)
    assert not none.any()


def test_hints_follow_the_schedule():
    # p(T/4) = 0.05 + 0.9 (1 + cos(pi/4)) / 2 = 0.05 + 0.45 * 1.70711
    steps = jnp.array([0, 25, 50, 99, 100, 200])
    expected = [0.95, 0.81820, 0.5, 0.05022, 0.0, 0.0]
    assert np.allclose(core.hint_probability(steps, horizon=100), expected, atol=1e-5)
    assert core.hint_probability(0, horizon=0) == 0.0
