"""Tests answers that were once judged wrongly, if the files of reported faults exist."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echorl_jax.rewards import load_grader
from echorl_jax.rewards.loading import judge

BUGS = Path(__file__).parents[3] / "shared" / "bugs"
needs_files = pytest.mark.skipif(not BUGS.is_dir(), reason="no files of reported faults")


def read(name):
    path = BUGS / name
    return [*map(json.loads, path.read_text("utf-8").splitlines())] if path.is_file() else []


@needs_files
@pytest.mark.parametrize(
    "trap", read("grader_traps.jsonl"), ids=lambda t: f"{t['kind']}: {t['response']!a}"[:60]
)
def test_a_reported_trap_has_the_right_verdict(trap):
    grader = load_grader(trap["grader"])
    assert judge(grader, trap["response"], trap["row"]).correct == trap["expected"]


@needs_files
@pytest.mark.parametrize(
    "line", read("math_answers.jsonl"), ids=lambda t: f"{t['response']!a} for {t['answer']!a}"[:60]
)
def test_a_reported_answer_has_the_right_verdict(line):
    row = {"prompt": [], "reward_model": {"ground_truth": line["answer"]}}
    assert judge(load_grader("math"), line["response"], row).correct == line["expected"]


# Constants of physics and astronomy as data sets of such problems write them.
E_NOTATION = ["6.626e-34", "2.998e8", "1.989E30", "-1.602e-19", "5e-5", "3e13", "7.35e+22", "4e0"]
E_NOTATION += ["1.2e-3", "8.85e-12", "9.11e-31", "1e100", "2.5e1", "1e-05", "-4.0e2"]


@needs_files
def test_golds_in_e_notation_have_all_their_spellings(tmp_path):
    rows = [{"problem": "How much?", "answer": gold} for gold in E_NOTATION]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "physics.parquet")
    command = [sys.executable, str(BUGS / "enotation_golds.py"), str(tmp_path / "physics.parquet")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    counts = json.loads(printed.stdout.replace("'", '"'))
    assert counts["golds"] == len(E_NOTATION)
    for spelling in ("latex", "plain", "same"):
        assert counts[f"{spelling} accepted"] == counts[f"{spelling} tried"] > 0
    assert counts["ten times too large accepted"] == 0
