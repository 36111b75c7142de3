"""Grading while rows are still being written: what comes out is what grading afterwards gives."""

import time
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.environment import Grading, end_tokens
from echorl_jax.models import init_params, load_decoder
from echorl_jax.rewards import GraderPool, PoolError, Verdict
from echorl_jax.rollout import generate

GROUP = 3


@pytest.fixture(scope="module")
def sampler() -> dict[str, Any]:
    """A random model, few slots and many looks, so that rows end at very different times."""
    tokenizer = load_tokenizer("builtin:countdown")
    model = load_decoder(str(BUILTIN["builtin:countdown"]), dtype="float32")
    rows = list(load_rows("countdown:count=8"))
    prompts = [encode_prompt(tokenizer, row, "chat") for row in rows]

    def sample(**settings: Any):
        return jax.device_get(
            generate(
                model,
                init_params(model, jax.random.key(0)),
                prompts,
                jax.random.key(1),
                group_size=GROUP,
                max_new_tokens=40,
                temperature=0.7,
                eos_ids=end_tokens(tokenizer, model),
                row_limits=[1 + 5 * row % 37 for row in range(len(rows) * GROUP)],
                slots=8,
                steps_per_poll=4,
                **settings,
            )
        )

    return {"sample": sample, "tokenizer": tokenizer, "rollouts": sample()}


def judged_rows(hang_on: str | None = None) -> list[dict[str, Any]]:
    return [{"number": number, "hang_on": hang_on if number == 2 else None} for number in range(8)]


@pytest.mark.parametrize("hangs", [False, True])
def test_verdicts_are_those_of_grading_afterwards(sampler: dict[str, Any], hangs: bool) -> None:
    tokenizer, rollouts = sampler["tokenizer"], sampler["rollouts"]
    length = rollouts.completion_length[7]
    text = tokenizer.decode(rollouts.completion_ids[7, :length], skip_special_tokens=True)
    rows = judged_rows(hang_on=text if hangs else None)
    with GraderPool("slow_graders:slow", workers=2, timeout_s=1.0) as grader:
        judged = [row for row in rows for _ in range(GROUP)]
        afterwards = Grading(judged, tokenizer=tokenizer, grader=grader)
        lengths = rollouts.completion_length
        ended = [ids[:end] for ids, end in zip(rollouts.completion_ids, lengths, strict=True)]
        afterwards.take(range(len(judged)), ended)
        after = afterwards.result()
        grading = Grading(judged, tokenizer=tokenizer, grader=grader)
        takes: list[list[int]] = []

        def finished(places, completions) -> None:
            takes.append(list(places))
            grading.take(places, completions)

        again = sampler["sample"](finished=finished)
        overlapped = grading.result()
    assert overlapped == after
    assert [v.reason.startswith("no verdict within 1 s") for v in after.verdicts] == [
        hangs and row == 7 for row in range(24)
    ]
    # Each row once, not in their order, and most before the end.
    assert sorted(sum(takes, [])) == list(range(24)) != sum(takes, [])
    assert len(takes) > 5
    for ours, others in zip(jax.tree.leaves(again), jax.tree.leaves(rollouts), strict=True):
        np.testing.assert_array_equal(ours, others)


def test_grading_goes_on_while_rows_are_written(sampler: dict[str, Any]) -> None:
    """All but the last rows' verdicts are there when the last rows are."""
    rows = [{"number": 0} for _ in range(24)]
    with GraderPool("slow_graders:slow", workers=2) as grader:
        grader.grade(["ready"], rows[:1])
        grading = Grading(rows, tokenizer=sampler["tokenizer"], grader=grader)

        def finished(places, completions) -> None:
            grading.take(places, completions)
            time.sleep(0.1)  # a device that needs this long for the next tokens

        sampler["sample"](finished=finished)
        begin = time.perf_counter()
        grading.result()
        waited = time.perf_counter() - begin
    # One after the other they take 2 s and more.
    assert waited < 0.5


def test_an_unjudged_completion_stays_unjudged(sampler: dict[str, Any]) -> None:
    tokenizer = sampler["tokenizer"]
    tokens = np.array(tokenizer.encode("1+2=3", add_special_tokens=False), np.int32)
    rows = [{"reward_model": {"ground_truth": {"target": target}}} for target in (3, 4)]
    with GraderPool("slow_graders:every_other", workers=1) as grader:
        grading = Grading(rows, tokenizer=tokenizer, grader=grader)
        grading.take([0, 1], [tokens] * 2)
        verdicts = grading.result().verdicts
    assert verdicts == (Verdict(None, None, "not judged"), Verdict(1.0, True, "scored 1"))


def test_a_group_is_judged_once_it_is_whole(sampler: dict[str, Any]) -> None:
    """Rows come one by one and in no order; fillers behind the last group are ignored."""
    lengths = [4, 2, 3, 1, 5, 5]
    rows = [
        {"prompt": [], "number": n // 3, "reward_model": {"ground_truth": ""}} for n in range(6)
    ]
    with GraderPool("tests.rewards.hostile_graders:trl_shortest", workers=1) as grader:
        grading = Grading(rows, tokenizer=sampler["tokenizer"], grader=grader, group_size=3)
        for place in (5, 1, 7, 0, 3, 6, 2, 4):
            length = lengths[place] if place < 6 else 1
            grading.take([place], [np.full(length, 5, np.int32)])
        verdicts = grading.result().verdicts
    assert [verdict.correct for verdict in verdicts] == [n in (1, 3) for n in range(6)]


def test_fillers_are_nobodys_and_a_missing_row_is_not_made_up(sampler: dict[str, Any]) -> None:
    tokenizer = sampler["tokenizer"]
    tokens = np.array(tokenizer.encode("1+2=3", add_special_tokens=False), np.int32)
    with GraderPool("slow_graders:slow", workers=0) as grader:
        grading = Grading([{"number": 1}, {"number": 2}], tokenizer=tokenizer, grader=grader)
        grading.take([3, 1, 2], [tokens] * 3)
        grading.take([4, 5], [tokens] * 2)
        with pytest.raises(KeyError):
            grading.result()
        grading.take([0], [tokens])
        assert grading.result().responses == ("1+2=3", "1+2=3")


def test_what_fails_while_rows_are_written_is_raised_with_the_verdicts(
    sampler: dict[str, Any],
) -> None:
    grader = GraderPool("slow_graders:slow", workers=1)
    grading = Grading([{"number": 1}] * 24, tokenizer=sampler["tokenizer"], grader=grader)
    grader.close()
    sampler["sample"](finished=grading.take)
    with pytest.raises(PoolError, match="closed"):
        grading.result()


def test_a_hint_is_judged_with_what_goes_on_from_it() -> None:
    tokenizer = load_tokenizer("builtin:countdown")
    truth = {"numbers": [15, 17, 23], "target": 136}
    rows = [{"reward_model": {"ground_truth": truth}}] * 3

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prefixes = [ids("23-15=8\n"), ids("23-15=8\n17*8=136"), []]
    completions = [ids("17*8=136"), [], ids("17*8=136")]
    with GraderPool("countdown", workers=0) as grader:
        grading = Grading(rows, tokenizer=tokenizer, grader=grader, prefixes=prefixes)
        grading.take([2, 0, 1], [np.array(completions[i], np.int32) for i in (2, 0, 1)])
        verdicts = grading.result().verdicts
    assert [verdict.correct for verdict in verdicts] == [True, True, False]
