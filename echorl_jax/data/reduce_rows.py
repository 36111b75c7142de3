"""Reduce, a task of many steps that needs no download: "Work out (3+4)*(9-2)-5."

A solution replaces one operation by its value on each line until a number stands alone. The order
is free, so that there are many right paths. Rows are made when they are read, see generated.py; a
problem is held out by its expression, whatever the order of its sums and products.
"""

import dataclasses
from itertools import pairwise
from operator import add, mul, sub
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

PRECEDENCE = {"+": 1, "-": 1, "*": 2}
OPERATE = {"+": add, "-": sub, "*": mul}


@dataclasses.dataclass(frozen=True)
class Operation:
    """``left operator right``; a leaf of the tree is a number."""

    left: "Tree"
    operator: str
    right: "Tree"


Tree = int | Operation


def value_of(tree: Tree) -> int:
    """The value of an expression."""
    if isinstance(tree, int):
        return tree
    return OPERATE[tree.operator](value_of(tree.left), value_of(tree.right))


def text_of(tree: Tree) -> str:
    """The expression with no more brackets than it needs to be read from left to right.

    >>> text_of(Operation(Operation(3, "+", 4), "*", Operation(9, "-", Operation(2, "-", 1))))
    '(3+4)*(9-(2-1))'
    """
    if isinstance(tree, int):
        return str(tree)
    mine = PRECEDENCE[tree.operator]
    left, right = text_of(tree.left), text_of(tree.right)
    if isinstance(tree.left, Operation) and PRECEDENCE[tree.left.operator] < mine:
        left = f"({left})"
    if isinstance(tree.right, Operation) and PRECEDENCE[tree.right.operator] <= mine:
        right = f"({right})"
    return f"{left}{tree.operator}{right}"


def canonical_text(tree: Tree) -> str:
    """The same text for expressions that differ in the order of sums and products alone.

    >>> one = Operation(Operation(3, "+", 4), "+", 5)
    >>> other = Operation(5, "+", Operation(4, "+", 3))
    >>> canonical_text(one) == canonical_text(other)
    True
    """
    if isinstance(tree, int):
        return str(tree)
    if tree.operator == "-":
        return f"({canonical_text(tree.left)}-{canonical_text(tree.right)})"
    return f"({tree.operator.join(sorted(_terms(tree, tree.operator)))})"


def _terms(tree: Tree, operator: str) -> list[str]:
    if isinstance(tree, Operation) and tree.operator == operator:
        return _terms(tree.left, operator) + _terms(tree.right, operator)
    return [canonical_text(tree)]


def depth_of(tree: Tree) -> int:
    """Operations on the longest way from the top to a number."""
    if isinstance(tree, int):
        return 0
    return 1 + max(depth_of(tree.left), depth_of(tree.right))


def rewrites(tree: Tree) -> list[Tree]:
    """Every expression that replaces one operation between two numbers by its value.

    >>> [text_of(each) for each in rewrites(Operation(Operation(3, "+", 4), "*", 2))]
    ['7*2']
    """
    if isinstance(tree, int):
        return []
    if isinstance(tree.left, int) and isinstance(tree.right, int):
        return [value_of(tree)]
    found: list[Tree] = [Operation(left, tree.operator, tree.right) for left in rewrites(tree.left)]
    found += [Operation(tree.left, tree.operator, right) for right in rewrites(tree.right)]
    return found


@dataclasses.dataclass(frozen=True)
class ReduceProblem:
    """An expression and one way to its value."""

    expression: Tree
    lines: tuple[str, ...]

    @property
    def question(self) -> str:
        """The prompt's text."""
        return f"Work out {text_of(self.expression)}."


@dataclasses.dataclass(frozen=True)
class ReduceRows(GeneratedRows):
    """Generated rows in verl's columns, read like a list.

    Each row's ``target`` is one assistant message: one operation at a time, in a random order. Two
    rows may hold the same problem.

    Raises:
      DataError: an option out of its range, or (on reading) options that no problem satisfies.

    >>> row = ReduceRows(seed=1, min_operands=3, max_operands=3)[0]
    >>> sorted(row)
    ['data_source', 'extra_info', 'prompt', 'reward_model', 'target']
    """

    # Numbers in an expression, both ends included.
    min_operands: int = 6
    max_operands: int = 8
    # Their range, and the largest value of any part of an expression; the least is 0.
    min_number: int = 1
    max_number: int = 9
    max_result: int = 99
    # Operations on the longest way from the top to a number; 0 is no limit.
    max_depth: int = 0
    # Operators that occur.
    operators: str = "+-*"
    # Name of the data source: evaluations are scored apart by it.
    name: str = "reduce"
    # Rows.
    count: int = 8192
    seed: int = 0
    # Which problems occur: those for training, the held-out ones, or both.
    split: Literal["train", "eval", "all"] = "train"

    def __post_init__(self) -> None:
        check_options(
            "reduce",
            self,
            positive=("min_operands", "count"),
            pairs=(
                ("min_operands", "max_operands"),
                ("min_number", "max_number"),
                ("max_number", "max_result"),
            ),
        )
        known = bool(self.operators) and set(self.operators) <= set(PRECEDENCE)
        words = f"operators={self.operators!r}: must be some of '+', '-', '*'"
        require(known, "reduce", words)
        for name in ("min_number", "max_depth"):
            least = getattr(self, name)
            require(least >= 0, "reduce", f"{name}={least}: must be at least 0")

    def row(self, index: int) -> dict[str, Any]:
        problem = self.problem(index)
        truth = {
            "expression": text_of(problem.expression),
            "value": value_of(problem.expression),
        }
        return {
            "data_source": self.name,
            "prompt": [{"role": "user", "content": problem.question}],
            "target": [{"role": "assistant", "content": "\n".join(problem.lines)}],
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": index, "split": self.split, "seed": self.seed},
        }

    def problem(self, index: int) -> ReduceProblem:
        """The problem behind row ``index``; every number of operands is equally likely."""
        draw = Draw(self.seed, index)
        size = draw.between(self.min_operands, self.max_operands)
        for _ in range(MAX_DRAWS):
            tree = self._attempt(draw, size)
            if tree is not None and self._in_split(tree):
                return ReduceProblem(tree, _solution(tree, draw))
        raise DataError(f"reduce: no problem of {size} operands found for {self}: widen the ranges")

    def _in_split(self, tree: Tree) -> bool:
        held_out = is_held_out(canonical_text(tree))
        return self.split == "all" or (self.split == "eval") == held_out

    def _attempt(self, draw: Draw, size: int) -> Tree | None:
        """Joins neighbours until one is left; None where no pair stays within the ranges."""
        numbers = [draw.between(self.min_number, self.max_number) for _ in range(size)]
        # Each part with its value and depth, which would cost a walk over the tree.
        parts: list[tuple[Tree, int, int]] = [(number, number, 0) for number in numbers]
        while len(parts) > 1:
            allowed = [
                (place, operator, value, 1 + max(left[2], right[2]))
                for place, (left, right) in enumerate(pairwise(parts))
                if not self.max_depth or max(left[2], right[2]) < self.max_depth
                for operator in self.operators
                if 0 <= (value := OPERATE[operator](left[1], right[1])) <= self.max_result
            ]
            if not allowed:
                return None
            place, operator, value, depth = allowed[draw.between(0, len(allowed) - 1)]
            joined = Operation(parts[place][0], operator, parts[place + 1][0])
            parts[place : place + 2] = [(joined, value, depth)]
        return parts[0][0]


def _solution(tree: Tree, draw: Draw) -> tuple[str, ...]:
    lines = []
    while options := rewrites(tree):
        tree = options[draw.between(0, len(options) - 1)]
        lines.append(text_of(tree))
    return tuple(lines) or (text_of(tree),)


def parse_reduce(options: str) -> ReduceRows:
    """Reads the part of a spec after ``reduce:``, ``key=value`` pairs joined by ``&``.

    Raises:
      DataError: an unknown key, or a value that is not of its type or range.

    >>> parse_reduce("max_operands=10&split=eval").max_operands
    10
    """
    return parse_options(ReduceRows, "reduce", options)
