r"""Spellings of one mathematical answer, brought to one form.

What typesetting adds is undone: fonts, spacing, Unicode signs, synonyms of commands. The grader
bounds the length of the texts; all regular expressions are linear.
"""

import functools
import re
import unicodedata


def _greek(letter: str) -> str:
    name = unicodedata.name(letter, "").removeprefix("GREEK ").split(" LETTER ")
    if len(name) < 2 or " " in name[1]:
        return letter
    command = name[1].lower().replace("lamda", "lambda")
    return f"\\{command.title() if name[0] == 'CAPITAL' else command} "


_SIGNS = {
    **dict.fromkeys("−–—‐‑‒", "-"),
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/"},
    **{"∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx "},
    **{"±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "},
    **{"°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "∶": ":", "→": r"\to "},
    **{chr(code): _greek(chr(code)) for code in (*range(0x391, 0x3AA), *range(0x3B1, 0x3CA))},
    **{"’": "'", "‘": "'", "、": ",", "。": ".", "€": "", "£": "", "¥": "", "₹": ""},
}
_TRANSLATION = str.maketrans(_SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SPACE = r"(?<!\\)\\[,;:> ]|~"
_TIME = r"(?:\\text\{\s*)?([0-9]{1,2}:[0-9]{2})\s*(?:\\text\{\s*)?"

# Applied in this order.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Nothing that a reader sees.
        (r"\\(?:[hv]?phantom|[hv]space|hskip|label|tag|color)\*?\s*\{[^{}]*\}", ""),
        (r"\\textcolor\s*\{[^{}]*\}", ""),
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[Bb]igg?[lrm]?(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\\$\s*([0-9][0-9,]*(?:\.[0-9]+)?)[\s.]*\Z", r"\1 \\text{dollars}"),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
        (r"(?:\{,\}|,)\s*\\!\s*|\{,\}\s*(?=[0-9]{3})", "\x00"),
        (r"\\!\s*", ""),
        (_SPACE, " "),
        (r"(?<=[0-9])\x00(?=[0-9]{3}(?![0-9]))", ""),
        (r"\x00", ","),
        # Synonyms.
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mathbf|boldsymbol|vec|hat)\s*\{([A-Za-z])\}", r" \1 "),
        (r"\\mathrm\s*\{([eidTxyzabcuvwn])\}", r" \1 "),
        (r"\\log_\s*(?:e(?![A-Za-z])|\{e\})", r"\\ln "),
        (
            r"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|textsf|texttt|mbox"
            r"|emph|operatorname\*?|text)(?![A-Za-z])\s*\{",
            r"\\text{",
        ),
        (r"\\(?:rm|bf|it)(?![A-Za-z])", ""),
        (r"\\boxed\s*(?=\{)|\\text\{\s*\}|(?<=[0-9])_\{10\}", ""),
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\A([^{}]*)\\over(?![A-Za-z])([^{}]*)\Z", r"\\frac{\1}{\2}"),
        (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:leqslant|leqq|le)(?![A-Za-z])|<=|=<", r"\\leq "),
        (r"\\(?:geqslant|geqq|ge)(?![A-Za-z])|>=", r"\\geq "),
        (r"\\ne(?![A-Za-z])|!=|\\not\s*=", r"\\neq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\[lr]vert(?![A-Za-z])", "|"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
        (r"\\(?:simeq|thickapprox)(?![A-Za-z])", r"\\approx "),
        (r"\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])|\^\s*\\circ", r"^\\circ "),
        (r"\\%", "%"),
        (r"(?<=[0-9}\s])(?:\\text\{\s*)?(?:percent(?:age)?|per cent|pct)\b(?:\s*\})?", "%"),
        (r"\\text\{\s*infinity\s*\}|(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
        (r"(?<![\\A-Za-z])(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
        (r"(?:\\sqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\*\*(?=\s*[-0-9({])", "^"),
        # One form of arguments: \frac12, \sqrt2, x^{2}, x_{1}.
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\\pi|[A-Za-z])(?![A-Za-z])\s*(?=[0-9{\\])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
        (r"([_^])\s*\{\s*([A-Za-z0-9])\s*\}", r"\1\2"),
        (rf"{_TIME}[Aa]\.?\s?[Mm]\b\.?(?:\s*\}})?", r"\1 am"),
        (rf"{_TIME}[Pp]\.?\s?[Mm]\b\.?(?:\s*\}})?", r"\1 pm"),
        (r"\s+", " "),
    )
]
# Commands whose backslash was escaped once too often.
_ESCAPED = re.compile(
    r"\\\\(?=(?:left|right|[dt]?frac|sqrt|pi|text|cdot|times|infty|cup)(?![A-Za-z]))"
)
_SEPARATORS = re.compile(r"\\q?quad(?![A-Za-z])|\\\\(?:\[[^\]]*\])?|\\newline(?![A-Za-z])")
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}\.?")
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
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_TRANSLATION)).translate(_TRANSLATION)
    if "\\begin" not in text:
        text = _SEPARATORS.sub(" , ", _ESCAPED.sub(r"\\", text))
    text = text.strip(" \t\n*`")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _strip(text)
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole and re.search(r"\d|,|\b(?:and|or)\b", whole[1]):
        text = _strip(whole[1])
    text = _NEGATIVE.sub("-", _LEAD.sub("", text, count=1), count=1)
    return text


def _strip(text: str) -> str:
    """Without what stands around an answer: spaces, a final stop, braces that group all of it."""
    text = text.strip(" \t\n*`").rstrip(" .,;:*`").lstrip(" ,;:")
    while text.startswith("{") and text.endswith("}") and _closing(text) == len(text) - 1:
        text = text[1:-1].strip(" .,;:")
    return text


def _closing(text: str) -> int:
    """Where the brace that opens a text is closed, or -1."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.start()
    return -1


def key(text: str) -> str:
    """What is compared letter by letter: without spaces, except those between numbers."""
    text = re.sub(r"(?<=[0-9]), (?=[0-9]{3}(?![0-9]))", ",\0", text)
    return re.sub(r"(?<![0-9]) | (?![0-9.])", "", text)


_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def words(text: str) -> str | None:
    r"""The words of a canonical text that is nothing but words, to be compared; else None.

    Their case counts as little as spaces and stops. A few small letters without vowels of words
    are a product of variables.

    >>> words("\\text{No solution.}"), words("Evelyn"), words("xy"), words("x+1")
    ('nosolution', 'evelyn', None, None)
    """
    plain = _TEXT.sub(r" \1 ", text).strip()
    wrapped = _TEXT.search(text) is not None
    tokens = plain.split()
    if not tokens or any(sign.isdigit() or sign in "\\^_=<>+*/|$" for sign in plain):
        return None
    if not wrapped:
        if not all(token.strip("'.,()").replace("'", "").isalpha() for token in tokens):
            return None
        if len(plain) == 1 and plain.isascii():
            return None
        small = len(plain) <= 3 and plain.isascii() and plain.islower()
        if small and not set(plain) & set("eiou"):
            return None
    kept = "".join(sign for sign in plain.casefold() if sign.isalnum())
    if len(kept) == 1 and kept.isascii():
        kept = "".join(sign for sign in plain if sign.isalnum())
    return kept or None
