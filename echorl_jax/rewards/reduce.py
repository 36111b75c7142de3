"""Judges Reduce: the last line of a response, alone, is the value of the expression.

How the response came there does not count: wrong ways that end right are successes, as with any
verifiable reward. The metric ``steps_right`` says how much of the way was right; no reward sees it.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

from echorl_jax.rewards.arithmetic import ArithmeticSyntaxError, Expression, parse_expression
from echorl_jax.rewards.extraction import after_thinking, last_answer
from echorl_jax.rewards.loading import Verdict


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    """A verdict by exact arithmetic, with the metric ``steps_right``.

    The row's ground truth is ``{"expression": ..., "value": n}``.

    With ``<answer> ... </answer>``, the last such number counts instead of the last line.

    >>> truth = {"expression": "(3+4)*2", "value": 14}
    >>> grade("7*2\\n14", {"reward_model": {"ground_truth": truth}})
    Verdict(score=1.0, correct=True, reason='ends with 14', metrics={'steps_right': 1.0})
    """
    verdict = _last_line(response, row)
    return dataclasses.replace(verdict, metrics={"steps_right": steps_right(response, row)})


def _last_line(response: str, row: Mapping[str, Any]) -> Verdict:
    value = Fraction(row["reward_model"]["ground_truth"]["value"])
    text = after_thinking(response)
    answer = last_answer(text)
    lines = _lines(text) if answer is None else [answer]
    if not lines:
        return Verdict.wrong("no lines")
    try:
        last = parse_expression(lines[-1])
    except (ArithmeticSyntaxError, ZeroDivisionError) as error:
        return Verdict.wrong(f"the last line is no number: {error}")
    if len(last.numbers) > 1:
        return Verdict.wrong("the last line is no number alone")
    if last.value != value:
        return Verdict.wrong(f"ends with {last.value}, not {value}")
    return Verdict.right(f"ends with {value}")


def steps_right(response: str, row: Mapping[str, Any]) -> float:
    """The share of lines that are right: the value is kept, and two numbers have become one.

    The first line is compared with the expression of the row, each other one with the line before
    it. A response without lines has 0.

    >>> truth = {"expression": "(3+4)*2-1", "value": 13}
    >>> steps_right("7*2-1\\n15-1\\n14", {"reward_model": {"ground_truth": truth}})
    0.6666666666666666
    """
    lines = [row["reward_model"]["ground_truth"]["expression"], *_lines(after_thinking(response))]
    parsed = [_parsed(line) for line in lines]
    right = [_one_operation(before, after) for before, after in pairwise(parsed)]
    return sum(right) / max(len(right), 1)


def _lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line.strip()]


def _parsed(line: str) -> Expression | None:
    try:
        return parse_expression(line)
    except (ArithmeticSyntaxError, ZeroDivisionError):
        return None


def _one_operation(before: Expression | None, after: Expression | None) -> bool:
    if before is None or after is None or before.value != after.value:
        return False
    gone = Counter(before.numbers) - Counter(after.numbers)
    made = Counter(after.numbers) - Counter(before.numbers)
    if len(after.numbers) != len(before.numbers) - 1:
        return False
    # Two numbers are gone and one is made; one of the two may equal what is made (3 - 0 = 3).
    return gone.total() <= 2 and made.total() <= 1
