"""Verdicts on multiple choice, and graders chosen row by row."""

from pathlib import Path

import pytest

from echorl_jax.data import load_rows
from echorl_jax.rewards import load_grader
from echorl_jax.rewards.choice import options_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
grade = load_grader("choice")
OPTIONS = ["a planet", "Days get shorter.", "$5$ N", "(a) 1, (b) 2"]


def row(gold="B", options=OPTIONS):
    return {"options": options, "reward_model": {"ground_truth": gold}}


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)}}",
        r"\boxed{b}",
        r"\boxed{B) Days get shorter.}",
        r"\boxed{\text{Days get shorter}}",
        r"\boxed{A} no, \boxed{Option B}",
        "<think> A </think> The correct answer is (B), since the spin is faster.",
        "Answer: B",
        "The answer is **B**.",
        "The answer is: $B$",
        "<answer> B </answer>",
        "It must be this one:\nB.",
        "(B)",
        "Is the answer A? No, the answer is option B",
        "The answer is (b).",
        "The answer is B, since option (a) fails.",
        "The answer is B. It could not be option (c)",
        "Is the answer A? No, the answer is (b)",
        "The answer is I guess the second\nB",
    ],
)
def test_right(response):
    assert grade(response, row()).correct


@pytest.mark.parametrize("response", ["The answer is 5.", "I think the answer is 5.\n\nB"])
def test_an_option_that_is_a_digit_is_named_by_its_text(response):
    assert grade(response, row("B", ["4", "5", "6"])).correct


@pytest.mark.parametrize(
    "response",
    ["The answer is 2.5", "The answer is 2/3", "answer: 2,500", r"The answer is 2\sqrt{3}"]
    + ["The answer is 2 + 3 = 5", "The answer is 2*3", "the answer is $2^3$", "option 2 % 5"],
)
def test_the_first_digit_of_a_number_names_no_option(response):
    assert not grade(response, row("B", ["1", "2", "3", "4"])).correct


@pytest.mark.parametrize("response", ["**Answer: 2**", "The answer is 2.", "the answer is $2$, so"])
def test_a_digit_that_is_the_whole_answer_does(response):
    assert grade(response, row("B", ["1", "2", "3", "4"])).correct


def test_options_may_have_their_labels():
    labelled = row("b", {"a": "three", "b": "four"})
    assert grade("The answer is (b).", labelled).correct
    assert grade(r"\boxed{four}", labelled).correct
    assert not grade(r"\boxed{three}", labelled).correct


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{A}",
        r"\boxed{A, B}",
        r"\boxed{AB}",
        r"\boxed{E}",
        r"\boxed{B or C}",
        "",
        "A planet rotates faster. Because of that",
        "The answer is Bob",
        "Days",
        "B is wrong, so the answer is C",
        r"<think> \boxed{B} </think> \boxed{C}",
        "\x00" * 1000,
        "(" * 1_000_000,
    ],
)
def test_wrong(response):
    assert not grade(response, row()).correct


def test_text_that_contains_labels_is_matched_as_a_whole():
    assert grade(r"\boxed{(a) 1, (b) 2}", row("D")).correct


def test_the_ground_truth_may_be_an_options_text():
    assert grade(r"\boxed{C}", row("5 N")).correct


def test_options_are_read_from_the_prompt():
    text = "Which?\n\nA) one\nB) two\n(C) three\n"
    assert options_of({"prompt": [{"content": text}]}) == {"A": "one", "B": "two", "C": "three"}
    assert options_of({"prompt": [{"content": "Which?\n1) one\n2) two"}]}) == {
        "1": "one",
        "2": "two",
    }
    assert options_of({"prompt": [{"content": "B) alone\nC) or not from the start"}]}) == {}


def test_a_ground_truth_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match="neither a letter nor one of the options"):
        grade("A", row("seven"))


def test_auto_tells_rows_apart():
    auto = load_grader("auto")
    countdown = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    mathematics = {"prompt": [{"content": "?"}], "reward_model": {"ground_truth": "1/2"}}
    assert auto("2*3=6", countdown).reason == "reaches 6"
    assert auto("(B)", row()).reason == "chose B"
    assert auto(r"\boxed{0.5}", mathematics).reason == "equals the answer"


@needs_files
@pytest.mark.parametrize("name", ["luffy_eval_arc_c_600.parquet", "mmlu_pro_600.parquet"])
def test_public_files_by_letter_and_by_text(name):
    rows = load_rows(str(SHARED / name))
    for each in rows:
        gold = each["reward_model"]["ground_truth"]
        options = options_of(each)
        other = next(label for label in options if label != gold)
        assert grade(rf"\boxed{{{gold}}}", each).correct
        assert grade(f"So the answer is ({gold}).", each).correct
        assert grade(rf"\boxed{{\text{{{options[gold]}}}}}", each).correct
        assert not grade(rf"\boxed{{{other}}}", each).correct
