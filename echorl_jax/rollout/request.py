"""A call's host side: prompts and settings of rows, checked and padded to an allowed shape."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from echorl_jax.rollout.buckets import bucket
from echorl_jax.rollout.settings import check_tokens

# Prompts are padded to a multiple of this.
PROMPT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """Host arrays of one call. P and N include padding; the first ``count`` rows are written."""

    tokens: np.ndarray  # i32 [P, S]
    length: np.ndarray  # i32 [P]
    number: np.ndarray  # i32 [N]
    group: np.ndarray  # i32 [N]
    limit: np.ndarray  # i32 [N]
    forced: np.ndarray  # i32 [N, F]
    forced_length: np.ndarray  # i32 [N]
    prompts: int
    count: int

    def places(self, lanes: int, lane: int) -> np.ndarray:
        """A lane's rows: those of every ``lanes``-th prompt, so that padding is shared too."""
        group_size = len(self.group) // len(self.length)
        first = np.arange(lane, len(self.length), lanes) * group_size
        return (first[:, None] + np.arange(group_size)).reshape(-1)

    def deal(self, lanes: int, lane: int) -> "Request":
        """The request of a lane; P is a multiple of ``lanes``."""
        rows = self.places(lanes, lane)
        prompts = len(range(lane, self.prompts, lanes))
        return Request(
            tokens=self.tokens[lane::lanes],
            length=self.length[lane::lanes],
            number=self.number[rows],
            group=self.group[: len(rows)],
            limit=self.limit[rows],
            forced=self.forced[rows],
            forced_length=self.forced_length[rows],
            prompts=prompts,
            count=self.count // self.prompts * prompts,
        )


def make_request(
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    row_limits: Sequence[int] | None,
    row_ids: Sequence[int] | None,
    prefixes: Sequence[Sequence[int]] | None,
    prompt_tokens: int,
    vocab_size: int,
    multiple: int,
) -> Request:
    """Checks and pads.

    Args:
      prompts: token ids, P lists.
      group_size: rows per prompt; row i answers prompt ``i // group_size``.
      max_new_tokens: T.
      row_limits: shorter limits for single rows, N numbers.
      row_ids: numbers that stand for the rows in the keys; 0 to N - 1 unless given.
      prefixes: tokens with which rows have to begin, N lists.
      prompt_tokens: S is at least this.
      vocab_size: V.
      multiple: P is padded to a multiple of this (the shards of the rows).

    Raises:
      ValueError: an empty list, a length or a token out of range, naming which.
    """
    if len(prompts) == 0:
        raise ValueError("prompts: there is none")
    for name, size in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    count = len(prompts) * group_size
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens={prompt_tokens}: must not be negative")
    limit = _limits(row_limits, count, max_new_tokens)
    number = _numbers(row_ids, count)
    prefixes = [()] * count if prefixes is None else prefixes
    if len(prefixes) != count:
        raise ValueError(f"prefixes: {len(prefixes)} for {count} rows")
    for row, prefix in enumerate(prefixes):
        check_tokens(f"prefixes[{row}]", prefix, vocab_size)
        if len(prefix) > limit[row]:
            raise ValueError(
                f"prefixes[{row}]: {len(prefix)} tokens, but the row may have {limit[row]}"
            )
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}] is empty")
        check_tokens(f"prompts[{index}]", prompt, vocab_size)

    padded = bucket(len(prompts), multiple=multiple)
    longest = max(prompt_tokens, *map(len, prompts))
    blank = [()] * (padded - len(prompts))
    tokens, length = pad_lists([*prompts, *blank], bucket(longest, multiple=PROMPT_MULTIPLE))
    width = max(map(len, prefixes))
    forced, forced_length = pad_lists([*prefixes, *blank * group_size], width and bucket(width))
    return Request(
        tokens=tokens,
        length=np.maximum(length, 1),
        number=np.concatenate([number, np.zeros(padded * group_size - count, np.int32)]),
        group=np.repeat(np.arange(padded, dtype=np.int32), group_size),
        limit=np.concatenate([limit, np.ones(padded * group_size - count, np.int32)]),
        forced=forced,
        forced_length=forced_length,
        prompts=len(prompts),
        count=count,
    )


def _limits(row_limits: Sequence[int] | None, count: int, longest: int) -> np.ndarray:
    if row_limits is None:
        return np.full(count, longest, np.int32)
    if len(row_limits) != count:
        raise ValueError(f"row_limits: {len(row_limits)} for {count} rows")
    limit = np.asarray(row_limits, np.int32)
    if limit.min() < 1 or limit.max() > longest:
        raise ValueError(f"row_limits: must lie in [1, max_new_tokens={longest}]")
    return limit


def _numbers(row_ids: Sequence[int] | None, count: int) -> np.ndarray:
    if row_ids is None:
        return np.arange(count, dtype=np.int32)
    if len(row_ids) != count:
        raise ValueError(f"row_ids: {len(row_ids)} for {count} rows")
    if min(row_ids) < 0 or max(row_ids) >= 2**31:
        raise ValueError("row_ids: must lie in [0, 2**31)")
    return np.asarray(row_ids, np.int32)


def pad_lists(lists: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of tokens as i32 ``[rows, width]``, zeros on the right, and their lengths."""
    tokens, length = np.zeros((len(lists), width), np.int32), np.zeros(len(lists), np.int32)
    for row, ids in enumerate(lists):
        tokens[row, : len(ids)] = ids
        length[row] = len(ids)
    return tokens, length
