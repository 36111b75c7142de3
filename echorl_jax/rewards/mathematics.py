r"""Judges mathematical answers: by their text, by value, by structure, and last with SymPy.

Numbers, words, lists, tuples, intervals, matrices and equations are compared part by part, exactly.
Other expressions go to ``algebra``. Answers that would be too costly to evaluate are refused
unread; the pool's limits are for the rest.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from echorl_jax.rewards import choice, literals
from echorl_jax.rewards.algebra import TRIGONOMETRIC, evaluate, is_costly, same_expression
from echorl_jax.rewards.extraction import GSM8K_MARK, after_thinking, boxed_spans, final_answer
from echorl_jax.rewards.literals import number
from echorl_jax.rewards.loading import Verdict
from echorl_jax.rewards.notation import canonical, key, words

MAX_ANSWER = 1000
# Longer lists are refused, because each part is compared with each.
MAX_PARTS = 40
# A shorter answer may stand in its problem by chance.
MIN_RESTATED = 4

LETTER = re.compile(r"[(\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?[(\s]*[A-J][\s)}.$]*")
MEANINGFUL = re.compile(r"[^\W_]|\\(?:emptyset|infty)")
# An answer with one of these is not evaluated.
UNEVALUATED = re.compile(
    r"\\(?:i*int|oint|(?:co)?prod|sum|lim|limsup|liminf|max|min|gcd|lcm|det|sup|inf|arg)(?![A-Za-z])"
    r"|\\text\{(?:lcm|gcd|max|min)\}"
)
# All that may stand in a calculation whose gold is a number.
CALCULATION = re.compile(
    r"(?:[-+*/^!(){}|0-9.\s\[\]]|(?<![A-Za-z])[ei](?![A-Za-z])|_(?=[0-9{])"
    r"|\\(?:frac|sqrt|cdot|times|div|pi|binom|log|ln|exp|(?:arc)?(?:sin|cos|tan)|cot|sec|csc"
    r"|[lr]floor|[lr]ceil|circ)(?![A-Za-z]))+"
)
# Two numbers side by side are no product.
SIDE_BY_SIDE = re.compile(r"[0-9.] +[0-9.]|[0-9]\}? *\\text")
RELATION = re.compile(r"\\(?:leq|geq|neq|approx|in|equiv|sim)(?![A-Za-z])|[=<>]")
APPROXIMATELY = r"\\(?:approx|sim)(?![A-Za-z])"
TURNED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
OR_AND = re.compile(
    r"\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\(?:lor|vee|land|wedge)(?![A-Za-z])"
)
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
# The side of an equation that only says what is found: x, f(x), a_1, f(2), |AB|, \frac{AB}{CD}.
NAME = re.compile(
    r"(?:[^\W\d_]|\\[A-Za-z]+(?![A-Za-z])|[{}()|,: '/]|_[0-9]|_\{[^{}]*\}"
    r"|\([-0-9, ]*[0-9][-0-9, ]*\)|\^\{-1\}|\^\\circ)+"
)
DECIMAL_COMMA = re.compile("-?[0-9]+,[0-9]+")
BRACKETED = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)")
MATRIX = re.compile(
    r"\\begin\{([bpB]?matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL
)
TRAILING_UNIT = re.compile(
    r"(?<=[0-9})\]A-Za-z\s])\s?(?:\\text\{([^{}]*)\}(?:\^[0-9])?|\^\\circ) ?\Z"
)


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    r"""Compares the answer with the ground truth: text, a list of accepted texts, or UFT's mapping.

    >>> row = {"reward_model": {"ground_truth": "336^\\circ"}}
    >>> grade("It turns by \\boxed{336} degrees.", row)
    Verdict(score=1.0, correct=True, reason='equals the answer', metrics={})
    """
    golds = _golds(row["reward_model"]["ground_truth"])
    if any(LETTER.fullmatch(gold) for gold in golds) and choice.is_choice(row):
        return choice.grade(response, row)
    answer = final_answer(after_thinking(response))
    if answer is None:
        return Verdict.wrong("no answer found")
    if len(answer) > MAX_ANSWER:
        return Verdict.wrong(f"an answer of more than {MAX_ANSWER} characters")
    answer = canonical(answer)
    verdict = _compare(answer, [canonical(gold) for gold in golds], row)
    return dataclasses.replace(verdict, answer=key(answer) or None)


def _compare(answer: str, golds: Sequence[str], row: Mapping[str, Any]) -> Verdict:
    if any(_same_text(gold, answer) for gold in golds):
        return Verdict.right("is the answer, word for word")
    if is_costly(answer):
        return Verdict.wrong("an answer too costly to evaluate")
    comparison = _Comparison(row)
    if any(comparison.same(gold, answer) for gold in golds):
        return Verdict.right("equals the answer")
    return Verdict.wrong("does not equal the answer" if answer else "no answer found")


def second_spelling(gold: str) -> str | None:
    r"""The same answer written in another way, to test a grader with; None if it has only one.

    >>> second_spelling("4.5e33"), second_spelling("\\text{East}"), second_spelling("x+1")
    ('4.5 \\times 10^{33}', 'East', None)
    """
    text = canonical(gold)
    if match := re.fullmatch(r"(-?[0-9.]+)[eE]([-+]?[0-9]+)", text):
        return rf"{match[1]} \times 10^{{{int(match[2])}}}"
    if match := re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}", text):
        return f"{match[1]}{match[2]}/{match[3]}"
    if re.fullmatch("-?[1-9][0-9]{3,14}", text):
        return f"{int(text):,}"
    if re.fullmatch(r"-?[0-9]{1,9}\.[0-9]{1,6}", text):
        value = Fraction(text)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if match := re.fullmatch(r"\\text\{([^{}\\]*[^\W\d][^{}\\]*)\}", text):
        return match[1].strip()
    if words(text) is not None and "\\" not in text and len(text) > 1:
        return rf"\text{{{text}}}"
    return None


def _golds(truth: Any) -> list[str]:
    if isinstance(truth, Mapping):
        truth = truth["target"]
    texts = truth if isinstance(truth, Sequence) and not isinstance(truth, str) else [truth]
    return [_gold(str(text)) for text in texts]


@functools.lru_cache(maxsize=4096)
def _gold(text: str) -> str:
    """The answer itself, of a ground truth that is a solution or has it in a box."""
    text = text.rpartition(GSM8K_MARK)[2].strip()
    return final_answer(text) or text if boxed_spans(text) or "answer" in text else text


def _same_text(gold: str, answer: str) -> bool:
    return key(gold) == key(answer) and MEANINGFUL.search(gold) is not None


class _Comparison:
    """Compares answers to one problem by their kind, and their parts as answers again."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str):
            prompt = "\n".join(str(message.get("content", "")) for message in prompt)
        self._percent_asked = "%" in prompt or "percent" in prompt.casefold()
        self._problem = re.sub(r"\s|\$|\\[,;:!]|\\left|\\right", "", prompt)

    def same(self, gold: str, answer: str) -> bool:
        """True if two canonical texts are the same answer. The first kind that fits decides."""
        if not gold or not answer:
            return False
        if _same_text(gold, answer):
            return True
        first, second = number(gold), number(answer)
        if first and second:
            return literals.equal(first, second, percent_asked=self._percent_asked)
        if literals.based(gold) or literals.based(answer):
            return literals.based(gold) == literals.based(answer)
        gold_words, answer_words = words(gold), words(answer)
        if not gold_words or not answer_words:
            if gold_words or answer_words:
                return False
        elif gold_words == answer_words:
            return True
        if DECIMAL_COMMA.fullmatch(answer) and answer.replace(",", ".") == gold:
            return True
        golds, answers = _parts(gold), _parts(answer)
        if len(golds) > 1 or len(answers) > 1:
            return self._same_list(golds, answers)
        return not gold_words and self._same_formula(gold, answer)

    def _same_formula(self, gold: str, answer: str) -> bool:
        if RELATION.search(gold) or RELATION.search(answer):
            return self._same_relation(gold, answer)
        same_ratio = literals.same_ratio(gold, answer)
        if same_ratio is not None:
            return same_ratio
        container, other = _container(gold), _container(answer)
        if container and other:
            return self._same_container(*container, *other)
        return self._same_algebra(gold, answer)

    def _same_in_order(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        return len(golds) == len(answers) and all(map(self.same, golds, answers))

    def _same_in_any_order(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        rest = list(answers)
        for gold in golds:
            match = next((answer for answer in rest if self.same(gold, answer)), None)
            if match is None:
                return False
            rest.remove(match)
        return not rest

    def _same_list(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        """Lists are equal in any order, unless only one of them says what each value is."""
        if max(len(golds), len(answers)) > MAX_PARTS:
            return False
        if len(golds) > 1 and len(answers) > 1:
            golds, answers = list(dict.fromkeys(golds)), list(dict.fromkeys(answers))
            return self._same_in_order(golds, answers) or (
                _labelled(golds) == _labelled(answers) and self._same_in_any_order(golds, answers)
            )
        kind, parts = _container((golds if len(golds) == 1 else answers)[0]) or ("", [])
        if not kind and len(golds) == 1:  # the answer may be several spellings of one value
            return all(self.same(golds[0], answer) for answer in answers)
        if kind not in ("()", "{}"):
            return False
        golds, answers = (parts, answers) if len(golds) == 1 else (golds, parts)
        return self._same_container(kind, golds, kind, answers)

    def _same_container(
        self, gold_kind: str, golds: Sequence[str], kind: str, answers: Sequence[str]
    ) -> bool:
        """Compares tuples, intervals, sets and matrices. A tuple may stand for a vector."""
        if gold_kind != kind and {gold_kind, kind} != {"vector", "()"}:
            return False
        if gold_kind == "{}":
            return len(golds) == len(answers) and self._same_in_any_order(golds, answers)
        return self._same_in_order(golds, answers)

    def _same_relation(self, gold: str, answer: str) -> bool:
        (gold_sides, gold_signs), (sides, signs) = _relation(gold), _relation(answer)
        if "" in sides:
            return False
        if signs and signs[-1] in ("\\approx", "\\sim"):
            return self._same_approximation(gold, answer)
        if not gold_signs and not signs:
            return self._same_algebra(gold, answer)
        if "\\in" in gold_signs[:1] + signs[:1]:
            gold = gold_sides[1] if gold_signs[:1] == ["\\in"] else gold
            return self.same(gold, sides[1] if signs[:1] == ["\\in"] else answer)
        if {*gold_signs, *signs} == {"="}:
            return self._same_equation(gold_sides, sides)
        if {*gold_signs} == {"="} or number(gold):
            return False
        turned = [TURNED.get(sign, sign) for sign in signs[::-1]]
        return (
            (signs == gold_signs and self._same_in_order(gold_sides, sides))
            or (turned == gold_signs and self._same_in_order(gold_sides, sides[::-1]))
            or self._same_algebra(gold, answer)
        )

    def _same_approximation(self, gold: str, answer: str) -> bool:
        r"""``1/3 \approx 0.33`` is 1/3, and 0.33 where it is what 1/3 rounds to.

        Of two whole or decimal numbers, one must be the other rounded: else they are two options.
        """
        exact, *rounded = _split(answer, APPROXIMATELY)
        side = _relation(exact)[0][-1]
        literal = number(side)
        value = literal.value if literal else evaluate(side)
        option = literal is not None and (
            literal.places is not None or literal.value.denominator == 1
        )
        for text in rounded:
            approximate = number(text)
            if approximate is None or value is None:
                continue
            last_digit = Fraction(1, 10) ** (approximate.places or 0)
            if abs(value - approximate.value) <= (last_digit / 2 if option else last_digit):
                if self.same(gold, text):
                    return True
            elif option:
                return False
        return self.same(gold, exact)

    def _same_equation(self, golds: list[str], answers: list[str]) -> bool:
        """Equations and chains of them. A name before the value counts only if both have one."""
        gold_names, gold_values = _names_and_values(golds)
        names, values = _names_and_values(answers)
        equations = " = ".join(golds), " = ".join(answers)
        if len(golds) > 1 and not gold_names:
            return len(answers) > 1 and self._same_algebra(*equations)
        gold, value = gold_values[-1], values[-1]
        if gold_names and names and {*map(key, gold_names)}.isdisjoint(map(key, names)):
            return not number(gold) and not number(value) and self._same_algebra(*equations)
        if gold_names and not names and len(values) > 1:
            return self._same_algebra(*equations)
        # Other numbers in the chain must agree; calculations before the value are not checked.
        return self.same(gold, value) and all(
            self.same(gold, other)
            for other in values[:-1]
            if number(other) or not (number(gold) or CALCULATION.fullmatch(other))
        )

    def _same_algebra(self, gold: str, answer: str) -> bool:
        """Compares with SymPy. A number is the gold of calculations, not of other objects."""
        if self._restates(gold, answer):
            return False
        gold, answer = _without_unit(gold), _without_unit(answer)
        if SIDE_BY_SIDE.search(answer) or (number(gold) and not CALCULATION.fullmatch(answer)):
            return False
        return same_expression(gold, answer)

    def _restates(self, gold: str, answer: str) -> bool:
        """True if an answer repeats an expression of the problem, or is not evaluated."""
        if UNEVALUATED.search(answer) and not UNEVALUATED.search(gold):
            return True
        text = re.sub(r"\s", "", answer)
        before, found, after = self._problem.partition(text)
        if len(text) < MIN_RESTATED or number(answer) or not found:
            return False
        return not any(sign in "0123456789+-*/^_{}\\(" for sign in before[-1:] + after[:1])


def _split(text: str, separator: str, *, keep: bool = False) -> list[str]:
    """Cuts at separators outside of brackets; a comma of thousands is none.

    With ``keep``, the separators stand between the parts.
    """
    parts, start, depth = [], 0, 0
    for match in re.finditer(
        r"(?P<open>\\begin|\\langle|\\?\{|[(\[])|(?P<close>\\end|\\rangle|\\?\}|[)\]])"
        rf"|{THOUSANDS.pattern}|(?P<cut>{separator})",
        text,
    ):
        depth += bool(match["open"]) - bool(match["close"])
        if match["cut"] and depth == 0:
            parts += [text[start : match.start()].strip(), match[0]][: 1 + keep]
            start = match.end()
    return [*parts, text[start:].strip()]


def _parts(text: str) -> list[str]:
    r"""The answers that a text lists, ``a \pm b`` being two."""
    groups = _split(OR_AND.sub(" , ", text), ";")
    # Semicolons separate the answers only if there are commas inside of them.
    if len(groups) == 1 or not any(len(_split(group, ",")) > 1 for group in groups):
        groups = [part for group in groups for part in _split(group, ",")]
    parts = []
    for group in filter(None, groups):
        if PLUS_MINUS.search(group) and not _container(group):
            upper, lower = (
                PLUS_MINUS.sub(lambda match, signs=signs: signs[match[0]], group)
                for signs in ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"})
            )
            parts += [re.sub(r"^\+\s*|(?<==)\s*\+\s*", " ", upper).strip(), lower]
        else:
            parts.append(group)
    return parts[: MAX_PARTS + 1]


def _labelled(parts: Sequence[str]) -> bool:
    """True if each part is an equation, and the left sides differ."""
    sides = [_split(part, "=") for part in parts]
    return len({key(side[0]) for side in sides if len(side) > 1}) == len(parts)


def _container(text: str) -> tuple[str, list[str]] | None:
    """The kind and the parts of a tuple, interval, set or matrix that is all of a text."""
    if match := MATRIX.fullmatch(text):
        rows = [_split(row, "&") for row in match[2].split("\\\\") if row.strip()]
        cells = [cell for row in rows for cell in row]
        vector = len(rows) == 1 or len(cells) == len(rows)
        return "vector" if vector else f"matrix of {len(rows)} rows", cells
    match = BRACKETED.fullmatch(text)
    if match is None or not _balanced(match[2]):
        return None
    opening, inside, closing = match.groups()
    kind = (opening + closing).replace("\\langle", "(").replace("\\rangle", ")").replace("\\", "")
    if opening == "\\{":
        return kind, _parts(inside)
    # A comma between numbers separates them here, whatever it does outside.
    parts = inside.split(",") if THOUSANDS.search(inside) else _split(inside.replace(";", ","), ",")
    return (kind, list(map(str.strip, parts))) if len(parts) > 1 else None


def _balanced(text: str) -> bool:
    signs = ((sign in "([") - (sign in ")]") for sign in text)
    depths = list(itertools.accumulate(signs, initial=0))
    return min(depths) == 0 == depths[-1]


def _relation(text: str) -> tuple[list[str], list[str]]:
    """The sides of a chain of relations and the signs between them."""
    pieces = _split(text, RELATION.pattern, keep=True)
    return pieces[0::2], pieces[1::2]


def _names_and_values(sides: list[str]) -> tuple[list[str], list[str]]:
    """The sides of an equation that are names, and its values, of which the last is the answer."""
    if len(sides) == 1:
        return [], sides
    names = [side for side in sides if _is_name(side)]
    values = [side for side in sides if not _is_name(side)]
    return (names, values) if values else (sides[:1], sides[-1:])


def _is_name(text: str) -> bool:
    return bool(NAME.fullmatch(text)) and not number(text) and any(map(str.isalpha, text))


def _without_unit(text: str) -> str:
    match = TRAILING_UNIT.search(text)
    if match is None or match.start() == 0 or literals.NO_UNIT.search(match[1] or ""):
        return text
    if match[1] is None and TRIGONOMETRIC.search(text):
        return text  # the degrees of an angle inside
    return text[: match.start()]
