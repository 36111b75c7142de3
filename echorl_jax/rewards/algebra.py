"""Compares mathematical expressions with SymPy, by their values to 25 digits.

Math-Verify's parser reads the LaTeX. Values are compared relatively, at a few points if there are
variables; equations, inequalities and sets go to Math-Verify. SymPy can run for hours on a short
text: texts known to be costly are refused, SymPy is interrupted in a main thread, and the pool's
limits are for the rest.
"""

import functools
import itertools
import logging
import re
import signal
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NoReturn

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex

from echorl_jax.rewards.literals import Number, number, rounds_to

# SymPy is interrupted after this much processor time (seconds): a busy machine changes no verdict.
LIMIT_S = 4.0
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
VARIABLE = re.compile(
    r"(?<!\\mathbb\{)(?<![A-Za-z\\])[A-Za-z]+"
    r"|\\(?:[Aa]lpha|[Bb]eta|[Gg]amma|[Dd]elta|[Tt]heta|[Ll]ambda|[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega"
    r"|[Pp]i|[Xx]i)(?![A-Za-z])"
)
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?\^\\circ")
# Both signs, and real roots and logarithms at some of them.
POINTS = tuple(sympy.Rational(*pair) for pair in ((7, 5), (13, 11), (-9, 7), (29, 13), (-17, 5)))
NORMALISE = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
# Digits of an evaluation; the relative difference of equal values; what is zero but for rounding.
PRECISION, TOLERANCE, ZERO = 40, sympy.Float("1e-25", 40), sympy.Float("1e-60", 40)

# It warns of its own time limits, which are part of normal work here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_costly(text: str) -> bool:
    """True if parsing a text might take more time or memory than an answer is worth."""
    depths = itertools.accumulate((sign in "([{") - (sign in ")]}") for sign in text)
    return max(depths, default=0) > MAX_NESTING or COSTLY.search(text) is not None


def same_expression(gold: str, answer: str) -> bool:
    r"""True if two canonical texts are the same expression, equation, inequality or set.

    >>> same_expression("\\sqrt{\\frac{1}{n}}", "\\frac{1}{\\sqrt{n}}"), same_expression("x", "|x|")
    (True, False)
    """
    return _variables(gold) == _variables(answer) and bool(_limited(_same, gold, answer))


def evaluate(text: str) -> Fraction | None:
    """The real value of a text without variables, to :data:`PRECISION` digits, or None."""
    parsed = _limited(_parse, text)
    value = _value(parsed, {}) if isinstance(parsed, sympy.Expr) else None
    return Fraction(str(value)) if isinstance(value, sympy.Number) else None


def _limited(function: Callable[..., Any], *arguments: str) -> Any:
    """Calls a function; None after :data:`LIMIT_S`. Only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    before = signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        return function(*arguments)
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _interrupt(*_: object) -> NoReturn:
    raise TimeoutError


def _variables(text: str) -> set[str]:
    """The variables, if any is a capital: the parser reads A as a, and Pi as pi."""
    found = VARIABLE.findall(text)
    if "".join(found).islower():
        return set()
    return {part for name in found for part in ([name] if name[0] == "\\" else name)}


def _same(gold: str, answer: str) -> bool:
    literals = number(gold), number(answer)
    first, second = (
        sympy.Rational(literal.value) / (100 if literal.percent else 1) if literal else _parse(text)
        for literal, text in zip(literals, (gold, answer), strict=True)
    )
    if first is None or second is None:
        return False
    if _is_scalar(first) and _is_scalar(second):
        same = _same_values(first, second, literals)
        if same is not None:
            return same
    return verify([first], [second], allow_set_relation_comp=True, timeout_seconds=None)


def _is_scalar(parsed: Any) -> bool:
    return isinstance(parsed, sympy.Expr) and not isinstance(parsed, sympy.MatrixExpr)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """A SymPy object in which decimals are exact fractions, or None if the text is unreadable."""
    if is_costly(text):
        return None
    if TRIGONOMETRIC.search(text):
        text = DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    normal = normalize_latex(text, NORMALISE)
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
    gold: Any, answer: Any, literals: tuple[Number | None, Number | None]
) -> bool | None:
    """Compares by values, at points if there are variables; None if there are no values."""
    if gold.free_symbols != answer.free_symbols:
        return False
    gold, answer = gold.doit(), answer.doit()
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    if gold.free_symbols:
        return _same_at_points(gold, answer)
    values = _value(gold, {}), _value(answer, {})
    if None in values:
        return None
    return _close(*values) or any(
        literal
        and isinstance(value, sympy.Number)
        and rounds_to(literal, Number(Fraction(str(value))))
        for literal, value in zip(literals, values[::-1], strict=True)
    )


def _same_at_points(gold: Any, answer: Any) -> bool | None:
    """Real expressions are compared where both are real, and must be real at the same points."""
    symbols, compared = sorted(gold.free_symbols, key=str), False
    for shift in range(len(POINTS)):
        point = {s: POINTS[(shift + 2 * i) % len(POINTS)] + i for i, s in enumerate(symbols)}
        values = _value(gold, point), _value(answer, point)
        if None in values:
            return None
        real = [bool(value.is_real) for value in values]
        if not all(real) and not gold.has(sympy.I):
            if any(real):
                return False
            continue
        if not _close(*values):
            return False
        compared = True
    return True if compared else None


def _value(expression: Any, point: Mapping[Any, Any]) -> Any:
    """A number, without an imaginary part that is only rounding; None if there is none."""
    value = expression.evalf(PRECISION, subs=dict(point))
    if value.has(sympy.nan, sympy.zoo) or not value.is_number or not value.is_finite:
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number):
        return None
    return real if abs(imaginary) <= TOLERANCE * abs(real) else value


def _close(first: Any, second: Any) -> bool:
    size = max(abs(first), abs(second))
    return bool(size <= ZERO or abs(first - second) <= TOLERANCE * size)
