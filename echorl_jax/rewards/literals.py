r"""Literal numbers by value: digits, e-notation, fractions, mixed numbers, percent, units, bases.

They are read into exact fractions, so that no float takes part in a comparison. Texts are canonical
(``notation.canonical``), and the grader bounds their length; all regular expressions are linear.
"""

import dataclasses
import functools
import re
from fractions import Fraction

from echorl_jax.rewards.notation import key

# Exponents of ten beyond this are no answers, and would cost memory.
MAX_EXPONENT = 5000
# A decimal may stand for a longer one, or for a fraction, from this many decimal places and
# significant digits on: 0.333333 is 1/3, 0.33333 is not.
ENOUGH_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Number:
    """A literal number.

    Attributes:
      value: exact; of ``28%`` it is 28.
      places: digits after the decimal point, None of a whole number or a fraction.
      digits: significant digits of the decimal.
      percent: a percent sign follows.
      unit: the unit's kind and its size in the kind's own unit, None if unknown or absent.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0
    percent: bool = False
    unit: tuple[str, Fraction] | None = None


def _units() -> dict[str, tuple[str, Fraction]]:
    """Name -> its kind and size; names of one unit stand together."""
    table = {
        "length": "mm millimeter millimetre=1 cm centimeter centimetre=10 m meter metre=1000 "
        "km kilometer kilometre=1000000 in inch inche=127/5 ft foot feet=1524/5 yd yard=4572/5 "
        "mi mile=1609344",
        "mass": "mg milligram=1 g gm gram=1000 kg kilogram=1000000",
        "time": "s sec second=1 min minute=60 h hr hour=3600 day=86400 week=604800",
        "money": "cent penny pennie=1 dollar buck usd=100",
        "angle": "degree deg=1 radian rad=0",
        "volume": "ml milliliter millilitre=1 l liter litre=1000",
    }
    found = {}
    for kind, entries in table.items():
        for names, size in re.findall(r"([a-z ]+)=([0-9/]+)", entries):
            for name in names.split():
                found[name] = found[name + "s"] = (kind, Fraction(size))
    return found


UNITS = _units()
_PLAIN = (
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_POWER = (
    r"\{?10\}?\s*\^\s*(?:\{\s*([-+]?)\s*([0-9]+)\s*\}|\(\s*([-+]?)\s*([0-9]+)\s*\)|([-+]?)([0-9]+))"
)
_SIGN = re.compile(r"\s*([-+]?)\s*")
_DECIMAL = re.compile(_PLAIN)
_POINTED = re.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{3})+,[0-9]{1,2}(?![0-9])")
_EXPONENT = re.compile(r"[eE]([-+]?[0-9]+)(?![0-9A-Za-z.])")
_TIMES_POWER = re.compile(rf"\s*(?:\\times|\\cdot|\*|[xX])\s*{_POWER}")
_POWER_ALONE = re.compile(_POWER)
_FRACTION = re.compile(rf"\\frac\s*\{{\s*([-+]?)\s*({_PLAIN})\s*\}}\s*\{{\s*({_PLAIN})\s*\}}")
_SLASH = re.compile(rf"({_PLAIN})\s*/\s*({_PLAIN})(?![0-9])")
_MIXED = re.compile(
    r"([0-9]+)(?: ?\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}| ([0-9]+) ?/ ?([0-9]+))"
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot)\s*\{([0-9]+)\}|\(([0-9]+)\))")
_RATIO = re.compile(rf"({_PLAIN})\s*:\s*({_PLAIN})")
_SCALE = re.compile(
    r"\s*(?:\\text\{\s*)?(hundred|thousand|million|billion|trillion)\b(?:\s*\})?", re.IGNORECASE
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNIT_TEXT = re.compile(r"\\text\{([^{}]*)\}(?:\^\{?[0-9]\}?)?")
_UNIT_WORDS = re.compile(r"([^\W\d_]+(?:'[^\W\d_]+)?\.?)(?:\^\{?-?[0-9]\}?)?")
# Words that turn a number and what follows it into something else than this number.
NO_UNIT = re.compile(
    r"\b(?:not|no|or|and|either|neither|nor|than|least|most|but|if|maybe|perhaps|wrong|incorrect"
    r"|minus|plus|is|are|was|were|should|would|could|may|might|too|false|instead|rather|squared|cubed|factorial|isn't|to|mod|modulo|over|divided|choose)\b",
    re.IGNORECASE,
)
_SINGLE_LETTER_UNITS = frozenset("msghlLNJVWACKF")
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
_ONES += "fifteen sixteen seventeen eighteen nineteen twenty"
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())}


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
    sign = _SIGN.match(text)
    start = sign.end() if sign else 0
    found = _literal(text, start)
    if found is None:
        return None
    literal, end = found
    if sign and sign[1] == "-":
        literal = dataclasses.replace(literal, value=-literal.value)
    if scale := _SCALE.match(text, end):
        power = _SCALES[scale[1].lower()]
        places = None if literal.places is None else max(literal.places - power, 0) or None
        literal = dataclasses.replace(literal, value=literal.value * 10**power, places=places)
        end = scale.end()
    rest = text[end:]
    if rest.strip() == "%":
        return dataclasses.replace(literal, percent=True)
    known, unit = _unit(rest)
    return dataclasses.replace(literal, unit=unit) if known else None


def _literal(text: str, start: int) -> tuple[Number, int] | None:
    """The number that stands at a place, without its sign, and where it ends."""
    if match := _MIXED.match(text, start):
        whole, over, under = match[1], match[2] or match[4], match[3] or match[5]
        return _quotient(Fraction(over), Fraction(under), Fraction(whole), match.end())
    if match := _FRACTION.match(text, start):
        over = _value(match[2]) * (-1 if match[1] == "-" else 1)
        return _quotient(over, _value(match[3]), Fraction(0), match.end())
    if match := _SLASH.match(text, start):
        return _quotient(_value(match[1]), _value(match[2]), Fraction(0), match.end())
    if match := _REPEATING.match(text, start):
        whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
        tail = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
        return Number(Fraction(int(whole + fixed), 10 ** len(fixed)) + tail), match.end()
    if match := _POWER_ALONE.match(text, start):
        return _scaled("1", _exponent(match.groups()), match.end())
    if match := _POINTED.match(text, start):
        return _scaled(match[0].replace(".", "").replace(",", "."), 0, match.end())
    match = _DECIMAL.match(text, start)
    if match is None:
        return None
    if exponent := _EXPONENT.match(text, match.end()):
        return _scaled(match[0], int(exponent[1]), exponent.end())
    if power := _TIMES_POWER.match(text, match.end()):
        return _scaled(match[0], _exponent(power.groups()), power.end())
    return _scaled(match[0], 0, match.end())


def _exponent(groups: tuple[str | None, ...]) -> int:
    signs, digits = groups[0::2], groups[1::2]
    place = next(i for i, found in enumerate(digits) if found)
    return int((signs[place] or "") + (digits[place] or "0"))


def _quotient(
    over: Fraction, under: Fraction, whole: Fraction, end: int
) -> tuple[Number, int] | None:
    return (Number(whole + over / under), end) if under else None


def _value(digits: str) -> Fraction:
    return Fraction(re.sub("[ ,]", "", digits).rstrip(".") or "0")


def _scaled(digits: str, exponent: int, end: int) -> tuple[Number, int] | None:
    if abs(exponent) > MAX_EXPONENT:
        return None
    _, point, decimals = digits.partition(".")
    places = len(decimals) - exponent if point and decimals else None
    significant = len(re.sub("[^0-9]", "", digits).lstrip("0"))
    return Number(_value(digits) * Fraction(10) ** exponent, places, significant), end


def _unit(rest: str) -> tuple[bool, tuple[str, Fraction] | None]:
    """Whether the text behind a number is a unit or nothing, and the unit where it is known."""
    plain = rest.strip()
    if not plain:
        return True, None
    if plain.startswith("^\\circ"):
        temperature = plain.removeprefix("^\\circ").strip()
        known = not temperature or re.fullmatch(r"(?:\\text\{\s*)?[CF]\s*\}?", temperature)
        return bool(known), UNITS["degree"] if not temperature else None
    spaced = rest[0] == " " or plain.startswith("\\text")
    words = _UNIT_TEXT.sub(r" \1 ", plain).strip()
    if "\\" in words or any(sign.isdigit() for sign in re.sub(r"\^\{?-?[0-9]\}?", "", words)):
        return False, None
    if NO_UNIT.search(words):
        return False, None
    if plain.startswith("\\text"):
        return True, UNITS.get(words.strip(" .").casefold())
    tokens = re.split(r"[\s/.\-]+", words.rstrip("."))
    good = [_UNIT_WORDS.fullmatch(token) for token in tokens]
    if not all(good):
        return False, None
    first = good[0][1] if good[0] else ""
    unit = UNITS.get(words.rstrip(".").casefold())
    if len(first) == 1 and first.isascii():
        return spaced and first in _SINGLE_LETTER_UNITS and len(tokens) == 1, unit
    return spaced or unit is not None or not first.isascii(), unit


def equal(gold: Number, answer: Number, *, percent_asked: bool = False) -> bool:
    """Whether two literal numbers are the same.

    ``28`` and ``28%`` are where the gold has the sign or the question asks for a percentage.
    Known units are converted. A decimal of :data:`ENOUGH_DIGITS` or more may be a rounding.
    """
    if gold.percent != answer.percent:
        if gold.value == answer.value and (gold.percent or percent_asked):
            return True
        gold, answer = _without_percent(gold), _without_percent(answer)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        if gold.unit[0] != answer.unit[0]:
            return False
        return gold.value * gold.unit[1] == answer.value * answer.unit[1] != 0
    return gold.value == answer.value or rounds_to(gold, answer) or rounds_to(answer, gold)


def rounds_to(decimal: Number, exact: Number) -> bool:
    """Whether a decimal is what a finer number, or a fraction, rounds to."""
    if decimal.places is None or min(decimal.places, decimal.digits) < ENOUGH_DIGITS:
        return False
    if exact.places is not None and exact.places <= decimal.places:
        return False
    return abs(decimal.value - exact.value) * 2 <= Fraction(1, 10**decimal.places)


def _without_percent(literal: Number) -> Number:
    if not literal.percent:
        return literal
    places = None if literal.places is None else literal.places + 2
    return dataclasses.replace(literal, value=literal.value / 100, percent=False, places=places)


_BASED = re.compile(
    r"(-?)\(?([0-9][0-9A-Za-z]*)\)?\s*(?:_\{?\(?|\\?text\{\s*base |base )(.+?)\)?\}?"
)


def based(text: str) -> tuple[str, str] | None:
    """The digits and the base of ``2516_8``, or None."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    name = re.sub(r"\\text|[{}()\s]", "", match[3]).casefold()
    base = NUMBER_WORDS.get(name, name)
    digits = match[1] + match[2].lstrip("0").casefold()
    return (digits, str(base)) if re.fullmatch("[0-9]{1,2}", str(base)) else None


def ratio(text: str) -> tuple[str, Fraction] | None:
    """The text of ``3:4`` and its quotient; None for other texts."""
    match = _RATIO.fullmatch(text)
    if match is None or not _value(match[2]):
        return None
    return key(text), _value(match[1]) / _value(match[2])


def equal_ratios(gold: tuple[str, Fraction], answer: tuple[str, Fraction]) -> bool:
    """Ratios are equal by their quotients, times of day such as 3:30 by their text only."""
    times = re.search(":[0-5][0-9]$", gold[0] + " " + answer[0]) or re.search(
        ":[0-5][0-9] ", gold[0] + " "
    )
    return gold[0] == answer[0] or (not times and gold[1] == answer[1])


def is_decimal_comma(gold: str, answer: str) -> bool:
    """Whether an answer is the gold decimal with a comma for its point."""
    return bool(re.fullmatch("-?[0-9]+,[0-9]+", answer)) and answer.replace(",", ".") == gold
