"""Right and wrong answers of each kind that mathematical benchmarks have, worded for this test.

A line of ``answer_kinds.txt`` is ``gold | right answers | wrong answers``, the answers parted by
`` ;; ``; a line ``# ...`` names the kind of those that follow. An answer stands in a box; after
``>`` stands a whole response.
"""

from pathlib import Path

import pytest

from echorl_jax.rewards import load_grader

grade = load_grader("math")
TABLE = Path(__file__).with_name("answer_kinds.txt")


def cases(*, right):
    kind = ""
    for line in filter(None, TABLE.read_text(encoding="utf-8").splitlines()):
        if line.startswith("# "):
            kind = line[2:]
            continue
        gold, *answers = line.split(" | ")
        for answer in answers[not right].split(" ;; "):
            yield pytest.param(gold, answer, id=f"{kind}: {gold} - {answer}")


def verdict(gold, answer):
    response = answer[1:] if answer.startswith(">") else rf"So it is $\boxed{{{answer}}}$."
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": gold}}
    return grade(response, row)


@pytest.mark.parametrize(("gold", "answer"), [*cases(right=True)])
def test_a_right_answer_is_accepted(gold, answer):
    assert verdict(gold, answer).correct


@pytest.mark.parametrize(("gold", "answer"), [*cases(right=False)])
def test_a_wrong_answer_is_refused(gold, answer):
    assert not verdict(gold, answer).correct
