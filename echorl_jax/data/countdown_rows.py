"""Countdown, a task that needs no download: "Reach 63 with 5, 7, 9."

Row ``i`` of a source is a function of ``(seed, i)`` alone, so rows are made when they are read.
Which problems are for training and which are held out is a property of the problem (a hash of its
numbers and target), not of the seed: whatever their seeds, sizes and ranges, ``split=train`` and
``split=eval`` never share a problem.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, overload

from echorl_jax.data.errors import DataError

# One problem in eight is held out.
EVAL_SHARE = 8
# Draws before a source counts as impossible (say, targets above anything its numbers can make).
MAX_DRAWS = 20_000
SPLITS = ("train", "eval", "all")
ORDERS = ("sorted", "shuffled")


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a solution, ``left operator right = result``."""

    left: Fraction
    operator: str
    right: Fraction
    result: Fraction

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Numbers, the target they can reach, and one way to reach it."""

    numbers: tuple[int, ...]
    target: int
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """The prompt's text."""
        return f"Reach {self.target} with {', '.join(map(str, self.numbers))}."

    @property
    def solution(self) -> str:
        """The steps, one a line; the last one's result is the target."""
        return "\n".join(map(str, self.steps))


def apply_operator(left: Fraction, operator: str, right: Fraction) -> Fraction | None:
    """The exact result, or None for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else None


def is_eval(numbers: Sequence[int], target: int) -> bool:
    """True if a problem is held out of training, whatever the order of its numbers."""
    text = f"{sorted(numbers)}>{target}".encode()
    return hashlib.blake2b(text, digest_size=8).digest()[0] % EVAL_SHARE == 0


@dataclasses.dataclass(frozen=True)
class CountdownRows(Sequence[dict[str, Any]]):
    """Generated rows in verl's columns, read like a list.

    Each row's ``target`` is one assistant message with the lines of the solution that the problem
    was made from; it uses every number. Two rows may hold the same problem.

    Raises:
      DataError: an option out of its range, or (on reading) options that no problem satisfies.

    >>> row = CountdownRows(seed=3)[0]
    >>> sorted(row)
    ['data_source', 'extra_info', 'prompt', 'reward_model', 'target']
    """

    # Numbers in a problem.
    operands: int = 3
    # Their range, both ends included.
    min_number: int = 1
    max_number: int = 29
    # Range of the target; results on the way stay within [1, max_result] too.
    min_result: int = 1
    max_result: int = 400
    # Operators that occur in solutions; a division always comes out whole.
    operators: str = "+-*"
    # Rows.
    count: int = 8192
    seed: int = 0
    # Which problems occur: those for training, the held-out ones, or both.
    split: Literal["train", "eval", "all"] = "train"
    # Formats of the numbers in the prompt.
    order: Literal["sorted", "shuffled"] = "sorted"

    def __post_init__(self) -> None:
        chosen = dataclasses.asdict(self)
        for name in ("operands", "min_number", "count"):
            _require(chosen[name] >= 1, f"{name}={chosen[name]}: must be at least 1")
        for low, high in (("min_number", "max_number"), ("min_result", "max_result")):
            _require(
                chosen[low] <= chosen[high], f"{low}={chosen[low]} is above {high}={chosen[high]}"
            )
        known = bool(self.operators) and set(self.operators) <= set("+-*/")
        _require(known, f"operators={self.operators!r}: must be some of '+', '-', '*', '/'")
        for name, allowed in (("split", SPLITS), ("order", ORDERS)):
            _require(
                chosen[name] in allowed, f"{name}={chosen[name]!r}: one of {', '.join(allowed)}"
            )

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
        return self._row(position)

    def _row(self, index: int) -> dict[str, Any]:
        problem = self.problem(index)
        truth = {"numbers": list(problem.numbers), "target": problem.target}
        return {
            "data_source": "countdown",
            "prompt": [{"role": "user", "content": problem.question}],
            "target": [{"role": "assistant", "content": problem.solution}],
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": index, "split": self.split, "seed": self.seed},
        }

    def problem(self, index: int) -> Problem:
        """The problem behind row ``index``."""
        draw = _Draw(self.seed, index)
        for _ in range(MAX_DRAWS):
            problem = self._attempt(draw)
            if problem and self._in_split(problem):
                return problem
        raise DataError(f"countdown: no problem found for {self}: widen the ranges")

    def _in_split(self, problem: Problem) -> bool:
        return self.split == "all" or (self.split == "eval") == is_eval(
            problem.numbers, problem.target
        )

    def _attempt(self, draw: "_Draw") -> Problem | None:
        numbers = [draw.between(self.min_number, self.max_number) for _ in range(self.operands)]
        if self.order == "sorted":
            numbers.sort()
        values, steps = [Fraction(number) for number in numbers], []
        while len(values) > 1:
            first = values.pop(draw.between(0, len(values) - 1))
            second = values.pop(draw.between(0, len(values) - 1))
            left, right = max(first, second), min(first, second)
            operator = self.operators[draw.between(0, len(self.operators) - 1)]
            result = apply_operator(left, operator, right)
            if result is None or result.denominator > 1 or not 1 <= result <= self.max_result:
                return None
            steps.append(Step(left, operator, right, result))
            values.append(result)
        if not self.min_result <= values[0] <= self.max_result:
            return None
        return Problem(tuple(numbers), int(values[0]), tuple(steps))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(f"countdown: {message}")


class _Draw:
    """Random integers from ``(seed, index)``, the same in every Python version.

    Of all of ``random.Random``, only ``random()`` is promised to stay as it is.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random((seed << 40) + index).random

    def between(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))


@functools.cache
def _option_types() -> dict[str, type]:
    return {field.name: type(field.default) for field in dataclasses.fields(CountdownRows)}


def parse_countdown(options: str) -> CountdownRows:
    """Reads the part of a spec after ``countdown:``, ``key=value`` pairs joined by ``&``.

    Raises:
      DataError: an unknown key, or a value that is not of its type or range.

    >>> parse_countdown("operands=4&max_number=9").operands
    4
    """
    chosen: dict[str, Any] = {}
    for pair in filter(None, options.split("&")):
        key, _, value = pair.partition("=")
        if key not in _option_types():
            raise DataError(
                f"countdown: unknown option {key!r}; one of {', '.join(_option_types())}"
            )
        try:
            chosen[key] = _option_types()[key](value)
        except ValueError:
            raise DataError(f"countdown: {key}={value!r}: must be a whole number") from None
    return CountdownRows(**chosen)
