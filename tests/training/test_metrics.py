"""Numbers of a step: whose rows they count, and how updates are joined."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.config import EchoConfig
from echorl_jax.core import OBJECTIVES
from echorl_jax.training.batch import Assembled, assemble
from echorl_jax.training.experience import Experience, Groups
from echorl_jax.training.metrics import collapsed_fraction, covariance, solved_weight, step_metrics
from echorl_jax.training.update import GAP_MEAN, GAP_WIDE, UpdateStats, update_metrics
from echorl_jax.types import Graded, LossTerm, Rollouts, TrainBatch

PER_TOKEN = ("completion_ids", "rollout_logprobs", "token_entropy")


def batch_of(logprobs, advantages, loss_mask, on_policy) -> TrainBatch:
    rows, width = loss_mask.shape
    nothing = np.zeros((rows, width), np.float32)
    return TrainBatch(
        tokens=np.zeros((rows, width + 1), np.int32),
        prompt_length=np.ones(rows, np.int32),
        length=np.full(rows, width + 1, np.int32),
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=nothing,
        rollout_logprobs=logprobs,
        token_weights=nothing,
        echo_weights=nothing,
        on_policy=on_policy,
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_covariance_over_the_policys_own_tokens(seed):
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (12, 9)).astype(np.float32)
    advantages = rng.normal(size=12).astype(np.float32)
    mask = (rng.random((12, 9)) < 0.7).astype(np.float32)
    own = rng.random(12) < 0.8
    pairs = [
        (logprobs[n, t], advantages[n])
        for n in range(12)
        for t in range(9)
        if own[n] and mask[n, t]
    ]
    expected = np.cov(np.array(pairs, np.float64).T, bias=True)[0, 1]
    found = covariance(batch_of(logprobs, advantages, mask, own))
    assert found == pytest.approx(expected, rel=1e-9)


def test_by_hand():
    # log pi -1 and -3 about their mean -2, A +1 and -1 about 0: (1 * 1 + -1 * -1) / 2 = 1.
    logprobs = np.array([[-1.0, -7.0], [-3.0, np.nan]], np.float32)
    mask = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    advantages = np.array([1.0, -1.0], np.float32)
    batch = batch_of(logprobs, advantages, mask, np.array([True, True]))
    assert covariance(batch) == 1.0


def test_no_token_and_equal_advantages_give_zero():
    logprobs = np.array([[-1.0], [-3.0]], np.float32)
    ones = np.ones((2, 1), np.float32)
    own = np.array([True, True])
    assert covariance(batch_of(logprobs, np.zeros(2, np.float32), ones, own)) == 0.0
    nothing = batch_of(logprobs, np.array([1.0, -1.0], np.float32), 0 * ones, own)
    assert covariance(nothing) == 0.0


def two_groups(
    own: np.ndarray, correct: np.ndarray, judged: np.ndarray | None = None, **echo: Any
) -> tuple[Experience, Assembled]:
    """Two groups of three rows; those that the policy did not write are without entropy."""
    length = np.array([2, 4, 8] * 2, np.int32)
    rollouts = Rollouts(
        prompt_ids=jnp.ones((2, 1), jnp.int32),
        prompt_length=jnp.ones(2, jnp.int32),
        group=jnp.array([0, 0, 0, 1, 1, 1]),
        completion_ids=jnp.ones((6, 8), jnp.int32),
        completion_length=jnp.asarray(length),
        rollout_logprobs=jnp.zeros((6, 8)),
        token_entropy=jnp.where(own[:, None], 0.5, 0.0) * jnp.ones((6, 8)),
        truncated=jnp.array([False, True, True] * 2),
    )
    graded = Graded(correct.astype(np.float32), correct=correct, on_policy=own, judged=judged)
    kept = graded.with_verdict
    made, _ = assemble(
        rollouts,
        graded,
        jnp.zeros(6),
        kept,
        kept,
        np.zeros(4, bool),
        jax.random.key(0),
        0,
        objective=OBJECTIVES["luffy"],
        echo=EchoConfig(**echo),
        max_tokens=8,
    )
    rollouts = jax.device_get(rollouts)
    groups = {name: np.reshape(vars(rollouts)[name], (2, 3, -1)) for name in PER_TOKEN}
    per_row: dict[str, Any] = {
        "completion_length": rollouts.completion_length,
        "truncated": rollouts.truncated,
        "rewards": graded.rewards,
        "correct": correct,
        "on_policy": own,
        "judged": kept,
        "in_policy": kept,
        "in_echo": kept,
        "reasons": np.array([""] * 6, object),
        "metrics": np.array([{"steps": float(row)} for row in range(5)] + [{}], object),
    }
    groups |= {name: np.reshape(value, (2, 3)) for name, value in per_row.items()}
    groups["reward_parts"] = np.zeros((2, 3, 0), np.float32)
    experience = Experience(
        prompts=(),
        groups=Groups(
            prompt_ids=rollouts.prompt_ids, prompt_length=rollouts.prompt_length, **groups
        ),
    )
    return experience, jax.device_get(made)


def test_an_experts_rows_are_not_the_policys_results():
    """Two groups of two policy rows and an expert row, which is right, long and without entropy."""
    own = np.array([True, True, False] * 2)
    correct = np.array([False, False, True, True, True, True])
    found = step_metrics(*two_groups(own, correct), hints=False, echo_coef=0.0)
    assert found["reward/mean"] == found["reward/correct"] == 0.5
    assert found["group/all_failure_fraction"] == found["group/all_success_fraction"] == 0.5
    # Rows 0, 1, 3 and 4 are the policy's.
    assert found["reward/steps/mean"] == 2.0
    # Of 0, 1, 3 and 4: (4 + 1 + 1 + 4) / 3.
    assert found["reward/steps/std"] == pytest.approx((10 / 3) ** 0.5)
    assert found["completion/length_mean"] == 3 and found["completion/truncated_fraction"] == 0.5
    assert found["entropy/token_mean"] == 0.5


def test_rows_that_are_not_judged_have_no_part_in_rewards_losses_and_clips():
    """One group of two successes and one of nothing, apart from rows that are not judged."""
    correct = np.array([True, True, False, False, False, False])
    judged = np.array([True, True, False, False, False, False])
    # With an unjudged row left out, all rows of the first group are right.
    experience, made = two_groups(np.ones(6, bool), correct, judged, when="degenerate_only")
    found = step_metrics(experience, made, hints=False, echo_coef=0.0)
    assert found["reward/mean"] == found["reward/correct"] == 1.0
    assert found["reward/ungraded_fraction"] == pytest.approx(4 / 6)
    assert found["group/all_success_fraction"] == 1.0 and found["group/all_failure_fraction"] == 0
    assert found["completion/length_mean"] == pytest.approx(14 / 3)  # of all rows
    assert made.clips.valid.tolist() == [[True], [False]]
    for weights in (made.batch.loss_mask, made.batch.token_weights, made.batch.echo_weights):
        assert weights[:2].any() and not weights[2:].any()


def test_groups_of_one_reward_have_collapsed():
    rewards = np.array([[0.1, 0.1, 0.1], [1, 0, 1], [1, 1, 0], [2, 0, 0], [0, 0, 0]], np.float32)
    judged = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    # Of the first three, whose judged rows can be compared, the first and the third are equal.
    assert collapsed_fraction(rewards, judged) == pytest.approx(2 / 3)
    assert collapsed_fraction(rewards[3:], judged[3:]) == 0


@pytest.mark.parametrize("by_token", [False, True])
def test_the_weight_of_solved_prompts_is_of_all_terms(by_token: bool):
    """One solved group of two policy rows and a wrong expert's, one with a wrong row."""
    own = np.array([True, True, False] * 2)
    correct = np.array([True, True, False, True, False, True])
    experience, made = two_groups(own, correct)
    weights = np.zeros((6, 8), np.float32)
    weights[:, :2] = [[0.5, 0.25], [1, 1], [0.5, 0], [9, 9], [9, 9], [9, 9]]
    advantages = np.array([2, -1, 4, 7, 7, 7], np.float32)
    echo = np.zeros((6, 8), np.float32)
    echo[1, :3] = 0.25
    batch = dataclasses.replace(
        made.batch,
        token_weights=weights,
        echo_weights=echo,
        advantages=np.repeat(advantages[:, None], 8, axis=1) if by_token else advantages,
    )
    # Policy: 0.75 * 2 + 2 * 1 + 0.5 * 4 = 5.5; echo: 0.1 * 0.75.
    assert solved_weight(experience, batch, echo_coef=0.1) == pytest.approx(5.575)
    none, _ = two_groups(own, np.zeros(6, bool))
    assert solved_weight(none, batch, echo_coef=0.1) == 0


def test_losses_are_means_over_updates_and_the_echos_over_those_with_a_clip():
    def update(policy: float, echo: tuple[float, float], gap: float) -> UpdateStats:
        terms = {
            "loss/policy": LossTerm(np.float32(policy), np.float32(2)),
            "loss/echo": LossTerm(*map(np.float32, echo)),
            "ratio/clip_fraction": LossTerm(np.float32(policy), np.float32(10)),
            GAP_MEAN: LossTerm(np.float32(gap), np.float32(2)),
            GAP_WIDE: LossTerm(np.float32(gap), np.float32(2)),
        }
        loss = np.float32(policy + echo[0])
        return UpdateStats(loss, terms, np.float32(gap), np.float32(gap), np.array(gap < 0.2))

    found = update_metrics(
        [update(1.0, (0.8, 1), 0.1), update(3.0, (0, 0), 0.2), update(2.0, (0.4, 1), 0)]
    )
    assert found["loss/policy"] == 2.0 and found["loss/echo"] == pytest.approx(0.6)
    assert found["loss/total"] == pytest.approx(7.2 / 3)
    assert found["ratio/clip_fraction"] == pytest.approx(0.2)
    assert found["rollout/logprob_gap_max"] == found[GAP_MEAN] * 2 == np.float32(0.1)
    assert found["optim/grad_norm"] == np.float32(0.2) and found["optim/skipped"] == 1.0
