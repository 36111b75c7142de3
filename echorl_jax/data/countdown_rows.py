"""Countdown, a task that needs no download: "Reach 63 with 5, 7, 9."

Rows are made when they are read, see generated.py; a problem is held out by its numbers, in any
order, and its target.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from echorl_jax.data.generated import (
    MAX_DRAWS,
    Draw,
    GeneratedRows,
    check_options,
    is_held_out,
    parse_options,
    require,
)
from echorl_jax.data.rows import DataError


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
    return is_held_out(f"{sorted(numbers)}>{target}")


@dataclasses.dataclass(frozen=True)
class CountdownRows(GeneratedRows):
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
        check_options(
            "countdown",
            self,
            positive=("operands", "min_number", "count"),
            pairs=(("min_number", "max_number"), ("min_result", "max_result")),
        )
        known = bool(self.operators) and set(self.operators) <= set("+-*/")
        words = f"operators={self.operators!r}: must be some of '+', '-', '*', '/'"
        require(known, "countdown", words)

    def row(self, index: int) -> dict[str, Any]:
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
        draw = Draw(self.seed, index)
        for _ in range(MAX_DRAWS):
            problem = self._attempt(draw)
            if problem and self._in_split(problem):
                return problem
        raise DataError(f"countdown: no problem found for {self}: widen the ranges")

    def _in_split(self, problem: Problem) -> bool:
        return self.split == "all" or (self.split == "eval") == is_eval(
            problem.numbers, problem.target
        )

    def _attempt(self, draw: Draw) -> Problem | None:
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


def parse_countdown(options: str) -> CountdownRows:
    """Reads the part of a spec after ``countdown:``, ``key=value`` pairs joined by ``&``.

    Raises:
      DataError: an unknown key, or a value that is not of its type or range.

    >>> parse_countdown("operands=4&max_number=9").operands
    4
    """
    return parse_options(CountdownRows, "countdown", options)
