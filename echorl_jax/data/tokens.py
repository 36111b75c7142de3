"""From rows to token ids."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.data.errors import DataError
from echorl_jax.data.templates import render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = {"builtin:countdown": Path(__file__).parent.parent / "assets" / "countdown"}


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a Hugging Face directory, a repository id or ``builtin:countdown``.

    Raises:
      DataError: no tokenizer there, or one without an end token.
    """
    # Says nothing about the absence of torch, which only transformers' own models need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    source = BUILTIN.get(path, path)
    looks_local = isinstance(source, Path) or path.startswith(("/", ".", "~"))
    if looks_local and not Path(source).expanduser().is_dir():
        raise DataError(f"{path}: no such directory, so no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(source).expanduser()) if looks_local else path
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no tokenizer: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-text token")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any], template: str = "chat"
) -> list[int]:
    """The token ids of a row's prompt, ready for the model to go on from.

    ``template`` is a name in :data:`~echorl_jax.data.templates.TEMPLATES`.

    Raises:
      DataError: an unknown template, or one that the tokenizer or the row cannot serve.
    """
    text = render_prompt(tokenizer, row["prompt"], template)
    # A chat template writes its own start token; other text gets the tokenizer's.
    return _encode(tokenizer, text, add_special_tokens=template == "plain")


def encode_target(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> list[int]:
    """The token ids of a row's expert trajectory and the end token, as a policy samples them.

    Raises:
      DataError: the row has no ``target`` messages.
    """
    messages = row.get("target")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("column target: no expert messages in this row")
    text = "".join(message["content"] for message in messages)
    end = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    assert isinstance(end, int)
    return [*_encode(tokenizer, text, add_special_tokens=False), end]


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool
) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def newline_delimiters(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> np.ndarray:
    """Marks each vocabulary entry whose decoded text contains a newline: ``[V]`` bool.

    Byte-level BPE merges ends of lines into tokens like ``.\\n\\n``, so the id of a lone newline
    misses many. Ids past the tokenizer's own, which pad a model's embedding, are False.
    """
    known = min(len(tokenizer), vocab_size)
    marks = np.zeros(vocab_size, bool)
    texts = tokenizer.batch_decode([[i] for i in range(known)])
    marks[:known] = ["\n" in text for text in texts]
    return marks
