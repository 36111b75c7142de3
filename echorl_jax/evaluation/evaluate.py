"""Completions for every row of a benchmark, graded while others are generated."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

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
      engine: samples.
      params: the policy's parameters.
      prompts: with rows in verl's columns, numbers for the keys, and prefixes of completions.
      key: PRNG key.
      sampling: how completions are drawn.
      tokenizer: decodes completions.
      grader: judges them.
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
