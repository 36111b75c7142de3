"""The verdict of a grader on one response."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Reasons are for people and travel between processes: one line, cut to this many characters.
MAX_REASON = 200
# First words of a reason where grading failed: the process hung or died, or the grader raised.
HUNG, DIED, RAISED = "no verdict within", "the grading process died", "the grader raised"
# A plain score from here on counts as correct.
CORRECT_SCORE = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reward, whether the response is right, and why, in one line.

    Score and correctness are None where the grader does not judge the response: such a row is left
    out of the loss and of all statistics.
    """

    score: float | None
    correct: bool | None
    reason: str

    @classmethod
    def right(cls, reason: str) -> "Verdict":
        """A correct response: score 1."""
        return cls(1.0, True, reason)

    @classmethod
    def wrong(cls, reason: str) -> "Verdict":
        """A response that is wrong, or on which the grader failed: score 0."""
        return cls(0.0, False, clean_reason(reason))

    @property
    def judged(self) -> bool:
        """True if there is a score."""
        return self.score is not None


def grading_failed(reason: str) -> bool:
    """True if no grader gave this verdict: it hung, died, or raised something."""
    return reason.startswith((HUNG, DIED, RAISED))


def clean_reason(text: str) -> str:
    """Text without line ends and control characters, cut to :data:`MAX_REASON`."""
    start = text[: 2 * MAX_REASON]
    clean = "".join(sign if sign.isprintable() else " " for sign in start)
    return clean if len(clean) <= MAX_REASON else clean[: MAX_REASON - 3] + "..."


def as_verdict(result: Any) -> Verdict:
    """Accepts what graders return: a number, a truth value, a mapping, None, or a verdict.

    A number is the score and is correct from 1 on. A mapping has ``score`` and may have ``acc`` for
    correctness. None, as the result or as its score, leaves the response without a verdict.

    Raises:
      TypeError: anything else.
      ValueError: a score that is not finite.

    >>> as_verdict({"score": -1.0, "acc": False})
    Verdict(score=-1.0, correct=False, reason='scored -1')
    """
    if isinstance(result, Verdict):
        given, correct, reason = result.score, result.correct, clean_reason(result.reason)
    else:
        known: Any = result if isinstance(result, Mapping) else {}
        given, correct, reason = known.get("score", result), known.get("acc"), None
    if given is None:
        return Verdict(None, None, "not judged" if reason is None else reason)
    score = _number(given)
    if not math.isfinite(score):
        raise ValueError(f"the grader's score is {score}")
    right = score >= CORRECT_SCORE if correct is None else bool(correct)
    return Verdict(score, right, f"scored {score:g}" if reason is None else reason)


def _number(value: Any) -> float:
    # NumPy scalars have item(); text that looks like a number is a mistake.
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, int | float):
        raise TypeError(f"the grader returned {type(value).__name__}, not a score")
    return float(plain)
