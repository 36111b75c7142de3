"""Demonstrations and hints."""

import math
from pathlib import Path

import pytest

from echorl_jax.data import (
    DataError,
    Prompt,
    add_hint,
    encode_prompt,
    encode_target,
    expert_text,
    hint_segments,
    load_rows,
    load_tokenizer,
)
from echorl_jax.data.countdown_rows import CountdownRows

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:countdown")


def test_a_demonstration_is_the_target_or_the_solution():
    target = [{"role": "assistant", "content": "by hand"}]
    assert expert_text({"target": target, "solution": "other"}) == "by hand"
    assert expert_text({"solution": "48/2 = <<48/2=24>>24\n#### 24"}) == "48/2 = 24\n#### 24"
    assert expert_text({"hint": ["a\n", "b"], "answer": "a\nb </think>"}) == "a\nb </think>"
    assert expert_text({"solution": None}) is None


def test_a_demonstration_ends_with_the_end_token(tokenizer):
    row = CountdownRows(seed=1)[0]
    ids = encode_target(tokenizer, row)
    assert tokenizer.decode(ids[:-1]) == "20-3=17\n26+17=43" and ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="column target: no expert messages"):
        encode_target(tokenizer, {"prompt": []})


@pytest.mark.parametrize(
    ("lines", "sizes"), [(0, []), (1, [1]), (5, [1] * 5), (7, [2, 2, 1, 1, 1])]
)
def test_segments_are_even_runs_of_lines(lines, sizes):
    text = [f"line {n}\n" for n in range(lines)]
    segments = hint_segments({"hint": text} if text else {})
    assert [segment.count("\n") for segment in segments] == sizes
    assert "".join(segments) == "".join(text)


def test_blank_lines_join_the_line_before():
    assert hint_segments({"solution": "a\n\n\nb\n"}) == ["a\n\n\n", "b\n"]


def prompts(tokenizer, count):
    rows = CountdownRows(operands=6, max_result=2000, count=count)
    return [Prompt(encode_prompt(tokenizer, row), row, i) for i, row in enumerate(rows)]


def test_shown_hints_follow_the_binomial_of_the_schedule(tokenizer):
    options = {"seed": 3, "hint_steps": 100, "max_prompt_tokens": 1000}
    for step, probability in [(0, 0.95), (50, 0.5), (99, 0.05022), (100, 0.0)]:
        shown = []
        for prompt in prompts(tokenizer, 400):
            hinted = add_hint(prompt, tokenizer, step=step, **options)
            assert hinted.ids[: len(prompt.ids)] == prompt.ids
            assert len(hinted.ids) == len(prompt.ids) + hinted.hint_tokens
            hint = tokenizer.decode(hinted.ids[len(prompt.ids) :])
            assert "".join(hint_segments(prompt.row)).startswith(hint)
            # Five lines, the last without a line end.
            shown.append(hint.count("\n") + (hint.count("=") == 5))
        deviation = math.sqrt(5 * probability * (1 - probability) / 400)
        assert abs(sum(shown) / 400 - 5 * probability) <= 4 * deviation
        if step == 50:
            assert set(shown) == set(range(6))


def test_a_resumed_run_shows_the_same_hints(tokenizer):
    options = {"step": 7, "hint_steps": 20, "max_prompt_tokens": 1000}
    (prompt,) = prompts(tokenizer, 1)
    assert add_hint(prompt, tokenizer, seed=1, **options) == add_hint(
        prompt, tokenizer, seed=1, **options
    )
    many = [add_hint(prompt, tokenizer, seed=seed, **options).hint_tokens for seed in range(20)]
    assert len(set(many)) > 2


def test_hints_stay_within_the_longest_prompt(tokenizer):
    options = {"step": 0, "seed": 0, "hint_steps": 10**9}
    for prompt in prompts(tokenizer, 20):
        limit = len(prompt.ids) + 12
        hinted = add_hint(prompt, tokenizer, max_prompt_tokens=limit, **options)
        assert len(hinted.ids) <= limit
        assert add_hint(prompt, tokenizer, max_prompt_tokens=len(prompt.ids), **options) is prompt


def test_a_row_without_solution_has_no_hint(tokenizer):
    prompt = Prompt([1, 2], {"prompt": []}, 0)
    options = {"step": 0, "seed": 0, "hint_steps": 10, "max_prompt_tokens": 99}
    assert add_hint(prompt, tokenizer, **options) is prompt


@needs_files
@pytest.mark.parametrize("name", ["uft_countdown_test_512.parquet", "uft_math_700.parquet"])
def test_hints_of_the_public_files(name):
    for row in load_rows(str(SHARED / name)):
        segments = hint_segments(row)
        assert 1 <= len(segments) <= 5
        assert "".join(segments) == "".join(row["hint"])
        assert expert_text(row).startswith(segments[0].rstrip())


@needs_files
def test_expert_trajectories_of_the_public_file_fit_their_tokens(tokenizer):
    row = load_rows(str(SHARED / "luffy_train_expert.parquet"))[0]
    ids = encode_target(tokenizer, row)
    assert tokenizer.decode(ids[:-1]) == row["target"][0]["content"]
