"""Groups for a step: refills, filters, mini-batches, experts, hints."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.core import OBJECTIVES
from echorl_jax.data import Prompt, load_rows, load_tokenizer
from echorl_jax.environment import append_experts, expert_completions
from echorl_jax.rewards import Verdict
from echorl_jax.training.batch import learn_hints
from echorl_jax.training.experience import (
    Experience,
    Groups,
    _warn_of_failed_grading,
    choose_groups,
    deal,
    join_rounds,
    mixed,
    reward_weights,
    with_verdicts,
)
from echorl_jax.types import TrainBatch
from tests.integration.conftest import small_config

T = 6


def experience(correct: list[list[int | None]], *, width: int = 4) -> Experience:
    """One group for each inner list; every token of row i is i, so that rows can be told apart.

    None is a row that is not judged.
    """
    outcomes = np.array(correct) == 1
    judged = np.array([[outcome is not None for outcome in group] for group in correct])
    groups, size = outcomes.shape
    rows = np.arange(groups * size, dtype=np.int32).reshape(groups, size)
    per_token = np.zeros((groups, size, T), np.float32)
    every = np.ones((groups, size), bool)
    return Experience(
        prompts=tuple(Prompt([1], {"row": i}, i) for i in range(groups)),
        groups=Groups(
            prompt_ids=np.arange(groups * width, dtype=np.int32).reshape(groups, width),
            prompt_length=np.full(groups, width, np.int32),
            completion_ids=np.tile(rows[:, :, None], (1, 1, T)),
            completion_length=np.full((groups, size), T, np.int32),
            rollout_logprobs=per_token,
            token_entropy=per_token,
            truncated=~every,
            rewards=outcomes.astype(np.float32),
            correct=outcomes,
            on_policy=every,
            in_policy=judged,
            in_echo=judged,
            judged=judged,
            reasons=rows.astype(str).astype(object),
            metrics=np.full(rows.shape, {}, object),
            reward_parts=np.zeros((*rows.shape, 0), np.float32),
        ),
        seconds={"rollout": 1.0},
    )


def test_rounds_are_joined_with_their_own_groups() -> None:
    joined = join_rounds([experience([[1, 0], [1, 1]]), experience([[0, 0], [0, 1]], width=7)])
    assert joined.rollouts.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert joined.rollouts.prompt_ids.shape == (4, 7)
    assert joined.seconds == {"rollout": 2.0} and joined.rounds == 2
    assert [p.index for p in joined.prompts] == [0, 1, 0, 1]


@pytest.mark.parametrize("keep_solved", [True, False])
def test_filtered_groups_keep_their_clips(keep_solved: bool) -> None:
    # mixed, solved, all wrong, mixed, mixed; two are wanted.
    found = experience([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0]])
    assert mixed(found).tolist() == [True, False, False, True, True]
    kept = choose_groups(found, mixed(found), wanted=2, keep_solved=keep_solved)
    assert kept.groups.in_policy[:, 0].tolist() == [True, False, False, True, False]
    assert kept.groups.in_echo[:, 1].tolist() == [True, keep_solved, False, True, False]


def test_unjudged_rows_do_not_make_a_group_mixed() -> None:
    found = experience(
        [[None, 1, 0], [None, 1, 1], [None, 0, 0], [None, None, 1], [None] * 3, [1, 0, 1]]
    )
    assert mixed(found).tolist() == [True, False, False, False, False, True]
    kept = choose_groups(found, mixed(found), wanted=2, keep_solved=True)
    first, rest, none, every = [False, True, True], [False, False, True], [False] * 3, [True] * 3
    assert kept.groups.in_policy.tolist() == [first, none, none, none, none, every]
    # The only judged row of the fourth group is a success: it gives a clip.
    assert kept.groups.in_echo.tolist() == [first, first, none, rest, none, every]
    # Groups of which the first row is not judged are dealt like others.
    parts = deal(kept, 2).split(2)
    assert sorted(part.groups.in_policy.sum() for part in parts) == [2, 3]


def test_mini_batches_share_policy_groups() -> None:
    found = experience([[1, 0], [1, 1], [0, 0], [0, 1]])
    found = choose_groups(found, mixed(found), wanted=2, keep_solved=True)
    parts = deal(found, 2).split(2)
    assert [part.groups.in_policy.sum() for part in parts] == [2, 2]
    seen = sorted(text for part in parts for text in part.groups.reasons.flat)
    assert seen == sorted(found.groups.reasons.flat)
    for part in parts:
        assert part.rollouts.group.tolist() == [0, 0, 1, 1]
        # Rows still belong to their reasons, and prompts to their rows.
        first = part.rollouts.completion_ids[:, 0]
        assert [str(i) for i in first] == list(part.groups.reasons.flat)
        assert part.rollouts.prompt_ids[:, 0].tolist() == [4 * p.index for p in part.prompts]


def test_experts_stand_at_the_end_of_each_group() -> None:
    tokenizer = load_tokenizer("builtin:countdown")
    rows = load_rows("countdown:seed=5&count=2")
    found = experience([[1, 0], [1, 1]])
    prompts = [Prompt([1], rows[i], i) for i in range(2)]
    wide = {
        name: np.pad(vars(found.rollouts)[name], [(0, 0), (0, 34)])
        for name in ("completion_ids", "rollout_logprobs", "token_entropy")
    }
    rollouts = dataclasses.replace(found.rollouts, **wide)
    experts = expert_completions(prompts, tokenizer, longest=T + 34)
    joined, on_policy = append_experts(rollouts, experts, count=1)
    assert on_policy.tolist() == [True, True, False, True, True, False]
    assert joined.group.tolist() == [0, 0, 0, 1, 1, 1]
    for row, prompt in ((2, prompts[0]), (5, prompts[1])):
        length = joined.completion_length[row]
        ids = joined.completion_ids[row, :length]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == prompt.row["target"][0]["content"]
        assert not joined.truncated[row]
    experts = expert_completions(prompts, tokenizer, longest=T)
    short = append_experts(found.rollouts, experts, count=1)[0]
    assert short.truncated[2] and short.completion_length[2] == T
    with pytest.raises(ConfigError, match="row 3 of data.train"):
        bare = Prompt([1], {"prompt": []}, 3)
        expert_completions([bare, bare], tokenizer, longest=T)


def test_a_hint_moves_into_the_target_region() -> None:
    # Two groups of two rows; hints of 2 and 0 tokens; 4-token prompts, 6-token completions.
    rows, width = 4, 4 + T
    plain: Any = {
        "tokens": np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
        "prompt_length": np.full(rows, 4, np.int32),
        "length": np.full(rows, width, np.int32),
        "loss_mask": np.ones((rows, T), np.float32),
        "advantages": np.ones(rows, np.float32),
        "old_logprobs": np.tile(np.arange(T, dtype=np.float32), (rows, 1)),
        "rollout_logprobs": np.zeros((rows, T), np.float32),
        "token_weights": np.ones((rows, T), np.float32),
        "echo_weights": np.zeros((rows, T), np.float32),
        "on_policy": np.ones(rows, bool),
    }
    batch = learn_hints(TrainBatch(**plain), np.array([0, 0, 1, 1]), np.array([2, 0], np.int32))
    assert batch.prompt_length.tolist() == [2, 2, 4, 4]
    assert batch.loss_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.loss_mask[2].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    # Entry t of a row still belongs to tokens[prompt_length + t].
    shifted = batch.old_logprobs[0, 2:8].tolist()
    assert shifted == [0, 1, 2, 3, 4, 5]
    # The first row of a group carries the hint; the mean is over two hint tokens.
    weights = np.zeros((rows, width))
    weights[0, :2] = 0.5
    assert batch.nll_weights is not None and np.array_equal(batch.nll_weights, weights)


def test_trees_of_numpy_stay_numpy() -> None:
    found = join_rounds([experience([[1, 0], [0, 1]]), experience([[1, 1], [0, 0]])])
    for part in (found, *deal(found, 2).split(2)):
        leaves = jax.tree.leaves((part.rollouts, part.graded))
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


def test_an_unjudged_row_has_no_reward_and_no_punishment() -> None:
    config = small_config(rollout={"max_new_tokens": T})
    dapo = dataclasses.replace(OBJECTIVES["dapo"], overlong_buffer=0.5)
    setup: Any = SimpleNamespace(config=config, objective=dapo)
    verdicts = [Verdict(1.0, True, ""), Verdict(None, None, "not judged")]
    given = experience([[1, None]])  # both as long as is allowed
    found = with_verdicts(setup, given.prompts, given.rollouts, np.ones(2, bool), verdicts)
    graded = found.graded
    assert graded.rewards.tolist() == [0.0, 0.0] and graded.with_verdict.tolist() == [True, False]
    assert graded.correct.tolist() == [True, False]


def test_each_reward_of_a_list_is_kept_where_each_is_normalised() -> None:
    """The punishment at the limit is one more reward; an error is 0 in each."""
    config = small_config(
        data={"grader": "a.py:right@2, b.py:short@0.5"}, rollout={"max_new_tokens": T}
    )
    gdpo = dataclasses.replace(OBJECTIVES["dapo"], overlong_buffer=0.5, normalise_each=True)
    setup: Any = SimpleNamespace(config=config, objective=gdpo)
    verdicts = [
        Verdict(2.5, True, "", {"right": 1.0, "short": 1.0, "words": 7.0}),
        Verdict(0.0, False, "", {"right": 0.0}),
        Verdict(0.0, False, "the grader raised ValueError: no"),
    ]
    given = experience([[1, 0, 0]])
    found = with_verdicts(setup, given.prompts, given.rollouts, np.ones(3, bool), verdicts)
    np.testing.assert_array_equal(
        found.groups.reward_parts[0], [[1, 1, -1], [0, np.nan, -1], [0, 0, -1]]
    )
    assert found.groups.rewards.tolist() == [[1.5, -1.0, -1.0]]
    assert reward_weights(setup).tolist() == [2.0, 0.5, 1.0]


def test_metrics_that_were_dropped_are_told_in_one_line() -> None:
    step = experience([[1, 0], [1, 1]])
    metrics = np.full((2, 2), {}, object)
    metrics[0, 1], metrics[1, 0] = {"dropped_metrics": 2.0, "steps": 1.0}, {"dropped_metrics": 1.0}
    groups = dataclasses.replace(step.groups, metrics=metrics)
    told: list[str] = []
    _warn_of_failed_grading(step, 3, told.append)
    _warn_of_failed_grading(dataclasses.replace(step, groups=groups), 4, told.append)
    assert len(told) == 1 and told[0].startswith("warning: step 4: 3 metrics of the grader were")
