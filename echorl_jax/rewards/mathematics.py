r"""Judges mathematical answers: by their text, by value, by structure, and last with SymPy.

Numbers, words, lists, tuples, intervals, matrices and equations are compared part by part, exactly.
What is left, expressions, is parsed by Math-Verify's parser and evaluated to 30 digits at a few
points. Answers that would be absurdly costly to evaluate are refused unread; the pool's limits are
for the rest.
"""

import dataclasses
import functools
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.errors import TimeoutException
from math_verify.grader import should_treat_as_complex
from math_verify.utils import timeout

from echorl_jax.rewards import choice, notation
from echorl_jax.rewards.extraction import GSM8K_MARK, after_thinking, boxed_spans, final_answer
from echorl_jax.rewards.notation import Number, canonical, key, number
from echorl_jax.rewards.verdict import Verdict

# SymPy is interrupted after this long (seconds); only possible in a main thread.
SYMPY_LIMIT_S = 4
MAX_ANSWER = 1000
MAX_NESTING = 40
# Parts of a list, and a list of lists of lists.
MAX_PARTS, MAX_DEPTH = 40, 6

# Towers of powers, exponents and factorials of large numbers, numbers of hundreds of digits:
# parsing evaluates them.
COSTLY = re.compile(
    r"\^[\s{(]*[^\s=,;]{0,20}\^[\s{(]*[^\s=,;]{0,20}\^"
    r"|(?:\^|\*\*)[\s{(]*\d{5,}"
    r"|\d\)?\*\*\(?\d+\)?\*\*"
    r"|\d{4,}[\s)}\]]*!|!\s*!\s*!"
    r"|\d{200,}"
)
LETTER = re.compile(r"\(?[A-J]\)?")
MEANINGFUL = re.compile(r"[^\W_]|\\(?:emptyset|infty)")
# A restatement of the problem instead of its answer.
UNEVALUATED = re.compile(
    r"\\(?:i*int|oint|sum|prod|coprod|lim|limsup|liminf|max|min|gcd|lcm|det|sup|inf|arg)(?![A-Za-z])"
)
# All that may stand in a calculation that a number is the gold of.
CALCULATION = re.compile(
    r"(?:[-+*/^!(){}|0-9.\s]|(?<![A-Za-z])[ei](?![A-Za-z])|\\(?:frac|sqrt|cdot|times|div|pi|binom|log"
    r"|ln|exp|a?r?c?(?:sin|cos|tan)|cot|sec|csc|[lr]floor|[lr]ceil|circ)(?![A-Za-z])|_(?=[0-9{])|\[|\])+"
)
# Two numbers side by side are no product.
SIDE_BY_SIDE = re.compile(r"[0-9.] +[0-9.]|[0-9]\}? *\\text")
RELATION = re.compile(r"\\(?:leq|geq|neq|approx|in|equiv|sim)(?![A-Za-z])|[=<>]")
OR_AND = re.compile(
    r"\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\(?:lor|vee|land|wedge)(?![A-Za-z])"
)
PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])")
THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
# The left side of an equation that only says what is found: x, f(x), a_1, P(A), |AB|, \frac{AB}{CD}.
NAME = re.compile(
    r"(?:[^\W\d]|\\(?!text\{\s*or)[A-Za-z]+|[{}()|,: ']|/|_[0-9]|_\{[^{}]*\}|\([-0-9, ]+\)|\^\{-1\}|\^\\circ)+"
)
VARIABLE = re.compile(
    r"(?<!\\mathbb\{)(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z]+"
    r"|\\(?:[Aa]lpha|[Bb]eta|[Gg]amma|[Dd]elta|[Tt]heta|[Ll]ambda|[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega"
    r"|[Pp]i|[Xx]i)(?![A-Za-z])"
)
MATRIX = re.compile(
    r"\\begin\{([bpB]?matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL
)
TRAILING_UNIT = re.compile(
    r"(?<=[0-9})\]A-Za-z\s])\s*(?:\\text\{([^{}]*)\}(?:\^[0-9])?|\^\\circ)\s*$"
)
_POINTS = tuple(Fraction(*pair) for pair in ((7, 5), (13, 11), (-9, 7), (29, 13), (-17, 5)))
_NORMALISE = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
_PRECISION, _TOLERANCE = 40, sympy.Float("1e-25", 40)
_ZERO = sympy.Float("1e-60", 40)

# It warns of its own time limits, which are part of normal work here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the comparison takes from the row besides the gold answer."""

    text: str  # without spaces
    percent_asked: bool


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    r"""Compares the answer with the ground truth: text, a list of accepted texts, or UFT's mapping.

    >>> row = {"reward_model": {"ground_truth": "336^\\circ"}}
    >>> grade("It turns by \\boxed{336} degrees.", row)
    Verdict(score=1.0, correct=True, reason='equals the answer')
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
    if any(_same_text(canonical(gold), answer) for gold in golds):
        return Verdict.right("is the answer, word for word")
    if _is_costly(answer):
        return Verdict.wrong("an answer too costly to evaluate")
    problem = _problem(row)
    if any(_same(canonical(gold), answer, problem, MAX_DEPTH) for gold in golds):
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
    if notation.words(text) is not None and "\\" not in text and len(text) > 1:
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


def _problem(row: Mapping[str, Any]) -> _Problem:
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str):
        prompt = "\n".join(str(message.get("content", "")) for message in prompt)
    asked = "%" in prompt or "percent" in prompt.casefold()
    return _Problem(re.sub(r"\s|\$|\\[,;:!]|\\left|\\right", "", prompt), asked)


def _is_costly(text: str) -> bool:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest > MAX_NESTING or COSTLY.search(text) is not None


def _same_text(gold: str, answer: str) -> bool:
    return key(gold) == key(answer) and MEANINGFUL.search(gold) is not None


def _same(gold: str, answer: str, problem: _Problem, depth: int) -> bool:
    """Whether two canonical texts are the same answer; each kind of answer decides for itself."""
    if not gold or not answer or depth < 0:
        return False
    if _same_text(gold, answer):
        return True
    numbers = number(gold), number(answer)
    if numbers[0] and numbers[1]:
        return notation.equal(numbers[0], numbers[1], percent_asked=problem.percent_asked)
    for read in (notation.based, notation.words):
        found = read(gold), read(answer)
        if found[0] is not None or found[1] is not None:
            if None not in found and read is notation.words and found[0] != found[1]:
                break  # both may list names
            return found[0] == found[1]
    if notation.is_decimal_comma(gold, answer):
        return True
    parts = _parts(gold), _parts(answer)
    if len(parts[0]) > 1 or len(parts[1]) > 1:
        return _same_list(parts[0], parts[1], problem, depth - 1)
    if notation.words(gold):
        return False
    if RELATION.search(gold) or RELATION.search(answer):
        return _same_relation(gold, answer, problem, depth - 1)
    ratios = notation.ratio(gold), notation.ratio(answer)
    if ratios[0] is not None and ratios[1] is not None:
        return notation.equal_ratios(ratios[0], ratios[1])
    boxes = _container(gold), _container(answer)
    if boxes[0] and boxes[1]:
        return _same_container(boxes[0], boxes[1], problem, depth - 1)
    return _same_expression(gold, answer, problem)


def _split(text: str, separator: str, *, keep: bool = False) -> list[str]:
    """Cuts at separators outside of brackets; a comma of thousands is none.

    With ``keep``, the separators stand between the parts.
    """
    parts, start, depth = [], 0, 0
    for match in re.finditer(
        rf"\\begin|\\end|\\?[{{}}]|[()\[\]]|{THOUSANDS.pattern}|{separator}", text
    ):
        sign = match[0]
        if sign in ("\\begin", "{", "(", "[", "\\{"):
            depth += 1
        elif sign in ("\\end", "}", ")", "]", "\\}"):
            depth -= 1
        elif depth == 0 and re.fullmatch(separator, sign):
            parts += [text[start : match.start()].strip(), sign][: 1 + keep]
            start = match.end()
    parts.append(text[start:].strip())
    return parts


def _parts(text: str) -> list[str]:
    r"""The answers that a text lists, ``a \pm b`` being two."""
    groups = _split(OR_AND.sub(" , ", text), ";")
    if len(groups) == 1 or not any(len(_split(group, ",")) > 1 for group in groups):
        groups = [part for group in groups for part in _split(group, ",")]
    found = []
    for group in filter(None, groups):
        group = group.strip()
        if PLUS_MINUS.search(group) and not _container(group):
            upper = PLUS_MINUS.sub(lambda m: "+" if "pm" in m[0] else "-", group)
            lower = PLUS_MINUS.sub(lambda m: "-" if "pm" in m[0] else "+", group)
            found += [re.sub(r"^\+\s*|(?<==)\s*\+\s*", " ", upper).strip(), lower]
        else:
            found.append(group)
    return found[: MAX_PARTS + 1]


def _same_list(golds: list[str], answers: list[str], problem: _Problem, depth: int) -> bool:
    """Lists are equal in any order, unless only one of them says what each value is."""
    if max(len(golds), len(answers)) > MAX_PARTS:
        return False
    if len(golds) == 1 or len(answers) == 1:
        return _same_as_one(golds, answers, problem, depth)
    golds, answers = list(dict.fromkeys(golds)), list(dict.fromkeys(answers))
    if len(golds) != len(answers):
        return False
    in_order = all(_same(g, a, problem, depth) for g, a in zip(golds, answers, strict=True))
    if in_order or _labelled(golds) != _labelled(answers):
        return in_order
    return _same_unordered(golds, answers, problem, depth)


def _same_unordered(
    golds: Sequence[str], answers: Sequence[str], problem: _Problem, depth: int
) -> bool:
    rest = list(answers)
    for gold in golds:
        found = next((a for a in rest if _same(gold, a, problem, depth)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def _labelled(parts: Sequence[str]) -> bool:
    """Whether each part names what it is the value of, and no two the same."""
    sides = [_split(part, "=") for part in parts]
    names = [key(side[0]) for side in sides if len(side) > 1]
    return len(set(names)) == len(parts)


def _same_as_one(golds: list[str], answers: list[str], problem: _Problem, depth: int) -> bool:
    """A list against one text, which may be a tuple or a set of the same values."""
    one, many = (golds[0], answers) if len(golds) == 1 else (answers[0], golds)
    box = _container(one)
    if box is None:
        # Several spellings of a single answer; several values are none.
        return one is golds[0] and all(_same(one, answer, problem, depth) for answer in many)
    opening, parts, closing = box
    if (opening, closing) not in (("(", ")"), ("\\{", "\\}")) or len(parts) != len(many):
        return False
    pair = (parts, many) if one is golds[0] else (many, parts)
    if opening == "\\{":
        return _same_unordered(*pair, problem, depth)
    return all(_same(g, a, problem, depth) for g, a in zip(*pair, strict=True))


def _container(text: str) -> tuple[str, list[str], str] | None:
    """The brackets around a whole text and what they hold: tuples, intervals, sets, matrices."""
    if match := MATRIX.fullmatch(text):
        rows = [_split(row, "&") for row in re.split(r"\\\\", match[2]) if row.strip()]
        if all(len(row) == 1 for row in rows) or len(rows) == 1:
            return "matrix", [cell for row in rows for cell in row], str(len(rows))
        return "matrix", [cell for row in rows for cell in row], f"{len(rows)}x{len(rows[0])}"
    for opening in ("(", "[", "\\{", "\\langle"):
        for closing in (")", "]", "\\}", "\\rangle"):
            if text.startswith(opening) and text.endswith(closing):
                inside = text[len(opening) : -len(closing)]
                if not _balanced(inside):
                    return None
                parts = _split(inside.replace(";", ","), ",")
                if opening == "\\{":
                    parts = _parts(inside)
                elif THOUSANDS.search(inside):
                    parts = [part.strip() for part in inside.split(",")]
                if len(parts) > 1 or opening == "\\{":
                    return opening.replace("\\langle", "("), parts, closing.replace("\\rangle", ")")
    return None


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if depth < 0:
            return False
    return depth == 0


def _same_container(gold: Any, answer: Any, problem: _Problem, depth: int) -> bool:
    if "matrix" in (gold[0], answer[0]) and gold[0] != answer[0]:
        # A vector may be written as a tuple.
        if {gold[0], answer[0]} != {"matrix", "("} or "x" in gold[2] + answer[2]:
            return False
    elif (gold[0], gold[2]) != (answer[0], answer[2]):
        return False
    if len(gold[1]) != len(answer[1]):
        return False
    if gold[0] == "\\{":
        return _same_unordered(gold[1], answer[1], problem, depth)
    return all(_same(g, a, problem, depth) for g, a in zip(gold[1], answer[1], strict=True))


def _relation(text: str) -> tuple[list[str], list[str]]:
    """The sides of a chain of relations and the signs between them."""
    pieces = _split(text, rf"(?:{RELATION.pattern})", keep=True)
    return pieces[0::2], pieces[1::2]


def _is_name(text: str) -> bool:
    return bool(NAME.fullmatch(text)) and number(text) is None and any(c.isalpha() for c in text)


def _same_relation(gold: str, answer: str, problem: _Problem, depth: int) -> bool:
    (gold_sides, gold_signs), (sides, signs) = _relation(gold), _relation(answer)
    if "" in sides:
        return False
    if signs and signs[-1] in ("\\approx", "\\sim"):
        return _same_approximation(gold, answer, problem, depth)
    if len(gold_sides) == 1 == len(sides):
        return _same_expression(gold, answer, problem)
    if "\\in" in (gold_signs + signs)[:1] or "\\in" in signs[:1]:
        values = [
            s[1] if n[:1] == ["\\in"] else t
            for s, n, t in ((gold_sides, gold_signs, gold), (sides, signs, answer))
        ]
        return _same(values[0], values[1], problem, depth)
    if set(signs) == {"="} and set(gold_signs) <= {"="}:
        return _same_equation(gold_sides, sides, problem, depth)
    if set(gold_signs) == {"="}:
        return not signs and _same_equation(gold_sides, sides, problem, depth)
    if not gold_signs and (number(gold) or notation.words(gold)):
        return False
    return _same_inequality((gold_sides, gold_signs), (sides, signs), problem, depth) or (
        _same_expression(gold, answer, problem)
    )


def _same_inequality(gold: Any, answer: Any, problem: _Problem, depth: int) -> bool:
    turned = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
    for sides, signs in (answer, (answer[0][::-1], [turned.get(s, s) for s in answer[1][::-1]])):
        if signs and signs == gold[1]:
            if all(_same(g, a, problem, depth) for g, a in zip(gold[0], sides, strict=True)):
                return True
    return False


def _same_approximation(gold: str, answer: str, problem: _Problem, depth: int) -> bool:
    r"""``1/3 \approx 0.33`` is 1/3, and 0.33 where it is what 1/3 rounds to."""
    exact, *rounded = _split(answer, r"\\(?:approx|sim)(?![A-Za-z])")
    exact_side = _relation(exact)[0][-1]
    literal = number(exact_side)
    option = literal is not None and (literal.places is not None or literal.value.denominator == 1)
    for text in rounded:
        found = number(text)
        fits = found is not None and _rounds(exact_side, found, half=option)
        if option and found is not None and not fits:
            return False  # two numbers, one of which is not the other rounded
        if fits and _same(gold, text, problem, depth):
            return True
    return _same(gold, exact, problem, depth)


def _rounds(text: str, decimal: Number, *, half: bool) -> bool:
    """Whether the value of a text is a decimal to within its last digit, or half of that."""
    literal = number(text)
    if literal is None:
        parsed = None if _is_costly(text) else _parse(text)
        value = _value(parsed, {}) if isinstance(parsed, sympy.Expr) else None
        if value is None or not value.is_real:
            return False
        literal = Number(Fraction(str(value)))
    last_digit = Fraction(1, 10) ** (decimal.places or 0)
    return abs(literal.value - decimal.value) <= (last_digit / 2 if half else last_digit)


def _same_equation(golds: list[str], answers: list[str], problem: _Problem, depth: int) -> bool:
    """Equations and chains of them. A name before the value counts only if both have one."""
    gold_names, gold_values = _names_and_values(golds)
    names, values = _names_and_values(answers)
    if len(golds) > 1 and not gold_names:
        if len(answers) == 1:
            return False
        return _same_expression(" = ".join(golds), " = ".join(answers), problem)
    if gold_names and names and {*map(key, gold_names)}.isdisjoint(map(key, names)):
        if number(gold_values[-1]) or number(values[-1]):
            return False
        return _same_expression(" = ".join(golds), " = ".join(answers), problem)
    gold, value = gold_values[-1], values[-1]
    if len(answers) > 1 and gold_names and not names and len(values) > 1:
        return _same_expression(" = ".join(golds), " = ".join(answers), problem)
    if not _same(gold, value, problem, depth):
        return False
    for other in values[:-1]:
        plain = number(other) is not None
        symbolic = not plain and not CALCULATION.fullmatch(other) and number(gold) is None
        if (plain or symbolic) and not _same(gold, other, problem, depth):
            return False
    return True


def _names_and_values(sides: list[str]) -> tuple[list[str], list[str]]:
    """What an equation names, and its values; the last side is a value unless the first is none."""
    if len(sides) == 1:
        return [], sides
    names = [side for side in sides if _is_name(side)]
    values = [side for side in sides if not _is_name(side)]
    if not values:
        return sides[:1], sides[-1:]
    return names, values


def _same_expression(gold: str, answer: str, problem: _Problem) -> bool:
    """What only algebra can tell. A number is the gold of calculations, not of other objects."""
    if _restates(gold, answer, problem) or _letters(gold) != _letters(answer):
        return False
    gold, answer = _without_unit(gold), _without_unit(answer)
    if SIDE_BY_SIDE.search(answer):
        return False
    literal = number(gold)
    if literal is not None and not CALCULATION.fullmatch(answer):
        return False
    try:
        return timeout(_limit())(_algebra)(gold, answer)
    except TimeoutException:
        return False


def _restates(gold: str, answer: str, problem: _Problem) -> bool:
    """Whether an answer leaves to the reader what the problem asks for."""
    if UNEVALUATED.search(answer) and not UNEVALUATED.search(gold):
        return True
    text = re.sub(r"\s", "", answer)
    if len(text) < 4 or number(answer):
        return False
    place = problem.text.find(text)
    if place < 0:
        return False
    around = problem.text[max(place - 1, 0) : place], problem.text[place + len(text) :][:1]
    return not any(sign and sign in "0123456789+-*/^_{}\\(" for sign in around)


def _letters(text: str) -> set[str]:
    """The variables of a text that has capital ones: the parser reads a for A, and pi for Pi."""
    found = VARIABLE.findall(text)
    if not any(sign.isupper() for name in found for sign in name):
        return set()
    return {part for name in found for part in ([name] if name[0] == "\\" else name)}


def _without_unit(text: str) -> str:
    match = TRAILING_UNIT.search(text)
    if match is None or not match.start() or (match[1] and notation._NO_UNIT.search(match[1])):
        return text
    return text[: match.start()]


def _algebra(gold: str, answer: str) -> bool:
    parsed = _exact(gold), _exact(answer)
    if parsed[0] is None or parsed[1] is None:
        return False
    if all(isinstance(p, sympy.Expr) and not isinstance(p, sympy.MatrixExpr) for p in parsed):
        same = _same_values(parsed[0], parsed[1], number(gold), number(answer))
        if same is not None:
            return same
    return verify([parsed[0]], [parsed[1]], allow_set_relation_comp=True, timeout_seconds=None)


def _exact(text: str) -> Any:
    literal = number(text)
    if literal is None:
        return _parse(text)
    return sympy.Rational(literal.value) / (100 if literal.percent else 1)


def _limit() -> int | None:
    return SYMPY_LIMIT_S if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """A SymPy object, or None for what is no mathematics. Decimals are exact fractions."""
    if _is_costly(text):
        return None
    normal = normalize_latex(text, _NORMALISE)
    try:
        parsed = latex2sympy(
            normal,
            is_real=not should_treat_as_complex(normal),
            convert_degrees=False,
            normalization_config=None,
        )
    except Exception:  # the parser raises all kinds of errors for text that it cannot read
        return None
    if not isinstance(parsed, sympy.Basic):
        return parsed
    decimals = parsed.atoms(sympy.Float)
    return parsed.xreplace({d: sympy.Rational(str(d)) for d in decimals}) if decimals else parsed


def _same_values(
    gold: Any, answer: Any, gold_number: Number | None, answer_number: Number | None
) -> bool | None:
    """Compares by values, at points if there are variables; None if there are no values."""
    if gold.free_symbols != answer.free_symbols:
        return False
    gold, answer = gold.doit(), answer.doit()
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    symbols = sorted(gold.free_symbols, key=str)
    if not symbols:
        values = _value(gold, {}), _value(answer, {})
        if values[0] is None or values[1] is None:
            return None
        return _close(*values) or _rounded(values, gold_number, answer_number)
    compared = 0
    for shift in range(len(_POINTS)):
        point = {s: _POINTS[(shift + 2 * i) % len(_POINTS)] + i for i, s in enumerate(symbols)}
        exact = {s: sympy.Rational(p.numerator, p.denominator) for s, p in point.items()}
        values = _value(gold, exact), _value(answer, exact)
        if values[0] is None or values[1] is None:
            return None
        real = [value.is_real for value in values]
        if not all(real) and not gold.has(sympy.I):
            if any(real):
                return False
            continue
        compared += 1
        if not _close(*values):
            return False
    return True if compared else None


def _value(expression: Any, point: Mapping[Any, Any]) -> Any:
    value = expression.evalf(_PRECISION, subs=dict(point))
    if value.has(sympy.nan, sympy.zoo) or not value.is_number or not value.is_finite:
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number):
        return None
    if abs(imaginary) <= _TOLERANCE * abs(real):
        return real
    return value


def _close(first: Any, second: Any) -> bool:
    size = max(abs(first), abs(second))
    return bool(size <= _ZERO or abs(first - second) <= _TOLERANCE * size)


def _rounded(values: Any, gold: Number | None, answer: Number | None) -> bool:
    """Whether one is a decimal of enough digits that the other, irrational value rounds to."""
    for literal, value in ((gold, values[1]), (answer, values[0])):
        if literal is not None and literal.places is not None and value.is_real:
            exact = sympy.Rational(str(value))
            if notation.rounds_to(literal, Number(Fraction(int(exact.p), int(exact.q)))):
                return True
    return False
