"""Completions for every row of a benchmark, graded."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from echorl_jax.evaluation.grading import grade_rollouts
from echorl_jax.models import Decoder
from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.rollout import generate
from echorl_jax.types import Array, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One graded completion of a row."""

    problem: int  # position among the rows
    sample: int
    data_source: str
    response: str
    verdict: Verdict
    tokens: int
    truncated: bool


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
    eos_ids: Sequence[int],
    top_p: float = 1.0,
    top_k: int = 0,
    rows_at_once: int = 256,
    mesh: Mesh | None = None,
) -> Iterator[Attempt]:
    """Yields ``samples`` attempts for each row, in order, as chunks of rows are done.

    The last chunk is filled up with repeats that are not yielded, so one compiled shape serves all.

    Args:
      rows: in verl's columns.
      prompts: their token ids.
      eos_ids: tokens that end a completion.
      rows_at_once: completions in one call of the sampler.
    """
    per_call = max(1, min(rows_at_once // samples, len(rows)))
    for start in range(0, len(rows), per_call):
        chunk = list(range(start, min(start + per_call, len(rows))))
        padded = chunk + chunk[-1:] * (per_call - len(chunk))
        rollouts = generate(
            model,
            params,
            [list(prompts[i]) for i in padded],
            jax.random.fold_in(key, start),
            group_size=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            eos_ids=eos_ids,
            mesh=mesh,
        )
        rollouts = jax.device_get(rollouts)
        texts = grade_rollouts(
            rollouts, [rows[i] for i in padded], tokenizer=tokenizer, grader=grader
        )
        for at in range(len(chunk) * samples):
            problem = chunk[at // samples]
            yield Attempt(
                problem=problem,
                sample=at % samples,
                data_source=rows[problem]["data_source"],
                response=texts.responses[at],
                verdict=texts.verdicts[at],
                tokens=int(rollouts.completion_length[at]),
                truncated=bool(rollouts.truncated[at]),
            )
