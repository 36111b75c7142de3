"""How a row's messages become the text that a model goes on from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from echorl_jax.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("chat", "plain")


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]], template: str
) -> str:
    """The prompt's text under a named template.

    Raises:
      DataError: an unknown name, or ``chat`` with a tokenizer that has no chat template.
    """
    if template == "plain":
        return "".join(message["content"] for message in messages)
    if template != "chat":
        raise DataError(f"template {template!r}: must be one of {', '.join(TEMPLATES)}")
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; take template plain")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
