"""Judges each row by what it is, for files and mixtures that hold several kinds."""

from collections.abc import Mapping
from typing import Any

from echorl_jax.rewards import choice, countdown, mathematics, reduce, shapes
from echorl_jax.rewards.loading import Verdict


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    """Judges by the ground truth.

    Numbers and a target are Countdown, an expression and its value Reduce, a last line Shapes, a
    letter with options is a choice, all else mathematics.

    >>> grade("(B)", {"reward_model": {"ground_truth": "B"}, "options": ["four", "five"]})
    Verdict(score=1.0, correct=True, reason='chose B', metrics={})
    """
    truth = row["reward_model"]["ground_truth"]
    if isinstance(truth, Mapping) and "numbers" in truth:
        return countdown.grade(response, row)
    if isinstance(truth, Mapping) and "expression" in truth:
        return reduce.grade(response, row)
    if isinstance(truth, Mapping) and "last_line" in truth:
        return shapes.grade(response, row)
    if choice.options_of(row) and choice.is_choice(row):
        return choice.grade(response, row)
    return mathematics.grade(response, row)
