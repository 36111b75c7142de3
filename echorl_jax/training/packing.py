"""Several demonstrations end to end in one row, so that little of a row is padding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from echorl_jax.training.micro_batches import Bounds, computed_tokens, length_buckets
from echorl_jax.types import TrainBatch


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
    for name in ("advantages", "on_policy", "entropy_scale"):
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
        # Padding is not attended to; as a part of the last sequence it has positions of its own.
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
