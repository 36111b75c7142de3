"""Named prompt templates, against the prompts in the public files."""

import resource
import time
from pathlib import Path

import pytest

from echorl_jax.data import TEMPLATES, DataError, encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import render_prompt

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
QUESTION = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:countdown")


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_holds_the_question_once(tokenizer, template):
    text = render_prompt(tokenizer, QUESTION, template)
    assert text.count("1+1?") == 1
    assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": QUESTION}, template)) == text


def test_qwens_format(tokenizer):
    assert render_prompt(tokenizer, QUESTION, "qwen-math") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["luffy", "qwen-math", "boxed", "uft"])
def test_a_named_template_takes_the_place_of_the_rows_system_prompt(tokenizer, template):
    given = [{"role": "system", "content": "Be brief."}, *QUESTION]
    text = render_prompt(tokenizer, given, template)
    assert text == render_prompt(tokenizer, QUESTION, template) and "Be brief" not in text


@needs_files
def test_the_authors_system_prompt_is_that_of_their_files(tokenizer):
    row = load_rows(str(SHARED / "luffy_eval_arc_c_600.parquet"))[0]
    assert row["prompt"][0]["role"] == "system"
    text = render_prompt(tokenizer, row["prompt"], "chat")
    assert render_prompt(tokenizer, row["prompt"][1:], "luffy") == text


@needs_files
def test_ufts_prompts_are_those_of_its_files(tokenizer):
    row = load_rows(str(SHARED / "uft_math_700.parquet"))[0]
    (message,) = row["prompt"]
    question = row["reward_model"]["ground_truth"]["question"]
    bare = [{"role": "user", "content": question.removesuffix(" ")}]
    assert render_prompt(tokenizer, bare, "uft") == message["content"]
    # A prompt that has the form already keeps it.
    assert render_prompt(tokenizer, row["prompt"], "uft") == message["content"]


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ raise_exception('no\nsystem role') }}", "TemplateError: no system role"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[9].content }}", "UndefinedError: "),
        ("{% for", "TemplateSyntaxError: "),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError: "),
        ({"tools": "{{ messages }}"}, "no default"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template, message):
    tokenizer = load_tokenizer("builtin:countdown")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"chat template refuses a prompt: .*{message}") as error:
        render_prompt(tokenizer, QUESTION, "chat")
    assert "\n" not in str(error.value)


LOOP = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}",
        "{{ 'a' * 10**11 }}",
        "{% generation %}{{ messages[0].content * 10**10 }}{% endgeneration %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{{ 'a' * 10**7 }}",
    ],
)
def test_a_chat_template_without_end_or_measure_is_refused_within_limits(template):
    tokenizer = load_tokenizer("builtin:countdown")
    tokenizer.chat_template = template
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="takes more than 2 seconds, 1 GiB or a million characters"):
        render_prompt(tokenizer, QUESTION, "chat")
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB


def test_an_unknown_template_names_the_known(tokenizer):
    with pytest.raises(DataError, match="template 'chatty': must be one of chat, plain, luffy"):
        render_prompt(tokenizer, QUESTION, "chatty")
