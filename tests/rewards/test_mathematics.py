"""Tests verdicts on mathematics: worded answers, published verdicts, hostile answers."""

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from echorl_jax.cli import run
from echorl_jax.data import load_rows
from echorl_jax.rewards import GraderPool, algebra, load_grader
from echorl_jax.rewards.extraction import boxed_spans, last_answer

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
grade = load_grader("math")


def judge(response, gold):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": gold}}
    return grade(response, row)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed {\{1,2\}}", r"\{1,2\}"),
        (r"\fbox{a}", "a"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{", None),
        ("boxed{1}", None),
        ("}{" * 9, None),
    ],
)
def test_the_last_balanced_box_is_found(text, inside):
    insides = [text[start:end] for start, end in boxed_spans(text)]
    assert (insides[-1] if insides else None) == inside


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("1</answer>", None),
        ("<answer>1", None),
    ],
)
def test_the_last_closed_answer_tag_is_found(text, inside):
    assert last_answer(text) == inside


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"So it is $\boxed{336}$ degrees.", r"336^\circ"),
        (r"\boxed{336^\circ}", "336"),
        (r"\boxed{15 \text{ cm}^2}", r"15\mbox{ cm}^2"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{1,\!000}", "1000"),
        (r"\boxed{(0, 1]}", "(0,1]"),
        (r"\boxed{2} and \boxed{1}", "1,2"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{\text{East}}", r"\text{east}"),
        (r"\boxed{2x+2}", "2(x+1)"),
        (r"<think> \boxed{7} </think> \boxed{8}", "8"),
        ("<answer> 8000 </answer>", {"question": "?", "target": "8000"}),
        ("some <<3*4=12>> steps\n#### 12", "Twelve eggs.\n#### 12"),
        ("The answer is 12.", "12"),
        (r"\boxed{2^{100000}}", "2^{100000}"),
        (r"\boxed{7}", ["5", "7"]),
        ("**Final Answer:** a * b ** c **so** \\boxed{3}", "3"),
    ],
)
def test_an_equal_answer_is_accepted(response, gold):
    assert judge(response, gold).correct


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"\boxed{335}", r"336^\circ"),
        (r"\boxed{8} but rather \boxed{9}", "8"),
        (r"<think> \boxed{8} </think> \boxed{7}", "8"),
        (r"\boxed{[0, 1]}", "(0,1]"),
        (r"\boxed{(1, 2)}", "(2, 1)"),
        (r"\boxed{1}", "1,2"),
        ("I do not know.", "3"),
        ("", "3"),
        (r"\boxed{}", ""),
        (r"The sum is 3, so \boxed{\mathrm{none}}", "3"),
        (r"\boxed{2007 + \frac\pi 2}", "2"),
    ],
)
def test_another_answer_is_refused(response, gold):
    assert not judge(response, gold).correct


@pytest.mark.parametrize(
    ("prompt", "gold", "answer", "right"),
    [
        ("What percent of 80 is 20?", "25", r"25\%", True),
        (r"By how many \% does it grow?", "25", r"25\%", True),
        ("How many are there?", "25", r"25\%", False),
        ("Factor $x^2-9$.", "(x-3)(x+3)", "(x+3)(x-3)", True),
        ("Factor $x^2-9$.", "(x-3)(x+3)", "x^2 - 9", False),
        ("What is 17*23?", "391", "17*23", False),
        ("What is 17*23?", "391", r"391", True),
        (r"Simplify $\sqrt{45}$.", r"3\sqrt{5}", r"\sqrt{45}", False),
        (r"Find $\binom{16}{5}$.", "4368", r"\binom{16}{5}", False),
        ("Is 4.0 or 4 smaller?", "4", "4.0", True),
        ("Take $2x+31$ apart.", "31+2x", "x+x+31", True),
    ],
)
def test_the_problem_says_what_an_answer_may_be(prompt, gold, answer, right):
    row = {"prompt": prompt, "reward_model": {"ground_truth": gold}}
    messages = {**row, "prompt": [{"role": "user", "content": prompt}]}
    for each in (row, messages):
        assert grade(rf"\boxed{{{answer}}}", each).correct == right


@pytest.mark.parametrize(
    ("response", "right"), [(r"\boxed{\text{(C)}}", True), ("**C**", True), (r"\boxed{A}", False)]
)
def test_a_letter_is_judged_as_a_choice(response, right):
    assert judge(response, "C").correct == right


def test_sympy_is_interrupted_after_processor_time_only(monkeypatch):
    monkeypatch.setattr(algebra, "LIMIT_S", 0.2)
    assert algebra._limited(lambda text: sum(0 for _ in itertools.count()), "") is None
    assert algebra._limited(lambda text: time.sleep(0.5) or text, "on a busy machine") is not None


@needs_files
def test_published_verdicts_on_model_outputs():
    lines = (SHARED / "graded_responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    verdicts = [judge(row["response"], row["gold"]).correct for row in rows]
    pairs = list(zip(verdicts, rows, strict=True))
    right = [verdict for verdict, row in pairs if row["correct"]]
    wrong = [verdict for verdict, row in pairs if not row["correct"]]
    assert len(right) == 295 and sum(right) == 295
    assert len(wrong) == 25 and sum(wrong) == 0


@needs_files
def test_published_pairs():
    lines = (SHARED / "grader_pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    verdicts = [judge(row["prediction"], row["gold"]).correct for row in rows]
    pairs = list(zip(verdicts, rows, strict=True))
    assert sum(v for v, row in pairs if row["expected"]) >= 103
    assert sum(not v for v, row in pairs if not row["expected"]) == 10


@needs_files
@pytest.mark.parametrize("name", ["uft_math_700.parquet", "luffy_train_expert.parquet"])
def test_gold_answers_and_expert_trajectories_are_right(name):
    for row in load_rows(str(SHARED / name))[:120]:
        text = row["target"][0]["content"] if "target" in row else row["answer"]
        assert grade(text, row).correct


CHEAP = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{9**9**9**9}",
    r"\boxed{10^{100000000}}",
    r"\boxed{100000000!}",
    r"\boxed{9!!!!}",
    r"\boxed{" + "(" * 100_000 + "1" + ")" * 100_000 + "}",
    r"\boxed{" + "(" * 300 + "1" + ")" * 300 + "}",
    r"\boxed{" + "9" * 100_000 + "}",
    r"\boxed{" * 1000,
    "{" * 100_000,
    "$" * 100_000,
    "a" * 1_000_000,
    "9" * 1_000_000,
    "\\boxed{\x00\ud800}",
    r"\boxed{__import__('os').system('touch pwned')}",
    "The answer is __import__('os').system('touch pwned')",
    "The answer is 2**99999999",
    "<answer>" * 10_000,
    r"\boxed{٤٢}",
]
# These are only stopped by a time limit.
COSTLY = [
    r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n}}",
    r"\boxed{\binom{9999999}{4999999}}",
    r"\boxed{(x+1)^{9999}}",
    r"\boxed{((((9!)!)!)!)!}",
    r"\boxed{\lim_{x\to 0}\sin(1/x)^{\tan x}}",
    r"\boxed{\gcd(10^{9999},3^{9999})}",
    r"\boxed{\begin{pmatrix}" + "&".join("1" * 200) + r"\end{pmatrix}^{9999}}",
    r"\boxed{" + r"\det" * 200 + "}",
    r"\boxed{" + r"\log_{2}" * 100 + "5}",
    r"\boxed{1e999999999}",
    r"\boxed{" + "{}" * 400_000 + "}",
]


def check_hostile(responses, limit_s):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "42"}}
    start = time.perf_counter()
    with GraderPool("math", workers=2) as pool:
        verdicts = pool.grade([*responses, r"\boxed{42}"], [row] * (len(responses) + 1))
    assert time.perf_counter() - start < limit_s
    assert [v.correct for v in verdicts] == [False] * len(responses) + [True]
    assert not os.path.exists("pwned")


def test_hostile_answers_cost_little(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_hostile(CHEAP, limit_s=30)


@pytest.mark.slow
def test_a_file_of_hostile_answers_within_two_minutes(tmp_path, monkeypatch):
    """Through the command, as a user meets them: a file of 30 and one right answer."""
    monkeypatch.chdir(tmp_path)
    responses = [*CHEAP, *COSTLY, r"\boxed{42}"]
    assert len(responses) == 31
    lines = [json.dumps({"response": text, "answer": "42"}) + "\n" for text in responses]
    (tmp_path / "hostile.jsonl").write_text("".join(lines))
    start = time.perf_counter()
    assert run(["grade", "hostile.jsonl", "--grader=math", "--out=graded.jsonl"]) == 0
    assert time.perf_counter() - start < 120
    graded = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in graded] == [False] * 30 + [True]
    assert sorted(os.listdir(tmp_path)) == ["graded.jsonl", "hostile.jsonl"]
