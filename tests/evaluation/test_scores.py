"""pass@k and intervals against enumeration and textbook values."""

from itertools import combinations

import pytest

from echorl_jax.evaluation.scores import pass_at_k, score_by_source


@pytest.mark.parametrize("attempts", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(attempts: int) -> None:
    for successes in range(attempts + 1):
        outcomes = [True] * successes + [False] * (attempts - successes)
        for k in range(1, attempts + 1):
            subsets = list(combinations(outcomes, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(attempts, successes, k) == pytest.approx(expected)


def test_sources_are_scored_apart() -> None:
    outcomes = [("a", 0, True), ("a", 0, False), ("b", 0, True), ("b", 1, False)]
    scores = score_by_source(outcomes)
    assert scores["a"].pass_at == {1: 0.5, 2: 1.0} and scores["b"].pass_at == {1: 0.5}
    assert scores["b"].problems == 2
