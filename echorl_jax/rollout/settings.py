"""What may be drawn and what ends a completion: one frozen, hashable description, checked once."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Static under jit: another value is another compiled program.

    Banned tokens are removed first; then ``top_k`` keeps the k likeliest, ``top_p`` the likeliest
    that together hold ``top_p`` of what is left, and ``min_p`` those at least ``min_p`` times as
    likely as the likeliest. Tokens that tie with the last one kept are kept too. None of this
    touches the reported log-probabilities and entropies.
    """

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # writing one of them ends a completion
    banned_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def scale(self) -> float:
        """Divides the logits, in drawing and in all reported numbers; 1 when greedy."""
        return self.temperature or 1.0

    @property
    def memory(self) -> int:
        """Latest tokens to be remembered, so that stop sequences are seen."""
        return max((len(sequence) for sequence in self.stop_sequences), default=0)


def make_sampling(
    *,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_ids: int | Iterable[int] = (),
    stop_sequences: Iterable[Sequence[int]] = (),
    banned_ids: Iterable[int] = (),
) -> Sampling:
    """Checks the settings of a call.

    Raises:
      ValueError: a value out of range, a token outside the vocabulary, or nothing left to sample.
    """
    if temperature != 0 and not 1e-30 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or at least 1e-30")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must lie in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: must lie in [0, 1]")
    sampling = Sampling(
        temperature=float(temperature),
        top_k=0 if top_k >= vocab_size else int(top_k),
        top_p=float(top_p),
        min_p=float(min_p),
        eos_ids=_sorted_ids([eos_ids] if isinstance(eos_ids, int | np.integer) else eos_ids),
        stop_sequences=tuple(tuple(map(int, sequence)) for sequence in stop_sequences),
        banned_ids=_sorted_ids(banned_ids),
    )
    if not all(sampling.stop_sequences):
        raise ValueError("stop_sequences: one of them is empty")
    check_tokens("eos_ids", sampling.eos_ids, vocab_size)
    check_tokens("banned_ids", sampling.banned_ids, vocab_size)
    for sequence in sampling.stop_sequences:
        check_tokens("stop_sequences", sequence, vocab_size)
    if len(sampling.banned_ids) == vocab_size:
        raise ValueError("banned_ids: every token is banned")
    return sampling


def _sorted_ids(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(map(int, ids))))


def check_tokens(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError, with the name, if an id is no whole number in ``[0, vocab_size)``."""
    if len(ids) and np.asarray(ids).dtype.kind not in "iu":
        raise ValueError(f"{name}: token ids must be whole numbers")
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name}: token {wrong} is outside the vocabulary of {vocab_size}")
