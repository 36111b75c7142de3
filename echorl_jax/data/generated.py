"""Rows that are made when they are read: what Countdown and Reduce share.

Row ``i`` of a source is a function of ``(seed, i)`` alone. Which problems are for training and
which are held out is a property of the problem (a hash of its text), not of the seed: whatever
their seeds, sizes and ranges, ``split=train`` and ``split=eval`` never share a problem.
"""

import abc
import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_type_hints, overload

from echorl_jax.data.rows import DataError

# One problem in eight is held out.
EVAL_SHARE = 8
# Draws before a source counts as impossible (say, targets above anything its numbers can make).
MAX_DRAWS = 20_000
# The largest option, far below what a float of 53 bits draws evenly.
MOST = 10**12
# Making and comparing an expression takes time that grows faster than its numbers.
MOST_OPERANDS = 32
_T = TypeVar("_T", bound="GeneratedRows")


def is_held_out(text: str) -> bool:
    """True if the problem with this canonical text is held out of training."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % EVAL_SHARE == 0


class GeneratedRows(Sequence[dict[str, Any]], abc.ABC):
    """Rows in verl's columns, read like a list; a frozen dataclass of its options."""

    count: int
    seed: int

    @abc.abstractmethod
    def row(self, index: int) -> dict[str, Any]:
        """Row ``index`` in ``[0, count)``."""

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        position = index + self.count if index < 0 else index
        if not 0 <= position < self.count:
            raise IndexError(index)
        return self.row(position)


class Draw:
    """Random integers from ``(seed, index)``, the same in every Python version.

    Of all of ``random.Random``, only ``random()`` is promised to stay as it is.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random((seed << 40) + index).random

    def between(self, low: int, high: int) -> int:
        """A number in ``[low, high]``."""
        return low + int(self._random() * (high - low + 1))


def check_options(
    name: str, rows: GeneratedRows, *, positive: Sequence[str], pairs: Sequence[Any]
) -> None:
    """Checks the options that generated rows share.

    Args:
      name: of the task, for messages.
      rows: the dataclass.
      positive: fields that must be at least 1.
      pairs: (low, high) fields, the ends of a range.

    Raises:
      DataError: an option out of its range.
    """
    chosen = dataclasses.asdict(rows)  # pyright: ignore
    for field in positive:
        require(chosen[field] >= 1, name, f"{field}={chosen[field]}: must be at least 1")
    for field, value in chosen.items():
        if isinstance(value, int):
            most = MOST_OPERANDS if field.endswith("operands") else MOST
            require(value <= most, name, f"{field}={str(value):.40}: must be at most {most}")
    require(rows.seed >= 0, name, f"seed={rows.seed}: must be at least 0")
    for low, high in pairs:
        above = f"{low}={chosen[low]} is above {high}={chosen[high]}"
        require(chosen[low] <= chosen[high], name, above)
    for field, kind in get_type_hints(type(rows)).items():
        if allowed := get_args(kind):
            words = f"{field}={chosen[field]!r}: one of {', '.join(allowed)}"
            require(chosen[field] in allowed, name, words)


def require(condition: bool, name: str, message: str) -> None:
    """Raises DataError with the task's name unless the condition holds."""
    if not condition:
        raise DataError(f"{name}: {message}")


def parse_options(kind: type[_T], name: str, options: str) -> _T:
    """Rows from the part of a spec after ``name:``, ``key=value`` pairs joined by ``&``.

    Raises:
      DataError: an unknown key, or a value that is not of its type or range.
    """
    types = {field.name: type(field.default) for field in dataclasses.fields(kind)}  # pyright: ignore
    chosen: dict[str, Any] = {}
    for pair in filter(None, options.split("&")):
        key, _, value = pair.partition("=")
        require(key in types, name, f"unknown option {key!r}; one of {', '.join(types)}")
        try:
            chosen[key] = types[key](value)
        except ValueError:
            raise DataError(f"{name}: {key}={value!r}: must be a whole number") from None
    return kind(**chosen)
