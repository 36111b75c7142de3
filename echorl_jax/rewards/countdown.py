"""Judges Countdown: reach the target with the given numbers, each used at most once.

Two forms of response are understood, after the reasoning. With ``<answer> ... </answer>``, the last
such expression counts. Otherwise the response must be steps, one a line, ``5*9=45``: each uses
numbers that are given or earlier results, each of them once, and the last result is the target.
"""

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from echorl_jax.rewards.arithmetic import ArithmeticSyntaxError, Expression, parse_expression
from echorl_jax.rewards.extraction import after_thinking, last_answer
from echorl_jax.rewards.loading import Verdict


class _Mistake(ValueError):
    """The reason for which a response is wrong."""


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    """A verdict by exact arithmetic; the row's ground truth is ``{"numbers": [...], "target": n}``.

    >>> truth = {"numbers": [5, 7, 9], "target": 45}
    >>> grade("9*5=45", {"reward_model": {"ground_truth": truth}})
    Verdict(score=1.0, correct=True, reason='reaches 45', metrics={})
    """
    truth = row["reward_model"]["ground_truth"]
    available = Counter(map(Fraction, truth["numbers"]))
    target = Fraction(truth["target"])
    text = after_thinking(response)
    answer = last_answer(text)
    try:
        if answer is None:
            result = _follow_steps(text, available)
        else:
            result = _evaluate(answer, available)
    except (_Mistake, ArithmeticSyntaxError) as error:
        return Verdict.wrong(str(error))
    except ZeroDivisionError:
        return Verdict.wrong("division by zero")
    if result != target:
        return Verdict.wrong(f"reaches {_show(result)}, not {target}")
    return Verdict.right(f"reaches {target}")


def _follow_steps(text: str, available: Counter[Fraction]) -> Fraction:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        raise _Mistake("no steps")
    # A step turns at least two numbers into one.
    if len(lines) >= available.total():
        raise _Mistake(f"{len(lines)} lines are more than {available.total()} numbers allow")
    result = Fraction(0)
    for place, line in enumerate(lines, start=1):
        try:
            result = _evaluate(line, available, needs_result=True)
        except (_Mistake, ArithmeticSyntaxError) as error:
            raise _Mistake(f"step {place}: {error}") from None
        available[result] += 1
    return result


def _evaluate(text: str, available: Counter[Fraction], *, needs_result: bool = False) -> Fraction:
    """The value of ``a + b`` or ``a + b = value``; takes the numbers out of ``available``."""
    left, equals, right = text.partition("=")
    expression = parse_expression(left)
    if needs_result and (not equals or len(expression.numbers) < 2):
        raise _Mistake("not of the form a + b = c")
    if equals and (stated := parse_expression(right)).value != expression.value:
        raise _Mistake(f"the result is {_show(expression.value)}, not {_show(stated.value)}")
    _use(expression, available)
    return expression.value


def _use(expression: Expression, available: Counter[Fraction]) -> None:
    for number in expression.numbers:
        # A minus may belong to an earlier result below zero, or negate a given number.
        source = number if available[number] > 0 else -number if number < 0 else number
        if available[source] <= 0:
            raise _Mistake(f"{_show(number)} is not there to be used")
        available[source] -= 1


def _show(number: Fraction) -> str:
    text = str(number)
    return text if len(text) <= 20 else f"{text[:17]}..."
