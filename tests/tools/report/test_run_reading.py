"""Reading a working directory in every state that a run can leave it in."""

import json
import os

import pytest
from synthetic_run import dump_lines, write_run

from echorl_jax.config import ConfigError
from echorl_jax.files import finite, read_jsonl, write_jsonl
from echorl_jax.tools.report.runs import read_run, read_runs


def test_a_complete_run_is_read_in_order_of_steps(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=12, samples_every=5))
    assert [row["step"] for row in run.metrics] == list(range(12))
    steps, values = run.series("eval/countdown/pass@1")
    assert steps == [0, 10, 11] and len(values) == 3
    assert [step for step, _ in run.sample_files()] == [0, 5, 10, 11]
    assert run.config["optim"]["learning_rate"] == 1e-4
    assert run.notes == ()


def test_an_empty_directory_is_a_run_without_steps(tmp_path):
    run = read_run(tmp_path)
    assert (run.metrics, run.config, run.environment, run.notes) == ((), {}, {}, ())
    assert run.sample_files() == [] and run.keys() == []


def test_a_missing_directory_is_a_one_line_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: not a directory") as caught:
        read_run(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_unreadable_lines_are_left_out_and_counted(tmp_path):
    lines = ['{"step": 0, "reward/mean": 0.5}', "[1, 2]", "\x00\x00", '{"step": 1, "reward/me']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert [row["step"] for row in run.metrics] == [0]
    assert run.notes == ("metrics.jsonl: 3 unreadable line(s) left out",)


def test_a_line_cut_inside_a_character_is_skipped(tmp_path):
    whole = json.dumps({"step": 0, "text": "schön"}, ensure_ascii=False).encode()
    (tmp_path / "rows.jsonl").write_bytes(whole + b"\n" + whole[:-4])
    assert [row["step"] for row in read_jsonl(tmp_path / "rows.jsonl")] == [0]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    rows = [{"step": s, "reward/mean": r} for s, r in [(0, 0.1), (1, 0.2), (2, 0.9), (2, 0.3)]]
    dump_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert run.series("reward/mean") == ([0, 1, 2], [0.1, 0.2, 0.3])
    assert "1 step(s) logged again" in run.notes[0]


def test_values_that_are_not_finite_numbers_are_not_drawn(tmp_path):
    dump_lines(
        tmp_path / "metrics.jsonl",
        [{"step": 0, "a": float("nan"), "b": float("inf"), "c": "x", "d": True, "e": None, "f": 2}],
    )
    run = read_run(tmp_path)
    assert run.keys() == ["f"]
    assert "2 value(s) were not finite" in run.notes[0]


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_config_is_noted(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    run = read_run(tmp_path)
    assert run.config == {} and run.notes == ("config.json: not a JSON object, left out",)


def test_runs_of_the_same_name_get_different_names(tmp_path):
    for name in ("a/seed0", "b/seed0"):
        (tmp_path / name).mkdir(parents=True)
    runs = read_runs(
        [tmp_path / "a/seed0", tmp_path / "b/seed0", tmp_path / "b" / ".." / "a/seed0"]
    )
    assert [run.name for run in runs] == [os.path.join("a", "seed0"), os.path.join("b", "seed0")]


def test_written_jsonl_reads_back_equal(tmp_path):
    rows = [{"a": [1, float("nan")], "b": "line\nbreak \u2028"}, {"a": {"c": float("-inf")}}]
    path = write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert list(read_jsonl(path)) == [finite(row) for row in rows]
    assert len(path.read_text().split("\n")) == 3
