"""Sources of rows, prompts as token ids, and the stream that training reads."""

from echorl_jax.data.experts import (
    add_hint,
    encode_target,
    expert_text,
    hint_segments,
    require_embedded_rows,
)
from echorl_jax.data.rows import DataError, Row
from echorl_jax.data.sources import Rows, load_rows
from echorl_jax.data.stream import Prompt, PromptStream, number_prompts
from echorl_jax.data.tokens import (
    TEMPLATES,
    Template,
    encode_prompt,
    encode_rows,
    load_tokenizer,
    newline_delimiters,
    require_embedded,
    require_vocabulary,
)

__all__ = [
    "DataError",
    "Prompt",
    "PromptStream",
    "Row",
    "Rows",
    "TEMPLATES",
    "Template",
    "add_hint",
    "encode_prompt",
    "encode_rows",
    "encode_target",
    "expert_text",
    "hint_segments",
    "load_rows",
    "load_tokenizer",
    "newline_delimiters",
    "number_prompts",
    "require_embedded",
    "require_embedded_rows",
    "require_vocabulary",
]
