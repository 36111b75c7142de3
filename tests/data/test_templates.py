"""Named prompt templates, against the prompts in the public files."""

import resource
import time
from datetime import datetime
from pathlib import Path

import pytest

from echorl_jax.data import TEMPLATES, DataError, encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import Template, keep_date, keep_template

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
QUESTION = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:countdown")


def render_prompt(tokenizer, messages, name):
    return Template(name).render(tokenizer, messages)


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


FILE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{{ strftime_now('%Y') }}{% if think is defined %} think={{ think }}{% endif %}"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(FILE)
    return str(path)


def test_a_file_is_a_chat_template_with_arguments_a_date_and_a_system_prompt(file):
    tokenizer = load_tokenizer("builtin:countdown")
    keep_date(tokenizer, datetime(2021, 5, 1))
    given = [{"role": "system", "content": "Be brief."}, *QUESTION]
    question = QUESTION[0]["content"]
    for template, start, end in [
        (Template(file), "[system] Be brief.\n", "2021"),
        (Template(file, '{"think": false}'), "[system] Be brief.\n", "2021 think=False"),
        (Template(file, system="Think."), "[system] Think.\n", "2021"),
        (Template(file, system=""), "", "2021"),
    ]:
        assert template.render(tokenizer, given) == f"{start}[user] {question}\n{end}"


def test_arguments_reach_the_tokenizers_own_template():
    tokenizer = load_tokenizer("builtin:countdown")
    tokenizer.chat_template = "{{ 'on' if enable_thinking | default(true) else 'off' }}"
    assert Template().render(tokenizer, QUESTION) == "on"
    assert Template(kwargs='{"enable_thinking": false}').render(tokenizer, QUESTION) == "off"


def test_the_template_of_a_file_is_saved_with_the_model(file, tmp_path):
    tokenizer = keep_template(load_tokenizer("builtin:countdown"), Template(file))
    tokenizer.save_pretrained(tmp_path / "model")
    again = load_tokenizer(str(tmp_path / "model"))
    expected = Template(file).render(tokenizer, QUESTION)
    assert Template().render(again, QUESTION) == expected


def test_plain_puts_the_system_prompt_first(tokenizer):
    given = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert Template("plain", system="Sum. ").render(tokenizer, given) == "Sum. 1+1?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Template("luffy", system="x"), "template 'luffy' has its own system prompt"),
        (Template("plain", '{"a": 1}'), "'plain' is no chat template and takes no arguments"),
        (Template("no/such.jinja"), "template no/such.jinja: .*No such file"),
        (Template(kwargs='{"messages": 1}'), "refuses a prompt: .*messages"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tokenizer, template, message):
    with pytest.raises(DataError, match=message) as error:
        template.render(tokenizer, QUESTION)
    assert "\n" not in str(error.value)
