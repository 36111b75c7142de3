"""LUFFY, UFT and SFT on real expert files: weights against NumPy, hints against their schedule."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from echorl_jax.config import Config
from echorl_jax.core import batch_loss
from echorl_jax.data import Prompt, add_hint, hint_segments, load_rows, load_tokenizer
from echorl_jax.files import read_steps
from echorl_jax.training import loop
from echorl_jax.training.batch import make_batches
from echorl_jax.training.experience import collect
from echorl_jax.training.run import open_run
from echorl_jax.training.sft import train_supervised
from tests.integration.conftest import small_config

HINT_STEPS = 12


def expert_config(files: list[Path], objective: str, **more: dict) -> Config:
    """20 steps of 2 prompts x 4 rows of up to 48 tokens, with the shipped tiny model."""
    defaults = {
        "data": {"train": ",".join(map(str, files)), "eval": "", "max_prompt_tokens": 384},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 48},
        "objective": {"name": objective, "kl_coef": None, "hint_steps": HINT_STEPS},
        "optim": {"micro_batch_tokens": 4096, "sft_rows_per_step": 16},
        "checkpoint": {"every": 0, "export": False},
    }
    defaults["data"]["template"] = "boxed"
    for section, values in more.items():
        defaults.setdefault(section, {}).update(values)
    return small_config(steps=20, **defaults)


@pytest.mark.slow
def test_luffys_expert_tokens_weigh_what_the_formula_says(
    tmp_path: Path, shared_data: Path
) -> None:
    config = expert_config([shared_data / "luffy_train_expert.parquet"], "luffy")
    opened = open_run(config, tmp_path, prompts_per_step=2, devices=jax.devices()[:1])
    with opened as (run, state):
        found = collect(
            run.setup,
            state.params,
            jax.random.key(0),
            step=1,
            stream=run.stream,
            engine=run.engine,
            grader=run.grader,
            warn=run.log.say,
        )
        # So few tokens never hold an answer; other verdicts, so that advantages differ.
        draw = np.random.default_rng(0)
        rewards = np.array([1, 0, 0, 1, 1, 1, 0, 0], np.float32)
        by_group = rewards.reshape(2, 4)
        graded = dataclasses.replace(found.groups, rewards=by_group, correct=by_group == 1)
        found = dataclasses.replace(found, groups=graded)
        (made,), _ = make_batches(run.setup, found, jax.random.key(1), step=1)
        batch = made.batch
        logprobs = -draw.gamma(1.0, 1.0, batch.loss_mask.shape).astype(np.float32)

        def policy_loss(logprobs):
            coef = {"echo_coef": 0.0}
            return batch_loss(logprobs, -logprobs, batch, run.setup.objective, **coef)[1][
                "loss/policy"
            ].sum

        loss, slope = jax.value_and_grad(policy_loss)(logprobs)

    expert = ~np.asarray(batch.on_policy)
    assert expert.reshape(2, 4).tolist() == [[False, False, False, True]] * 2
    groups = rewards.reshape(2, 4)
    advantages = (groups - groups.mean(axis=1, keepdims=True)).reshape(8)
    assert abs(advantages[expert]).min() > 0
    # A mean over the eight rows of token sums over the longest completion.
    longest = 8 * config.rollout.max_new_tokens
    length = np.asarray(found.rollouts.completion_length)
    expected, expected_slope = 0.0, np.zeros_like(logprobs, np.float64)
    for row in range(8):
        for t in range(length[row]):
            p = math.exp(logprobs[row, t])
            if expert[row]:  # -A f(p), f(p) = p / (p + 0.1); d f / d log p = 0.1 p / (p + 0.1)^2
                value, derivative = p / (p + 0.1), 0.1 * p / (p + 0.1) ** 2
            else:  # -A rho, unclipped
                value = derivative = p / math.exp(batch.old_logprobs[row, t])
            expected -= advantages[row] * value / longest
            expected_slope[row, t] = -advantages[row] * derivative / longest
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_luffy_trains_on_its_file(tmp_path: Path, shared_data: Path) -> None:
    config = expert_config(
        [shared_data / "luffy_train_expert.parquet"], "luffy", rollout={"max_new_tokens": 128}
    )
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, samples_every=0))
    loop.train(config, tmp_path, devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(math.isfinite(line["loss/total"]) for line in lines)
    assert all(line["optim/skipped"] == 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uft_math_700.parquet", "uft_countdown_train.parquet"])
def test_uft_shows_less_and_less_and_then_nothing(
    tmp_path: Path, shared_data: Path, name: str
) -> None:
    config = expert_config([shared_data / name], "uft")
    loop.train(config, tmp_path, devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    shown = [line["prompt/hint_tokens_mean"] for line in lines]
    assert len(shown) == 20 and min(shown[:4]) > 0
    assert np.mean(shown[:4]) > np.mean(shown[8:12])
    assert shown[HINT_STEPS:] == [0.0] * 8
    # The likelihood of hints is in the loss exactly as long as there are hints.
    assert [line["loss/nll"] > 0 for line in lines] == [tokens > 0 for tokens in shown]


@pytest.mark.parametrize("name", ["uft_math_700.parquet", "uft_countdown_test_512.parquet"])
def test_hints_of_real_files_are_binomial(shared_data: Path, name: str) -> None:
    """Shown segments over 300 rows against SciPy's binomial with the schedule of ECHORL.md."""
    tokenizer = load_tokenizer("builtin:countdown")
    rows = load_rows(str(shared_data / name))[:300]
    for step in (0, 6, 11, 12):
        p = 0.05 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / HINT_STEPS))
        p = p if step < HINT_STEPS else 0.0
        seen = expected = variance = 0.0
        for index, row in enumerate(rows):
            bare = Prompt([1, 2], row, index)
            hinted = add_hint(
                bare,
                tokenizer,
                step=step,
                seed=0,
                hint_steps=HINT_STEPS,
                max_prompt_tokens=10_000,
            )
            pieces = hint_segments(row)
            texts = ["".join(pieces[:k]) for k in range(len(pieces) + 1)]
            lengths = np.array([len(tokenizer.encode(text)) if text else 0 for text in texts])
            chance = stats.binom.pmf(np.arange(len(texts)), len(pieces), p)
            mean = float(chance @ lengths)
            expected += mean
            variance += float(chance @ (lengths - mean) ** 2)
            seen += hinted.hint_tokens
            assert hinted.hint_tokens in lengths
        assert abs(seen - expected) <= 4 * math.sqrt(variance) + 1e-9


@pytest.mark.slow
def test_sft_on_the_expert_file_lowers_the_loss(tmp_path: Path, shared_data: Path) -> None:
    config = expert_config(
        [shared_data / "luffy_train_expert.parquet"],
        "sft",
        echo={"enabled": False},
        rollout={"max_new_tokens": 256},
        optim={"learning_rate": 1e-3, "sft_rows_per_step": 8},
    )
    train_supervised(config, tmp_path, devices=jax.devices()[:1])
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    loss = [json.loads(line)["loss/nll"] for line in text]
    assert len(loss) == 20 and np.mean(loss[-3:]) < 0.8 * loss[0]
