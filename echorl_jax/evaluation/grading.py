"""From sampled token ids to verdicts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class GradedTexts:
    """The completions as text with their verdicts, row by row."""

    responses: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def grade_rollouts(
    rollouts: Rollouts,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
) -> GradedTexts:
    """Decodes each completion without special tokens and has it graded against its prompt's row.

    Args:
      rollouts: NumPy arrays.
      rows: one per prompt.
      tokenizer: decodes.
      grader: judges; a bad item costs only itself.
    """
    completions = zip(rollouts.completion_ids, rollouts.completion_length, strict=True)
    ids = [tokens[:length].tolist() for tokens, length in completions]
    responses = tokenizer.batch_decode(ids, skip_special_tokens=True)
    verdicts = grader.grade(responses, [dict(rows[g]) for g in np.asarray(rollouts.group)])
    return GradedTexts(tuple(responses), tuple(verdicts))
