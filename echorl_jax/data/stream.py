"""The endless stream of prompts that training reads."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import grain
import numpy as np

from echorl_jax.data.pictures import Processor, UnreadImages
from echorl_jax.data.rows import BadRow, DataError, Row
from echorl_jax.data.sources import Rows
from echorl_jax.data.tokens import Template, encode_prompt
from echorl_jax.parallel import from_shares, own_share
from echorl_jax.types import HostArray, Image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the sampler takes it, and the row that the grader needs."""

    ids: Sequence[int]
    row: Mapping[str, Any]
    index: int  # place among the rows of the data
    hint_tokens: int = 0  # the last ids that are an expert's hint (UFT)
    prefix: Sequence[int] = ()  # tokens that every completion begins with and counts
    images: Sequence[Image] = ()  # as the vision tower takes them
    number: int | None = None  # in the PRNG keys of its rows; None takes its place in the call


def number_prompts(
    rows: Sequence[Row],
    ids: Sequence[Sequence[int]],
    processor: Processor | None,
    *,
    longest: int,
) -> list[Prompt]:
    """The prompts that fit, numbered in order, for an evaluation; images are read when used.

    Args:
      rows, ids: of all prompts.
      processor: of a model with a vision tower.
      longest: tokens of a prompt that is kept.
    """
    fits = [i for i in range(len(rows)) if len(ids[i]) <= longest]
    if processor is None:
        return [Prompt(ids[i], rows[i], i, number=n) for n, i in enumerate(fits)]
    fits = [i for i in fits if not processor.has_too_many(ids[i])]
    return [
        Prompt(ids[i], rows[i], i, images=UnreadImages(rows[i], processor), number=n)
        for n, i in enumerate(fits)
    ]


class _UnreadRow(Mapping[str, Any]):
    """A row that another process has read; this process reads it on first access."""

    def __init__(self, rows: Sequence[Row], index: int) -> None:
        self._rows = rows
        self._index = index

    def __getitem__(self, name: str) -> Any:
        return self._rows[self._index][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows[self._index])

    def __len__(self) -> int:
        return len(self._rows[self._index])


class PromptStream(Iterator[list[Prompt]]):
    """Yields, step by step, ``prompts_per_step`` prompts, the same on every process.

    Rows come in an order drawn from ``seed``, another one each epoch; with weights on the sources,
    each part is drawn by its share and repeated on its own. Prompts longer than
    ``max_prompt_tokens`` are left out and counted. Every process walks the same global order of
    places, reads and encodes only its share of the rows, and gets the ids of the others: a step has
    the same prompts for any number of processes, and a state saved by one run fits another with
    more or fewer. A row that is retired when its turn comes is passed over.

    Args:
      rows: what :func:`load_rows` gives, or any sequence of rows.
      prompts_per_step: P.
      seed: of the order.
      max_prompt_tokens: longest prompt that is kept.
      template: of the prompts.
      processor: of a model with a vision tower; prompts then have their images. A prompt with more
        image tokens than it allows is left out and counted too.
      on_bad_row: "skip" leaves out, and counts, a row whose picture cannot be decoded.
      retired: True for the place of a row that must not come again; the same on every process.

    Raises:
      DataError: no rows, no prompts in a step, or (on reading) no prompt that is short enough and
        not retired, or a picture that cannot be decoded.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        prompts_per_step: int,
        seed: int,
        max_prompt_tokens: int,
        template: Template | str = "chat",
        processor: Processor | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        retired: Callable[[int], bool] = lambda place: False,
    ) -> None:
        if not rows:
            raise DataError("no rows to train on")
        if prompts_per_step < 1:
            raise DataError(f"prompts_per_step={prompts_per_step}: must be at least 1")
        self._rows = rows
        self._tokenizer = tokenizer
        self._template = template
        self._processor = processor
        self._skip_bad = on_bad_row == "skip"
        self._max_prompt_tokens = max_prompt_tokens
        self._prompts_per_step = prompts_per_step
        self._retired = retired
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
        while (missing := self._prompts_per_step - len(step)) > 0:
            for prompt in self._read(self._next_places(missing)):
                if prompt is not None:
                    step.append(prompt)
                    misses = 0
                    continue
                self._too_long += 1
                misses += 1
                if misses > self._patience:
                    raise DataError(
                        f"no prompt is within max_prompt_tokens={self._max_prompt_tokens}"
                    )
        return step

    def _next_places(self, count: int) -> list[int]:
        """The next rows that are not retired."""
        places: list[int] = []
        passed_over = 0
        while len(places) < count:
            place = int(next(self._order))
            if not self._retired(place):
                places.append(place)
                passed_over = 0
                continue
            passed_over += 1
            if passed_over > self._patience:
                raise DataError("no prompt is left: all that fit have reached data.retire_above")
        return places

    def _read(self, places: Sequence[int]) -> list[Prompt | None]:
        """The rows at these places as prompts; None for one that is too long."""
        longest = self._max_prompt_tokens
        share = own_share(self._prompts_per_step)
        # The first column is the length. One shape for all calls: one compiled exchange.
        encoded = np.zeros((share.stop - share.start, 1 + longest), np.int32)
        own: dict[int, Row] = {}
        images: dict[int, Sequence[Image]] = {}
        for line, place in zip(encoded, places[share], strict=False):
            own[place] = self._rows[place]
            ids, images[place] = self._encode(place, own[place])
            line[0] = len(ids)
            line[1 : 1 + len(ids)] = ids[:longest]
        found = from_shares(encoded, self._prompts_per_step)[: len(places)]

        def prompt(place: int, ids: HostArray) -> Prompt:
            row = own[place] if place in own else _UnreadRow(self._rows, place)
            if self._processor is not None and place not in images:
                images[place] = self._processor.images(row)
            return Prompt(ids.tolist(), row, place, images=images.get(place, ()))

        return [
            prompt(place, line[1 : 1 + line[0]]) if line[0] <= longest else None
            for place, line in zip(places, found, strict=True)
        ]

    def _encode(self, place: int, row: Row) -> tuple[Sequence[int], Sequence[Image]]:
        """A row's ids and images; ids that are too many for a prompt that is left out."""
        processor = self._processor
        too_long = range(self._max_prompt_tokens + 1)
        try:
            ids = encode_prompt(self._tokenizer, row, self._template, processor)
            if processor is None:
                return ids, ()
            if len(ids) > self._max_prompt_tokens or processor.has_too_many(ids):
                return too_long, ()
            return ids, processor.images(row)
        except BadRow as error:
            if not self._skip_bad:
                raise DataError(f"row {place} of the training rows, {error}") from error
            return too_long, ()

    def peek(self) -> list[Prompt]:
        """The next step's prompts; the stream stays where it is."""
        state = self.get_state()
        prompts = next(self)
        self.set_state(state)
        return prompts

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
