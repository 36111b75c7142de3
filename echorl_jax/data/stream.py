"""The endless stream of prompts that training reads."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain

from echorl_jax.data.errors import DataError
from echorl_jax.data.rows import Row
from echorl_jax.data.sources import Rows
from echorl_jax.data.tokens import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the rollout takes it, and the row that the grader needs."""

    ids: list[int]
    row: Row
    # Place among the rows of the stream.
    index: int
    # The last ids that are an expert's hint (UFT).
    hint_tokens: int = 0


class PromptStream(Iterator[list[Prompt]]):
    """Yields, step by step, this process's share of ``prompts_per_step`` prompts.

    Rows come in an order drawn from ``seed``, another one each epoch; with weights on the sources,
    each part is drawn by its share and repeated on its own. Prompts longer than
    ``max_prompt_tokens`` are left out and counted. Every process walks the same global order and
    keeps its own slice of each step, so a step has the same prompts for any number of processes,
    and a state saved by one run fits another with more or fewer.

    Args:
      rows: what :func:`load_rows` gives, or any sequence of rows.
      tokenizer: makes the ids.
      prompts_per_step: P over all processes; a multiple of ``process_count``.
      seed: of the order.
      max_prompt_tokens: longest prompt that is kept.
      template: name of the prompt template.
      process_index: this process, in ``[0, process_count)``.
      process_count: processes that share each step.

    Raises:
      DataError: no rows, a share that does not come out whole, or (on reading) no prompt that is
      short enough.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        prompts_per_step: int,
        seed: int,
        max_prompt_tokens: int,
        template: str = "chat",
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if not rows:
            raise DataError("no rows to train on")
        if prompts_per_step < 1 or prompts_per_step % process_count:
            raise DataError(
                f"prompts_per_step={prompts_per_step}: must be a multiple of the "
                f"{process_count} processes"
            )
        self._rows = rows
        self._tokenizer = tokenizer
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self._prompts_per_step = prompts_per_step
        share = prompts_per_step // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        # Encoding a step takes milliseconds: no reader threads, so nothing is left running at exit.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
        self._order = iter(_row_order(rows, seed).to_iter_dataset(options))
        self._too_long = 0
        # Any row that fits turns up within two epochs, of the rarest part if there are weights.
        rarest = min(rows.weights) if isinstance(rows, Rows) and rows.weights else 1.0
        self._patience = 2 * len(rows) / rarest

    @property
    def too_long(self) -> int:
        """Prompts left out so far for their length, over all processes."""
        return self._too_long

    def __next__(self) -> list[Prompt]:
        step: list[Prompt] = []
        misses = 0
        while len(step) < self._prompts_per_step:
            index = int(next(self._order))
            row = self._rows[index]
            ids = encode_prompt(self._tokenizer, row, self._template)
            if len(ids) <= self._max_prompt_tokens:
                step.append(Prompt(ids, row, index))
                misses = 0
                continue
            self._too_long += 1
            misses += 1
            if misses > self._patience:
                raise DataError(f"no prompt is within max_prompt_tokens={self._max_prompt_tokens}")
        return step[self._share]

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, as JSON can hold it."""
        return {
            "position": self._order.get_state(),
            "rows": len(self._rows),
            "too_long": self._too_long,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`get_state` was called.

        Raises:
          DataError: the state is of a stream over another number of rows.
        """
        if state["rows"] != len(self._rows):
            raise DataError(
                f"the saved stream had {state['rows']} rows, this one has {len(self._rows)}"
            )
        self._order.set_state(state["position"])
        self._too_long = state["too_long"]


def _row_order(rows: Sequence[Row], seed: int) -> grain.MapDataset[int]:
    if not isinstance(rows, Rows) or rows.weights is None:
        return _shuffled(0, len(rows), seed)
    ends = zip(rows.starts, rows.starts[1:], strict=False)
    parts = [_shuffled(start, stop, seed + k) for k, (start, stop) in enumerate(ends)]
    return grain.MapDataset.mix(parts, weights=rows.weights)


def _shuffled(start: int, stop: int, seed: int) -> grain.MapDataset[int]:
    return grain.MapDataset.range(start, stop).seed(seed).shuffle().repeat()
