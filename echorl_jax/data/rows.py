"""One shape for all rows: verl's columns, whatever columns a file has.

Known shapes: verl (``prompt`` messages, ``reward_model.ground_truth``, ``extra_info``, optional
expert ``target``), TRL (``prompt`` as messages or text, the answer in a separate column), plain
``problem`` or ``question`` with ``answer``, the same with ``options`` for multiple choice, and with
``numbers`` and ``target`` for Countdown. Columns that a shape does not name are kept, for graders
that read them.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from echorl_jax.config import ConfigError

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Before the number that a solution of GSM8K comes to.
GSM8K_MARK = "####"
# Columns with the answer in rows without ``reward_model``; the first match wins.
ANSWERS = ("ground_truth", "answer", "solution")
# Columns of sound and films in public data sets, and of pictures in forms that are not read.
MEDIA = """
video videos audio audios multi_modal_data multi_modal_inputs multimodal_data
mm_data decoded_image
""".split()
# The first characters of messages that were stored as text.
MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content)["']\s*:""")
# Words that data sets write in place of an answer.
SENTINELS = {"proof", "notfound", "answernotfound", "noanswerfound", "nan", "null"}
NOT_AVAILABLE = {"n/a", "<na>"}
# Commands around an answer, and the text of an answer that is not only punctuation.
_WRAPPERS = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|mbox)(?![A-Za-z])")
_ANSWER = re.compile(r"[^\W_]|\\[{]|[<>=+*/^%∅∞]")


class DataError(ConfigError):
    """Rows or a tokenizer that cannot be used: one line with the file, the row and the column."""


class BadRow(ValueError):
    """A row that cannot be used; says which column and why."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"column {column}: {reason}")


def normalise_row(raw: Mapping[str, Any], *, source: str) -> Row:
    """Brings a row into verl's columns.

    ``source`` becomes the ``data_source`` of a row that names none. An expert trajectory is a
    ``target`` that is a list of messages; any other ``target`` (in UFT's Countdown files it is the
    number to reach) is dropped.

    Raises:
      BadRow: a column that is missing or has the wrong content.
    """
    for column in MEDIA:
        if holds_something(raw.get(column)):
            raise BadRow(column, "only pictures in columns images and image are supported")
    row = dict(raw)
    prompt = _parsed(raw.get("prompt"), "prompt")
    row["prompt"] = _prompt(raw, prompt)
    row["reward_model"] = {"style": "rule", **_mapping(raw, "reward_model")}
    row["reward_model"]["ground_truth"] = _ground_truth(raw)
    row["data_source"] = raw.get("data_source") or ("countdown" if _is_puzzle(raw) else source)
    row["extra_info"] = _mapping(raw, "extra_info")
    if isinstance(prompt, str):
        # TRL's reward functions get text where the prompt was text, messages where it was messages.
        row["extra_info"]["prompt_format"] = "text"
    _check_letter(raw, row["reward_model"]["ground_truth"])
    if GSM8K_MARK in str(raw.get("answer")) and not (raw.get("hint") or raw.get("solution")):
        # GSM8K's own files: the answer is a whole solution.
        row["solution"] = raw["answer"]
    _settle_expert_texts(row)
    row["data_source"] = _text(row["data_source"], "data_source")
    if row["data_source"] == "countdown":
        _check_countdown(row["reward_model"]["ground_truth"])
    if row["data_source"] == "reduce":
        _check_reduce(row["reward_model"]["ground_truth"])
    return row


def _prompt(raw: Mapping[str, Any], prompt: Any) -> list[dict[str, str]]:
    if prompt is None:
        return [{"role": "user", "content": _question(raw)}]
    if isinstance(prompt, str):
        return [{"role": "user", "content": _text(prompt, "prompt")}]
    return _messages(prompt, "prompt")


def _parsed(value: Any, column: str) -> Any:
    """The value; where it is the JSON text of messages, the messages."""
    text = _unicode(value, column) if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if MESSAGES_AS_TEXT.match(text):
            raise BadRow(column, "text that begins as messages do but is not JSON") from None
        return text
    messages = found if isinstance(found, list) else [found]
    are_messages = [isinstance(each, Mapping) and "role" in each for each in messages]
    return messages if messages and all(are_messages) else text


def holds_something(value: Any) -> bool:
    """False for None, NaN, empty text and what holds only those, as shared schemas fill it in."""
    if isinstance(value, np.ndarray):
        return value.size > 0 and (value.dtype != object or any(map(holds_something, value.flat)))
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_something, value))
    return value is not None and value == value and value not in ("", b"", False)


def _question(raw: Mapping[str, Any]) -> str:
    column = next((name for name in ("problem", "question") if raw.get(name) is not None), None)
    if column is None:
        raise BadRow("prompt", "missing, and there is no column problem or question either")
    text = _text(raw[column], column)
    options = _options(raw)
    if not options:
        return text
    lines = [f"{label}) {option}" for label, option in options.items()]
    return "\n".join([text, "", *lines])


def _ground_truth(raw: Mapping[str, Any]) -> Any:
    judged = raw.get("reward_model")
    if judged is not None:
        truth = _mapping(raw, "reward_model").get("ground_truth")
        column = "reward_model.ground_truth"
    elif _is_puzzle(raw):
        truth, column = {"numbers": raw["numbers"], "target": raw["target"]}, "numbers"
    else:
        column = next((name for name in ANSWERS if raw.get(name) is not None), None)
        if column is None:
            raise BadRow("reward_model", "missing, and there is no column answer either")
        truth = raw[column]
    if isinstance(truth, str | bytes):
        truth = _unicode(truth, column)
    return _matchable(truth, column)


def _matchable(truth: Any, column: str) -> Any:
    """A ground truth that a response can match; numbers become text.

    Raises:
      BadRow: none can: it is empty, no number, a word that stands for a missing answer, or an
        object that is neither a puzzle nor UFT's with a ``target``.
    """
    if isinstance(truth, Mapping):
        return _matchable_object({k: v for k, v in truth.items() if v is not None}, column)
    if isinstance(truth, Sequence) and not isinstance(truth, str):
        kept = [each for each in truth if each is not None and each != ""]
        if not kept:
            raise BadRow(column, "a list without an answer")
        if any(isinstance(each, Mapping | list | tuple) for each in kept):
            raise BadRow(column, "a list must hold accepted answers as text or numbers")
        return [_matchable(each, column) for each in kept]
    if isinstance(truth, float) and not math.isfinite(truth):
        raise BadRow(column, f"{truth} is no answer")
    if truth is None or not (text := str(truth)).strip():
        raise BadRow(column, "empty")
    plain = _WRAPPERS.sub("", text)
    word = re.sub(r"[\W_]", "", plain).casefold()
    if word in SENTINELS or text.strip().casefold() in NOT_AVAILABLE:
        raise BadRow(column, f"{text[:40]!r} stands for a missing answer")
    if not _ANSWER.search(plain):
        raise BadRow(column, f"{text[:40]!r} holds no answer")
    return text if isinstance(truth, int | float) else truth


def _matchable_object(truth: dict[str, Any], column: str) -> dict[str, Any]:
    if "numbers" in truth:
        _check_countdown(truth)
    elif "target" not in truth:
        raise BadRow(
            column,
            "an object must be a puzzle with numbers and target, or hold the answer in target",
        )
    elif not _is_whole(truth["target"]):
        _matchable(truth["target"], f"{column}.target")
    return truth


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise BadRow(column, f"expected a list of messages, found {_kind(value)}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadRow(column, "expected messages with role and content")
    messages = [{**message, "content": _joined_parts(message["content"])} for message in value]
    for message in messages:
        if not all(isinstance(message[part], str | bytes) for part in ("role", "content")):
            raise BadRow(column, "a message's role and content must be text")
    return [
        {part: _unicode(message[part], column) for part in ("role", "content")}
        for message in messages
    ]


def _joined_parts(content: Any) -> Any:
    """Text for a list of texts and marks of pictures, the form of TRL and of chat templates."""
    if isinstance(content, str | bytes) or not isinstance(content, Sequence):
        return content
    pieces = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "image":
            pieces.append("<image>")
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            return content
    return "".join(pieces)


def _is_puzzle(raw: Mapping[str, Any]) -> bool:
    return raw.get("numbers") is not None and _is_whole(raw.get("target"))


def _settle_expert_texts(row: Row) -> None:
    target = _parsed(row.pop("target", None), "target")
    if isinstance(target, Sequence) and not isinstance(target, str | bytes):
        row["target"] = _messages(target, "target")
    for column in ("solution", "answer"):
        if isinstance(row.get(column), str | bytes):
            row[column] = _unicode(row[column], column)
    hint = row.get("hint")
    if isinstance(hint, str | bytes):
        row["hint"] = _unicode(hint, "hint").splitlines(keepends=True)
    elif hint is not None:
        if not isinstance(hint, Sequence):
            raise BadRow("hint", f"expected a list of texts, found {_kind(hint)}")
        row["hint"] = [_text(line, "hint", empty=True) for line in hint]


def _check_letter(raw: Mapping[str, Any], truth: Any) -> None:
    """The letter of an answer must be that of an option."""
    options = _options(raw)
    if not options or not isinstance(truth, str) or truth in options.values():
        return
    letter = truth.strip().upper()
    if len(letter) == 1 and letter in LETTERS and letter not in options:
        raise BadRow("answer", f"{truth!r}, but there are only {len(options)} options")


def _options(raw: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text; none in rows that are no multiple choice, which one schema gives them too."""
    options = raw.get("options")
    if options is None or (isinstance(options, Sequence | Mapping) and not options):
        return {}
    if isinstance(options, Mapping):
        kept = {label: text for label, text in options.items() if text is not None}
        return {str(label).strip().upper(): str(text) for label, text in kept.items()}
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise BadRow("options", f"expected a list of texts, found {_kind(options)}")
    return dict(zip(LETTERS, map(str, options), strict=False))


def _check_countdown(truth: Any) -> None:
    if not isinstance(truth, Mapping):
        raise BadRow(
            "reward_model.ground_truth", f"expected numbers and target, found {_kind(truth)}"
        )
    numbers = truth.get("numbers")
    if not isinstance(numbers, Sequence) or not all(_is_whole(n) for n in numbers) or not numbers:
        raise BadRow("reward_model.ground_truth.numbers", "no list of whole numbers")
    if not _is_whole(truth.get("target")):
        raise BadRow("reward_model.ground_truth.target", "no whole number")


def _check_reduce(truth: Any) -> None:
    if not isinstance(truth, Mapping) or not isinstance(truth.get("expression"), str):
        raise BadRow("reward_model.ground_truth", "expected an expression (text) and a value")
    if not _is_whole(truth.get("value")):
        raise BadRow("reward_model.ground_truth.value", "no whole number")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(raw: Mapping[str, Any], column: str) -> dict[str, Any]:
    value = raw.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(column, f"expected an object, found {_kind(value)}")
    return dict(value)


def _text(value: Any, column: str, *, empty: bool = False) -> str:
    if not isinstance(value, str | bytes):
        raise BadRow(column, f"expected text, found {_kind(value)}")
    if not empty and not value.strip():
        raise BadRow(column, "empty")
    return _unicode(value, column)


def _unicode(text: str | bytes, column: str) -> str:
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()
    except UnicodeDecodeError as error:
        raise BadRow(column, "not UTF-8 text") from error
    except UnicodeEncodeError as error:  # JSON can spell it, but no tokenizer takes it
        raise BadRow(column, "half of a surrogate pair, which is no Unicode text") from error
    return text


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "an object", list: "a list", str: "text", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
