"""The Countdown generator, and a solver that shows what its problems allow."""

import itertools
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax.data import DataError
from echorl_jax.data.countdown_rows import (
    CountdownRows,
    Step,
    apply_operator,
    is_eval,
    parse_countdown,
)


def follow(lines, numbers):
    """Carries out solution lines; returns what is left of the numbers and the last result."""
    left = [Fraction(number) for number in numbers]
    result = None
    for line in lines:
        expression, result = line.split("=")
        result = Fraction(result)
        operator = next(sign for sign in "+*/-" if sign in expression[1:])
        place = expression.index(operator, 1)
        a, b = Fraction(expression[:place]), Fraction(expression[place + 1 :])
        left.remove(a)
        left.remove(b)
        assert result == {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]
        left.append(result)
    return left, result


def reachable(numbers, operators):
    """Every value that uses all numbers, by trying all orders, groupings and operators."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for order in set(itertools.permutations(numbers)):
        for cut in range(1, len(order)):
            for a in reachable(order[:cut], operators):
                for b in reachable(order[cut:], operators):
                    values |= {a + b, a - b, a * b} if operators == "+-*" else {a + b}
    return values


def solve(
    numbers: Sequence[int], target: int, *, operators: str = "+-*/", use_all: bool = False
) -> list[Step] | None:
    """Finds steps from ``numbers`` to ``target`` by exhaustive search over exact rationals.

    Each number is used at most once, or exactly once with ``use_all``. None when there is no way.
    Six numbers take some seconds at worst.

    >>> [str(step) for step in solve([1, 5, 9], 46)]
    ['9*5=45', '45+1=46']
    >>> solve([1, 1], 7) is None
    True
    """
    dead: set[tuple[Fraction, ...]] = set()
    goal = Fraction(target)

    def search(values: tuple[Fraction, ...]) -> list[Step] | None:
        if goal in values and (len(values) == 1 or not use_all):
            return []
        if len(values) < 2 or values in dead:
            return None
        for step, rest in _moves(values, operators):
            if (tail := search(tuple(sorted((*rest, step.result))))) is not None:
                return [step, *tail]
        dead.add(values)
        return None

    return search(tuple(sorted(map(Fraction, numbers))))


def _moves(
    values: tuple[Fraction, ...], operators: str
) -> Iterator[tuple[Step, tuple[Fraction, ...]]]:
    """Every step two of the sorted values allow, with the values it leaves over."""
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            rest = values[:i] + values[i + 1 : j] + values[j + 1 :]
            low, high = values[i], values[j]
            for operator in operators:
                pairs = ((high, low),) if operator in "+*" else ((high, low), (low, high))
                for left, right in pairs:
                    if (result := apply_operator(left, operator, right)) is not None:
                        yield Step(left, operator, right, result), rest


@pytest.mark.parametrize("options", ["", "operands=2", "operands=6&max_result=1000&operators=+-*/"])
def test_every_problem_is_solved_by_its_solution_with_all_numbers(options):
    rows = parse_countdown(f"{options}&count=200&seed=5")
    for row in rows:
        truth = row["reward_model"]["ground_truth"]
        lines = row["target"][0]["content"].split("\n")
        left, result = follow(lines, truth["numbers"])
        assert left == [result] == [truth["target"]]
        assert row["prompt"][0]["content"].startswith(f"Reach {truth['target']} with ")


def test_numbers_and_results_stay_in_their_ranges():
    rows = CountdownRows(min_number=4, max_number=11, min_result=50, max_result=90, count=300)
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    assert {n for truth in truths for n in truth["numbers"]} == set(range(4, 12))
    assert all(50 <= truth["target"] <= 90 for truth in truths)
    assert all(truth["numbers"] == sorted(truth["numbers"]) for truth in truths)
    assert any(
        row["reward_model"]["ground_truth"]["numbers"]
        != sorted(row["reward_model"]["ground_truth"]["numbers"])
        for row in CountdownRows(order="shuffled", count=20)
    )


def test_rows_are_the_same_every_time_and_everywhere():
    # Written down once: a change would make runs of different versions incomparable.
    rows = CountdownRows(seed=1)
    assert rows[0]["prompt"][0]["content"] == "Reach 43 with 3, 20, 26."
    assert rows[0]["target"][0]["content"] == "20-3=17\n26+17=43"
    assert rows[4321] == CountdownRows(seed=1)[4321] == rows[4321 - len(rows)]
    assert list(itertools.islice(rows, 3)) == [rows[0], rows[1], rows[2]] == rows[:3]
    assert rows[0] != CountdownRows(seed=2)[0]


def test_train_and_eval_never_share_a_problem():
    def problems(rows):
        truths = [row["reward_model"]["ground_truth"] for row in rows]
        return {(tuple(sorted(truth["numbers"])), truth["target"]) for truth in truths}

    small = {"operands": 2, "max_number": 6, "count": 400}
    train = problems(CountdownRows(**small, seed=1)) | problems(CountdownRows(**small, seed=2))
    held_out = problems(CountdownRows(**small, seed=1, split="eval", order="shuffled"))
    everything = problems(CountdownRows(**small, seed=3, split="all"))
    assert train and held_out and not train & held_out
    # The space is small enough to be seen whole: the splits cover it.
    assert everything <= train | held_out
    assert all(is_eval(numbers[::-1], target) for numbers, target in held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("operand=3", "countdown: unknown option 'operand'; one of operands, "),
        ("operands=three", "countdown: operands='three': must be a whole number"),
        ("operands=0", "countdown: operands=0: must be at least 1"),
        ("operands=999", "countdown: operands=999: must be at most 32"),
        ("seed=-7", "countdown: seed=-7: must be at least 0"),
        ("min_number=9&max_number=3", "countdown: min_number=9 is above max_number=3"),
        ("operators=+^", "countdown: operators='+^': must be some of "),
        ("split=test", "countdown: split='test': one of train, eval, all"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options, message):
    with pytest.raises(DataError) as caught:
        parse_countdown(options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_impossible_range_is_an_error_not_a_hang():
    with pytest.raises(DataError, match="no problem found"):
        CountdownRows(max_number=2, min_result=300)[0]


def test_an_index_out_of_range_ends_iteration():
    with pytest.raises(IndexError):
        CountdownRows(count=3)[3]
    assert len(list(CountdownRows(count=3))) == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(1, 60))
def test_the_solver_finds_a_way_exactly_when_there_is_one(numbers, target):
    steps = solve(numbers, target, operators="+-*", use_all=True)
    assert (steps is not None) == (target in reachable(tuple(numbers), "+-*"))
    if steps is not None:
        left, result = follow(map(str, steps), numbers)
        assert left == [target] and result == target


def test_the_solver_works_with_fractions_on_the_way():
    # 24 from 3, 3, 8, 8 needs 8 / (3 - 8/3), so no search over whole numbers finds it.
    steps = solve([3, 3, 8, 8], 24, use_all=True)
    assert steps and any(step.result.denominator > 1 for step in steps)
    assert follow(map(str, [steps[-1]]), [steps[-1].left, steps[-1].right])[1] == 24


def test_the_solver_leaves_numbers_over_unless_told_otherwise():
    assert solve([7, 9], 9) == []
    assert solve([7, 9], 9, use_all=True) is None


def test_reading_a_row_is_cheap():
    rows = CountdownRows(count=10**9)
    start = time.perf_counter()
    assert rows[10**9 - 1]["extra_info"]["index"] == 10**9 - 1
    assert time.perf_counter() - start < 0.5
