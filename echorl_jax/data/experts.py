"""Expert trajectories of rows: demonstrations for SFT and LUFFY, hints for UFT."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.core import hint_probability
from echorl_jax.data.pictures import Processor
from echorl_jax.data.rows import DataError
from echorl_jax.data.stream import Prompt
from echorl_jax.data.tokens import Template, encode_prompt, require_embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A solution is cut into at most this many segments.
MAX_SEGMENTS = 5
# GSM8K's solutions carry marks for a calculator, "<<48/2=24>>".
CALCULATOR = re.compile(r"<<[^<>]*>>")


def expert_text(row: Mapping[str, Any]) -> str | None:
    """A row's demonstration, or None: its ``target`` messages, UFT's answer, its ``solution``."""
    if row.get("target"):
        return "".join(message["content"] for message in row["target"])
    # Beside hints, the column answer is the whole solution with its final answer.
    solution = row.get("answer" if row.get("hint") else "solution")
    return CALCULATOR.sub("", solution) if isinstance(solution, str) and solution else None


def encode_target(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> list[int]:
    """The token ids of a row's demonstration and the end token, as a policy samples them.

    Raises:
      DataError: the row has none.
    """
    text = expert_text(row)
    if text is None:
        raise DataError("column target: no expert messages in this row, and no solution")
    end = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    assert isinstance(end, int)
    return [*tokenizer.encode(text, add_special_tokens=False), end]


def require_embedded_rows(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Mapping[str, Any]],
    *,
    template: Template | str,
    vocab_size: int,
    experts: bool,
    source: str,
    processor: Processor | None = None,
) -> None:
    """Checks that a model has an embedding for every token of its prompts and expert texts.

    Nothing is encoded when all of the tokenizer's tokens are within the vocabulary.

    Args:
      rows: in verl's columns.
      template: of the prompts.
      vocab_size: rows of the model's embedding.
      experts: whether expert texts are used too.
      processor: of a model with a vision tower.
      source: name of the rows in messages.

    Raises:
      DataError: the first row with a token beyond the vocabulary.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return
    for place, row in enumerate(rows):
        texts = {"prompt": encode_prompt(tokenizer, row, template, processor)}
        if experts and expert_text(row) is not None:
            texts["expert text"] = encode_target(tokenizer, row)
        if experts and row.get("hint"):
            hint = "".join(hint_segments(row))
            texts["hint"] = tokenizer.encode(hint, add_special_tokens=False)
        for name, ids in texts.items():
            require_embedded(tokenizer, ids, vocab_size, f"{source}, row {place}, {name}")


def hint_segments(row: Mapping[str, Any]) -> list[str]:
    """Cuts a row's expert solution into ``min(MAX_SEGMENTS, lines)`` even runs of whole lines.

    The lines are UFT's column ``hint`` or those of :func:`expert_text`; joined, the segments are
    the text again. Source: UFT, arXiv 2505.16984.

    >>> hint_segments({"hint": list("abcdefg")})
    ['ab', 'cd', 'e', 'f', 'g']
    """
    lines = _lines(row)
    count = min(MAX_SEGMENTS, len(lines))
    sizes = [len(lines) // count + (k < len(lines) % count) for k in range(count)] if count else []
    ends = np.cumsum([0, *sizes])
    return ["".join(lines[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def _lines(row: Mapping[str, Any]) -> list[str]:
    given = row.get("hint")
    pieces = list(given) if given else (expert_text(row) or "").splitlines(keepends=True)
    lines: list[str] = []
    for piece in pieces:
        # Blank lines belong to the one before them.
        if piece.strip() or not lines:
            lines.append(piece)
        else:
            lines[-1] += piece
    return lines


def add_hint(
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    step: int,
    seed: int,
    hint_steps: int,
    max_prompt_tokens: int,
) -> Prompt:
    """Appends the beginning of the expert solution to a prompt, shorter as training goes on.

    Of n segments, Binomial(n, p(step)) are shown. The draw depends on the seed, the step and the
    row alone, so a resumed run repeats it. Segments that would make the prompt longer than
    ``max_prompt_tokens`` are left out.

    Returns:
      The prompt whose last ``hint_tokens`` ids are the hint; the same prompt when nothing is shown.
    """
    segments = hint_segments(prompt.row)
    draws = np.random.default_rng((seed, step, prompt.index)).random(len(segments))
    probability = float(hint_probability(step, horizon=hint_steps))
    for shown in range(int((draws < probability).sum()), 0, -1):
        hint = tokenizer.encode("".join(segments[:shown]), add_special_tokens=False)
        if len(prompt.ids) + len(hint) <= max_prompt_tokens:
            ids = [*prompt.ids, *hint]
            return dataclasses.replace(prompt, ids=ids, hint_tokens=len(hint))
    return prompt
