"""Engines: another one trains through the same loop, and a broken one is named in one line."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.config import Config, ConfigError
from echorl_jax.data import Prompt, load_tokenizer
from echorl_jax.environment import Engine, JaxEngine, sample_and_grade
from echorl_jax.environment.engines import MOST_SAMPLES, make_engine
from echorl_jax.errors import RunStopped
from echorl_jax.models import init_params
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Resources, Sampling
from echorl_jax.training.loop import train
from echorl_jax.types import Rollouts
from tests.environment.replay_engine import RECORDED
from tests.integration.conftest import small_config
from tests.rollout.conftest import decoder


def with_engine(config: Config, path: str) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=path))


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recorded_rollouts_without_entropies_train_as_sampled_ones(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer computes the missing entropies, so that the same clips are found."""
    config = small_config(
        steps=2, model={"dtype": "float32"}, optim={"compile_ahead": ahead, "learning_rate": 1e-4}
    )
    sample, calls = JaxEngine.sample, []

    def record(*arguments: Any, **settings: Any) -> Rollouts:
        rollouts = sample(*arguments, **settings)
        if "row_limits" not in settings:
            arrays = {k: v for k, v in vars(rollouts).items() if k != "token_entropy"}
            np.savez(tmp_path / f"call_{len(calls)}.npz", **arrays)
            calls.append(1)
        return rollouts

    with monkeypatch.context() as patch:
        patch.setattr(JaxEngine, "sample", record)
        sampled = train(config, tmp_path / "sampled", devices=jax.devices()[:1])
    monkeypatch.setenv(RECORDED, str(tmp_path))
    replayed_config = with_engine(config, "tests.environment.replay_engine:ReplayEngine")
    replayed = train(replayed_config, tmp_path / "replayed", devices=jax.devices()[:1])
    for ours, theirs in zip(
        jax.tree.leaves(replayed.params), jax.tree.leaves(sampled.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("sampled", "replayed")
    ]
    for one, other in zip(*lines, strict=True):
        assert one["echo/clips"] == other["echo/clips"] > 0
        assert one["echo/clip_tokens_mean"] == other["echo/clip_tokens_mean"]
        for key in ("echo/step_entropy_mean", "entropy/token_mean", "loss/echo"):
            assert other[key] == pytest.approx(one[key], abs=1e-4) and other[key] > 0


@pytest.mark.parametrize(
    "path, line",
    [
        ("tests.environment.replay_engine:fails", "no server answers"),
        ("tests.environment.replay_engine:absent", "absent"),
        ("no_such_module:engine", "no_such_module"),
        ("builtins:dict", "no sample, warm_up, close"),
        ("tests.environment.replay_engine:leaves_python", "7"),
        ("engine", "must be package.module:function"),
    ],
)
def test_an_engine_that_cannot_be_made_is_one_line(path: str, line: str) -> None:
    config = with_engine(small_config(), path)
    settings: dict[str, Any] = dict.fromkeys(("model", "tokenizer", "mesh"))
    with pytest.raises(ConfigError, match=f"config.rollout.engine = '{path}': .*{line}") as error:
        make_engine(config, slots=1, **settings)
    assert "\n" not in str(error.value)


def test_prompts_of_many_lengths_make_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    params = init_params(model, jax.random.key(0))
    sampling = Sampling(group_size=1, max_new_tokens=2)

    def width(engine: JaxEngine, length: int) -> int:
        prompts = [Prompt([1] * length, {}, 0)]
        rollouts = engine.sample(params, prompts, jax.random.key(0), sampling=sampling)
        return rollouts.prompt_ids.shape[1]

    ahead = JaxEngine(model, Resources(), prompt_tokens=40)
    assert {width(ahead, length) for length in (1, 17, 40)} == {48}
    lazy = dataclasses.replace(ahead, one_length=False)
    # The power of two above the longest prompt, in multiples of 16, never beyond the longest.
    assert [width(lazy, length) for length in (1, 17, 33)] == [16, 32, 48]


def test_numbers_and_prefixes_of_prompts_reach_the_sampler() -> None:
    model = decoder()
    params = init_params(model, jax.random.key(0))
    sampling = Sampling(group_size=2, max_new_tokens=6)
    engine = JaxEngine(model, Resources(), prompt_tokens=4)
    prompts = [Prompt([3, 5], {}, i, number=i, prefix=[7] * i) for i in range(3)]

    def ids(chosen: list[Prompt]) -> np.ndarray:
        key = jax.random.key(1)
        return engine.sample(params, chosen, key, sampling=sampling).completion_ids

    whole = ids(prompts)
    assert whole[2:4, 0].tolist() == [7, 7] and whole[4:, :2].tolist() == [[7, 7]] * 2
    # A prompt draws the same in any call and place.
    np.testing.assert_array_equal(ids([prompts[2], prompts[1]]), whole[[4, 5, 2, 3]])
    assert MOST_SAMPLES == 4096  # keys of finished evaluations depend on it


class Fixed(Engine):
    """Two completions of one token for each prompt, reported or not."""

    def __init__(self, rows: int, report: Sequence[int]) -> None:
        self.rows, self.report = rows, report

    def sample(self, params: Any, prompts: Any, key: Any, **settings: Any) -> Rollouts:
        tokenizer = load_tokenizer("builtin:countdown")
        ids = np.array([tokenizer.encode("2*3=6", add_special_tokens=False)] * self.rows, np.int32)
        settings["finished"](self.report, [ids[row] for row in self.report])
        row: Any = np.ones(self.rows, np.int32)
        token: Any = np.zeros(ids.shape, np.float32)
        return Rollouts(
            prompt_ids=ids[:1],
            prompt_length=row[:1],
            group=row * 0,
            completion_ids=ids,
            completion_length=row * ids.shape[1],
            rollout_logprobs=token,
            token_entropy=token,
            truncated=row == 0,
        )


@pytest.mark.parametrize("report", [[], [1], [0, 1]])
def test_rows_that_an_engine_does_not_report_are_graded_too(report: list[int]) -> None:
    row = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    settings: dict[str, Any] = {
        "sampling": Sampling(group_size=2, max_new_tokens=8),
        "tokenizer": load_tokenizer("builtin:countdown"),
    }
    prompts, key = [Prompt([1], row, 0)], jax.random.key(0)
    with GraderPool("countdown", workers=0) as grader:
        attempts = sample_and_grade(Fixed(2, report), {}, prompts, key, grader=grader, **settings)
        assert [verdict.correct for verdict in attempts.verdicts().verdicts] == [True, True]
        with pytest.raises(RunStopped, match="the engine returned 3 rows, expected 2"):
            sample_and_grade(Fixed(3, report), {}, prompts, key, grader=grader, **settings)
