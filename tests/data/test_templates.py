"""Named prompt templates, against the prompts in the public files."""

from pathlib import Path

import pytest

from echorl_jax.data import TEMPLATES, DataError, encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.templates import render_prompt

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


def test_a_chat_template_that_refuses_is_one_clear_line(tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(DataError, match="refuses a prompt: no system role"):
            render_prompt(tokenizer, QUESTION, "chat")
    finally:
        tokenizer.chat_template = original


def test_an_unknown_template_names_the_known(tokenizer):
    with pytest.raises(DataError, match="template 'chatty': must be one of chat, plain, luffy"):
        render_prompt(tokenizer, QUESTION, "chatty")
