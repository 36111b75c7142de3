"""Makes a model's text safe to look at: nothing in it can act, nothing stays invisible."""

import json
import re
from typing import Any

from echorl_jax.tools.report.runs import finite

# Control characters except tab and newline; zero-width marks; the marks that turn the direction of
# text; line and paragraph separators; halves of surrogate pairs; the byte-order mark.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Replaces characters that would hide or reorder others by a picture or their code point.

    C0 controls become their Unicode control pictures, the others ``<U+XXXX>`` in single angle
    quotation marks.

    >>> visible("a\\x00b\\u202ec")
    'a␀b‹U+202E›c'
    """
    return _HIDDEN.sub(_shown, text)


def embed_json(value: Any) -> str:
    r"""JSON that can stand inside an HTML ``<script type="application/json">``.

    Pure ASCII; ``<``, ``>`` and ``&`` are escaped too, so no text can end the element or open
    another. Numbers that are not finite become null.

    >>> embed_json({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"‹U+{code:04X}›"
