"""pass@k and intervals against enumeration and textbook values."""

from itertools import combinations

import pytest

from echorl_jax.evaluation.evaluate import (
    majority_at_k,
    majority_by_source,
    pass_at_k,
    score_by_source,
)
from echorl_jax.evaluation.generations import Outcome
from echorl_jax.evaluation.table import print_results, summarise


@pytest.mark.parametrize("attempts", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(attempts: int) -> None:
    for successes in range(attempts + 1):
        outcomes = [True] * successes + [False] * (attempts - successes)
        for k in range(1, attempts + 1):
            subsets = list(combinations(outcomes, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(attempts, successes, k) == pytest.approx(expected)


def test_a_majority_is_of_answers_and_right_ones_are_one_answer() -> None:
    a, b, c, none = ("1/2", True), ("0.5", True), ("2", False), (None, False)
    assert majority_at_k([a, b, c, ("3", False)], 4) == 1.0
    assert majority_at_k([c, c, a], 3) == 0.0
    assert majority_at_k([c, c, a, b, none], 5) == 0.5  # a tie
    assert majority_at_k([none, none, a], 3) == 1.0 and majority_at_k([none] * 3, 3) == 0.0
    # Every subset of three of these five, by enumeration.
    votes = [a, b, c, c, ("4", False)]
    exact = sum(majority_at_k(list(each), 3) for each in combinations(votes, 3)) / 10
    assert majority_at_k(votes, 3) == pytest.approx(exact, abs=0.1)
    outcomes = [("s", 0, right, said) for said, right in votes] + [("t", 1, True, None)] * 4
    assert majority_by_source(outcomes).keys() == {"s"}
    assert majority_by_source(outcomes)["s"].keys() == {4, 5}


def test_sources_are_scored_apart() -> None:
    outcomes = [("a", 0, True), ("a", 0, False), ("b", 0, True), ("b", 1, False)]
    scores = score_by_source(outcomes)
    assert scores["a"].pass_at == {1: 0.5, 2: 1.0} and scores["b"].pass_at == {1: 0.5}
    assert scores["b"].problems == 2


def test_unjudged_attempts_are_not_counted() -> None:
    # Problem 0 has 1 of 2 right, problem 1 is wrong once, problem 2 is not judged.
    outcomes = [("a", 0, True), ("a", 0, None), ("a", 0, False), ("a", 1, False), ("a", 1, None)]
    score = score_by_source([*outcomes, ("a", 2, None), ("b", 3, None)])["a"]
    # pass@2 is of the only problem with two judged attempts.
    assert (score.problems, score.samples) == (2, 2)
    assert score.mean == 0.25 and score.pass_at == {1: 0.25, 2: 1.0}
    assert list(score_by_source([("b", 3, None)])) == []


def test_columns_without_content_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def outcome(source: str, problem: int, *, greedy: bool, correct: bool) -> Outcome:
        return Outcome(source, problem, greedy, correct, "", tokens=10, truncated=False, metrics={})

    greedy = [outcome("a", i, greedy=True, correct=i == 0) for i in range(2)]
    print_results(summarise(greedy), left_out=0, bad=0)
    printed = capsys.readouterr().out
    assert "greedy" in printed and "avg@k" not in printed and "pass@k" not in printed
    sampled = [outcome("a", 0, greedy=False, correct=right) for right in (True, False)]
    sampled.append(outcome("b", 1, greedy=False, correct=True))
    print_results(summarise(sampled), left_out=2, bad=0)
    printed = capsys.readouterr().out
    assert "greedy" not in printed and "@2 0.500" in printed and "@2 1.000" in printed
    mean, left_out = [line.split() for line in printed.splitlines() if line.strip()][-2:]
    assert mean == ["mean", "of", "sources", "0.750"]
    assert left_out == "left out: 2 prompts too long".split()
