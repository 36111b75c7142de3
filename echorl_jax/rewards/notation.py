r"""Brings the spellings of a mathematical answer to one form.

Undoes what typesetting adds: fonts, spacing, Unicode signs, synonyms of commands. The grader bounds
the length of the texts; all regular expressions are linear.
"""

import functools
import re
import unicodedata


def _greek(letter: str) -> str:
    """The command for a Greek letter, or the letter if there is none."""
    case, _, name = unicodedata.name(letter, "").removeprefix("GREEK ").partition(" LETTER ")
    if not name or " " in name:
        return letter
    command = name.lower().replace("lamda", "lambda")
    return f"\\{command.title() if case == 'CAPITAL' else command} "


def _command(found: re.Match[str]) -> str:
    return _COMMANDS.get(found[1], found[0])


_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒", "-"),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/"},
        **{"∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx "},
        **{"±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
        **{"∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "→": r"\to "},
        **{chr(code): _greek(chr(code)) for code in (*range(0x391, 0x3AA), *range(0x3B1, 0x3CA))},
        **{"’": "'", "‘": "'", "、": ",", "。": ".", "∶": ":"},
        **dict.fromkeys("€£¥₹", ""),
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
# Commands without arguments -> what they are written as here.
_COMMANDS = {
    **dict.fromkeys("displaystyle textstyle limits nolimits rm bf it".split(), ""),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac"),
    **dict.fromkeys("le leqslant leqq".split(), r"\leq "),
    **dict.fromkeys("ge geqslant geqq".split(), r"\geq "),
    **dict.fromkeys("simeq thickapprox".split(), r"\approx "),
    **{"ne": r"\neq ", "lt": "<", "gt": ">", "lvert": "|", "rvert": "|", "degree": r"^\circ "},
    **{"lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "varnothing": r"\emptyset "},
}
_FONT = (
    r"\\(?:math(?:rm|bf|it|sf)|text(?:bf|it|rm|normal|sf|tt)?|mbox|emph|operatorname\*?)\s*(?=\{)"
)
_TIME = r"(?:\\text\{\s*)?([0-9]{1,2}:[0-9]{2})\s*(?:\\text\{\s*)?"
# Applied in this order, the commands of the table above between the two lists.
_BEFORE_COMMANDS = [
    # Invisible.
    (r"\\(?:[hv]?phantom|[hv]space|hskip|label|tag|color|textcolor)\*?\s*\{[^{}]*\}", ""),
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[Bb]igg?[lrm]?(?![A-Za-z])", ""),
    (r"\\\$\s*([0-9][0-9,]*(?:\.[0-9]+)?)[\s.]*\Z", r"\1 \\text{dollars}"),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
    # The comma of thousands: 1,\!000 and 1{,}000.
    (r"(?<=[0-9])(?:\{,\}\s*(?:\\!)?|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))|\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|~", " "),
    (r"\\(?:mathbf|boldsymbol|vec|hat)\s*\{([A-Za-z])\}", r" \1 "),
    (r"\\mathrm\s*\{([eidTxyzabcuvwn])\}", r" \1 "),
    (r"\\log_\s*(?:e(?![A-Za-z])|\{e\})", r"\\ln "),
    (_FONT, r"\\text"),
]
_AFTER_COMMANDS = [
    (r"\\boxed\s*(?=\{)|\\text\{\s*\}|(?<=[0-9])_\{10\}", ""),
    (r"(?:\{|\A)([^{}]*)\\over(?![A-Za-z])([^{}]*)(?:\}|\Z)", r"\\frac{\1}{\2}"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"<=|=<", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=|\\not\s*=", r"\\neq "),
    (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", r"^\\circ "),
    (r"\\%|(?<=[0-9}\s])(?:\\text\{\s*)?(?:per ?cent(?:age)?|pct)\b(?:\s*\})?", "%"),
    (r"\\text\{\s*infinity\s*\}|(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
    (r"(?<![\\A-Za-z])(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
    (r"\*\*(?=\s*[-0-9({])", "^"),
    # One form of arguments: \frac{1}{2}, \sqrt{2}, x^2, x_1.
    (r"\\frac\s*(?:([0-9])|(\\pi|[A-Za-z])(?![A-Za-z]))\s*(?=[0-9{\\])", r"\\frac{\1\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    (r"(?:\\sqrt|√)\s*\(([^()]*)\)|√\s*([0-9]+|[A-Za-z])|\\sqrt\s*([0-9])", r"\\sqrt{\1\2\3}"),
    (r"([_^])\s*\{\s*([A-Za-z0-9])\s*\}", r"\1\2"),
    (rf"{_TIME}[Aa]\.?\s?[Mm]\b\.?(?:\s*\}})?", r"\1 am"),
    (rf"{_TIME}[Pp]\.?\s?[Mm]\b\.?(?:\s*\}})?", r"\1 pm"),
    (r"\s+", " "),
]
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        *_BEFORE_COMMANDS,
        (r"\\([A-Za-z]+)", _command),
        *_AFTER_COMMANDS,
    )
]
# Commands whose backslash was escaped once too often.
_ESCAPED = re.compile(
    r"\\\\(?=(?:left|right|[dt]?frac|sqrt|pi|text|cdot|times|infty|cup)(?![A-Za-z]))"
)
_SEPARATORS = re.compile(r"\\q?quad(?![A-Za-z])|\\\\(?:\[[^\]]*\])?|\\newline(?![A-Za-z])")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
# Words before a value that do not change it, in mathematics mode or not.
_LEAD = re.compile(
    r"\A(?:\\text\{)?\s*(?:(?:so|thus|hence|therefore|the|final|correct|answer|is|are|equals|exactly"
    r"|approximately|approx|about|around|roughly|usd|rs|there)\b[.:,]?\s*|(?:=|:|\\approx|\\sim)\s*)+"
    r"\}?\s*(?=[-+0-9.({\\])",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"\A(?:\\text\{)?\s*(?:minus|negative)\s*\}?\s*(?=[0-9\\])", re.IGNORECASE)


@functools.lru_cache(maxsize=8192)
def canonical(text: str) -> str:
    r"""One spelling of an answer, still LaTeX.

    >>> canonical("$\\dfrac12\\,\\mathrm{cm}.$"), canonical("2½"), canonical("\\text{East}")
    ('\\frac{1}{2} \\text{cm}', '2 1/2', '\\text{East}')
    """
    text = " ".join(text.split())
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    if "\\begin" not in text:
        text = _SEPARATORS.sub(" , ", _ESCAPED.sub(r"\\", text))
    text = text.strip(" *`")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _strip(text)
    whole = _TEXT.fullmatch(text)
    if whole and re.search(r"\d|,|\b(?:and|or)\b", whole[1]):
        text = _strip(whole[1])
    return _NEGATIVE.sub("-", _LEAD.sub("", text))


def _strip(text: str) -> str:
    """Removes what stands around an answer: spaces, a final stop, braces that group all of it."""
    text = text.strip(" *`").rstrip(" .,;:*`").lstrip(" ,;:")
    while text.startswith("{") and text.endswith("}") and brace_pairs(text).get(0) == len(text) - 1:
        text = text[1:-1].strip(" .,;:")
    return text


def brace_pairs(text: str, start: int = 0) -> dict[int, int]:
    r"""Maps each brace that opens, from ``start`` on, to the one that closes it.

    ``\{`` and ``\}`` are no braces, and a brace that is never closed is left out.
    """
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for found in _BRACES.finditer(text, start):
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == "}" and opened:
            pairs[opened.pop()] = found.start()
    return pairs


def key(text: str) -> str:
    """The text to compare letter by letter: no spaces, except those between numbers."""
    text = re.sub(r"(?<=[0-9]), (?=[0-9]{3}(?![0-9]))", ",\0", text)
    return re.sub(r"(?<![0-9]) | (?![0-9.])", "", text)


def words(text: str) -> str | None:
    r"""The letters and digits of a canonical text that consists of words, else None.

    Case, spaces and stops do not count. Up to three small letters without a vowel are a product of
    variables.

    >>> words("\\text{No solution.}"), words("Evelyn"), words("xy"), words("x+1")
    ('nosolution', 'evelyn', None, None)
    """
    plain = _TEXT.sub(r" \1 ", text).strip()
    if not plain or re.search(r"[\d\\^_=<>+*/|$]", plain):
        return None
    if not _TEXT.search(text):
        if not all(token.strip("'.,()").replace("'", "").isalpha() for token in plain.split()):
            return None
        short = len(plain) <= 3 and plain.isascii()
        if short and (len(plain) == 1 or (plain.islower() and not set(plain) & set("eiou"))):
            return None
    kept = "".join(filter(str.isalnum, plain))
    one_letter = len(kept) == 1 and kept.isascii()
    return (kept if one_letter else kept.casefold()) or None
