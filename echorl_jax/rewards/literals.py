r"""Literal numbers by value: digits, e-notation, fractions, mixed numbers, percent, units, bases.

Numbers are read into exact fractions, because a float would round. Texts are canonical
(``notation.canonical``), and the grader bounds their length; all regular expressions are linear.
"""

import functools
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

# Larger exponents of ten are refused, because they would cost memory.
MAX_EXPONENT = 5000
# A decimal may stand for a longer one, or for a fraction, from this many decimal places and
# significant digits on: 0.333333 is 1/3, 0.33333 is not.
ENOUGH_DIGITS = 6


@dataclass(frozen=True)
class Number:
    """A literal number.

    Attributes:
      value: exact; of ``28%`` it is 28.
      places: digits after the decimal point, None of a whole number or a fraction.
      digits: significant digits of the decimal.
      percent: a percent sign follows.
      unit: the unit's kind and its size in the kind's base unit, None if unknown or absent.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0
    percent: bool = False
    unit: tuple[str, Fraction] | None = None


# Kind -> names of each unit and its size; a plural "s" is understood.
_UNIT_TABLE = {
    "length": "mm millimeter millimetre=1 cm centimeter centimetre=10 m meter metre=1000 "
    "km kilometer kilometre=1000000 in inch inche=127/5 ft foot feet=1524/5 yd yard=4572/5 "
    "mi mile=1609344",
    "mass": "mg milligram=1 g gm gram=1000 kg kilogram=1000000",
    "time": "s sec second=1 min minute=60 h hr hour=3600 day=86400 week=604800",
    "money": "cent penny pennie=1 dollar buck usd=100",
    "angle": "degree deg=1 radian rad=0",
    "volume": "ml milliliter millilitre=1 l liter litre=1000",
}
UNITS = {
    name + plural: (kind, Fraction(size))
    for kind, entries in _UNIT_TABLE.items()
    for names, size in re.findall(r"([a-z ]+)=([0-9/]+)", entries)
    for name in names.split()
    for plural in ("", "s")
}
_SINGLE_LETTER_UNITS = frozenset("msghlLNJVWACKF")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
_ONES += "fifteen sixteen seventeen eighteen nineteen twenty"
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())}
# With one of these words behind it, a number is not the whole answer, or not its value.
NO_UNIT = re.compile(
    r"\b(?:not|no|or|and|either|neither|nor|than|least|most|but|if|maybe|perhaps|wrong|incorrect"
    r"|minus|plus|is|are|was|were|should|would|could|may|might|too|false|instead|rather|squared"
    r"|cubed|factorial|isn't|to|mod|modulo|over|divided|choose)\b",
    re.IGNORECASE,
)

# 1,234.5 and 1 234.5 and 1234.5 and .5; then 1.234,5 as written in Europe.
_PLAIN = (
    r"(?:(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]*)?"
    r"|\.[0-9]+)"
)
_EUROPEAN = re.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{3})+,[0-9]{1,2}(?![0-9])")
_POINT_FOR_COMMA = {ord("."): None, ord(","): "."}
_MIXED = re.compile(
    r"([0-9]+)(?: ?\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}| ([0-9]+) ?/ ?([0-9]+))"
)
_FRACTION = re.compile(
    rf"\\frac\s*\{{\s*([-+]?\s*{_PLAIN})\s*\}}\s*\{{\s*({_PLAIN})\s*\}}"
    rf"|({_PLAIN})\s*/\s*({_PLAIN})(?![0-9])"
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot)\s*\{|\()([0-9]+)[})]")
_SCIENTIFIC = re.compile(
    rf"(?:({_PLAIN})\s*(?:\\times|\\cdot|\*|[xX])\s*)?"
    r"\{?10\}?\s*\^\s*([{(])?\s*([-+]?\s*[0-9]+)(?(2)\s*[)}])"
)
_DECIMAL = re.compile(rf"({_EUROPEAN.pattern}|{_PLAIN})(?:[eE]([-+]?[0-9]+)(?![0-9A-Za-z.]))?")
_RATIO = re.compile(rf"({_PLAIN})\s*:\s*({_PLAIN})")
_TIME = re.compile(r".*:\s*[0-5][0-9]")
_SCALE = re.compile(rf"\s*(?:\\text\{{\s*)?({'|'.join(_SCALES)})\b(?:\s*\}})?", re.IGNORECASE)
_BASED = re.compile(
    r"(-?)\(?([0-9][0-9A-Za-z]*)\)?\s*(?:_\{?\(?|\\?text\{\s*base |base )(.+?)\)?\}?"
)
_EXPONENT = re.compile(r"\^\{?-?[0-9]\}?")
_TEXT = re.compile(r"\\text\{([^{}]*)\}(?:\^\{?[0-9]\}?)?")
_DEGREES = re.compile(r"\^\\circ\s*((?:\\text\{\s*)?[CF]\s*\}?)?")
_UNIT_WORD = re.compile(rf"[^\W\d_]+(?:'[^\W\d_]+)?(?:{_EXPONENT.pattern})?")


@functools.lru_cache(maxsize=8192)
def number(text: str) -> Number | None:
    r"""Reads a canonical text that is one literal number with, at most, a unit.

    >>> number("4.5 \\times 10^{3}").value, number("1e-05").value, number("2 1/2 \\text{cm}").value
    (Fraction(4500, 1), Fraction(1, 100000), Fraction(5, 2))
    >>> number("5 or 6"), number("5^2")
    (None, None)
    """
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1]
    word = NUMBER_WORDS.get(re.sub(r"\\text|[{}\s]", "", text).casefold())
    if word is not None:
        return Number(Fraction(word))
    text = text.strip()
    unsigned = text[1:].lstrip() if text[:1] in ("-", "+") else text
    literal, end = _literal(unsigned)
    if literal is None:
        return None
    if text[:1] == "-":
        literal = replace(literal, value=-literal.value)
    if scale := _SCALE.match(unsigned, end):
        power = _SCALES[scale[1].lower()]
        places = None if literal.places is None else max(literal.places - power, 0) or None
        literal = replace(literal, value=literal.value * 10**power, places=places)
        end = scale.end()
    rest = unsigned[end:]
    if rest.strip() == "%":
        return replace(literal, percent=True)
    known, unit = _unit(rest)
    return replace(literal, unit=unit) if known else None


def _literal(text: str) -> tuple[Number | None, int]:
    """The number without a sign at the start of a text, or None, and where it ends."""
    if match := _MIXED.match(text) or _FRACTION.match(text):
        *whole, over, under = (_value(digits) for digits in match.groups() if digits)
        return Number(sum(whole, over / under)) if under else None, match.end()
    if match := _REPEATING.match(text):
        whole, fixed, repeated = match.groups()
        period = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return Number((int(whole + fixed or "0") + period) / 10 ** len(fixed)), match.end()
    if match := _SCIENTIFIC.match(text):
        return _decimal(match[1] or "1", match[3]), match.end()
    if match := _DECIMAL.match(text):
        digits = match[1].translate(_POINT_FOR_COMMA) if _EUROPEAN.match(text) else match[1]
        return _decimal(digits, match[2] or "0"), match.end()
    return None, 0


def _value(digits: str) -> Fraction:
    return Fraction(re.sub("[+ ,]", "", digits).rstrip("."))


def _decimal(digits: str, exponent: str) -> Number | None:
    power = int(exponent.replace(" ", ""))
    if abs(power) > MAX_EXPONENT:
        return None
    decimal = Decimal(f"{re.sub('[ ,]', '', digits)}e{power}")
    _, significant, last = decimal.as_tuple()
    places = None if digits.partition(".")[2] == "" else -int(last)
    return Number(Fraction(decimal), places, len(significant))


def _unit(rest: str) -> tuple[bool, tuple[str, Fraction] | None]:
    """True if the text behind a number is a unit or nothing; and the unit where it is known."""
    plain = rest.strip()
    if plain.startswith("^\\circ"):
        match = _DEGREES.fullmatch(plain)
        return match is not None, UNITS["degree"] if plain == "^\\circ" else None
    words = _TEXT.sub(r" \1 ", plain).strip(" .")
    unit = UNITS.get(words.casefold())
    if re.search(r"\\|[0-9]", _EXPONENT.sub("", words)) or NO_UNIT.search(words):
        return False, None
    if not plain or plain.startswith("\\text"):
        return True, unit
    tokens = re.split(r"[\s/.\-]+", words)
    if not all(_UNIT_WORD.fullmatch(token) for token in tokens):
        return False, None
    # "3 m" is a length and "3m" a product; 3個 needs no space.
    spaced, first = rest[0] == " ", tokens[0]
    if first.isascii() and len(first) == 1:
        return spaced and first in _SINGLE_LETTER_UNITS and len(tokens) == 1, unit
    return spaced or unit is not None or not first.isascii(), unit


def equal(gold: Number, answer: Number, *, percent_asked: bool = False) -> bool:
    """True if two literal numbers are the same.

    ``28`` and ``28%`` are where the gold has the sign or the question asks for a percentage.
    Known units are converted. A decimal of :data:`ENOUGH_DIGITS` or more may be a rounding.
    """
    if gold.percent != answer.percent:
        if gold.value == answer.value and (gold.percent or percent_asked):
            return True
        gold, answer = _without_percent(gold), _without_percent(answer)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        same_kind = gold.unit[0] == answer.unit[0]
        return same_kind and gold.value * gold.unit[1] == answer.value * answer.unit[1] != 0
    return gold.value == answer.value or rounds_to(gold, answer) or rounds_to(answer, gold)


def rounds_to(decimal: Number, exact: Number) -> bool:
    """True if a decimal is what a finer number, or a fraction, rounds to."""
    if decimal.places is None or min(decimal.places, decimal.digits) < ENOUGH_DIGITS:
        return False
    if exact.places is not None and exact.places <= decimal.places:
        return False
    return abs(decimal.value - exact.value) * 2 <= Fraction(1, 10**decimal.places)


def _without_percent(literal: Number) -> Number:
    if not literal.percent:
        return literal
    places = None if literal.places is None else literal.places + 2
    return replace(literal, value=literal.value / 100, percent=False, places=places)


def based(text: str) -> tuple[str, str] | None:
    """The digits and the base of ``2516_8``, or None."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    name = re.sub(r"\\text|[{}()\s]", "", match[3]).casefold()
    base = str(NUMBER_WORDS.get(name, name))
    digits = match[1] + match[2].lstrip("0").casefold()
    return (digits, base) if re.fullmatch("[0-9]{1,2}", base) else None


def same_ratio(gold: str, answer: str) -> bool | None:
    """Compares texts such as ``3:4`` by their quotients, or None if one is no ratio.

    A text such as ``3:30`` may be a time of day, and no other ratio equals it.
    """
    first, second = _RATIO.fullmatch(gold), _RATIO.fullmatch(answer)
    if first is None or second is None:
        return None
    left, right = _value(first[1]) * _value(second[2]), _value(second[1]) * _value(first[2])
    times = _TIME.fullmatch(gold) or _TIME.fullmatch(answer)
    return not times and left == right and bool(_value(first[2]) and _value(second[2]))
