"""The input of a call: sampling settings, rows and resources, checked and padded.

Array shapes come from a small closed set (:func:`bucket`), so that the number of compiled programs
does not grow with the data.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from echorl_jax.choices import KVDtype
from echorl_jax.types import Array, HostArray, pytree

# Prompts are padded to a multiple of this many tokens.
PROMPT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Static under jit: another value is another compiled program.

    Banned tokens are removed first. Then ``top_k`` keeps the k most probable tokens, ``top_p`` the
    most probable tokens that together hold ``top_p`` of the remaining probability, and ``min_p``
    the tokens at least ``min_p`` times as probable as the most probable one. Tokens that tie with
    the last one kept are kept too. Reported log-probabilities and entropies are not truncated.
    """

    group_size: int  # G
    max_new_tokens: int  # T
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # each ends a completion and belongs to it
    banned_ids: tuple[int, ...] = ()
    # Texts that end a completion. The sampler knows no text: the environment cuts the rows after
    # the call, where the token sequences above did not end them.
    stop_strings: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def scale(self) -> float:
        """Divides the logits, for drawing and for all reported numbers; 1 when greedy."""
        return self.temperature or 1.0

    @property
    def stop_window(self) -> int:
        """W: how many latest tokens the search for stop sequences needs."""
        return max((len(sequence) for sequence in self.stop_sequences), default=0)

    def checked(self, vocab_size: int) -> "Sampling":
        """The same settings in one canonical form, so that equal settings share programs.

        Raises:
          ValueError: a value out of range, a token outside the vocabulary, or every token banned.
        """
        for name, valid, requirement in (
            ("group_size", self.group_size >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or 1e-30 <= self.temperature < math.inf,
                "0 (greedy) or at least 1e-30",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("stop_sequences", all(self.stop_sequences), "sequences of at least one token"),
        ):
            if not valid:
                raise ValueError(f"{name}={vars(self)[name]}: must be {requirement}")
        check_tokens("eos_ids", self.eos_ids, vocab_size)
        check_tokens("banned_ids", self.banned_ids, vocab_size)
        for sequence in self.stop_sequences:
            check_tokens("stop_sequences", sequence, vocab_size)
        if len(set(self.banned_ids)) == vocab_size:
            raise ValueError("banned_ids: every token is banned")
        return dataclasses.replace(
            self,
            temperature=float(self.temperature),
            top_k=0 if self.top_k >= vocab_size else int(self.top_k),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            eos_ids=sorted_ids(self.eos_ids),
            banned_ids=sorted_ids(self.banned_ids),
        )


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of a call. Samples do not depend on them, apart from the rounding of ``kv_dtype``.

    See :func:`generate` for the meaning of each field.
    """

    slots: int = 0
    cpu_workers: int = 0
    kv_dtype: KVDtype | None = None
    mesh: Mesh | None = None
    steps_per_poll: int = 128
    pad_id: int = 0
    page_tokens: int = 0
    expected_tokens: int = 0

    @property
    def shards(self) -> int:
        """Parts that rows are split into on the mesh."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check(self) -> None:
        """Raises ValueError, with the name of the setting, for a value out of range."""
        if jax.config.values["jax_enable_x64"]:
            raise ValueError("jax_enable_x64 is on: the sampler counts and computes in 32 bits")
        counts = ("slots", "cpu_workers", "page_tokens", "expected_tokens")
        for name, least in (*((name, 0) for name in counts), ("steps_per_poll", 1)):
            if (value := vars(self)[name]) < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.cpu_workers > 1 and self.mesh is not None and self.mesh.size > 1:
            raise ValueError(
                f"cpu_workers={self.cpu_workers}: a mesh of {self.mesh.size} devices has one worker"
            )


def sorted_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """Each id once, in order, as Python integers."""
    return tuple(sorted(set(map(int, ids))))


def check_tokens(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError, with ``name``, unless every id is an integer in ``[0, vocab_size)``."""
    if len(ids) and np.asarray(ids).dtype.kind not in "iu":
        raise ValueError(f"{name}: token ids must be whole numbers")
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name}: token {wrong} is outside the vocabulary of {vocab_size}")


def check_lists(name: str, lists: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError for an empty list and for a token outside the vocabulary."""
    for index, ids in enumerate(lists):
        if not len(ids):
            raise ValueError(f"{name}[{index}] is empty")
        check_tokens(f"{name}[{index}]", ids, vocab_size)


@pytree
class PromptImages:
    """The images of a call's prompts, for a model with a vision tower."""

    features: Array  # [F, D], of all images
    index: Array  # i32 [P, S], a token's feature, -1 for a token with its own embedding
    positions: Array  # i32 [P, S, 3]
    delta: Array  # i32 [P], position of a later token, less its index in the row


@pytree
class Request:
    """The rows of one call; the rows of a prompt are adjacent. NumPy arrays until they are placed.

    Rows from ``count`` on pad the shape; nothing is written for them. All methods are for the host.
    """

    tokens: Array  # i32 [P, S], the prompts, right-padded
    length: Array  # i32 [P], at least 1
    group: Array  # i32 [N], the prompt of each row
    row_id: Array  # i32 [N], the row's number in the PRNG keys
    limit: Array  # i32 [N], longest completion
    prefix: Array  # i32 [N, F], tokens that the completion begins with
    prefix_length: Array  # i32 [N]
    count: Array  # i32 []
    images: PromptImages | None = None

    @property
    def rows(self) -> int:
        """N, padding included."""
        return self.group.shape[0]

    @property
    def group_size(self) -> int:
        """G."""
        return self.rows // self.length.shape[0]

    @property
    def prompts(self) -> int:
        """Prompts without padding."""
        return int(self.count) // self.group_size

    def padded(self, prompts: int) -> "Request":
        """The request with padding for ``prompts`` prompts in all."""
        last = len(self.length) - 1
        index = np.arange(prompts)
        repeated = self._take(np.minimum(index, last), int(self.count))
        # A prompt of one token costs no prefill.
        length = np.where(index > last, 1, repeated.length).astype(np.int32)
        return dataclasses.replace(repeated, length=length)

    def part(self, parts: int, part: int) -> "Request":
        """The rows of every ``parts``-th prompt, so that the parts share the padding too."""
        count = len(range(part, self.prompts, parts)) * self.group_size
        return self._take(np.arange(part, len(self.length), parts), count)

    def part_rows(self, parts: int, part: int) -> HostArray:
        """The numbers of the rows of :meth:`part` that are not padding."""
        return self._rows_of(np.arange(part, self.prompts, parts))

    def _rows_of(self, prompts: HostArray) -> HostArray:
        return (prompts[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)

    def _take(self, prompts: HostArray, count: int) -> "Request":
        """The given prompts with all their rows, ``count`` of which are not padding."""
        rows, number = self._rows_of(prompts), np.int32(count)
        return Request(
            tokens=self.tokens[prompts],
            length=self.length[prompts],
            group=_groups(len(prompts), self.group_size),
            row_id=self.row_id[rows],
            limit=self.limit[rows],
            prefix=self.prefix[rows],
            prefix_length=self.prefix_length[rows],
            count=number,  # pyright: ignore[reportArgumentType]
            images=self._take_images(prompts),
        )

    def _take_images(self, prompts: HostArray) -> PromptImages | None:
        if self.images is None:
            return None
        images = self.images
        return PromptImages(
            features=images.features,
            index=images.index[prompts],
            positions=images.positions[prompts],
            delta=images.delta[prompts],
        )


def _groups(prompts: int, group_size: int) -> HostArray:
    return np.repeat(np.arange(prompts, dtype=np.int32), group_size)


def make_request(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    vocab_size: int,
    row_limits: Sequence[int] | None = None,
    row_ids: Sequence[int] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    prompt_tokens: int = 0,
    images: PromptImages | None = None,
) -> Request:
    """Checks the rows of a call and pads their tokens; :func:`generate` describes the arguments.

    ``images`` are those of the prompts, with as many columns as the longest prompt or fewer.

    Raises:
      ValueError: an empty list, a length or a token out of range; the message names it.
    """
    if len(prompts) == 0:
        raise ValueError("prompts: the list is empty")
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens={prompt_tokens}: must not be negative")
    check_lists("prompts", prompts, vocab_size)
    rows, longest = len(prompts) * sampling.group_size, max(prompt_tokens, *map(len, prompts))
    limits = [sampling.max_new_tokens] * rows if row_limits is None else row_limits
    limit = _per_row("row_limits", limits, rows, least=1, most=sampling.max_new_tokens)
    row_ids = range(rows) if row_ids is None else row_ids
    prefixes = [()] * rows if prefixes is None else prefixes
    if len(prefixes) != rows:
        raise ValueError(f"prefixes: {len(prefixes)} for {rows} rows")
    for row, prefix in enumerate(prefixes):
        check_tokens(f"prefixes[{row}]", prefix, vocab_size)
        if len(prefix) > limit[row]:
            raise ValueError(
                f"prefixes[{row}]: {len(prefix)} tokens, above the row's limit of {limit[row]}"
            )
    tokens, length = pad_lists(prompts, bucket(longest, multiple=PROMPT_MULTIPLE))
    width = max(map(len, prefixes))
    prefix, prefix_length = pad_lists(prefixes, width and bucket(width))
    count: HostArray = np.int32(rows)
    if images is not None:
        missing = [(0, 0), (0, tokens.shape[1] - images.index.shape[1])]
        images = dataclasses.replace(
            images,
            index=np.pad(images.index, missing, constant_values=-1),
            positions=np.pad(images.positions, [*missing, (0, 0)]),
        )
    return Request(
        tokens=tokens,
        length=length,
        group=_groups(len(prompts), sampling.group_size),
        row_id=_per_row("row_ids", row_ids, rows, least=0, most=2**31 - 1),
        limit=limit,
        prefix=prefix,
        prefix_length=prefix_length,
        count=count,
        images=images,
    )


def _per_row(name: str, numbers: Sequence[int], rows: int, *, least: int, most: int) -> HostArray:
    if len(numbers) != rows:
        raise ValueError(f"{name}: {len(numbers)} for {rows} rows")
    if min(numbers) < least or max(numbers) > most:
        raise ValueError(f"{name}: must lie in [{least}, {most}]")
    return np.asarray(numbers, np.int32)


def pad_lists(lists: Sequence[Sequence[int]], width: int) -> tuple[HostArray, HostArray]:
    """Lists of tokens as i32 ``[rows, width]``, padded with 0 on the right, and their lengths."""
    tokens, length = np.zeros((len(lists), width), np.int32), np.zeros(len(lists), np.int32)
    for row, ids in enumerate(lists):
        tokens[row, : len(ids)] = ids
        length[row] = len(ids)
    return tokens, length


def bucket(size: int, *, multiple: int = 1) -> int:
    """The smallest allowed size that holds ``size``: ``multiple`` times 1, 2, 3, 4, 6, 8, 12, 16...

    At most a third of it is padding, beyond the smallest sizes.

    >>> [bucket(n) for n in (1, 5, 9, 13, 100)], bucket(70, multiple=16)
    ([1, 6, 12, 16, 128], 96)
    """
    units = max(1, -(-size // multiple))
    power = 1 << (units - 1).bit_length()
    three_quarters = power // 4 * 3
    return multiple * (three_quarters if three_quarters >= units else power)


def slots_below(size: int, *, multiple: int = 1) -> int:
    """The largest number of slots of at most ``size``: ``multiple`` times a multiple of 8 if that
    fits, so that it can be halved for the last rows.

    >>> slots_below(60), slots_below(60, multiple=4), slots_below(6)
    (56, 32, 6)
    """
    units = size // multiple
    return multiple * (units // 8 * 8 or units)


def slot_counts(slots: int, *, smallest: int) -> tuple[int, ...]:
    """The numbers of slots that have a program: ``slots``, then halves down to ``smallest``.

    >>> slot_counts(64, smallest=8), slot_counts(6, smallest=8)
    ((64, 32, 16, 8), (6,))
    """
    counts = [slots]
    while counts[-1] % 2 == 0 and counts[-1] // 2 >= smallest:
        counts.append(counts[-1] // 2)
    return tuple(counts)


def greatest_divisor(length: int, *, most: int) -> int:
    """The largest divisor of ``length`` that is at most ``most``.

    >>> greatest_divisor(384, most=256)
    192
    """
    return max(n for n in range(1, min(length, most) + 1) if length % n == 0)
