"""Countdown verdicts."""

import time
from pathlib import Path

import pytest

from echorl_jax.data import load_rows
from echorl_jax.data.countdown_rows import CountdownRows
from echorl_jax.rewards import judge, load_grader

SHARED = Path(__file__).parents[3] / "shared" / "data"
grade = load_grader("countdown")


def row(numbers, target):
    return {"reward_model": {"ground_truth": {"numbers": numbers, "target": target}}}


@pytest.mark.parametrize(
    "response",
    [
        "9*5=45\n45+7=52",
        "9 * 5 = 45\n\n45 + 7 = 52\n",
        "9×5=45\n45+7=52",
        "9*5+7=52",
        "(9*5)+7=52",
        "<think> 1+1=3 </think> 9*5=45\n45+7=52",
        "<answer> 9*5+7 </answer>",
        "<answer> 9*5+7 = 52 </answer>",
        "<answer> 1 </answer> wait <answer>(5 * 9) + 7</answer> done",
        "<answer>7--9*5</answer>",
    ],
)
def test_a_solution_is_right(response):
    verdict = grade(response, row([5, 7, 9], 52))
    assert verdict.correct and verdict.score == 1.0 and verdict.reason == "reaches 52"


def test_fractions_and_negative_results_may_occur_on_the_way():
    assert grade("7/2=3.5\n3.5*4=14", row([2, 4, 7], 14)).correct
    assert grade("5-9=-4\n-4+20=16", row([5, 9, 20], 16)).correct
    assert grade("<answer>8/(3-8/3)</answer>", row([3, 3, 8, 8], 24)).correct


def test_numbers_may_be_left_over():
    assert grade("9*5=45", row([5, 7, 9], 45)).correct


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no steps"),
        ("9*5=45", "reaches 45, not 52"),
        ("9*5=46\n46+7=53", "step 1: the result is 45, not 46"),
        ("9*5=45\n45+8=53", "step 2: 8 is not there to be used"),
        ("9*9=81", "step 1: 9 is not there to be used"),
        ("9*5=45\n9+7=16", "step 2: 9 is not there to be used"),
        ("9*5=45\n45+7=52\n52*1=52", "3 lines are more than 3 numbers allow"),
        ("52", "step 1: not of the form a + b = c"),
        ("52=52", "step 1: not of the form a + b = c"),
        ("9*5+7", "step 1: not of the form a + b = c"),
        ("I think 9*5=45", "step 1: unexpected 'I think 9*'"),
        ("9/(7-7)=1", "division by zero"),
        ("<answer> 9*5+8 </answer>", "8 is not there to be used"),
        ("<answer> 52 </answer>", "52 is not there to be used"),
        ("<answer> 5+7+9 </answer>", "reaches 21, not 52"),
        ("<answer> 9*5+7 = 53 </answer>", "the result is 52, not 53"),
        ("<answer> 9*5+7 or so </answer>", "unexpected 'or so'"),
        ("<answer></answer>", "the expression breaks off"),
        ("<answer> 9*5+7", "step 1: unexpected '<answer> 9'"),
        ("-9*-5=45\n-7-45=-52", "reaches -52, not 52"),
    ],
)
def test_a_mistake_is_wrong_and_named(response, reason):
    verdict = grade(response, row([5, 7, 9], 52))
    assert not verdict.correct and verdict.score == 0.0 and verdict.reason == reason


def test_each_copy_of_a_number_is_used_once():
    assert grade("5*5=25", row([5, 5], 25)).correct
    assert not grade("5*5=25", row([5, 6], 25)).correct


@pytest.mark.parametrize(
    "response",
    [
        "9**9**9**9**9=1",
        "<answer>" * 100_000,
        "<answer>" + "(" * 100_000 + "</answer>",
        "1+1=2\n" * 200_000,
        "\n" * 1_000_000,
        "=" * 1_000_000,
        "9" * 1_000_000 + "=1",
        "\x00\ud800\udfff",
        "__import__('os').system('touch pwned')=52",
        "<answer>" + "9*" * 200 + "9</answer>",
        "5+7=12\u2028" * 1000,
        "٥*٩=٤٥",
    ],
    ids=lambda text: ascii(text[:14]),
)
def test_hostile_responses_are_wrong_and_cheap(response, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    verdict = grade(response, row([5, 7, 9], 52))
    assert time.process_time() - start < 0.5
    assert not verdict.correct and len(verdict.reason) <= 200 and "\n" not in verdict.reason
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_puzzle_gives_a_failed_verdict():
    verdict = judge(grade, "1+1=2", {"reward_model": {"ground_truth": "2"}})
    assert not verdict.correct and verdict.reason.startswith("the grader raised TypeError")


def test_generated_solutions_are_right_and_others_wrong():
    rows = CountdownRows(count=300, operands=4, operators="+-*/")
    solutions = [each["target"][0]["content"] for each in rows]
    assert all(grade(text, each).correct for text, each in zip(solutions, rows, strict=True))
    shifted = zip(solutions[1:] + solutions[:1], rows, strict=True)
    assert not any(grade(text, each).correct for text, each in shifted)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files beside the repository")
def test_the_answers_of_the_public_files_are_right_and_shuffled_ones_wrong():
    rows = load_rows(str(SHARED / "uft_countdown_test_512.parquet"))
    answers = [each["answer"] for each in rows]
    assert all(grade(text, each).correct for text, each in zip(answers, rows, strict=True))
    shifted = zip(answers[1:] + answers[:1], rows, strict=True)
    assert not any(grade(text, each).correct for text, each in shifted)


def test_an_answer_inside_unfinished_reasoning_does_not_count():
    truth = {"numbers": [5, 7, 9], "target": 52}
    row = {"reward_model": {"ground_truth": truth}}
    answer = "<answer>9*5+7</answer>"
    assert load_grader("countdown")(f"<think> so {answer}</think> {answer}", row).correct
    assert not load_grader("countdown")(f"<think> perhaps {answer} or", row).correct
