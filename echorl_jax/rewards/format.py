"""Judges the form of a response alone: a thought within tags, then a boxed answer."""

from collections.abc import Mapping
from typing import Any

from echorl_jax.rewards.loading import Verdict

# What a response has, in this order; it begins with the first.
_MARKS = ("<think>", "</think>", "\\boxed{", "}")


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    """Right if the response is ``<think> ... </think> ... \\boxed{...} ...``.

    The rule of verl's and EasyR1's recipes for Geometry3K; what the answer is does not count.

    >>> grade("<think>6 + 1</think>It is \\\\boxed{7}.", {}).correct
    True
    """
    text, place = response.strip(), 0
    for mark in _MARKS:
        found = text.find(mark, place)
        if found < 0 or (place == 0 and found):
            return Verdict.wrong(f"no {mark!r} where the form has it")
        place = found + len(mark)
    return Verdict.right("the form is right")
