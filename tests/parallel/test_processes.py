"""Two real JAX processes do the host work of one, and get what one would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.several import Run

PROGRAM = str(Path(__file__).with_name("joined.py"))
RUN_IT = "import runpy, sys; sys.argv[0] = sys.argv.pop(1);"
RUN_IT += "runpy.run_path(sys.argv[0], run_name='__main__')"
LIMITS = {"start_timeout_s": 120.0, "lost_after_s": 30.0}


def devices(count: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone") / "found.json"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **path, **devices(4)}
    subprocess.run([sys.executable, PROGRAM, str(out)], check=True, env=environment, timeout=120)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory, run = tmp_path_factory.mktemp("pair"), Run()
    for process in (0, 1):
        out = str(directory / f"{process}.json")
        run.start(process, RUN_IT, PROGRAM, out, limits=LIMITS, environment=devices(2))
    assert [code for code, _ in run.ends(within_s=180)] == [0, 0]
    return [json.loads((directory / f"{process}.json").read_text()) for process in (0, 1)]


def test_what_is_exchanged(alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    assert [found["exchanges"]["share"] for found in pair] == [[0, 3], [3, 5]]
    assert [found["exchanges"]["first"] for found in pair] == [True, False]
    for found in (found["exchanges"] for found in pair):
        assert found["rows"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert found["texts"] == ["", "a", "ßß", "dddd", "e"]
        assert found["any"] == [True, False]
        assert (found["from_first"], found["on_first"]) == (10, 20)
        assert found["refused"] == "process 0: no such place"
        assert found["differ"] == "process 1 has other weights than process 0"
        # 0 + 1 + 4 + ... + 49, and 3 on top, over the devices of both.
        assert found["total"] == 143.0 and found["on"] == [0, 1]
    assert alone["exchanges"]["total"] == 143.0 and alone["exchanges"]["share"] == [0, 5]


def test_the_order_of_prompts_is_that_of_one(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    for found in pair:
        for name in ("ids", "index", "truth", "too_long", "state"):
            assert found["stream"][name] == alone["stream"][name], name
    # The bound on lengths bites, and yet each process has read about half of the rows.
    assert alone["stream"]["too_long"] > 0
    read = [set(found["stream"]["read"]) for found in pair]
    assert read[0] | read[1] == set(alone["stream"]["read"])
    drawn = len(alone["stream"]["read"])
    assert all(len(found["stream"]["read"]) < drawn for found in pair)
    assert sum(len(found["stream"]["read"]) for found in pair) == drawn


def test_each_grades_its_share_and_all_know_all(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    expected = alone["verdicts"]["verdicts"]
    assert [correct for _, correct, _ in expected] == [True, False] * 3
    assert all(found["verdicts"]["verdicts"] == expected for found in pair)
    for found in (alone, *pair):
        metrics = {f"{i}".rjust(40, "x"): -(0.1**300) / 3 for i in range(17)}
        expected = [[None, None, "not judged", {"a": 0.1}], [0.1, True, "", metrics]] * 2
        assert found["verdicts"]["unjudged"] == expected
    for found in (alone, *pair):
        assert found["verdicts"]["groups"] == [True, False, False, True, True, False]
    assert [found["verdicts"]["decoded"] for found in pair] == [
        [True] * 3 + [False] * 3,
        [False] * 3 + [True] * 3,
    ]


def test_work_that_fails_in_one_has_failed_in_all(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    closed = "PoolError: the grading pool is closed"
    for found in (found["failures"] for found in pair):
        assert found["told"] == [
            [None, f"PoolError: process 1: {closed}"],
            [None, "KeyError: 'x'"],
            [7, ""],
        ]
        assert found["after"] is True
    # Where the other one cannot be told, each ends with what it knows.
    assert [found["failures"]["raised"] for found in pair] == [
        "RuntimeError: alone: the other processes did not come to its end",
        "OSError: lost",
    ]
    assert alone["failures"]["told"] == [[None, closed], [None, "KeyError: 'x'"], [7, ""]]
    assert alone["failures"]["raised"] == "(None, 'OSError: lost')"


def test_uneven_processes_are_refused() -> None:
    run = Run()
    for process in (0, 1):
        out = devices(process + 1)
        run.start(process, RUN_IT, PROGRAM, "unused", limits=LIMITS, environment=out)
    for code, said in run.ends(within_s=120):
        assert code == 2 and "process 1 has 2 local device(s), but process 0 has 1" in said, said
