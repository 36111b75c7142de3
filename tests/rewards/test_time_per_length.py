"""No grader's time grows faster than the length of a response, whatever the response repeats."""

import time

import pytest

from echorl_jax.rewards import GRADERS, load_grader

ROWS = {
    "choice": {"options": ["four", "five"], "reward_model": {"ground_truth": "B"}},
    "countdown": {"reward_model": {"ground_truth": {"numbers": [5, 7, 9], "target": 52}}},
    "reduce": {"reward_model": {"ground_truth": {"expression": "5*9+7", "value": 52}}},
    "math": {"prompt": [{"content": "?"}], "reward_model": {"ground_truth": "5"}},
}
ROWS["auto"] = ROWS["choice"]
ROWS["format"] = ROWS["math"]
ROWS["shapes"] = {"reward_model": {"ground_truth": {"last_line": "5"}}}
# Each is (start, what is repeated, end).
SHAPES = [
    ("The answer is", "\n", "x"),
    ("answer", " \n", "x"),
    ("", "the answer is not A but ", ""),
    ("", "answer is the the ", ""),
    ("The answer is A", " or", ""),
    (r"\boxed{", "A or ", "}"),
    ("<answer>", "A, ", "</answer>"),
    ("", r"\boxed{", ""),
    ("", r"\boxed{5} and ", ""),
    ("", "<answer>", ""),
    ("", "<think>", ""),
    ("", "答案是", ""),
    ("", "\\text ", ""),
    ("", "*a", ""),
    ("", "#### ", ""),
    ("", "(", ""),
    ("", "$", ""),
    ("", "1=1\n", ""),
    ("", "1,", ""),
    ("", "9", ""),
    ("", ".", ""),
    ("5*9", "+0", "=45"),
    ("<think>", "</think>", "\\boxed{"),
]


@pytest.mark.parametrize("name", sorted(GRADERS))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ascii("".join(shape))[:20])
def test_time_is_linear_in_the_length(name, shape):
    """At most 0.5 s and 20 us a character of processor time, with room for slow machines."""
    grade, row = load_grader(name), ROWS[name]
    start, repeated, end = shape
    grade("The answer is 1.", row)  # imports what it needs
    for length in (500, 4_000, 32_000):  # a cubic pattern is stopped at the first
        response = start + repeated * (length // len(repeated)) + end
        begin = time.process_time()
        grade(response, row)
        assert time.process_time() - begin < 0.5 + 2e-5 * length, length
