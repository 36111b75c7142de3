"""Arithmetic as models write it, read by a small parser into exact fractions, never as code.

Costs are bounded before any work is done: the length of the text, the digits of a number, the
nesting. There is no power operator, so values stay within the size of their product.
"""

import dataclasses
import re
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_DIGITS = 15
MAX_DEPTH = 40

# Only ASCII digits are numbers here; other signs for the operators are common in model output.
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|[-+*/()])")


class ArithmeticSyntaxError(ValueError):
    """Text that is not an arithmetic expression, or one that is too large to be meant."""


@dataclasses.dataclass(frozen=True)
class Expression:
    """The value of an expression and the numbers it was made of, in the order they stand."""

    value: Fraction
    numbers: tuple[Fraction, ...]


def parse_expression(text: str) -> Expression:
    """Reads ``+ - * /``, brackets, and whole or decimal numbers, with the usual precedence.

    A minus before a number is part of that number; before a bracket it negates.

    Raises:
      ArithmeticSyntaxError: not an expression, or longer, deeper or with more digits than the
        bounds above.
      ZeroDivisionError: it divides by zero.

    >>> parse_expression("(7 - 2) / 2").value
    Fraction(5, 2)
    """
    if len(text) > MAX_CHARACTERS:
        raise ArithmeticSyntaxError(f"longer than {MAX_CHARACTERS} characters")
    parser = _Parser(_tokenise(text))
    expression = parser.sum(depth=0)
    if parser.next is not None:
        raise ArithmeticSyntaxError(f"unexpected {parser.next!r}")
    return expression


def _tokenise(text: str) -> list[str]:
    text = text.translate(SIGNS).strip()
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise ArithmeticSyntaxError(f"unexpected {text[position : position + 10].strip()!r}")
        if len(match[1]) > MAX_DIGITS:
            raise ArithmeticSyntaxError(f"a number of more than {MAX_DIGITS} digits")
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent, one method a level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0

    @property
    def next(self) -> str | None:
        """The token to come, None at the end."""
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _take(self) -> str:
        token = self.next
        if token is None:
            raise ArithmeticSyntaxError("the expression breaks off")
        self._position += 1
        return token

    def sum(self, depth: int) -> Expression:
        left = self._product(depth)
        while self.next in ("+", "-"):
            negate = self._take() == "-"
            right = self._product(depth)
            value = left.value - right.value if negate else left.value + right.value
            left = Expression(value, left.numbers + right.numbers)
        return left

    def _product(self, depth: int) -> Expression:
        left = self._signed(depth)
        while self.next in ("*", "/"):
            divide = self._take() == "/"
            right = self._signed(depth)
            value = left.value / right.value if divide else left.value * right.value
            left = Expression(value, left.numbers + right.numbers)
        return left

    def _signed(self, depth: int) -> Expression:
        if self.next != "-":
            return self._atom(depth)
        self._take()
        inner = self._signed(self._deeper(depth))
        if len(inner.numbers) == 1:
            return Expression(-inner.value, (-inner.numbers[0],))
        return Expression(-inner.value, inner.numbers)

    def _atom(self, depth: int) -> Expression:
        token = self._take()
        if token == "(":
            inner = self.sum(self._deeper(depth))
            if self._take() != ")":
                raise ArithmeticSyntaxError("a bracket is not closed")
            return inner
        if not token[0].isdigit():
            raise ArithmeticSyntaxError(f"unexpected {token!r}")
        number = Fraction(token)
        return Expression(number, (number,))

    def _deeper(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise ArithmeticSyntaxError(f"nested deeper than {MAX_DEPTH}")
        return depth + 1
