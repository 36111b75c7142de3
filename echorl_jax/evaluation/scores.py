"""Success rates with their uncertainty."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable

from echorl_jax.evaluation.intervals import wilson


@dataclasses.dataclass(frozen=True)
class Score:
    """What a set of problems, each tried ``samples`` times, came to."""

    problems: int
    samples: int  # attempts per problem; the smallest if they differ
    mean: float  # avg@k: the mean success of all attempts, pass@1 of a random one
    low: float  # 95% interval of the mean
    high: float
    pass_at: dict[int, float]  # k -> unbiased pass@k, for k = 1, 2, 4, ... up to samples


def pass_at_k(attempts: int, successes: int, k: int) -> float:
    """Unbiased chance that k of the attempts hold a success: ``1 - C(n-c, k) / C(n, k)``.

    Source: Chen et al. 2021, arXiv 2107.03374.

    Raises:
      ValueError: ``k`` above ``attempts``.

    >>> round(pass_at_k(4, 1, 2), 3)
    0.5
    """
    if not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} needs at least {k} attempts, not {attempts}")
    return 1.0 - math.comb(attempts - successes, k) / math.comb(attempts, k)


def score_by_source(outcomes: Iterable[tuple[str, int, bool]]) -> dict[str, Score]:
    """Scores per data source.

    Args:
      outcomes: (data source, problem, correct) for each attempt. The interval counts problems, not
        attempts, since attempts at one problem are alike.

    >>> score_by_source([("a", 0, True), ("a", 0, False), ("a", 1, True), ("a", 1, True)])["a"].mean
    0.75
    """
    by_source: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for source, problem, correct in outcomes:
        by_source[source][problem].append(correct)
    return {source: _score(list(groups.values())) for source, groups in by_source.items()}


def _score(problems: list[list[bool]]) -> Score:
    samples = min(map(len, problems))
    mean = sum(sum(p) / len(p) for p in problems) / len(problems)
    low, high = wilson(mean * len(problems), len(problems))
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    pass_at = {k: sum(pass_at_k(len(p), sum(p), k) for p in problems) / len(problems) for k in ks}
    return Score(len(problems), samples, mean, low, high, pass_at)
