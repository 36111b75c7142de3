"""Judges Shapes: the last line of a response is the answer, whatever stands before it."""

from collections.abc import Mapping
from typing import Any

from echorl_jax.rewards.extraction import after_thinking, last_answer
from echorl_jax.rewards.loading import Verdict


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    """A verdict by comparing words, without regard to case and a full stop.

    The row's ground truth is ``{"last_line": ...}``. With ``<answer> ... </answer>``, the last such
    text counts instead of the last line.

    >>> grade("circles: 3\\nsquares: 2\\ncircles", {"reward_model": {"ground_truth": {
    ...     "last_line": "circles"}}})
    Verdict(score=1.0, correct=True, reason='ends with circles', metrics={})
    """
    wanted = str(row["reward_model"]["ground_truth"]["last_line"])
    text = after_thinking(response)
    answer = last_answer(text)
    lines = [line for line in text.splitlines() if line.strip()] if answer is None else [answer]
    if not lines:
        return Verdict.wrong("no lines")
    last = lines[-1].strip().removesuffix(".")
    if last.casefold() != wanted.casefold():
        return Verdict.wrong(f"ends with {last[:40]!r}, not {wanted!r}")
    return Verdict.right(f"ends with {wanted}")
