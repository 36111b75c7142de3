"""The grader of Reduce, and how it judges the way."""

import pytest

from echorl_jax.data.reduce_rows import ReduceRows
from echorl_jax.rewards import load_grader
from echorl_jax.rewards.reduce import grade, steps_right

ROW = {
    "reward_model": {"ground_truth": {"expression": "(3+4)*(9-2)-5", "value": 44}},
    "data_source": "reduce",
}


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("7*(9-2)-5\n7*7-5\n49-5\n44", True),
        ("44", True),
        ("7*7-5\n48-4\n44", True),  # a wrong way that ends right
        ("7*7-5\n49-5\n 44 \n\n", True),
        ("<think>45</think>\n44", True),
        ("so <answer>44</answer> it is", True),
        ("7*7-5\n49-5", False),  # the same value, but not worked out
        ("7*7-5\n49-5\n45", False),
        ("-44", False),
        ("44\nis the value", False),
        ("49-5=44", False),
        ("4 4", False),
        ("<think>44", False),
        ("", False),
        ("\n", False),
        ("9" * 400, False),
        ("((((" * 100, False),
        ("1/0", False),
    ],
)
def test_the_last_line_counts(response, correct):
    verdict = grade(response, ROW)
    assert (verdict.correct, verdict.score) == (correct, float(correct))
    assert "\n" not in verdict.reason and len(verdict.reason) < 200


@pytest.mark.parametrize("name", ["reduce", "auto"])
def test_every_generated_solution_is_right_in_every_step(name):
    judge = load_grader(name)
    rows = ReduceRows(count=60, max_operands=10)
    for row in rows:
        solution = row["target"][0]["content"]
        assert judge(solution, row).correct and steps_right(solution, row) == 1.0
        other = rows[(row["extra_info"]["index"] + 1) % 60]
        same = other["reward_model"]["ground_truth"]["value"]
        assert judge(other["target"][0]["content"], row).correct == (
            same == row["reward_model"]["ground_truth"]["value"]
        )


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("7*(9-2)-5\n7*7-5\n49-5\n44", 1.0),
        ("(3+4)*7-5\n7*7-5\n49-5\n44", 1.0),  # another order
        ("7*(9-2)-5\n7*7-5\n48-5\n43", 3 / 4),  # 43 follows from 48-5
        ("7*7-5\n49-5\n44", 2 / 3),  # two operations in the first line
        ("44", 0.0),
        ("(4+3)*(9-2)-5", 0.0),  # nothing was worked out
        ("hello\n44", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_of_right_steps(response, share):
    assert steps_right(response, ROW) == pytest.approx(share)
