"""Graders by name and with other libraries' signatures."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hostile_graders import obey

from echorl_jax.config import ConfigError
from echorl_jax.rewards import Verdict, grading_failed, judge, load_grader
from echorl_jax.rewards.loading import as_verdict

ROW = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "reward_model": {"ground_truth": "2"},
    "extra_info": {},
    "level": "easy",
}


def test_a_users_function_is_found_by_its_path():
    verdict = load_grader("hostile_graders:obey")("fine", {"number": 3})
    assert verdict == Verdict(0.5, True, "fine 3")


def test_a_verl_function_gets_verl_arguments():
    grader = load_grader("hostile_graders:verl_score")
    assert grader("2", ROW) == Verdict(2.0, True, "scored 2")
    assert grader("3", ROW) == Verdict(-1.0, False, "scored -1")


@pytest.mark.parametrize("info", [{}, {"prompt_format": "text"}])
def test_a_trl_function_gets_trl_arguments(info):
    grader = load_grader("hostile_graders:trl_reward")
    assert grader("2", {**ROW, "extra_info": info}).correct
    assert not grader("3", {**ROW, "extra_info": info}).correct
    assert not grader("2", {**ROW, "extra_info": info, "level": "hard"}).correct


@pytest.mark.parametrize(("name", "response"), [("trl_none", "2"), ("obey", "none")])
def test_none_is_no_verdict(name, response):
    verdict = judge(load_grader(f"hostile_graders:{name}"), response, ROW)
    assert verdict == Verdict(None, None, "not judged") and not verdict.judged
    assert not grading_failed(verdict.reason)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdwn", "did you mean countdown?"),
        ("no_such_module:grade", "cannot import no_such_module"),
        ("leaves_at_import:grade", "cannot import leaves_at_import: SystemExit"),
        ("hostile_graders:missing", "hostile_graders has no missing"),
        ("hostile_graders:NOT_A_FUNCTION", "not a function"),
        ("hostile_graders:wrong_signature", r"expected a function of \(response, row\)"),
        ("hostile_graders:trl_async", "async functions are not supported"),
        ("hostile_graders:", "or package.module:function"),
    ],
)
def test_a_grader_that_cannot_be_used_is_one_clear_line(name, message, tmp_path, monkeypatch):
    (tmp_path / "leaves_at_import.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_grader(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (True, Verdict(1.0, True, "scored 1")),
        (0, Verdict(0.0, False, "scored 0")),
        (0.9, Verdict(0.9, False, "scored 0.9")),
        ({"score": 0.5, "acc": True}, Verdict(0.5, True, "scored 0.5")),
        (Verdict(1, True, "a\nb"), Verdict(1.0, True, "a b")),
        (None, Verdict(None, None, "not judged")),
        ({"score": None, "acc": False}, Verdict(None, None, "not judged")),
        (Verdict(None, False, "no unit tests"), Verdict(None, None, "no unit tests")),
    ],
)
def test_results_become_verdicts(result, verdict):
    assert as_verdict(result) == verdict


class Sized(dict):
    """A mapping of a million entries that takes no memory."""

    def __len__(self):
        return 10**6

    def items(self):
        return ((f"metric_{i}", i) for i in itertools.count())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"steps": 3, "on_time": True}, {"steps": 3.0, "on_time": 1.0}),
        ({"share": np.float32(0.5), "count": np.array(7)}, {"share": 0.5, "count": 7.0}),
        ({}, {}),
        ({"a": float("nan"), "b": float("-inf"), "c": 1}, {"c": 1.0, "dropped_metrics": 2.0}),
        ({"a": "0.5", "b": None, "c": [1.0]}, {"dropped_metrics": 3.0}),
        ({"a": 10**400, "b": np.ones(2)}, {"dropped_metrics": 2.0}),
        ({1: 2.0, "": 2.0, "two words": 2.0, "a/b": 2.0, "x" * 41: 2.0}, {"dropped_metrics": 5.0}),
        ("steps", {"dropped_metrics": 1.0}),
        (None, {"dropped_metrics": 1.0}),
        (Sized(), {**{f"metric_{i}": i for i in range(16)}, "dropped_metrics": 10**6 - 16}),
    ],
)
def test_metrics_that_are_no_finite_numbers_are_dropped_and_counted(given, kept):
    """The score and the verdict stay as they are."""
    for result in (
        Verdict(0.5, True, "fine", given),
        {"score": 0.5, "acc": True, "metrics": given},
    ):
        verdict = as_verdict(result)
        assert (verdict.score, verdict.correct, verdict.metrics) == (0.5, True, kept)
        assert as_verdict(verdict) == verdict  # nothing is counted twice


def test_an_unjudged_response_keeps_its_metrics():
    assert as_verdict({"score": None, "metrics": {"words": 9}}).metrics == {"words": 9.0}


@pytest.mark.parametrize("result", ["1.0", [1.0], {"acc": True}, float("inf")])
def test_other_results_are_errors(result):
    with pytest.raises((TypeError, ValueError)):
        as_verdict(result)


@pytest.mark.parametrize("response", ["raise", "recurse", "exit", "nan", "text"])
def test_whatever_a_grader_raises_is_a_verdict(response):
    verdict = judge(obey, response, {})
    assert not verdict.correct and verdict.score == 0.0
    assert verdict.reason.startswith("the grader raised ")
    assert len(verdict.reason) <= 200 and verdict.reason.isprintable()


def test_an_interrupt_is_not_caught():
    def interrupted(response, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(interrupted, "", {})


def test_graders_start_without_jax():
    code = "import sys, echorl_jax.rewards.grading_process; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
