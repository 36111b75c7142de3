"""Tokenizers, chat templates, and prompts as token ids."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.config import DataConfig
from echorl_jax.data.pictures import (
    MARK,
    Processor,
    content_parts,
    entries_of,
    pictures_of,
    widened,
)
from echorl_jax.data.rows import BadRow, DataError
from echorl_jax.errors import one_line
from echorl_jax.files import BUILTIN, hub_answers, model_path, split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A message's content is text, or parts where it has pictures.
Messages = Sequence[dict[str, Any]]
# The call with which a chat template asks for the date; transformers offers no other clock.
DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")

# The system prompt of LUFFY's training and evaluation files, which EchoRL's authors use too.
LUFFY_SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final "
    "solution. This involves analyzing, summarizing, exploring, reassessing, and refining your "
    "thought process through multiple iterations. Structure your response into two sections: "
    "Thought and Solution. In the Thought section, present your reasoning using the format: "
    '"<think>\n {thoughts} </think>\n". Each thought should include detailed analysis, '
    "brainstorming, verification, and refinement of ideas. After "
    '"</think>\n," in the Solution section, provide the final, logical, and accurate answer, '
    "clearly derived from the exploration in the Thought section. If applicable, include the "
    "answer in \\boxed{} for closed-form results like multiple choices or mathematical solutions."
)
# The system prompt that Qwen2.5-Math was tuned with.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
# The instruction of verl's and EasyR1's recipes for Geometry3K, after the problem.
THINK = (
    " You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
    "answer MUST BE put in \\boxed{}."
)
# The prompt of UFT's files, for base models: it ends inside an opened thought.
UFT_START = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\nUser: "
)
UFT_END = (
    " Show your work in <think> </think> tags. And return the final answer in <answer> </answer> "
    "tags, for example <answer> 12 </answer>.\nAssistant: Let me solve this step by step.\n<think> "
)


_NO_MEMORY = 3
_TRIAL_MESSAGES = [
    [{"role": "user", "content": "1 + 1 = ?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}],
]
# The environment is that of transformers. Errors of a template are left to the real rendering.
_TRIAL = f"""
import json, re, resource, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment

resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
template, special_tokens, conversations = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.globals.update(raise_exception=int, strftime_now=str)
template = re.sub(r"{{%-?\\s*(end)?generation\\s*-?%}}", "", template)
for messages in conversations:
    try:
        text = environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True,
            **special_tokens,
        )
        if len(text) > 10**6:
            raise MemoryError
    except MemoryError:
        sys.exit({_NO_MEMORY})
    except Exception:
        pass
"""


@dataclasses.dataclass(frozen=True)
class Template:
    """Makes the text of a prompt from a row's messages."""

    name: str = "chat"  # in TEMPLATES, or a file with a chat template in Jinja
    kwargs: str = "{}"  # arguments of a chat template, a JSON object
    system: str | None = None  # in place of the row's system message; "" has none

    @classmethod
    def of(cls, data: DataConfig) -> "Template":
        """The template of a config."""
        return cls(data.template, data.template_kwargs, data.system_prompt)

    @property
    def is_file(self) -> bool:
        """True for a file with a chat template."""
        return self.name.endswith((".jinja", ".jinja2", ".j2"))

    @property
    def is_chat(self) -> bool:
        """True if the text is made by a chat template."""
        return self.is_file or self.name in ("chat", "luffy", "think")

    def render(self, tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
        """The prompt's text.

        Raises:
          DataError: an unknown name, settings that the template has no use for, or a chat template
            that cannot be read, or that refuses the messages.
        """
        if not self.is_file and self.name not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise DataError(f"template {self.name!r}: must be one of {known}, or a .jinja file")
        if not self.is_chat and self.kwargs != "{}":
            raise DataError(f"template {self.name!r} is no chat template and takes no arguments")
        if self.system is not None:
            if not self.is_file and self.name not in ("chat", "plain", "think"):
                raise DataError(f"template {self.name!r} has its own system prompt")
            start = [{"role": "system", "content": self.system}] if self.system else []
            messages = [*start, *_without_system(messages)]
        return (
            _chat(tokenizer, messages, self)
            if self.is_file
            else (TEMPLATES[self.name](tokenizer, messages, self))
        )


def keep_template(
    tokenizer: "PreTrainedTokenizerBase", template: Template
) -> "PreTrainedTokenizerBase":
    """The tokenizer, to be saved with a model: a file's chat template becomes its own."""
    if template.is_file:
        tokenizer.chat_template = read_template(template.name)
    return tokenizer


@functools.cache
def read_template(name: str) -> str:
    """The text of a file with a chat template.

    Raises:
      DataError: it cannot be read.
    """
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"template {name}: {one_line(error)}") from error


def keep_date(tokenizer: "PreTrainedTokenizerBase", date: datetime) -> None:
    """Makes a chat template that writes today's date write this one, so that prompts stay equal.

    The tokenizer's own template, which is saved with a model, stays as it is.
    """
    render: Any = tokenizer.apply_chat_template

    def dated(*args: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        text = chat_template or tokenizer.get_chat_template()
        text = DATE.sub(lambda call: json.dumps(date.strftime(call["format"])), text)
        return render(*args, chat_template=text, **kwargs)

    tokenizer.apply_chat_template = dated


def _chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: Template) -> str:
    if not (template.is_file or tokenizer.chat_template):
        raise DataError("the tokenizer has no chat template; take another template, say plain")
    kwargs = json.loads(template.kwargs)
    origin = template.name if template.is_file else "the tokenizer's chat template"
    try:
        chat = read_template(template.name) if template.is_file else tokenizer.get_chat_template()
        _try_out(chat, json.dumps({**tokenizer.special_tokens_map, **kwargs}, default=str))
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            chat_template=chat,
            **kwargs,
        )
    except DataError:
        raise
    # A template is a program of the model directory, which may raise anything.
    except Exception as error:
        raise DataError(f"{origin} refuses a prompt: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


@functools.cache
def _try_out(template: str, special_tokens: str) -> None:
    """Renders short conversations in a process with limits, once for each template: a loop or a
    large product would otherwise take this process with it.
    """
    trial = subprocess.run(
        [sys.executable, "-c", _TRIAL],
        input=json.dumps([template, json.loads(special_tokens), _TRIAL_MESSAGES]),
        text=True,
        capture_output=True,
    )
    if trial.returncode == _NO_MEMORY or trial.returncode < 0:
        raise DataError(
            "the tokenizer's chat template takes more than 2 seconds, 1 GiB or a million "
            "characters for a short prompt"
        )


def _luffy(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: Template) -> str:
    start = {"role": "system", "content": LUFFY_SYSTEM}
    return _chat(tokenizer, [start, *_without_system(messages)], template)


def _qwen_math(tokenizer: "PreTrainedTokenizerBase", messages: Messages, _: Template) -> str:
    turns = [{"role": "system", "content": BOXED}, *_without_system(messages)]
    lines = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns]
    return "".join([*lines, "<|im_start|>assistant\n"])


def _think(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: Template) -> str:
    *before, last = messages
    content: Any = last["content"]
    if isinstance(content, str):
        asked: Any = f"{content}{THINK}"
    else:
        asked = [*content, {"type": "text", "text": THINK}]
    return _chat(tokenizer, [*before, {**last, "content": asked}], template)


def _boxed(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: Template) -> str:
    return f"{_plain(tokenizer, _without_system(messages), template)}\n{BOXED}\n"


def _uft(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: Template) -> str:
    text = _plain(tokenizer, _without_system(messages), template)
    return text if text.startswith(UFT_START) else f"{UFT_START}{text}{UFT_END}"


def _plain(tokenizer: "PreTrainedTokenizerBase", messages: Messages, _: Template) -> str:
    return "".join(message["content"] for message in messages)


def _without_system(messages: Messages) -> list[dict[str, str]]:
    return [message for message in messages if message["role"] != "system"]


TEMPLATES: dict[str, Callable[["PreTrainedTokenizerBase", Messages, Template], str]] = {
    # The tokenizer's chat template.
    "chat": _chat,
    # The contents, joined.
    "plain": _plain,
    # chat with the authors' system prompt in place of the row's.
    "luffy": _luffy,
    # chat with the instruction to think within <think> tags and to box the answer.
    "think": _think,
    # Qwen's chat format with its instruction to box the answer.
    "qwen-math": _qwen_math,
    # The question and that instruction, for base models.
    "boxed": _boxed,
    # UFT's conversation for base models.
    "uft": _uft,
}


MOST_LAYERS = 4096


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a Hugging Face directory, a repository id or ``builtin:countdown``.

    Raises:
      DataError: no tokenizer there, or one without an end token; the workdir of a run; an adapter
        without its base.
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
    for adapter in (Path(source), Path(source) / "adapter"):
        alone = not (Path(source) / "config.json").exists()
        if alone and (adapter / "adapter_config.json").exists():
            raise DataError(
                f"{path} holds an adapter, not a model: name its base as the model and {adapter} "
                "as the adapter"
            )
    _require_layers(Path(source) / "config.json")
    try:
        # Otherwise transformers asks on standard input whether to run the directory's code.
        here = Path(source).is_dir()
        name, revision = (source, None) if here else split_revision(source)
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=False,
            local_files_only=here or not hub_answers(),
        )
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
    tokenizer: "PreTrainedTokenizerBase",
    row: Mapping[str, Any],
    template: Template | str = "chat",
    processor: Processor | None = None,
) -> list[int]:
    """The token ids of a row's prompt, ready for the model to go on from.

    ``template`` may be the name of one without settings. With a ``processor``, a picture of the row
    has as many image tokens as the model makes features of it.

    Raises:
      DataError: an unknown template, or one that the tokenizer or the row cannot serve; a tokenizer
        that ends every text with an end token.
      BadRow: pictures that do not fit the text, or for a model without a vision tower.
    """
    template = Template(template) if isinstance(template, str) else template
    messages, pictures = row["prompt"], [] if processor is None else pictures_of(row)
    if processor is None and entries_of(row):
        raise BadRow("images", "pictures, but the model has no vision tower")
    if pictures and not template.is_chat:
        raise DataError(f"template {template.name!r}: only chat templates show pictures")
    marked = processor is not None and any(MARK in message["content"] for message in messages)
    if pictures or marked:
        messages = content_parts(messages, len(pictures))
    text = template.render(tokenizer, messages)
    # These write the start token themselves: the tokenizer must not add another.
    starts_itself = template.is_chat or template.name == "qwen-math"
    ids = tokenizer.encode(text, add_special_tokens=not starts_itself)
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if ids[-1:] != tokenizer.encode(text, add_special_tokens=False)[-1:]:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer appends its end token "
                f"{tokenizer.convert_ids_to_tokens(ids[-1])!r} to every prompt, so the model would "
                "start after an end; take it out of post_processor in tokenizer.json (or set "
                "add_eos_token to false in tokenizer_config.json), or take template chat"
            )
    if processor is None:
        return ids
    return widened(ids, processor.image_id, [processor.tokens(one) for one in pictures])


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[Mapping[str, Any]],
    template: Template | str = "chat",
    processor: Processor | None = None,
    *,
    source: str,
) -> list[list[int]]:
    """:func:`encode_prompt` for each row; ``source`` is their name in messages.

    Raises:
      DataError: see there; names the row.
    """
    encoded = []
    for place, row in enumerate(rows):
        try:
            encoded.append(encode_prompt(tokenizer, row, template, processor))
        except BadRow as error:
            raise DataError(f"{source}, row {place}, {error}") from error
    return encoded


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
