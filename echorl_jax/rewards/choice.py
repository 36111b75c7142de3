"""Judges multiple choice: the response names an option by its letter or by its text."""

import re
from collections.abc import Mapping
from typing import Any

from echorl_jax.rewards.extraction import after_thinking, last_answer, last_boxed
from echorl_jax.rewards.verdict import Verdict

# Answers end responses; earlier text is not searched for phrases.
TAIL = 2000
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "123456789"
# "B) text", "(B) text", "B. text" at the start of a line of the prompt.
OPTION_LINE = re.compile(r"^\s*\(?([A-Z]|[1-9])[).:]\s*(.+?)\s*$", re.MULTILINE)
# A label on its own, maybe in brackets, and what may stand behind it.
LABEL = re.compile(
    r"(?:option|choice|answer)?[\s:]*[(\[]?([A-Za-z1-9])(?:[)\].:,]+(\s.*)?)?", re.I | re.S
)
# What ends a digit that is not the beginning of a number or a formula.
_WHOLE = r"(?![A-Za-z0-9'’]|[.,/]\d|\s*(?:[\\^/%]|\*(?!\*)|[-+=]\s*[\d(\\]))"
_BETWEEN = r"(?i:\s+is)?(?i:\s+option)?\s*:?\s*[*$]*\s*"
# "the answer is (C)", "option 2"; a small letter only of an answer, and in brackets.
PHRASE = re.compile(
    rf"(?i:answer|option|choice){_BETWEEN}[(\[]?([A-Z](?![A-Za-z0-9'’])|[1-9]{_WHOLE})"
    rf"|(?i:answer){_BETWEEN}[(\[]([a-z])[)\]]"
)
DECORATION = str.maketrans("", "", "$*{}")
WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed|bf|rm)\b\s*")


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text, from the column ``options`` or from the lines of the prompt that list them."""
    listed = row.get("options")
    if isinstance(listed, Mapping):
        kept = {label: text for label, text in listed.items() if text is not None}
        return {str(label).strip().upper(): str(text) for label, text in kept.items()}
    if listed:
        return dict(zip(LETTERS, map(str, listed), strict=False))
    prompt = row.get("prompt") or [{"content": ""}]
    found = dict(OPTION_LINE.findall(prompt[-1]["content"]))
    # A list of options has two or more and leaves none out.
    labels = "".join(found)
    return (
        found if len(found) > 1 and labels in LETTERS + "|" + DIGITS and labels[0] in "A1" else {}
    )


def is_choice(row: Mapping[str, Any]) -> bool:
    """Whether the row's ground truth names an option, by letter or text."""
    truth = row["reward_model"]["ground_truth"]
    return isinstance(truth, str) and letter_of(truth, options_of(row)) is not None


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    r"""Compares the chosen option with the ground truth, which is a letter or an option's text.

    The choice is read from ``\boxed{}``, else from ``<answer>``, else from the last phrase like
    "the answer is (C)", else from a last line that is nothing but an option.

    >>> row = {"reward_model": {"ground_truth": "B"}, "options": ["four", "five"]}
    >>> grade("so \\boxed{\\text{five}}", row)
    Verdict(score=1.0, correct=True, reason='chose B')
    """
    options = options_of(row)
    gold = letter_of(str(row["reward_model"]["ground_truth"]), options)
    if gold is None:
        raise ValueError("the ground truth is neither a letter nor one of the options")
    chosen = find_choice(response, options)
    if chosen is None:
        return Verdict.wrong("no option found in the response")
    return (
        Verdict.right(f"chose {gold}")
        if chosen == gold
        else Verdict.wrong(f"chose {chosen}, not {gold}")
    )


def find_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a response settles on, or None."""
    tail = after_thinking(response)[-TAIL:]
    for marked in (last_boxed(tail), last_answer(tail)):
        if marked is not None:
            return letter_of(marked, options)
    phrases = [letter_of(found[1] or found[2], options) for found in PHRASE.finditer(tail)]
    named = [letter for letter in phrases if letter is not None]
    if named:
        return named[-1]
    lines = tail.strip().splitlines()
    return letter_of(lines[-1], options) if lines else None


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The label that a short text names, by itself or as an option's text.

    >>> letter_of("(b)", {"A": "4", "B": "5"}), letter_of("5", {"A": "4", "B": "5"})
    ('B', 'B')
    """
    plain = WRAPPERS.sub("", text).translate(DECORATION).strip().strip(".")
    match = LABEL.fullmatch(plain)
    label = match[1].upper() if match and (match[1].upper() in options or not options) else None
    if match and label and not match[2]:
        return label
    for key in (_spaced, _unspaced):
        same = [name for name, option in options.items() if key(option) == key(text)]
        if len(same) == 1:
            return same[0]
    return label


def _spaced(text: str) -> str:
    return " ".join(WRAPPERS.sub("", text).translate(DECORATION).split()).strip(".").casefold()


def _unspaced(text: str) -> str:
    return re.sub(r"[\s\\]", "", _spaced(text))
