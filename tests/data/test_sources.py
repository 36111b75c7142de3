"""Files of rows, good and damaged."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax.data import DataError, encode_rows, expert_text, load_rows, load_tokenizer
from echorl_jax.data.rows import BadRow, normalise_row

SHARED = Path(__file__).parents[3] / "shared" / "data"
BUGS = SHARED.parent / "bugs"


def verl_row(**changes):
    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 7},
    }
    return {**row, **changes}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_verl_rows_are_read_as_they_are(write, name):
    expert = [{"role": "assistant", "content": "2"}]
    (row,) = load_rows(write([verl_row(target=expert)], name))
    assert row == verl_row(target=expert)


def test_plain_rows_get_verl_columns(write):
    (row,) = load_rows(write([{"problem": "1+1?", "answer": 2, "level": "easy"}], "sums.jsonl"))
    assert row["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert row["reward_model"] == {"style": "rule", "ground_truth": "2"}
    assert row["data_source"] == "sums" and row["level"] == "easy" and row["extra_info"] == {}


def test_trl_rows_keep_their_columns(write):
    (row,) = load_rows(write([{"prompt": "1+1?", "ground_truth": "2", "hard": False}]))
    assert row["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert row["reward_model"]["ground_truth"] == "2" and row["hard"] is False
    assert row["extra_info"] == {"prompt_format": "text"}


def test_choices_are_listed_under_the_question(write):
    (row,) = load_rows(write([{"question": "Which?", "options": ["a", "b"], "answer": "B"}]))
    assert row["prompt"][0]["content"] == "Which?\n\nA) a\nB) b"


def test_options_may_have_labels_or_be_empty(write):
    rows = [
        {"question": "Which?", "options": {"a": "3", "b": "4"}, "answer": "b"},
        {"question": "2+2?", "options": [], "answer": "four"},
        verl_row(options="", reward_model={"ground_truth": "4"}),
        verl_row(options={"A": "3", "B": "4", "C": None}, reward_model={"ground_truth": "B"}),
    ]
    first, second, *_ = load_rows(write(rows))
    assert first["prompt"][0]["content"] == "Which?\n\nA) 3\nB) 4"
    assert second["prompt"][0]["content"] == "2+2?"


def test_a_target_that_is_a_number_is_no_expert(write):
    (row,) = load_rows(write([verl_row(target=98)]))
    assert "target" not in row


COUNTDOWN = {"ground_truth": {"numbers": [1, 2], "target": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "column prompt: missing, and there is no column problem or question"),
        ({"prompt": []}, "column prompt: expected a list of messages, found a list"),
        ({"prompt": [{"role": "user"}]}, "column prompt: expected messages with role and content"),
        ({"prompt": [{"role": "user", "content": 3}]}, "column prompt: a message's role and"),
        ({"prompt": "  "}, "column prompt: empty"),
        ({"prompt": "x \ud800"}, "column prompt: half of a surrogate pair"),
        ({"options": {"A": 3}, "reward_model": {"ground_truth": "B"}}, "column answer: 'B', but"),
        ({"options": 5, "reward_model": {"ground_truth": "A"}}, "column options: expected a list"),
        ({"reward_model": None}, "column reward_model: missing"),
        ({"reward_model": "2"}, "column reward_model: expected an object, found text"),
        ({"reward_model": {}}, "column reward_model.ground_truth: empty"),
        ({"reward_model": {"ground_truth": " "}}, "column reward_model.ground_truth: empty"),
        ({"data_source": 3}, "column data_source: expected text, found a number"),
        ({"extra_info": [1]}, "column extra_info: expected an object, found a list"),
        ({"target": [{"role": "assistant"}]}, "column target: expected messages"),
        ({"images": ["x"]}, "column images: picture 1 cannot be read"),
        ({"image": {"bytes": None, "path": "1.png"}}, "column images: picture 1 cannot be read"),
        ({"multi_modal_data": {"image": [{"a": 1}]}}, "column multi_modal_data: only pictures in"),
        ({"video": "clip.mp4"}, "column video: only pictures in columns images and image are"),
        ({"prompt": "[{'role': 'user', 'content': 'x'}]"}, "column prompt: text that begins as"),
        ({"prompt": '[{"role": "user"}]'}, "column prompt: expected messages with role"),
        ({"prompt": '[{"role": "user", "content": 3}]'}, "column prompt: a message's role and"),
        ({"target": '{"role": "assistant"}'}, "column target: expected messages"),
        ({"solution": "x \ud800"}, "column solution: half of a surrogate pair"),
        ({"data_source": "x \ud800"}, "column data_source: half of a surrogate pair"),
        ({"reward_model": {"ground_truth": "\ud800"}}, "column reward_model.ground_truth: half of"),
        ({"hint": 3}, "column hint: expected a list of texts, found a number"),
        ({"hint": ["a", 3]}, "column hint: expected text, found a number"),
        ({"data_source": "countdown"}, "column reward_model.ground_truth: expected numbers"),
        (
            {"data_source": "countdown", "reward_model": {"ground_truth": {"target": 3}}},
            "column reward_model.ground_truth.numbers: no list of whole numbers",
        ),
        (
            {"data_source": "countdown", "reward_model": {"ground_truth": {"numbers": [1, 2]}}},
            "column reward_model.ground_truth.target: no whole number",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(write, changes, message):
    path = write([verl_row(), verl_row(**changes)])
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2, {message}")
    assert "\n" not in str(caught.value)
    rows = load_rows(path, on_bad_row="skip")
    assert len(rows) == 1 and rows.bad == (str(caught.value),)


def test_media_columns_that_hold_nothing_are_ignored(write):
    nothing = {"images": [None], "image": None, "multi_modal_data": {"image": [], "video": ""}}
    assert len(load_rows(write([verl_row(**nothing)]))) == 1


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Is "[1]" a list?'},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_json_text_of_messages_is_read_as_messages(write, name):
    expert = [{"role": "assistant", "content": "Yes"}]
    row = verl_row(prompt=json.dumps(MESSAGES, indent=1), target=json.dumps(expert))
    (read,) = load_rows(write([row], name))
    assert read["prompt"] == MESSAGES and expert_text(read) == "Yes"
    assert "prompt_format" not in read["extra_info"]
    (single,) = load_rows(write([verl_row(prompt=json.dumps(MESSAGES[1]))], name))
    assert single["prompt"] == [MESSAGES[1]]


@pytest.mark.parametrize("text", ["[1, 2, 3]", '{"a": 1}', "[10 points] Find x.", "{x} = 2?", "[]"])
def test_other_text_in_brackets_stays_text(write, text):
    (row,) = load_rows(write([verl_row(prompt=text)]))
    assert row["prompt"] == [{"role": "user", "content": text}]
    assert row["extra_info"]["prompt_format"] == "text"


# Latin-1 for "cafe" with an accent, and UTF-8 for the same word.
LATIN, UTF = b"caf\xe9 1+1?", "caf\u00e9 1+1?".encode()


def raw_text(*values):
    """A column that says it is UTF-8, whatever the bytes are."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def chat_column(texts):
    roles = pa.array(["user"] * len(texts))
    messages = pa.StructArray.from_arrays([roles, texts], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), messages)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("problem", raw_text(UTF, LATIN, UTF)),
        ("problem", pa.array([UTF, LATIN, UTF], pa.binary())),
        ("prompt", chat_column(raw_text(UTF, LATIN, UTF))),
        ("prompt", chat_column(pa.array([UTF, LATIN, UTF], pa.binary()))),
    ],
)
def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path, column, values):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({column: values, "answer": ["1", "2", "3"]}), path)
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert str(caught.value) == f"{path}, row 1, column {column}: not UTF-8 text"
    rows = load_rows(str(path), on_bad_row="skip")
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["1", "3"]
    assert rows[1]["prompt"][0]["content"] == UTF.decode()


def test_unused_columns_may_be_of_any_type(tmp_path):
    """Values that Python cannot hold, such as the year 14,645, do not make a row bad."""
    far = pa.array([400_000_000_000], pa.timestamp("s"))
    columns = {
        "far": far,
        "nested": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), far),
        "zone": pa.array([1], pa.timestamp("ms", tz="Nowhere/Else")),
        "long": pa.array([2**62], pa.duration("s")),
        "nanoseconds": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
        "latin": raw_text(LATIN),
        "picture": pa.array([b"\x89PNG\xff"]),
        "pairs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "enum": pa.array(["x"]).dictionary_encode(),
        "half": pa.array([1.5], pa.float16()),
        "empty": pa.nulls(1),
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": ["1+1?"], "answer": ["2"], **columns}), path)
    (row,) = load_rows(str(path))
    assert row["prompt"][0]["content"] == "1+1?" and row["far"].startswith("14645-06-30")
    assert row["nested"] == [row["far"]] and row["latin"] == LATIN and row["half"] == 1.5


WORDS = """
prompt role content problem question options answer ground_truth reward_model solution target
numbers hint data_source extra_info image images
""".split()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), json_values, max_size=6), st.booleans())
def test_any_row_is_read_or_bad(changes, plain):
    base = {"problem": "1+1?", "answer": "2"} if plain else verl_row()
    with contextlib.suppress(BadRow):
        row = normalise_row({**base, **changes}, source="any")
        assert all(isinstance(message["content"], str) for message in row["prompt"])
        assert isinstance(expert_text(row), str | None)


@pytest.mark.slow
def test_a_row_group_over_2_gib_of_nested_text_is_read(tmp_path):
    path, mib = tmp_path / "rows.parquet", 1 << 20
    part = pa.table(
        {"prompt": chat_column(pa.array(["x" * (9 * mib)] * 128)), "answer": ["2"] * 128}
    )
    table = pa.concat_tables([part, part])
    pq.write_table(table, path, row_group_size=256, compression="zstd", use_dictionary=False)
    del part, table
    assert pq.ParquetFile(path).num_row_groups == 1
    assert len(load_rows(str(path))) == 256


@pytest.mark.skipif(not BUGS.is_dir(), reason="no reported files beside the repository")
def test_reported_files_are_read_or_refused(tmp_path):
    command = [sys.executable, str(BUGS / "rows.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    read = [line.split()[1] for line in done.stdout.splitlines() if " rows, prompt " in line]
    chats, bytes_and_types = ["json_prompt", "json_prompt_verl"], ["nanoseconds", "bom"]
    assert read == [*chats, "latin1_bytes_skipped", *bytes_and_types], done.stdout


UNMATCHABLE = [
    float("nan"),
    float("inf"),
    [],
    [None],
    [None, ""],
    [["4"]],
    [{"a": "4"}],
    "  ",
    "$$",
]
UNMATCHABLE += [
    "...",
    r"\boxed{}",
    "Proof.",
    r"\text{proof}",
    "NotFound",
    "not found",
    "NaN",
    "null",
]
UNMATCHABLE += [
    "N/A",
    {"answer": "4"},
    {},
    {"target": " "},
    {"target": "PROOF"},
    {"numbers": [1, 2]},
]


@pytest.mark.parametrize("gold", UNMATCHABLE, ids=repr)
def test_a_gold_that_no_response_can_match_is_a_bad_row(write, gold):
    path = write([verl_row(), verl_row(reward_model={"ground_truth": gold})])
    with pytest.raises(DataError, match=r"line 2, column reward_model.ground_truth"):
        load_rows(path)
    assert len(load_rows(path, on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    ("gold", "kept"),
    [
        (4, "4"),
        (0.00001, "1e-05"),
        (["4", None, 5], ["4", "5"]),
        (r"\{\}", r"\{\}"),
        (">", ">"),
        ("None", "None"),
        (r"\text{proof by cases}", r"\text{proof by cases}"),
        ({"target": "4", "numbers": None}, {"target": "4"}),
        ({"target": 6, "numbers": [2, 3]}, {"target": 6, "numbers": [2, 3]}),
    ],
    ids=repr,
)
def test_golds_that_can_be_matched_are_kept(write, gold, kept):
    (row,) = load_rows(write([verl_row(reward_model={"ground_truth": gold})]))
    assert row["reward_model"]["ground_truth"] == kept


def test_a_bad_parquet_row_is_named_by_its_place_from_0(write):
    rows = [verl_row(), verl_row(), verl_row(reward_model=None), verl_row(data_source="last")]
    path = write(rows, "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet, row 2, column reward_model"):
        load_rows(path)
    kept = load_rows(path, on_bad_row="skip")
    assert [row["data_source"] for row in kept] == ["sums", "sums", "last"]
    assert len(kept.bad) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "line 2: not JSON: Expecting property name"),
        (b'"text"', "line 2: expected an object, found str"),
        (b"\xff\xfe", "line 2: not UTF-8 text"),
        (b"[" * 100_000, "line 2: not JSON: nested too deeply"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = Path(write([verl_row()]))
    path.write_bytes(path.read_bytes() + line + b"\n\n" + json.dumps(verl_row()).encode())
    with pytest.raises(DataError, match=message):
        load_rows(str(path))
    assert len(load_rows(str(path), on_bad_row="skip")) == 2


def test_a_truncated_parquet_is_one_clear_line(write):
    path = Path(write([verl_row()] * 50, "rows.parquet"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert str(caught.value).startswith(f"{path}: not a readable parquet file: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(write):
    path = write([verl_row()], "train.jsonl")
    with pytest.raises(DataError, match=r"trian.jsonl: no such file; did you mean .*train.jsonl"):
        load_rows(path.replace("train", "trian"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "a name is empty"),
        ("countdown:,", "a name is empty"),
        ("countdown:@2,countdown:seed=2", "give every source a weight"),
        ("countdown:@0,countdown:seed=2@1", "give every source a weight"),
        ("/nonexistent/rows.jsonl", "nor the folder /nonexistent"),
        (__file__, "unknown kind of file"),
    ],
)
def test_a_wrong_spec_is_one_clear_line(spec, message):
    with pytest.raises(DataError, match=message):
        load_rows(spec)


def test_an_empty_file_is_an_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load_rows(str(path))


def test_a_file_of_bad_rows_only_is_an_error_even_when_skipping(write):
    with pytest.raises(DataError, match="line 1, column prompt"):
        load_rows(write([verl_row(prompt=None)]), on_bad_row="skip")


def test_sources_stand_end_to_end(write):
    path = write([verl_row(), verl_row(data_source="second")])
    rows = load_rows(f"{path}, countdown:count=3&seed=4")
    assert len(rows) == 5 and rows.starts == (0, 2, 5)
    assert [row["data_source"] for row in rows] == ["sums", "second", *["countdown"] * 3]
    assert rows[-1] == rows[4] and rows[1:3] == [rows[1], rows[2]]


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("level=2-3", [2, 3, 2]),
        ("level=3", [3]),
        ("limit=2", [1, 2]),
        ("level=2-5&limit=2", [2, 3]),
        ("source=b", [3, 2]),
        ("source=a|b&level=1", [1]),
    ],
)
def test_filters(write, query, kept):
    levels = zip([1, 2, 3, 2], "aabb", strict=True)
    rows = [verl_row(level=f"Level {level}", data_source=name) for level, name in levels]
    for name in ("rows.jsonl", "rows.parquet"):
        found = load_rows(f"{write(rows, name)}?{query}")
        assert [int(row["level"][-1]) for row in found] == kept


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("levels=3", "unknown option 'levels'; one of level, source, limit"),
        ("limit=few", "limit='few': must be a whole number"),
        ("level=3-", "level='3-': must be LOW-HIGH"),
        ("level=3-4-5", "level='3-4-5': must be LOW-HIGH"),
        ("level=1", "a row has no number there"),
        ("source=other", "no row is left by its filters"),
    ],
)
def test_a_wrong_filter_is_one_clear_line(write, query, message):
    with pytest.raises(DataError, match=message):
        load_rows(f"{write([verl_row()])}?{query}")


def test_plain_countdown_rows(write):
    row = {"question": "Reach 3 with 1, 2.", "numbers": [1, 2], "target": 3, "solution": "2+1=3"}
    (read,) = load_rows(write([row]))
    assert read["data_source"] == "countdown" and "target" not in read
    assert read["reward_model"]["ground_truth"] == {"numbers": [1, 2], "target": 3}


def test_weights_become_shares():
    assert load_rows("countdown:seed=1@3,countdown:seed=2@1").weights == (0.75, 0.25)
    assert load_rows("countdown:seed=1,countdown:seed=2").weights is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files beside the repository")
@pytest.mark.parametrize(
    ("name", "count", "source", "expert"),
    [
        ("uft_countdown_train.parquet", 10_240, "countdown", False),
        ("uft_countdown_test_512.parquet", 512, "countdown", False),
        ("uft_math_700.parquet", 700, "DigitalLearningGmbH/MATH-lighteval", False),
        ("luffy_train_expert.parquet", 473, "gsm8k", True),
        ("luffy_eval_aime24_aime25_amc_math500.parquet", 643, "math", False),
        ("luffy_eval_arc_c_600.parquet", 600, "arc_c", False),
        ("mmlu_pro_600.parquet", 600, "mmlu_pro_600", False),
        ("math_train_1000.jsonl", 1000, "math_train_1000", False),
        ("gsm8k_test.jsonl", 1319, "gsm8k_test", False),
    ],
)
def test_public_files_are_read_as_they_are(name, count, source, expert):
    rows = load_rows(str(SHARED / name))
    assert len(rows) == count and not rows.bad
    assert rows[0]["data_source"] == source
    assert ("target" in rows[0]) == expert
    assert rows[-1]["prompt"][-1]["content"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files beside the repository")
def test_a_model_without_a_vision_tower_refuses_pictures():
    rows, tokenizer = (
        load_rows(str(SHARED / "geometry3k_6.parquet")),
        load_tokenizer("builtin:countdown"),
    )
    with pytest.raises(DataError, match="train, row 0, column images: pictures, but the model has"):
        encode_rows(tokenizer, rows, source="train")
