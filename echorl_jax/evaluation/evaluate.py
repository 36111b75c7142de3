"""Completions for every row of a benchmark, and their scores: avg@k, pass@k, intervals."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from echorl_jax.data import Prompt
from echorl_jax.environment import Attempts, Engine, sample_and_grade
from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.rollout import Progress, Sampling
from echorl_jax.types import Array, HostArray, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """One graded completion of a prompt."""

    problem: int  # position among the prompts
    sample: int
    data_source: str
    response: str
    verdict: Verdict
    ids: HostArray  # int32, a prefix and the end token included
    entropy: HostArray  # float32 at each of them, in nats
    truncated: bool


def attempt_prompts(
    engine: Engine,
    params: PyTree,
    prompts: Sequence[Prompt],
    key: Array,
    *,
    sampling: Sampling,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
    rows_at_once: int = 256,
    done: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Attempt]:
    """Yields ``sampling.group_size`` graded completions for each prompt, prompt by prompt.

    Draws depend on ``key`` and on the numbers of the prompt and the sample alone. Calls begin at
    fixed prompts and have one shape (the last is filled up with repeats that are not yielded), so
    that a continuation after ``done`` attempts repeats the same computation. Grading processes
    judge rows that have ended while the rest of the call, and the next one, are generated.

    Args:
      prompts: with rows in verl's columns, numbers for the keys, and prefixes of completions.
      sampling: how completions are drawn.
      rows_at_once: completions in one call of the engine.
      done: attempts at the beginning that are left out.
      progress: called by the engine at each poll.
    """
    samples = sampling.group_size
    per_call = max(1, min(rows_at_once // samples, len(prompts)))

    def call(start: int) -> tuple[int, Attempts]:
        part = list(prompts[start : start + per_call])
        attempts = sample_and_grade(
            engine,
            params,
            part + part[-1:] * (per_call - len(part)),
            key,
            sampling=sampling,
            tokenizer=tokenizer,
            grader=grader,
            graded_prompts=len(part),
            all_texts=True,
            progress=progress,
        )
        return start, attempts

    calls = map(call, range(done // samples // per_call * per_call, len(prompts), per_call))
    # Pairs: a call's verdicts are waited for when the next call has been generated.
    for before, _ in itertools.pairwise(itertools.chain(calls, [None])):
        assert before is not None
        for attempt in _attempts(*before, prompts, samples):
            if attempt.problem * samples + attempt.sample >= done:
                yield attempt


def _attempts(
    start: int, attempts: Attempts, prompts: Sequence[Prompt], samples: int
) -> Iterator[Attempt]:
    texts, rollouts = attempts.verdicts(), attempts.rollouts
    for row, verdict in enumerate(texts.verdicts):
        problem, length = start + row // samples, int(rollouts.completion_length[row])
        yield Attempt(
            problem=problem,
            sample=row % samples,
            data_source=prompts[problem].row["data_source"],
            response=texts.responses[row],
            verdict=verdict,
            ids=rollouts.completion_ids[row, :length],
            entropy=rollouts.token_entropy[row, :length],
            truncated=bool(rollouts.truncated[row]),
        )


# Subsets of a problem's attempts that maj@k is the mean of.
SUBSETS = 256
# Redraws of the units in a bootstrap.
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a share; ``(0, 1)`` without trials.

    It stays inside [0, 1] and does not collapse at shares of 0 and 1. Source: Wilson 1927, JASA 22.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    from scipy.stats import binomtest  # a second to import, which few commands need

    if trials == 0:
        return 0.0, 1.0
    low, high = binomtest(round(successes), trials).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of a (weighted) mean over independent units.

    The same numbers give the same interval.

    Args:
      values: one mean per unit, such as a trajectory.
      weights: how much each unit counts, such as its tokens; equal by default.

    Raises:
      ValueError: there are no values, or no weight.

    >>> bootstrap_mean([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    from scipy.stats import bootstrap

    unit = np.asarray(values, np.float64)
    weight = np.ones_like(unit) if weights is None else np.asarray(weights, np.float64)
    if unit.size == 0 or weight.sum() <= 0:
        raise ValueError("bootstrap_mean: nothing to average")
    if len(set(values)) == 1:
        return float(unit[0]), float(unit[0])

    def mean(unit: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
        total = weight.sum(axis=axis)
        # A redraw without weight has no mean; the overall one takes its place.
        mean = (weight * unit).sum(axis=axis) / np.where(total > 0, total, 1.0)
        return np.where(total > 0, mean, overall)

    overall = float((weight * unit).sum() / weight.sum())
    result = bootstrap(
        (unit, weight), mean, paired=True, n_resamples=RESAMPLES, method="percentile", rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of a set of problems, each tried ``samples`` times."""

    problems: int
    samples: int  # judged attempts per problem; the most if they differ
    mean: float  # avg@k: the mean success of all attempts, pass@1 of a random one
    low: float  # 95% interval of the mean
    high: float
    # k -> unbiased pass@k over the problems with k attempts, for k = 1, 2, 4, ... and samples
    pass_at: dict[int, float]
    pass_range: tuple[float, float]  # 95% interval of the pass@k with the largest k


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Completion lengths (tokens) and the share that was cut off before an end token."""

    mean: float
    median: float
    p95: float
    longest: int
    truncated: float


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


def majority_at_k(votes: Sequence[tuple[str | None, bool]], k: int) -> float:
    """The chance that the most frequent answer of k of the attempts is right (maj@k).

    Right answers are one answer, however they are spelled; an attempt without an answer does not
    vote; of several most frequent answers each wins alike. Exact for all attempts, else a mean over
    subsets that are always the same. Source: Wang et al. 2022, arXiv 2203.11171.

    Args:
      votes: (answer, correct) of each attempt.

    Raises:
      ValueError: ``k`` above the number of attempts.

    >>> majority_at_k([("4", True), ("4.0", True), ("5", False)], 3)
    1.0
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} needs at least {k} attempts, not {len(votes)}")

    def won(places: Iterable[int]) -> float:
        cast = [votes[i] for i in places]
        # No answer is an empty text: it stands for the right ones.
        counts = Counter("" if right else said for said, right in cast if right or said)
        first = [said for said, count in counts.items() if count == max(counts.values())]
        return ("" in first) / max(len(first), 1)

    if k == len(votes):
        return won(range(k))
    random = np.random.default_rng(0)
    subsets = [random.choice(len(votes), k, replace=False) for _ in range(SUBSETS)]
    return math.fsum(map(won, subsets)) / SUBSETS


def majority_by_source(
    outcomes: Iterable[tuple[str, int, bool | None, str | None]],
) -> dict[str, dict[int, float]]:
    """maj@k per data source for the k of pass@k from 3 on; none where no attempt has an answer.

    Args:
      outcomes: as for :func:`score_by_source`, and each attempt's answer.
    """
    by_source: dict[str, dict[int, list[tuple[str | None, bool]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for source, problem, correct, answer in outcomes:
        if correct is not None:
            by_source[source][problem].append((answer, correct))
    found = {}
    for source, problems in by_source.items():
        votes = list(problems.values())
        if any(answer is not None for each in votes for answer, _ in each):
            found[source] = {
                k: math.fsum(majority_at_k(each, k) for each in votes if len(each) >= k)
                / sum(len(each) >= k for each in votes)
                for k in _ks(max(map(len, votes)))
                if k > 2  # of two attempts no majority differs from a draw
            }
    return found


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def score_by_source(outcomes: Iterable[tuple[str, int, bool | None]]) -> dict[str, Score]:
    """Scores per data source; none for a source without a judged attempt.

    Args:
      outcomes: (data source, problem, correct) for each attempt; None is not judged and not
        counted. The interval counts problems, not attempts, since attempts at one problem are
        alike.

    >>> score_by_source([("a", 0, True), ("a", 0, False), ("a", 1, True), ("a", 1, True)])["a"].mean
    0.75
    """
    by_source: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for source, problem, correct in outcomes:
        if correct is not None:
            by_source[source][problem].append(correct)
    return {source: _score(list(groups.values())) for source, groups in by_source.items()}


def length_stats(tokens: Sequence[int], truncated: Sequence[bool]) -> Lengths:
    """Statistics of the lengths of at least one completion.

    >>> length_stats([1, 2, 9], [False, False, True]).median
    2.0
    """
    return Lengths(
        mean=float(np.mean(tokens)),
        median=float(np.median(tokens)),
        p95=float(np.quantile(tokens, 0.95)),
        longest=max(tokens),
        truncated=float(np.mean(truncated)),
    )


def _score(problems: list[list[bool]]) -> Score:
    samples = max(map(len, problems))
    means = [sum(p) / len(p) for p in problems]
    ks = _ks(samples)
    passes = {k: [pass_at_k(len(p), sum(p), k) for p in problems if len(p) >= k] for k in ks}
    mean = sum(means) / len(means)
    low, high = _interval(means)
    return Score(
        problems=len(problems),
        samples=samples,
        mean=mean,
        low=low,
        high=high,
        pass_at={k: sum(values) / len(values) for k, values in passes.items()},
        pass_range=_interval(passes[ks[-1]]),
    )


def _interval(values: list[float]) -> tuple[float, float]:
    """Wilson's for shares of problems; a bootstrap over problems where each problem has a share.

    Resampling equal values says nothing: Wilson's is taken there too.
    """
    if set(values) <= {0.0, 1.0} or len(set(values)) == 1:
        return wilson(sum(values), len(values))
    return bootstrap_mean(values)
