"""Tokenizers, and the token ids of rows."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.data.errors import DataError
from echorl_jax.data.templates import render_prompt, starts_itself
from echorl_jax.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LAYERS = 4096
BUILTIN = {"builtin:countdown": Path(__file__).parent.parent / "assets" / "countdown"}


def model_path(path: str) -> str:
    """The directory of a model that comes with the package, else the path itself.

    >>> model_path("runs/1/export")
    'runs/1/export'
    """
    return str(BUILTIN[path]) if path in BUILTIN else os.path.expanduser(path)


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a Hugging Face directory, a repository id or ``builtin:countdown``.

    Raises:
      DataError: no tokenizer there, or one without an end token; the workdir of a run.
    """
    # Says nothing about the absence of torch, which only transformers' own models need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    source = model_path(path)
    if path in BUILTIN or path.startswith(("/", ".", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise DataError(f"{path}: no such directory, so no tokenizer")
    if all((Path(source) / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise DataError(
            f"{path} is the workdir of a run, not a model: take {path}/export, or what "
            f"`echorl convert --model={path} --out=DIR` makes of a checkpoint"
        )
    _require_layers(Path(source) / "config.json")
    try:
        # Otherwise transformers asks on standard input whether to run the directory's code.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # Some files load and then fail on the first text.
        usable = len(tokenizer) > 0 and tokenizer.encode("1 + 1 = 2\n") is not None
    # The libraries raise bare exceptions for files of other versions.
    except Exception as error:
        raise DataError(f"{path}: no tokenizer: {one_line(error)}") from error
    if not usable:
        raise DataError(f"{path}: the tokenizer has no vocabulary; is tokenizer.json there?")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-text token")
    return tokenizer


def _require_layers(file: Path) -> None:
    """Refuses a layer count that no model has: transformers, which reads the configuration to find
    the tokenizer's class, makes a list of that length.
    """
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # No such file, or one that transformers refuses at once.
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if isinstance(layers, int | float) and layers > MOST_LAYERS:
        raise DataError(f"{file}: num_hidden_layers={layers} is more than {MOST_LAYERS}")


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any], template: str = "chat"
) -> list[int]:
    """The token ids of a row's prompt, ready for the model to go on from.

    ``template`` is a name in :data:`~echorl_jax.data.templates.TEMPLATES`.

    Raises:
      DataError: an unknown template, or one that the tokenizer or the row cannot serve; a tokenizer
        that ends every text with an end token.
    """
    text = render_prompt(tokenizer, row["prompt"], template)
    ids = tokenizer.encode(text, add_special_tokens=not starts_itself(template))
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if ids[-1:] != tokenizer.encode(text, add_special_tokens=False)[-1:]:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer appends its end token "
                f"{tokenizer.convert_ids_to_tokens(ids[-1])!r} to every prompt, so the model would "
                "start after an end; take it out of post_processor in tokenizer.json (or set "
                "add_eos_token to false in tokenizer_config.json), or take template chat"
            )
    return ids


def require_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Checks that a model has a row for what text turns into, and for the end token.

    Tokens that were added, such as a padding token, may lie beyond: many published models have
    those. Texts that hold one are refused by :func:`require_embedded`.

    Raises:
      DataError: the tokenizer is of another model.
    """
    plain = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    end: Any = tokenizer.eos_token_id
    largest = max({end, *plain})
    if largest >= vocab_size:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer's token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the model's vocabulary of "
            f"{vocab_size}; they do not belong together"
        )


def require_embedded(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], vocab_size: int, text: str
) -> None:
    """Checks that a model has an embedding for each token id of a text; ``text`` is its name.

    Raises:
      DataError: a token is beyond the model's vocabulary.
    """
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{text}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the "
            f"model's vocabulary of {vocab_size}: it was added to the tokenizer, but the model's "
            "embedding was not resized"
        )


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
