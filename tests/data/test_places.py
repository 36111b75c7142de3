"""Rows from folders, patterns, JSON lists and compressed files."""

import gzip
import json
from pathlib import Path

import pytest

from echorl_jax.data import DataError, load_rows

ROWS = [{"problem": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(6)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(spec: str) -> list[str]:
    return [row["reward_model"]["ground_truth"] for row in load_rows(spec)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six rows in four kinds of files."""
    place = tmp_path / "sums"
    (place / "deep").mkdir(parents=True)
    (place / "a.jsonl").write_text(lines(ROWS[:2]))
    (place / "b.json").write_text(json.dumps(ROWS[2:4], indent=1))
    (place / "c.json").write_text(lines(ROWS[4:5]))
    (place / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[5:]).encode()))
    (place / "notes.md").write_text("not rows")
    return place


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", "123456"),
        ("/*.json*", "12345"),
        ("/b.json", "34"),
        ("/c.json", "5"),
        ("/deep/d.jsonl.gz", "6"),
        ("/**/*.gz", "6"),
        ("/*.json?limit=3", "345"),
    ],
)
def test_each_kind_of_place_gives_its_rows(folder: Path, pattern: str, expected: str) -> None:
    assert "".join(answers(f"{folder}{pattern}")) == expected


def test_rows_of_several_files_are_of_the_folders_name(folder: Path) -> None:
    assert {row["data_source"] for row in load_rows(str(folder))} == {"sums"}
    assert {row["data_source"] for row in load_rows(f"{folder}/*.json")} == {"sums"}
    assert {row["data_source"] for row in load_rows(f"{folder}/deep/d.jsonl.gz")} == {"d"}


def test_several_files_have_one_weight_and_one_digest(folder: Path) -> None:
    rows = load_rows(f"{folder}/*.json@0.8,{folder}/a.jsonl@0.2")
    assert [len(part) for part in rows.parts] == [3, 2] and rows.weights == (0.8, 0.2)
    before = load_rows(str(folder)).digest
    (folder / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[4:5]).encode()))
    assert load_rows(str(folder)).digest != before


def test_a_bad_row_among_several_files_is_named_by_its_file(folder: Path) -> None:
    (folder / "b.json").write_text(json.dumps([ROWS[2], {"answer": "4"}]))
    with pytest.raises(DataError, match=rf"^{folder}/b.json, row 1, "):
        load_rows(str(folder))
    assert "".join(answers(f"{folder}/a.jsonl")) == "12"
    rows = load_rows(str(folder), on_bad_row="skip")
    assert len(rows) == 5 and len(rows.bad) == 1


def test_files_that_cannot_be_rows_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "torn.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-9])
    with pytest.raises(DataError, match=r"torn.jsonl.gz: not a whole gzip file"):
        load_rows(f"{folder}/torn.jsonl.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: a folder without files of rows"):
        load_rows(f"{tmp_path}/empty")
    with pytest.raises(DataError, match=r"\*.parquet: no such file"):
        load_rows(f"{folder}/*.parquet")
