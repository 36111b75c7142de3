"""Completions for every row of a benchmark, graded while others are generated."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from echorl_jax.evaluation.grading import Grading
from echorl_jax.models import Decoder
from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.rollout import Progress, generate
from echorl_jax.types import Array, HostArray, PyTree, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Attempts at one row that have keys of their own: sample s of row r draws as row r * 4096 + s.
MOST_SAMPLES = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """One graded completion of a row."""

    problem: int  # position among the rows
    sample: int
    data_source: str
    response: str
    verdict: Verdict
    ids: HostArray  # int32, a prefix and the end token included
    entropy: HostArray  # float32 at each of them, in nats
    truncated: bool


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call of the sampler wrote, with its verdicts on their way."""

    places: Sequence[int]  # rows of the call, without the repeats that fill it up
    rollouts: Rollouts  # NumPy
    grading: Grading


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: Decoder) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's and the model's."""
    own: Any = tokenizer.eos_token_id
    return tuple(sorted({own, *model.config.eos_ids}))


def attempt_rows(
    model: Decoder,
    params: PyTree,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    prefixes: Sequence[Sequence[int]] | None = None,
    rows_at_once: int = 256,
    slots: int = 0,
    numbers: Sequence[int] | None = None,
    done: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Attempt]:
    """Yields ``samples`` attempts for each row, in order, as calls of the sampler are done.

    What is drawn for a sample depends on the row's number and the sample's alone. Calls begin at
    fixed rows and have one shape (the last is filled up with repeats that are not yielded), so that
    work which goes on after ``done`` attempts repeats the very computation. Grading processes judge
    what has ended while the rest of its call, and the next one, are generated.

    Args:
      rows: in verl's columns.
      prompts: their token ids.
      prefixes: how each row's attempts have to begin; they are judged with it.
      rows_at_once: completions in one call of the sampler.
      slots: completions decoded at once; 0 lets the sampler choose.
      numbers: each row's number in the keys; its position unless given.
      done: attempts at the beginning that are not wanted again.
      progress: called by the sampler at each look.
    """
    per_call = max(1, min(rows_at_once // samples, len(rows)))
    longest = max(map(len, prompts), default=0)
    numbers = range(len(rows)) if numbers is None else numbers

    def call(start: int) -> _Call:
        places = range(start, min(start + per_call, len(rows)))
        filled = [*places, *[places[-1]] * (per_call - len(places))]
        judged = [rows[i] for i in places for _ in range(samples)]
        grading = Grading(judged, tokenizer=tokenizer, grader=grader, all_texts=True)
        rollouts = generate(
            model,
            params,
            [list(prompts[i]) for i in filled],
            key,
            group_size=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_ids=end_tokens(tokenizer, model),
            row_ids=[numbers[i] * MOST_SAMPLES + s for i in filled for s in range(samples)],
            prefixes=prefixes and [prefixes[i] for i in filled for _ in range(samples)],
            slots=slots,
            prompt_tokens=longest,
            mesh=mesh,
            progress=progress,
            finished=grading.take,
        )
        return _Call(places, jax.device_get(rollouts), grading)

    calls = map(call, range(done // samples // per_call * per_call, len(rows), per_call))
    # Pairs, so that a call's verdicts are waited for when the next one has been generated.
    for before, _ in itertools.pairwise(itertools.chain(calls, [None])):
        assert before is not None
        for attempt in _attempts(before, rows, samples):
            if attempt.problem * samples + attempt.sample >= done:
                yield attempt


def _attempts(call: _Call, rows: Sequence[Mapping[str, Any]], samples: int) -> Iterator[Attempt]:
    texts, rollouts = call.grading.result(), call.rollouts
    for at, verdict in enumerate(texts.verdicts):
        problem, length = call.places[at // samples], int(rollouts.completion_length[at])
        yield Attempt(
            problem=problem,
            sample=at % samples,
            data_source=rows[problem]["data_source"],
            response=texts.responses[at],
            verdict=verdict,
            ids=rollouts.completion_ids[at, :length],
            entropy=rollouts.token_entropy[at, :length],
            truncated=bool(rollouts.truncated[at]),
        )
