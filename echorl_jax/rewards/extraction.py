"""Finds the part of a response that is its answer, in time linear in the length of the text."""

import re

THINK_END = "</think>"
ANSWER_START, ANSWER_END = "<answer>", "</answer>"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Escaped signs are passed over, so that \{ and \} are not braces.
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """What follows the last ``</think>``; the whole response if there is none.

    >>> after_thinking("<think> hmm </think> 42")
    ' 42'
    """
    return response.rpartition(THINK_END)[2]


def last_answer(response: str) -> str | None:
    """The inside of the last closed ``<answer> ... </answer>``, or None.

    >>> last_answer("<answer> 1 </answer> no, <answer> 2 </answer>")
    ' 2 '
    """
    before, end, _ = response.rpartition(ANSWER_END)
    if not end:
        return None
    _, start, inside = before.rpartition(ANSWER_START)
    return inside if start else None


def last_boxed(response: str) -> str | None:
    r"""The inside of the last ``\boxed{...}`` or ``\fbox{...}`` whose braces balance, or None.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    span = last_boxed_span(response)
    return response[span[0] : span[1]] if span else None


def last_boxed_span(response: str) -> tuple[int, int] | None:
    """Where the inside of the last balanced box begins and ends."""
    starts = {match.end() for match in BOX.finditer(response)}
    if not starts:
        return None
    found: tuple[int, int] | None = None
    open_braces: list[int] = []
    for match in BRACES.finditer(response, min(starts) - 1):
        if match[0] == "{":
            open_braces.append(match.end())
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start in starts and (found is None or start > found[0]):
                found = start, match.start()
    return found
