"""The history of prompts and entropies, against hand-worked values."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from echorl_jax.data import Prompt
from echorl_jax.training.batch import Assembled
from echorl_jax.training.experience import Experience, Groups
from echorl_jax.training.history import QUANTILES, STEPS, History
from echorl_jax.types import EchoClips, TrainBatch

ROWS = 10


def experience(
    index: Sequence[int],
    correct: Sequence[Sequence[int]],
    judged: Sequence[Sequence[int]] | None = None,
    own: Sequence[Sequence[int]] | None = None,
) -> Experience:
    """Groups with these verdicts for rows of the data; nothing else of them counts."""
    right = np.array(correct, bool)
    everything, nothing = np.ones(right.shape, bool), np.zeros(right.shape)
    groups = Groups(
        prompt_ids=nothing,
        prompt_length=nothing[:, 0],
        completion_ids=nothing,
        completion_length=nothing,
        rollout_logprobs=nothing,
        token_entropy=nothing,
        truncated=nothing,
        rewards=right.astype(np.float32),
        correct=right,
        judged=everything if judged is None else np.array(judged, bool),
        on_policy=everything if own is None else np.array(own, bool),
        in_policy=everything,
        in_echo=everything,
        reasons=nothing,
        metrics=nothing,
        reward_parts=np.zeros((*nothing.shape, 0), np.float32),
    )
    return Experience(tuple(Prompt([1], {}, place) for place in index), groups)


def made(
    entropy: Sequence[Sequence[float]] = ((0.0,),),
    tokens: Sequence[Sequence[int]] = ((0,),),
    own: Sequence[bool] = (True,),
) -> Assembled:
    """Rows with these step entropies and numbers of tokens; nothing else of them counts."""
    nothing = np.zeros((len(own), 1), np.float32)
    batch = TrainBatch.plain(
        tokens=nothing,
        prompt_length=nothing[:, 0],
        length=nothing[:, 0],
        loss_mask=nothing,
        on_policy=np.array(own),
    )
    clips = EchoClips(*[nothing] * 5)
    means = np.array(entropy, np.float32)
    return Assembled(batch, clips, nothing, means, np.array(tokens), nothing[:, 0])


def visit(history: History, *arguments: Any) -> dict[str, float]:
    return history.update(experience(*arguments), made())


def regressed(history: History, *arguments: Any) -> float:
    return visit(history, *arguments)["group/regressed_fraction"]


def test_solved_prompts_that_are_not_solved_again_have_regressed():
    history = History(ROWS)
    # Prompts 3 and 4 are solved, 5 is not; nothing was visited before.
    assert regressed(history, [3, 4, 5], [[1, 1], [1, 1], [0, 1]]) == 0
    # 4 is visited again and is not solved; 5 was not solved before, 6 is new.
    assert regressed(history, [4, 5, 6], [[1, 0], [0, 0], [1, 1]]) == 1
    # 3 and 6 were solved: 3 stays so, 6 does not. 4 is solved, but was not at its last visit.
    assert regressed(history, [3, 6, 4], [[1, 1], [0, 1], [1, 1]]) == 0.5
    assert regressed(history, [7], [[0, 0]]) == 0


def test_unjudged_rows_and_experts_rows_do_not_count():
    history = History(ROWS)
    # The judged rows of prompt 1 are right; of prompt 2 only the expert's row is; 3 has no verdict.
    correct, judged = [[1, 0], [1, 0], [0, 0]], [[1, 0], [1, 1], [0, 0]]
    regressed(history, [1, 2, 3], correct, judged, [[1, 1], [0, 1], [1, 1]])
    assert history.get_state()["prompts"] == {
        "index": [1, 2],
        "visits": [1, 1],
        "correct": [1, 0],
        "judged": [1, 1],
    }
    assert regressed(history, [1, 2], [[0, 0], [0, 0]]) == 1


def test_a_prompt_that_comes_twice_in_a_step_is_visited_once():
    history = History(ROWS)
    regressed(history, [2, 2], [[1, 1], [1, 0]])
    prompts = history.get_state()["prompts"]
    assert (prompts["visits"], prompts["correct"], prompts["judged"]) == ([1], [3], [4])


def test_prompts_retire_at_the_rate_of_their_last_visit():
    history = History(ROWS, retire_above=0.75)
    found = visit(history, [0, 1, 2], [[1, 1, 1, 0], [1, 1, 0, 0], [1] * 4])
    assert found["data/retired_fraction"] == pytest.approx(2 / ROWS)
    assert [history.retired(place) for place in range(4)] == [True, False, True, False]
    assert not History(ROWS).retired(0) and History(ROWS).retired_fraction == 0


def test_the_threshold_is_a_quantile_of_the_policys_long_enough_steps():
    history = History(ROWS, threshold=0.5, min_step_tokens=2)
    assert history.min_entropy == -np.inf
    nobody = experience([0], [[0]])
    # Of 1, 2, 3 (two tokens or more, the policy's), not of 9 (one token) and 8 (an expert's row).
    entropy, tokens = [[1.0, 9.0], [2.0, 3.0], [8.0, 8.0]], [[2, 1], [2, 5], [2, 2]]
    history.update(nobody, made(entropy, tokens, [True, True, False]))
    assert history.min_entropy == pytest.approx(2)
    # A training step without steps of the policy changes nothing.
    history.update(nobody, made([[5.0]], [[0]], [True]))
    assert history.min_entropy == pytest.approx(2)


def test_each_of_the_last_training_steps_weighs_the_same():
    """A step is kept as quantiles at the middles of equal parts, whatever its number of values."""
    rng, steps = np.random.default_rng(0), []
    history = History(ROWS, threshold=0.8)
    for number in range(STEPS + 3):
        values = rng.gamma(2.0, number + 1.0, (1, 3000 if number % 2 else 1000)).astype(np.float32)
        steps.append(values[0])
        tokens = np.ones(values.shape)
        history.update(experience([0], [[0]]), made(values.tolist(), tokens.tolist(), [True]))
    middles = [(part + 0.5) / QUANTILES for part in range(QUANTILES)]
    pooled = [np.quantile(values.astype(float), m) for values in steps[-STEPS:] for m in middles]
    assert history.min_entropy == pytest.approx(np.quantile(pooled, 0.8), rel=1e-12)
    # Every 1000 values three times weigh as much as 3000.
    even = np.concatenate([np.repeat(v, 3000 // len(v)) for v in steps[-STEPS:]])
    assert history.min_entropy == pytest.approx(np.quantile(even, 0.8), rel=0.01)


def test_the_state_survives_json_to_the_bit():
    settings = {"retire_above": 0.9, "threshold": 0.3, "rate_steps": 2, "groups": 3}
    history, again = History(ROWS, **settings), History(ROWS, **settings)
    first = experience([1, 9], [[1, 1], [0, 1]])
    history.update(first, made([[0.1, 1 / 3]], [[1, 1]], [True]))
    again.set_state(json.loads(json.dumps(history.get_state())))
    assert again.get_state() == history.get_state()
    assert again.min_entropy == history.min_entropy and again.retired(1) and not again.retired(9)
    # Row 1 is solved, and so no success rate in (0, 1).
    np.testing.assert_array_equal(again.past_rates, np.float32([0.5, *[np.nan] * 5]))
    again.set_state({})  # of an older checkpoint
    assert again.get_state() == history.get_state()
