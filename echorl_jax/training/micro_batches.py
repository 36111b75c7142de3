"""Cuts a batch into micro-batches of a small, closed set of shapes, on the host.

Rows that cannot have a gradient are left out, and a row whose only terms are linear in the
log-probabilities of a prefix (an EchoClip, a hint) is cut to that prefix: the weights in the batch
are global already, so the gradient stays exactly the same. Short demonstrations share rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from echorl_jax.types import HostArray, TrainBatch

# Fewest rows of a micro-batch for each data-parallel device: half of a full one, but between these.
# Padding costs less than more compiled programs.
SMALLEST_ROWS = (4, 32)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of every micro-batch of a run, so that the compiled programs are few and known."""

    longest: int  # tokens of the longest row
    # Tokens of a micro-batch on all devices together, padding included; a single row for each
    # device may exceed it.
    token_budget: int
    row_multiple: int  # data-parallel devices; divides every micro-batch


def length_buckets(longest: int) -> tuple[int, ...]:
    """Row lengths that are compiled for, each at most twice the one before.

    Short rows of a long run share a length: they cost little there, a program costs minutes.

    >>> length_buckets(600)
    (32, 40, 48, 64, 96, 128, 256, 384, 600)
    >>> length_buckets(9216)
    (384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 9216)
    """
    sizes, power = [32, 40, 48, 64, 96, 128], 256
    while power < longest:
        sizes += [power, power * 3 // 2]
        power *= 2
    return (*(size for size in sizes if longest <= 32 * size and size < 0.85 * longest), longest)


def micro_batch_shapes(rows: int, bounds: Bounds) -> list[tuple[int, int]]:
    """Every (rows, length) that :func:`micro_batches` makes of a batch, the largest first.

    Args:
      rows: N of the batch; any part of it may have a gradient.
      bounds: of the run.
    """
    shapes = {
        (_row_count(left, width, bounds), width)
        for width in length_buckets(bounds.longest)
        for left in range(1, rows + 1)
    }
    return sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))


def trainable_rows(batch: TrainBatch, *, every_row: bool) -> tuple[TrainBatch, np.ndarray]:
    """The batch with pure-prefix rows cut, and which rows have a gradient.

    Args:
      batch: NumPy arrays.
      every_row: the objective has a term that does not vanish with the advantage (KL, entropy).

    Returns:
      The batch with new lengths, and a bool ``[N]``.
    """
    in_policy = np.any(batch.token_weights != 0, axis=1)
    rows = batch.loss_mask.shape[0]
    whole = in_policy & (every_row | np.any(batch.advantages.reshape(rows, -1) != 0, axis=1))
    if batch.solved is not None:
        whole |= in_policy & batch.solved
    if batch.selected is not None:
        whole |= np.any(np.asarray(batch.selected), axis=1)
    prefix = _used_tokens(batch.echo_weights)
    if batch.nll_weights is not None:
        prefix = np.maximum(prefix, _used_tokens(batch.nll_weights))
    length = np.where(whole, batch.length, batch.prompt_length + prefix)
    cut = dataclasses.replace(
        batch,
        length=length.astype(np.int32),
        # Tokens that are cut off have no log-probabilities and do not enter the policy loss.
        loss_mask=np.where(whole[:, None], batch.loss_mask, np.float32(0)),
        token_weights=np.where(whole[:, None], batch.token_weights, np.float32(0)),
    )
    return cut, whole | (prefix > 0)


def micro_batches(
    batch: TrainBatch, rows: np.ndarray, bounds: Bounds
) -> Iterator[tuple[np.ndarray, TrainBatch]]:
    """Yields the chosen rows, longest first, in micro-batches within the bounds.

    Row counts are ``bounds.row_multiple`` times a power of two and lengths come from
    :func:`length_buckets`. Missing rows are padding with zero weights.

    Args:
      batch: NumPy arrays.
      rows: bool ``[N]``, from :func:`trainable_rows`.
      bounds: of the run.

    Yields:
      The places of its rows in the batch, and the micro-batch, which may have more rows.
    """
    lengths = np.asarray(batch.length)
    order = np.flatnonzero(rows)
    order = order[np.argsort(-lengths[order], kind="stable")]
    for count, width in _cut(lengths[order], bounds):
        yield order[:count], take_rows(batch, order[:count], count=count, width=width)
        order = order[count:]


def computed_tokens(lengths: Sequence[int], bounds: Bounds) -> int:
    """Tokens that :func:`micro_batches` computes for rows of these lengths, padding included.

    >>> computed_tokens([30] * 60, Bounds(longest=40, token_budget=4096, row_multiple=1))
    2048
    """
    ordered = np.sort(np.asarray(lengths))[::-1]
    return sum(count * width for count, width in _cut(ordered, bounds))


def _cut(lengths: np.ndarray, bounds: Bounds) -> Iterator[tuple[int, int]]:
    """Rows and length of each micro-batch; ``lengths`` is sorted, the longest first."""
    buckets = np.array(length_buckets(bounds.longest))
    while lengths.size:
        width = int(buckets[np.searchsorted(buckets, lengths[0])])
        count = _row_count(lengths.size, width, bounds)
        yield count, width
        lengths = lengths[count:]


def _row_count(rows: int, width: int, bounds: Bounds) -> int:
    """``row_multiple`` times a power of two, without much padding: a rest comes in a smaller one.

    >>> def counts(token_budget, *rows):
    ...     return [_row_count(n, 10, Bounds(10, token_budget, 1)) for n in rows]
    >>> counts(2560, 1, 60, 85, 185, 250), counts(170, 1, 8, 9, 14, 20), counts(50, 1)
    ([32, 64, 64, 128, 256], [8, 8, 8, 16, 16], [4])
    """
    full = multiple = bounds.row_multiple
    most = max(1, bounds.token_budget // width)
    while 2 * full <= most:
        full *= 2
    least, enough = (multiple * rows for rows in SMALLEST_ROWS)
    smallest = min(full, max(least, min(full // 2, enough)))
    count = smallest
    while count < min(rows, full):
        count *= 2
    return count if count == smallest or count - rows <= count // 8 else count // 2


def _used_tokens(weights: HostArray) -> np.ndarray:
    used = np.asarray(weights) != 0
    return np.where(used.any(axis=1), used.shape[1] - np.argmax(used[:, ::-1], axis=1), 0)


def take_rows(batch: TrainBatch, index: np.ndarray, *, count: int, width: int) -> TrainBatch:
    """Rows ``index``, cut or padded to ``width`` tokens and ``count`` rows."""
    # A packed row's targets are all of it but the first token.
    most = width if batch.segment_ids is None else width - 1
    target_width = min(most, batch.loss_mask.shape[1])

    def fit(path: tuple[Any, ...], value: HostArray) -> HostArray:
        if path[-1].name == "features":
            return value  # of all rows
        array = np.asarray(value)[index]
        missing = [(0, count - len(index))] + [(0, 0)] * (array.ndim - 1)
        if array.ndim > 1:
            whole_row = path[0].name in ("tokens", "segment_ids", "images")
            columns = width if whole_row else target_width
            array = array[:, :columns]
            missing[1] = (0, columns - array.shape[1])
        return np.pad(array, missing)

    fitted = jax.tree_util.tree_map_with_path(fit, batch)
    # A padding row keeps one token, so that no attention row is empty.
    return dataclasses.replace(
        fitted,
        prompt_length=np.maximum(fitted.prompt_length, 1),
        length=np.maximum(fitted.length, 1),
    )


def pack_rows(batch: TrainBatch, *, width: int) -> TrainBatch:
    """The same sequences in fewer rows of up to ``width`` tokens, with the same token weights.

    Attention stays within a sequence (``segment_ids``) and positions begin again with each, so loss
    and gradient are those of the batch as it was. The target region of a packed row is all of it
    but the first token. Per-row fields must not differ between rows.

    Args:
      batch: NumPy arrays, without fields for clips, hints or selected tokens in use.
      width: at least the longest sequence.

    Raises:
      ValueError: a sequence is longer than ``width``, or rows differ in a field of rows.
    """
    lengths = np.asarray(batch.length)
    if lengths.size and lengths.max() > width:
        raise ValueError(f"pack_rows: a sequence of {lengths.max()} tokens, rows of {width}")
    for name in ("advantages", "on_policy", "solved", "entropy_scale"):
        if vars(batch)[name] is not None and len(np.unique(vars(batch)[name])) > 1:
            raise ValueError(f"pack_rows: rows differ in {name}")
    bins = first_fit(lengths.tolist(), width)
    tokens = np.zeros((len(bins), width), np.int32)
    segments = np.zeros_like(tokens)
    fields = ("loss_mask", "old_logprobs", "rollout_logprobs", "token_weights", "echo_weights")
    moved = {name: np.zeros((len(bins), width - 1), np.float32) for name in fields}
    for row, members in enumerate(bins):
        start = 0
        for number, place in enumerate(members):
            end, prompt = start + lengths[place], int(batch.prompt_length[place])
            tokens[row, start:end] = batch.tokens[place, : lengths[place]]
            segments[row, start:end] = number
            for name, values in moved.items():
                # Entry t belongs to the row's token t + 1.
                own = vars(batch)[name][place, : lengths[place] - prompt]
                values[row, start + prompt - 1 : end - 1] = own
            start = end
        # Padding is not attended to. As part of the last sequence it has no position twice.
        segments[row, start:] = len(members) - 1
    first = [members[0] for members in bins]
    return dataclasses.replace(
        batch,
        **moved,
        tokens=tokens,
        segment_ids=segments,
        prompt_length=np.ones(len(bins), np.int32),
        length=np.array([lengths[members].sum() for members in bins], np.int32),
        advantages=np.asarray(batch.advantages)[first],
        on_policy=np.asarray(batch.on_policy)[first],
        entropy_scale=None if batch.entropy_scale is None else batch.entropy_scale[first],
    )


def packed_width(lengths: Sequence[int], bounds: Bounds) -> int:
    """The row length, up to twice the longest sequence's, with which the least is computed.

    Longer rows fill up better but cost more attention, so no length beyond that is tried.

    Args:
      lengths: of the sequences.
      bounds: of the run's micro-batches.
    """
    most = max(lengths)
    sizes = [size for size in length_buckets(bounds.longest) if size >= most]

    def cost(width: int) -> int:
        rows = [sum(lengths[i] for i in members) for members in first_fit(lengths, width)]
        return computed_tokens(rows, bounds)

    return min([size for size in sizes if size <= 2 * sizes[0]], key=cost)


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Places of the sequences in each row: longest first, each into the first row with room.

    >>> first_fit([3, 5, 4, 2], 8)
    [[1, 0], [2, 3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((k for k, left in enumerate(room) if left >= lengths[place]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(width)
        bins[row].append(place)
        room[row] -= lengths[place]
    return bins
