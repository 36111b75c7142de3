"""Decodes sampled token ids and has them graded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from echorl_jax.errors import one_line
from echorl_jax.parallel import from_shares, own_share, texts_from_shares
from echorl_jax.rewards import GraderPool, PoolError, Verdict
from echorl_jax.rewards.verdict import MAX_REASON
from echorl_jax.types import HostArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The longest reason in UTF-8, of a verdict and of grading that failed as a whole.
REASON_BYTES = 4 * MAX_REASON
FAILURE_BYTES = 600


@dataclasses.dataclass(frozen=True)
class GradedTexts:
    """The completions as text with their verdicts, row by row."""

    responses: tuple[str, ...]  # "" for a row that another process has decoded
    verdicts: tuple[Verdict, ...]


class Grading:
    """Verdicts on completions that are handed in as they are written, in any order and any pieces.

    Each is decoded without special tokens and judged against its row while the caller goes on. Each
    of several processes does this for its share of them; all get all verdicts, in the order of
    ``rows``: the same, whenever what was handed in.

    Args:
      rows: what each completion is judged against, N.
      tokenizer: decodes.
      grader: judges; a bad item costs only itself.
      all_texts: decode other processes' completions too.
      prefixes: tokens before each completion that belong to what is judged, such as a hint.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        tokenizer: "PreTrainedTokenizerBase",
        grader: GraderPool,
        all_texts: bool = False,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._rows = rows
        self._prefixes = prefixes or [()] * len(rows)
        self._tokenizer = tokenizer
        self._grader = grader
        self._decoded = range(len(rows)) if all_texts else _own(len(rows))
        self._texts = [""] * len(rows)
        self._parts: list[tuple[Sequence[int], Future[list[Verdict]]]] = []

    def take(self, places: Sequence[int], completions: Sequence[HostArray]) -> None:
        """Starts on some of the completions; places from N on are padding and are ignored.

        Args:
          places: their numbers among the rows.
          completions: their tokens.
        """
        wanted = {i: ids for i, ids in zip(places, completions, strict=True) if i in self._decoded}
        if not wanted:  # a tokenizer may decode no rows as one empty text
            return
        own = [i for i in wanted if i in _own(len(self._rows))]
        try:
            ids = [[*self._prefixes[i], *tokens.tolist()] for i, tokens in wanted.items()]
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            for place, text in zip(wanted, texts, strict=True):
                self._texts[place] = text
            judged = [dict(self._rows[i]) for i in own]
            self._parts.append((own, self._grader.submit([self._texts[i] for i in own], judged)))
        except Exception as error:  # the other processes learn of it where they look for verdicts
            failed: Future[list[Verdict]] = Future()
            failed.set_exception(error)
            self._parts.append((own, failed))

    def result(self) -> GradedTexts:
        """Waits for the verdicts; all processes call this in the same order.

        Raises:
          PoolError: the grading processes cannot be started. What fails on one of several processes
            is raised on all, so that none waits for another's verdicts.
        """
        own = _if_all_have(self._own_verdicts)
        verdicts = _from_all_processes(own, len(self._rows))
        return GradedTexts(tuple(self._texts), tuple(verdicts))

    def _own_verdicts(self) -> list[Verdict]:
        found: dict[int, Verdict] = {}
        for places, verdicts in self._parts:
            found.update(zip(places, verdicts.result(), strict=True))
        return [found[i] for i in _own(len(self._rows))]


def _own(count: int) -> range:
    return range(count)[own_share(count)]


def _if_all_have(work: Callable[[], list[Verdict]]) -> list[Verdict]:
    """The verdicts of this process, once it is known that every process has its own."""
    try:
        verdicts, failure = work(), None
    except Exception as error:
        verdicts, failure = [], error
    if failure is not None and jax.process_count() == 1:
        raise failure
    reason = "" if failure is None else one_line(failure)
    told = texts_from_shares([reason], jax.process_count(), most_bytes=FAILURE_BYTES)
    for process, reason in enumerate(told):
        if reason:
            raise PoolError(f"process {process}: {reason}") from failure
    return verdicts


def _from_all_processes(own: Sequence[Verdict], count: int) -> list[Verdict]:
    """The verdicts on all ``count`` rows, of which this process has given its share."""
    # A score is finite, so NaN can stand for None.
    scores = np.array([verdict.score for verdict in own], np.float64)
    correct = np.array([verdict.correct for verdict in own], bool)
    # As whole numbers: JAX would round a 64-bit score on its way.
    words = from_shares(scores.view(np.uint32).reshape(-1, 2), count)
    reasons = texts_from_shares([verdict.reason for verdict in own], count, most_bytes=REASON_BYTES)
    return [
        Verdict(None, None, reason)
        if np.isnan(score)
        else Verdict(float(score), bool(right), reason)
        for score, right, reason in zip(
            np.ascontiguousarray(words).view(np.float64)[:, 0],
            from_shares(correct, count),
            reasons,
            strict=True,
        )
    ]
