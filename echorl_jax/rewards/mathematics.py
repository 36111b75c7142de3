r"""Judges mathematical answers: by their text, by value, by structure, and last with SymPy.

Numbers, words, lists, tuples, intervals, matrices and equations are compared part by part, exactly.
What is left, expressions, is parsed by Math-Verify's parser and evaluated to 30 digits at a few
points. Answers that would be absurdly costly to evaluate are refused unread; the pool's limits are
for the rest.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from echorl_jax.rewards import choice, literals
from echorl_jax.rewards.algebra import TRIGONOMETRIC, evaluate, is_costly, same_expression
from echorl_jax.rewards.extraction import GSM8K_MARK, after_thinking, boxed_spans, final_answer
from echorl_jax.rewards.literals import number
from echorl_jax.rewards.notation import canonical, key, words
from echorl_jax.rewards.verdict import Verdict

MAX_ANSWER = 1000
# Parts of a list, and lists within tuples within lists.
MAX_PARTS, MAX_DEPTH = 40, 6
# A shorter answer may stand in its problem by chance.
MIN_RESTATED = 4

LETTER = re.compile(r"[(\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?[(\s]*[A-J][\s)}.$]*")
MEANINGFUL = re.compile(r"[^\W_]|\\(?:emptyset|infty)")
# Work that an answer leaves to its reader.
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
BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}
MATRIX = re.compile(
    r"\\begin\{([bpB]?matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL
)
TRAILING_UNIT = re.compile(
    r"(?<=[0-9})\]A-Za-z\s])\s?(?:\\text\{([^{}]*)\}(?:\^[0-9])?|\^\\circ) ?\Z"
)


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
    if is_costly(answer):
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


def _problem(row: Mapping[str, Any]) -> _Problem:
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str):
        prompt = "\n".join(str(message.get("content", "")) for message in prompt)
    asked = "%" in prompt or "percent" in prompt.casefold()
    return _Problem(re.sub(r"\s|\$|\\[,;:!]|\\left|\\right", "", prompt), asked)


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
        return literals.equal(numbers[0], numbers[1], percent_asked=problem.percent_asked)
    for read in (literals.based, words):
        found = read(gold), read(answer)
        if found[0] is not None or found[1] is not None:
            if None not in found and read is words and found[0] != found[1]:
                break  # both may list names
            return found[0] == found[1]
    if re.fullmatch("-?[0-9]+,[0-9]+", answer) and answer.replace(",", ".") == gold:
        return True
    parts = _parts(gold), _parts(answer)
    if len(parts[0]) > 1 or len(parts[1]) > 1:
        return _same_list(parts[0], parts[1], problem, depth - 1)
    if words(gold):
        return False
    if RELATION.search(gold) or RELATION.search(answer):
        return _same_relation(gold, answer, problem, depth - 1)
    same_ratio = literals.same_ratio(gold, answer)
    if same_ratio is not None:
        return same_ratio
    boxes = _container(gold), _container(answer)
    if boxes[0] and boxes[1]:
        return _same_container(boxes[0], boxes[1], problem, depth - 1)
    return _same_algebra(gold, answer, problem)


def _split(text: str, separator: str, *, keep: bool = False) -> list[str]:
    """Cuts at separators outside of brackets; a comma of thousands is none.

    With ``keep``, the separators stand between the parts.
    """
    parts, start, depth = [], 0, 0
    for match in re.finditer(
        rf"\\begin|\\end|\\[lr]angle|\\?[{{}}]|[()\[\]]|{THOUSANDS.pattern}|{separator}", text
    ):
        sign = match[0]
        if sign in ("\\begin", "\\langle", "{", "(", "[", "\\{"):
            depth += 1
        elif sign in ("\\end", "\\rangle", "}", ")", "]", "\\}"):
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
    in_order = _same_each(golds, answers, problem, depth)
    if in_order or _labelled(golds) != _labelled(answers):
        return in_order
    return _same_unordered(golds, answers, problem, depth)


def _same_each(golds: Sequence[str], answers: Sequence[str], problem: _Problem, depth: int) -> bool:
    return all(_same(g, a, problem, depth) for g, a in zip(golds, answers, strict=True))


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
    return _same_each(*pair, problem, depth)


def _container(text: str) -> tuple[str, list[str], str] | None:
    """The brackets around a whole text and what they hold: tuples, intervals, sets, matrices."""
    if match := MATRIX.fullmatch(text):
        rows = [_split(row, "&") for row in match[2].split("\\\\") if row.strip()]
        cells = [cell for row in rows for cell in row]
        vector = len(rows) == 1 or len(cells) == len(rows)
        return "matrix", cells, "" if vector else f"{len(rows)} rows"
    opening = next((each for each in BRACKETS if text.startswith(each)), None)
    closing = next((each for each in BRACKETS.values() if text.endswith(each)), None)
    if opening is None or closing is None:
        return None
    inside = text[len(opening) : -len(closing)]
    if not _balanced(inside):
        return None
    if opening == "\\{":
        return opening, _parts(inside), closing
    # A comma between numbers separates them here, whatever it does outside.
    parts = inside.split(",") if THOUSANDS.search(inside) else _split(inside.replace(";", ","), ",")
    if len(parts) == 1:
        return None
    return (
        opening.replace("\\langle", "("),
        list(map(str.strip, parts)),
        closing.replace("\\rangle", ")"),
    )


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
        if {gold[0], answer[0]} != {"matrix", "("} or "rows" in gold[2] + answer[2]:
            return False
    elif (gold[0], gold[2]) != (answer[0], answer[2]):
        return False
    if len(gold[1]) != len(answer[1]):
        return False
    if gold[0] == "\\{":
        return _same_unordered(gold[1], answer[1], problem, depth)
    return _same_each(gold[1], answer[1], problem, depth)


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
        return _same_algebra(gold, answer, problem)
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
    if not gold_signs and (number(gold) or words(gold)):
        return False
    return _same_inequality((gold_sides, gold_signs), (sides, signs), problem, depth) or (
        _same_algebra(gold, answer, problem)
    )


def _same_inequality(gold: Any, answer: Any, problem: _Problem, depth: int) -> bool:
    sides, signs = answer
    turned = sides[::-1], [TURNED.get(sign, sign) for sign in signs[::-1]]
    return bool(signs) and any(
        there == gold[1] and _same_each(gold[0], these, problem, depth)
        for these, there in (answer, turned)
    )


def _same_approximation(gold: str, answer: str, problem: _Problem, depth: int) -> bool:
    r"""``1/3 \approx 0.33`` is 1/3, and 0.33 where it is what 1/3 rounds to.

    Of two whole or decimal numbers, one must be the other rounded: else they are two options.
    """
    exact, *rounded = _split(answer, APPROXIMATELY)
    exact_side = _relation(exact)[0][-1]
    literal = number(exact_side)
    option = literal is not None and (literal.places is not None or literal.value.denominator == 1)
    for text in rounded:
        found, value = number(text), literal.value if literal else evaluate(exact_side)
        fits = False
        if found is not None and value is not None:
            last_digit = Fraction(1, 10) ** (found.places or 0)
            fits = abs(value - found.value) <= (last_digit / 2 if option else last_digit)
        if option and found is not None and not fits:
            return False
        if fits and _same(gold, text, problem, depth):
            return True
    return _same(gold, exact, problem, depth)


def _same_equation(golds: list[str], answers: list[str], problem: _Problem, depth: int) -> bool:
    """Equations and chains of them. A name before the value counts only if both have one."""
    gold_names, gold_values = _names_and_values(golds)
    names, values = _names_and_values(answers)
    if len(golds) > 1 and not gold_names:
        if len(answers) == 1:
            return False
        return _same_algebra(" = ".join(golds), " = ".join(answers), problem)
    if gold_names and names and {*map(key, gold_names)}.isdisjoint(map(key, names)):
        if number(gold_values[-1]) or number(values[-1]):
            return False
        return _same_algebra(" = ".join(golds), " = ".join(answers), problem)
    gold, value = gold_values[-1], values[-1]
    if len(answers) > 1 and gold_names and not names and len(values) > 1:
        return _same_algebra(" = ".join(golds), " = ".join(answers), problem)
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


def _same_algebra(gold: str, answer: str, problem: _Problem) -> bool:
    """What only algebra can tell. A number is the gold of calculations, not of other objects."""
    if _restates(gold, answer, problem):
        return False
    gold, answer = _without_unit(gold), _without_unit(answer)
    if SIDE_BY_SIDE.search(answer):
        return False
    if number(gold) is not None and not CALCULATION.fullmatch(answer):
        return False
    return same_expression(gold, answer)


def _restates(gold: str, answer: str, problem: _Problem) -> bool:
    """Whether an answer leaves to the reader what the problem asks for."""
    if UNEVALUATED.search(answer) and not UNEVALUATED.search(gold):
        return True
    text = re.sub(r"\s", "", answer)
    place = problem.text.find(text)
    if len(text) < MIN_RESTATED or number(answer) or place < 0:
        return False
    around = problem.text[max(place - 1, 0) : place] + problem.text[place + len(text) :][:1]
    return not any(sign in "0123456789+-*/^_{}\\(" for sign in around)


def _without_unit(text: str) -> str:
    match = TRAILING_UNIT.search(text)
    if match and match[1] is None and TRIGONOMETRIC.search(text):
        return text  # the degrees of an angle inside
    if match is None or not match.start() or literals.NO_UNIT.search(match[1] or ""):
        return text
    return text[: match.start()]
