"""Judges mathematical answers with math-verify, which compares parsed expressions instead of text.

What is compared is the last ``\\boxed{}`` after ``</think>`` with its surroundings, else the
``<answer>``, else what math-verify finds near the end. Answers that would be absurdly costly to
evaluate are refused unread; the pool's limits are for the rest.
"""

import dataclasses
import functools
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from echorl_jax.rewards import choice
from echorl_jax.rewards.extraction import after_thinking, last_answer, last_boxed_span
from echorl_jax.rewards.verdict import Verdict

# math-verify interrupts itself after this long (seconds); only possible in a main thread.
PARSE_LIMIT_S = 4
# Text around a box that may belong to the answer: boxes before it ("\boxed{1} and \boxed{2}"), a
# unit after it.
BEFORE_BOX, AFTER_BOX = 200, 20
# An answer without a box is looked for in this much of the end.
TAIL = 1000
MAX_ANSWER = 1000
# GSM8K's solutions end in "#### 72".
GSM8K_MARK = "####"
MAX_NESTING = 40

# Towers of powers, exponents and factorials of large numbers, numbers of hundreds of digits:
# parsing evaluates them.
COSTLY = re.compile(
    r"\^[\s{(]*[^\s=,;]{0,20}\^[\s{(]*[^\s=,;]{0,20}\^"
    r"|(?:\^|\*\*)[\s{(]*\d{5,}"
    r"|\d\)?\*\*\(?\d+\)?\*\*"
    r"|\d{4,}[\s)}\]]*!|!\s*!\s*!"
    r"|\d{200,}"
)
CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
LETTER = re.compile(r"\(?[A-J]\)?")
COSMETICS = re.compile(r"\\(?:text|textbf|mbox|mathrm|left|right|[,!;:\s()\[\]])|[\s$.]")

# It warns of its own time limits, which are part of normal work here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class _Found:
    """The answer itself, and the stretch of text around it that math-verify is shown."""

    answer: str
    context: str
    boxed: bool


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    r"""Compares the answer with the ground truth: text, a list of accepted texts, or UFT's mapping.

    >>> row = {"reward_model": {"ground_truth": "336^\\circ"}}
    >>> grade("It turns by \\boxed{336} degrees.", row)
    Verdict(score=1.0, correct=True, reason='equals the answer')
    """
    golds = _golds(row["reward_model"]["ground_truth"])
    found = _find_answer(after_thinking(response))
    if len(found.answer) > MAX_ANSWER:
        return Verdict.wrong(f"an answer of more than {MAX_ANSWER} characters")
    if _plain(found.answer) and _plain(found.answer) in map(_plain, golds):
        return Verdict.right("is the answer, word for word")
    if any(LETTER.fullmatch(gold) and choice.is_choice(row) for gold in golds):
        return choice.grade(response, row)
    if _is_costly(found.context):
        return Verdict.wrong("an answer too costly to evaluate")
    # A box that cannot be read is not replaced by some number that stands near it.
    parsed = _parse(found.context, only_first=found.boxed)
    if any(_verify(_parse_gold(gold), parsed) for gold in golds):
        return Verdict.right("equals the answer")
    return Verdict.wrong("does not equal the answer" if parsed else "no answer found")


def _find_answer(text: str) -> "_Found":
    if (span := last_boxed_span(text)) is not None:
        start, end = span
        # "\boxed{1} and \boxed{2}" is one answer; whatever else stands before a box is not part of
        # it.
        first = text.find("\\boxed", max(0, start - BEFORE_BOX), start)
        return _Found(text[start:end], text[max(first, 0) : end + AFTER_BOX], boxed=True)
    answer = last_answer(text)
    if answer is None and GSM8K_MARK in text[-TAIL:]:
        answer = text.rpartition(GSM8K_MARK)[2]
    if answer is None:
        return _Found(text[-TAIL:], text[-TAIL:], boxed=False)
    return _Found(answer, answer if "$" in answer else f"${answer}$", boxed=False)


def _golds(truth: Any) -> list[str]:
    if isinstance(truth, Mapping):
        truth = truth["target"]
    texts = truth if isinstance(truth, Sequence) and not isinstance(truth, str) else [truth]
    return [str(text).rpartition(GSM8K_MARK)[2].strip() for text in texts]


def _is_costly(text: str) -> bool:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest > MAX_NESTING or COSTLY.search(text) is not None


def _plain(text: str) -> str:
    """Text as it would be compared by eye: without spacing, mathematics mode and type commands."""
    return COSMETICS.sub("", text.replace("dfrac", "frac").replace("tfrac", "frac")).casefold()


def _limit() -> int | None:
    return PARSE_LIMIT_S if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    if _is_costly(gold):
        return ()
    marked = gold if "$" in gold or "\\boxed" in gold or "\\(" in gold else f"${gold}$"
    return tuple(_parse(marked, only_first=False))


def _parse(text: str, *, only_first: bool) -> list[Any]:
    mode = "first_match" if only_first else "any_match"
    limit: Any = _limit()
    return parse(text, CONFIG, extraction_mode=mode, parsing_timeout=limit)


def _verify(gold: Sequence[Any], found: Sequence[Any]) -> bool:
    return verify(list(gold), list(found), timeout_seconds=_limit())
