"""The generator of Reduce, against Python's own arithmetic."""

import ast
import itertools
import operator
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax.data import DataError, load_rows
from echorl_jax.data.reduce_rows import (
    ReduceRows,
    canonical_text,
    depth_of,
    parse_reduce,
    rewrites,
    text_of,
    value_of,
)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def parts(text: str) -> list[int]:
    """The value of every operation in an expression, as Python reads it; the whole comes last."""
    values = []

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return node.value
        assert isinstance(node, ast.BinOp)
        values.append(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        return values[-1]

    whole = walk(ast.parse(text, mode="eval").body)
    return values or [whole]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 10**6),
    operands=st.integers(1, 10),
    most=st.sampled_from([20, 99]),
    operators=st.sampled_from(["+", "+-", "+-*"]),
)
def test_expressions_and_solutions_are_what_python_computes(index, operands, most, operators):
    rows = ReduceRows(
        min_operands=operands,
        max_operands=operands,
        max_number=9 if operators != "+" else 1,
        max_result=most,
        operators=operators,
        count=10**6 + 1,
        split="all",
    )
    row = rows[index]
    truth = row["reward_model"]["ground_truth"]
    assert row["prompt"][0]["content"] == f"Work out {truth['expression']}."
    assert len(numbers(truth["expression"])) == operands
    assert set(truth["expression"]) <= set("0123456789()") | set(operators)
    values = parts(truth["expression"])
    assert values[-1] == truth["value"] and min(values) >= 0 and max(values) <= most
    lines = row["target"][0]["content"].splitlines()
    assert len(lines) == max(operands - 1, 1) and lines[-1] == str(truth["value"])
    assert all(parts(line)[-1] == truth["value"] for line in lines)
    for before, after in itertools.pairwise([truth["expression"], *lines]):
        assert len(numbers(after)) == len(numbers(before)) - 1 or operands == 1


def test_the_order_of_operations_is_free_and_varies():
    problem = ReduceRows(min_operands=6, max_operands=6, operators="+", max_result=60).problem(4)
    assert len(rewrites(problem.expression)) >= 1
    ways = {ReduceRows(operators="+", seed=0, max_result=90).problem(i).lines for i in range(50)}
    assert len(ways) == 50
    # 1+2+(3+4): either pair may come first.
    rows = ReduceRows(min_operands=4, max_operands=4, operators="+", max_result=40, count=400)
    firsts = {}
    for index in range(400):
        found = rows.problem(index)
        if len(rewrites(found.expression)) == 2:
            places = [text_of(each) for each in rewrites(found.expression)]
            chosen = places.index(found.lines[0])
            firsts[chosen] = firsts.get(chosen, 0) + 1
    assert min(firsts[0], firsts[1]) / (firsts[0] + firsts[1]) > 0.35


def test_training_and_held_out_problems_have_no_expression_in_common():
    options = {"min_operands": 3, "max_operands": 3, "max_number": 4, "count": 1500}
    train, held_out = (
        {
            canonical_text(ReduceRows(split=split, seed=seed, **options).problem(i).expression)
            for i in range(options["count"])
        }
        for split, seed in (("train", 1), ("eval", 2))
    )
    assert len(train) > 100 and len(held_out) > 20 and not train & held_out


def test_depth_and_ranges_hold():
    rows = ReduceRows(max_depth=3, max_number=5, min_number=2, max_result=30)
    problems = [rows.problem(i) for i in range(100)]
    assert max(depth_of(problem.expression) for problem in problems) == 3
    used = {number for p in problems for number in numbers(text_of(p.expression))}
    assert used == {2, 3, 4, 5} and {value_of(p.expression) for p in problems} <= set(range(31))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("operands=3", "unknown option 'operands'; one of min_operands"),
        ("max_operands=many", "max_operands='many': must be a whole number"),
        ("min_operands=9", "min_operands=9 is above max_operands=8"),
        ("operators=/", "operators='/': must be some of"),
        ("split=test", "split='test': one of train, eval, all"),
        ("max_number=100", "max_number=100 is above max_result=99"),
        ("count=0", "count=0: must be at least 1"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("max_operands=33", "max_operands=33: must be at most 32"),
        ("max_number=1" + "0" * 400, f"max_number=1{'0' * 39}: must be at most 10"),
    ],
)
def test_a_wrong_option_is_one_line(spec, message):
    with pytest.raises(DataError, match=f"reduce: {re.escape(message)}"):
        parse_reduce(spec)


def test_what_no_problem_satisfies_is_told():
    rows = ReduceRows(min_operands=8, operators="*", min_number=3, max_result=10)
    with pytest.raises(DataError, match="reduce: no problem of 8 operands found"):
        rows[0]


def test_rows_come_through_the_sources():
    rows = load_rows("reduce:count=3&seed=5,countdown:count=2")
    assert [row["data_source"] for row in rows] == ["reduce"] * 3 + ["countdown"] * 2


def test_every_number_of_operands_is_equally_likely():
    """Long expressions stay within a small range less often than short ones."""
    rows = ReduceRows(min_operands=3, max_operands=10, max_result=9, operators="+-", count=800)
    truths = [row["reward_model"]["ground_truth"]["expression"] for row in rows]
    counts = Counter(len(numbers(text)) for text in truths)
    # 100 expected; six standard deviations of a binomial count are 56.
    assert set(counts) == set(range(3, 11)) and 44 <= min(counts.values())
