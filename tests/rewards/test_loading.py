"""Graders by name and with other libraries' signatures."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile_graders import obey

from echorl_jax.config import ConfigError
from echorl_jax.rewards import GraderPool, Verdict, grading_failed, judge, load_grader
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


def test_success_is_the_graders_verdict_unless_a_score_is_asked_for():
    """One function calls 0.5 right, the other 0.9 wrong, being below 1."""
    for least, own, plain in [(None, True, False), (0.6, False, True), (1.0, False, False)]:
        grader = load_grader("hostile_graders:obey", success_threshold=least)
        assert grader("fine", {}).correct == own
        grader = load_grader("hostile_graders:nearly", success_threshold=least)
        assert grader("fine", {}).correct == plain and grader("fine", {}).score == 0.9
    assert load_grader("hostile_graders:obey", success_threshold=0.0)("none", {}).correct is None


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


def test_a_trl_function_gets_the_whole_group_with_its_tokens():
    grader = load_grader("hostile_graders:trl_shortest@0.5, hostile_graders:obey")
    row = {**ROW, "number": 1}
    verdicts = grader.judge_all(["a b", "a", "raise"], row, [[1, 2], [3], [4, 5]])
    assert grader.grouped and [v.score for v in verdicts] == [0.5, 1.0, 0.0]
    assert [v.correct for v in verdicts] == [False, True, False]
    assert verdicts[2].reason.startswith("the grader raised ValueError")
    # One response is a group of one; without tokens the function cannot be called.
    assert grader("a", row).reason.startswith("the grader raised TypeError")


def test_an_async_function_is_awaited_and_one_bad_score_costs_that_response():
    grader = load_grader("hostile_graders:trl_async")
    verdicts = grader.judge_all(["1", "nan", "2"], ROW)
    assert [v.score for v in verdicts] == [1.0, 0.0, 1.0]
    assert verdicts[1].reason == "the grader raised ValueError: the grader's score is nan"


@pytest.mark.parametrize(("name", "response"), [("trl_none", "2"), ("obey", "none")])
def test_none_is_no_verdict(name, response):
    verdict = judge(load_grader(f"hostile_graders:{name}"), response, ROW)
    assert verdict == Verdict(None, None, "not judged") and not verdict.judged
    assert not grading_failed(verdict.reason)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdwn", "did you mean countdown?"),
        ("no_such_module:grade", "grader 'no_such_module:grade': .*No module named"),
        ("leaves_at_import:grade", "cannot import leaves_at_import: SystemExit"),
        ("hostile_graders:missing", "hostile_graders has no missing"),
        ("hostile_graders:NOT_A_FUNCTION", "not a function"),
        ("hostile_graders:wrong_signature", r"expected a function of \(response, row\)"),
        ("hostile_graders:", "must be package.module:function or FILE.py:function"),
        ("hostile_graders", "package.module:function or FILE.py:function"),
        ("no_such_file.py:grade", "grader 'no_such_file.py:grade': .*No such file"),
        ("math@much", "'math@much' is not GRADER or GRADER@WEIGHT"),
        ("math@nan", "with a finite weight"),
        ("math,,choice", "'' is not GRADER"),
        ("math, math@2", "two entries are the same"),
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


RULES = """
from helper import MARK

def answer(response, row):
    if "crash" in response:
        raise KeyError("no answer")
    if "?" in response:
        return None
    return {"score": float("4" in response), "metrics": {"digits": sum(map(str.isdigit, response))}}

def form(data_source, solution_str, ground_truth, mark=MARK):
    return 0.5 if mark in solution_str else 0.0

def short(completions, limit, **columns):
    return [None if not c[0]["content"] else len(c[0]["content"]) <= limit for c in completions]
"""


@pytest.fixture
def rules(tmp_path):
    """The path of a file of graders; a module beside it is found too."""
    (tmp_path / "helper.py").write_text("MARK = '#'\n")
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path / "rules.py"


@pytest.mark.parametrize(
    ("response", "score", "correct"),
    [
        ("# 4", 0.9 * 1 + 0.2 * 0.5, True),
        ("4", 0.9, True),
        ("#", 0.1, False),  # a reward, but no success
        ("#?", None, None),  # the deciding function does not judge it
    ],
)
def test_a_list_of_graders_gives_the_weighted_sum_and_the_first_ones_verdict(
    rules, response, score, correct
):
    grader = load_grader(f"{rules}:answer@0.9, {rules}:form@0.2")
    verdict = grader(response, ROW)
    assert verdict.score == pytest.approx(score) and verdict.correct == correct
    own = {"form": 0.5 if "#" in response else 0.0}
    if correct is not None:
        own |= {"answer": float("4" in response), "digits": float("4" in response)}
    assert verdict.metrics == own


def test_a_verdict_tells_the_answer_in_one_spelling():
    row = {"reward_model": {"ground_truth": "\\frac{1}{2}"}, "prompt": [], "data_source": ""}
    said = [load_grader("math")(text, row).answer for text in (r"\boxed{3 x}", r"\boxed{3x}", "no")]
    assert said[0] == said[1] is not None and said[2] is None
    choices = {"reward_model": {"ground_truth": "B"}, "options": ["four", "five"]}
    assert load_grader("choice@2, countdown@0")("x", {}).answer is None
    assert [load_grader("choice")(t, choices).answer for t in ("(A)", "A or B")] == ["A", None]
    with GraderPool("math", workers=1) as pool:  # through a process
        assert pool.grade([r"\boxed{3 x}"], [row])[0].answer == said[0]


def test_a_star_marks_the_grader_that_decides(rules):
    grader = load_grader(f"{rules}:form@0.2, *{rules}:answer")
    assert grader("# 4", ROW).correct and not grader("# 5", ROW).correct
    assert grader("# 4", ROW).reason == "form: scored 0.5; answer: scored 1"
    # Of several marked ones it is the first that judges the response.
    grader = load_grader(f"*{rules}:answer, *{rules}:form@0.2", success_threshold=0.5)
    assert [grader(text, ROW).correct for text in ("4", "#", "#?", "?")] == [
        True,
        False,
        True,
        False,
    ]


def test_a_threshold_is_for_the_unweighted_score_of_the_grader_that_decides(rules):
    spec = f"{rules}:form@10, {rules}:answer"
    assert not load_grader(spec)("#", ROW).correct
    assert load_grader(spec, success_threshold=0.5)("#", ROW).correct
    assert not load_grader(spec, success_threshold=0.6)("#", ROW).correct


def test_a_list_fails_where_one_of_it_fails(rules):
    verdict = load_grader(f"{rules}:form, {rules}:answer")("# crash", ROW)
    assert verdict == Verdict(0.0, False, "the grader raised KeyError: 'no answer'")


def test_a_sum_that_overflows_is_a_failure(rules):
    verdict = load_grader(f"{rules}:form@1e308, {rules}:answer@1.7e308")("# 4", ROW)
    assert grading_failed(verdict.reason) and verdict.score == 0


def test_arguments_reach_the_functions_that_take_them(rules):
    spec = f"{rules}:answer, {rules}:form, {rules}:short"
    with pytest.raises(ConfigError, match="no function takes the argument 'width'"):
        load_grader(f"{rules}:answer", kwargs={"width": 1})
    grader = load_grader(spec, kwargs={"mark": "!", "limit": 3})
    assert grader("4!", ROW).metrics == {"answer": 1.0, "form": 0.5, "short": 1.0, "digits": 1.0}
    assert grader("4 # 4", ROW).metrics == {"answer": 1.0, "form": 0, "short": 0, "digits": 2.0}
    assert "short" not in grader("", ROW).metrics  # None adds nothing


def test_functions_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"def score(response, row): return {ord(name)}\n")
    spec = f"{tmp_path / 'a.py'}:score, {tmp_path / 'b.py'}:score@-1"
    verdict = load_grader(spec)("", ROW)
    assert verdict.score == -1.0 and sorted(verdict.metrics.values()) == [97.0, 98.0]
    first, second = sorted(verdict.metrics)
    assert first.endswith("a.score") and second.endswith("b.score")


def test_files_in_the_current_folder_are_graders_of_the_program(rules):
    """Through the program and a grading process, as a user starts them."""
    lines = rules.parent / "lines.jsonl"
    lines.write_text('{"response": "# 4", "answer": "4"}\n{"response": "#", "answer": "4"}\n')
    run = subprocess.run(
        [sys.executable, "-m", "echorl_jax", "grade", "lines.jsonl", "--workers=1"]
        + ["--grader=rules.py:answer@0.9, rules:form@0.2", '--grader_kwargs={"mark": "#"}'],
        cwd=rules.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    verdicts = [json.loads(line) for line in run.stdout.splitlines()[:2]]
    assert [(v["score"], v["correct"]) for v in verdicts] == [(1.0, True), (0.1, False)], run.stderr


def test_graders_start_without_jax():
    code = "import sys, echorl_jax.rewards.grading_process; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
