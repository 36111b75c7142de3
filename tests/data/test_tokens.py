"""The tiny tokenizer, prompts as ids, and delimiters."""

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import echorl_jax
from echorl_jax.data import (
    DataError,
    encode_prompt,
    encode_target,
    load_tokenizer,
    newline_delimiters,
    require_vocabulary,
)
from echorl_jax.data.countdown_rows import CountdownRows
from tests.data.make_tiny_tokenizer import write_directory

ASSETS = Path(echorl_jax.__file__).parent / "assets" / "countdown"
QWEN = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "qwen2_5"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:countdown")


@pytest.fixture(scope="module")
def qwen():
    if not QWEN.is_dir():
        pytest.skip("no Qwen2.5 tokenizer beside the repository")
    return load_tokenizer(str(QWEN))


def test_the_script_makes_the_files_that_ship(tmp_path):
    write_directory(tmp_path)
    for made in tmp_path.iterdir():
        assert json.loads(made.read_text()) == json.loads((ASSETS / made.name).read_text())


def test_the_config_fits_the_tokenizer(tokenizer):
    config = json.loads((ASSETS / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    vocab_size = len(tokenizer)
    require_vocabulary(tokenizer, vocab_size)
    plain = max(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    with pytest.raises(DataError, match=rf"token {plain} \('.*'\) .* vocabulary of {plain}; they"):
        require_vocabulary(tokenizer, plain)
    # A token that was added later need not have a row, unless generation ends with it.
    grown = load_tokenizer("builtin:countdown")
    grown.add_special_tokens({"additional_special_tokens": ["<|later|>"]})
    require_vocabulary(grown, vocab_size)
    grown.eos_token = "<|later|>"
    with pytest.raises(DataError, match="later"):
        require_vocabulary(grown, vocab_size)


def _places(value, path=()):
    """Every place of a JSON value, long lists and tables only at their start."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items)[:30]:
        if isinstance(inner, dict | list):
            yield from _places(inner, (*path, key))
        else:
            yield (*path, key)


def _replaced(value, path, new):
    """``value`` with another value at a place; no value deletes the key."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new == "delete":
        del copy[path[0]]
    else:
        copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


FILES = {
    name: json.loads((ASSETS / name).read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json")
}
PLACES = {name: list(_places(content)) for name, content in FILES.items()}
OTHER = [None, True, -1, 10**12, 2.5, "", "x", [], {}, ["a"], {"a": 1}, "delete"]


def test_an_absurd_layer_count_is_one_line_and_costs_no_memory(tmp_path):
    for file, content in FILES.items():
        (tmp_path / file).write_text(json.dumps(content))
    config = FILES["config.json"] | {"num_hidden_layers": 10**12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="config.json: num_hidden_layers=1000000000000 is more"):
        load_tokenizer(str(tmp_path))


# Without shrinking: each example loads a tokenizer.
@settings(max_examples=60, deadline=None, phases=[Phase.generate], derandomize=True)
@given(st.data())
def test_a_tokenizer_of_another_version_gives_ids_or_one_line(data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    path = data.draw(st.sampled_from(PLACES[name]))
    changed = _replaced(FILES[name], path, data.draw(st.sampled_from(OTHER)))
    with tempfile.TemporaryDirectory() as directory:
        for file, content in (FILES | {name: changed}).items():
            (Path(directory) / file).write_text(json.dumps(content))
        try:
            tokenizer = load_tokenizer(directory)
            encode_prompt(tokenizer, {"prompt": [{"role": "user", "content": "1, 2?\n"}]})
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"model": {"type": "Unknown"}}', "[" * 100_000, '{"version": "9.0"}']
)
def test_a_tokenizer_file_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(FILES["config.json"]))
    with pytest.raises(DataError, match="no tokenizer: ") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_goes_in_and_comes_out(tokenizer, text):
    # <| |> would spell a special token; none arises from this alphabet except by chance of
    # thousands.
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_words_digits_and_line_ends_are_single_tokens(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("Reach 63 with 5, 7, 9.\n\n")]
    expected = "Reach| |6|3| with| |5|,| |7|,| |9|.|\n|\n"
    assert pieces == expected.split("|")


def test_a_prompt_and_its_target_are_what_the_policy_reads_and_writes(tokenizer):
    row = CountdownRows(seed=1)[0]
    assert tokenizer.decode(encode_prompt(tokenizer, row)) == "Reach 43 with 3, 20, 26.\n"
    target = encode_target(tokenizer, row)
    assert tokenizer.decode(target[:-1]) == "20-3=17\n26+17=43"
    assert target[-1] == tokenizer.eos_token_id
    # Prompt and target together are the conversation under the chat template.
    both = tokenizer.apply_chat_template(row["prompt"] + row["target"], tokenize=False)
    assert tokenizer.decode(encode_prompt(tokenizer, row) + target) == both


def test_a_plain_template_joins_the_contents(tokenizer):
    row = {"prompt": [{"role": "user", "content": "1+"}, {"role": "user", "content": "2="}]}
    assert tokenizer.decode(encode_prompt(tokenizer, row, "plain")) == "1+2="


def test_a_tokenizer_that_ends_every_prompt_is_refused(tmp_path):
    """Its post-processor appends the end token, as add_eos_token does in Llama's."""
    for file in ASSETS.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    ids = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": ids},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ending = load_tokenizer(str(tmp_path))
    row = {"prompt": [{"role": "user", "content": "1+1?"}]}
    assert ending.encode("1+1?")[-1] == ending.eos_token_id
    for template in ("plain", "boxed", "uft"):
        with pytest.raises(DataError, match=r"appends its end token '<\|endoftext\|>' to every"):
            encode_prompt(ending, row, template)
    assert encode_prompt(ending, row, "chat")[-1] != ending.eos_token_id
    # A text that ends so by itself is the row's affair.
    row["prompt"][0]["content"] += "<|endoftext|>"
    assert encode_prompt(load_tokenizer("builtin:countdown"), row, "plain")[-1] == 0


def test_a_tokenizer_without_chat_template_says_so(qwen):
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(qwen, {"prompt": [{"role": "user", "content": "hi"}]})


def test_delimiters_of_the_tiny_tokenizer(tokenizer):
    marks = newline_delimiters(tokenizer, 512)
    assert marks.dtype == np.bool_ and marks.shape == (512,)
    assert marks.nonzero()[0].tolist() == tokenizer.encode("\n")


def test_delimiters_of_qwen_hold_the_authors_and_the_merged_ones(qwen):
    marks = newline_delimiters(qwen, 151_936)
    assert marks[[198, 271]].all()
    (merged,) = qwen.encode(".\n\n")
    assert marks[merged] and not marks[qwen.encode("a")[0]]
    assert not marks[len(qwen) :].any()


@pytest.mark.parametrize("path", ["/nonexistent/model", "no-such-owner/no-such-model"])
def test_a_missing_tokenizer_is_one_clear_line(path):
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_without_a_way_to_the_hub_one_line_comes_at_once(tmp_path: Path) -> None:
    """Nothing listens at the address: no retries, and the cache is asked."""
    program = (
        "import time; from echorl_jax.data import load_tokenizer\n"
        "from echorl_jax.models import load_model\n"
        "import transformers; start = time.monotonic()\n"
        "for load in (load_tokenizer, load_model):\n"
        "    try: load('owner/name')\n"
        "    except ValueError as error: print(type(error).__name__, '\\n' in str(error))\n"
        "print(time.monotonic() - start < 8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.stdout.split("\n")[:3] == ["DataError False", "ModelError False", "True"], done
    assert "Retrying" not in done.stderr
