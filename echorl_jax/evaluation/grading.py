"""From sampled token ids to verdicts."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.parallel import from_shares, own_share, texts_from_shares
from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.rewards.verdict import MAX_REASON
from echorl_jax.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The longest reason in UTF-8.
REASON_BYTES = 4 * MAX_REASON


@dataclasses.dataclass(frozen=True)
class GradedTexts:
    """The completions as text with their verdicts, row by row."""

    responses: tuple[str, ...]  # "" for a row that another process has decoded
    verdicts: tuple[Verdict, ...]


@dataclasses.dataclass(frozen=True)
class Grading:
    """Verdicts on their way."""

    responses: list[str]  # N, as in :class:`GradedTexts`
    own: Future[list[Verdict]]

    def result(self) -> GradedTexts:
        """Waits for them; all processes call this in the same order."""
        verdicts = _from_all_processes(self.own.result(), len(self.responses))
        return GradedTexts(tuple(self.responses), tuple(verdicts))


def grade_rollouts(
    rollouts: Rollouts,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
) -> GradedTexts:
    """:func:`start_grading`, and its result."""
    return start_grading(rollouts, rows, tokenizer=tokenizer, grader=grader).result()


def start_grading(
    rollouts: Rollouts,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
) -> Grading:
    """Decodes each completion without special tokens and has it graded against its prompt's row.

    Grading processes work while the caller goes on.

    Each of several processes does this for its share of the rollouts; all get all verdicts.

    Args:
      rollouts: NumPy arrays.
      rows: one per prompt.
      tokenizer: decodes.
      grader: judges; a bad item costs only itself.
    """
    count, share = len(rollouts.group), own_share(len(rollouts.group))
    lengths = rollouts.completion_length[share]
    completions = zip(rollouts.completion_ids[share], lengths, strict=True)
    ids = [tokens[:length].tolist() for tokens, length in completions]
    responses = tokenizer.batch_decode(ids, skip_special_tokens=True)
    judged = [dict(rows[g]) for g in np.asarray(rollouts.group)[share]]
    texts = [""] * count
    texts[share] = responses
    return Grading(texts, grader.submit(responses, judged))


def _from_all_processes(own: Sequence[Verdict], count: int) -> list[Verdict]:
    """The verdicts on all ``count`` rows, of which this process has given its share."""
    scores = np.array([verdict.score for verdict in own], np.float64)
    correct = np.array([verdict.correct for verdict in own], bool)
    # As whole numbers: JAX would round a 64-bit score on its way.
    words = from_shares(scores.view(np.uint32).reshape(-1, 2), count)
    reasons = texts_from_shares([verdict.reason for verdict in own], count, most_bytes=REASON_BYTES)
    return [
        Verdict(float(score), bool(right), reason)
        for score, right, reason in zip(
            np.ascontiguousarray(words).view(np.float64)[:, 0],
            from_shares(correct, count),
            reasons,
            strict=True,
        )
    ]
