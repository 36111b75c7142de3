"""Renders a row's messages as the text of a prompt."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from echorl_jax.data.errors import DataError
from echorl_jax.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
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


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: str) -> str:
    """The prompt's text under a template of :data:`TEMPLATES`.

    Raises:
      DataError: an unknown name, or a chat template that the tokenizer does not have or that
        refuses the messages.
    """
    if template not in TEMPLATES:
        raise DataError(f"template {template!r}: must be one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template](tokenizer, messages)


def keep_date(tokenizer: "PreTrainedTokenizerBase", date: datetime) -> None:
    """Makes a chat template that writes today's date write this one, so that prompts stay equal.

    The tokenizer's own template, which is saved with a model, stays as it is.
    """
    if isinstance(tokenizer.chat_template, str):
        text = DATE.sub(
            lambda call: json.dumps(date.strftime(call["format"])), tokenizer.chat_template
        )
        render: Any = functools.partial(tokenizer.apply_chat_template, chat_template=text)
        tokenizer.apply_chat_template = render


def starts_itself(template: str) -> bool:
    """True if a template writes the start token itself: the tokenizer must not add another."""
    return template in ("chat", "luffy", "qwen-math")


def _chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; take another template, say plain")
    try:
        _try_out(
            tokenizer.get_chat_template(), json.dumps(tokenizer.special_tokens_map, default=str)
        )
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except DataError:
        raise
    # A template is a program of the model directory, which may raise anything.
    except Exception as error:
        raise DataError(
            f"the tokenizer's chat template refuses a prompt: {one_line(error)}"
        ) from error
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


def _luffy(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    return _chat(
        tokenizer, [{"role": "system", "content": LUFFY_SYSTEM}, *_without_system(messages)]
    )


def _qwen_math(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    turns = [{"role": "system", "content": BOXED}, *_without_system(messages)]
    lines = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns]
    return "".join([*lines, "<|im_start|>assistant\n"])


def _boxed(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    return f"{_plain(tokenizer, _without_system(messages))}\n{BOXED}\n"


def _uft(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    text = _plain(tokenizer, _without_system(messages))
    return text if text.startswith(UFT_START) else f"{UFT_START}{text}{UFT_END}"


def _plain(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    return "".join(message["content"] for message in messages)


def _without_system(messages: Messages) -> list[dict[str, str]]:
    return [message for message in messages if message["role"] != "system"]


TEMPLATES: dict[str, Callable[["PreTrainedTokenizerBase", Messages], str]] = {
    # The tokenizer's chat template.
    "chat": _chat,
    # The contents, joined.
    "plain": _plain,
    # chat with the authors' system prompt in place of the row's.
    "luffy": _luffy,
    # Qwen's chat format with its instruction to box the answer.
    "qwen-math": _qwen_math,
    # The question and that instruction, for base models.
    "boxed": _boxed,
    # UFT's conversation for base models.
    "uft": _uft,
}
