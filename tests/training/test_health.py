"""Checks of a step: when sampler and trainer are compared, and what stops a run."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.environment import JaxEngine
from echorl_jax.errors import RunStopped
from echorl_jax.training.health import LOGPROB_GAP, GapBounds, Health, require_agreement
from echorl_jax.training.loop import train
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.update import GAP_MEAN, GAP_WIDE, UpdateStats, _no_stats
from echorl_jax.types import LossTerm, Rollouts
from tests.integration.conftest import small_config


def written() -> Rollouts:
    """One finite rollout of a token."""
    one: Any = np.ones((1, 1), np.float32)
    row: Any = np.ones(1, np.int32)
    return Rollouts(
        prompt_ids=one,
        prompt_length=row,
        group=row * 0,
        completion_ids=one,
        completion_length=row,
        rollout_logprobs=-one,
        token_entropy=one,
        truncated=row == 0,
    )


def stats(*, gap: float = 0.0, count: int = 1, finite: bool = True) -> UpdateStats:
    nothing = _no_stats()
    terms = nothing.terms | {GAP_MEAN: LossTerm(np.float32(gap), np.float32(count))}
    return dataclasses.replace(
        nothing, logprob_gap=np.float32(gap), terms=terms, finite=np.array(finite)
    )


def health(bad_updates: int = 0, **sections: Any) -> Health:
    setup: Any = SimpleNamespace(config=small_config(**sections))
    return Health(setup, bad_updates, pytest.fail)


def state(bad_updates: int = 0) -> TrainState:
    return TrainState({}, {}, np.int32(0), np.int32(bad_updates))


def test_the_first_step_of_a_process_and_every_nth_are_compared() -> None:
    checked, compared = health(rollout={"check_every": 5, "max_logprob_gap": 1.0}), []
    for step in range(3, 13):  # resumed after step 2
        # Step 3 has no trainable tokens, which postpones the comparison.
        try:
            checked.check(step, state(), [stats(gap=2.0, count=0 if step == 3 else 1)], written())
        except RunStopped:
            compared.append(step)
            checked.check(step, state(), [stats(gap=0.5)], written())
    assert compared == [4, 6, 11]
    never = health(rollout={"check_every": 0, "max_logprob_gap": 1.0})
    for step in range(1, 9):
        never.check(step, state(), [stats(gap=2.0)], written())


@pytest.mark.parametrize("gap, stops", [(0.5, False), (2.0, True), (float("nan"), True)])
def test_a_gap_past_the_bound_or_nan_stops(gap: float, stops: bool) -> None:
    done = dataclasses.replace(_no_stats(), logprob_gap=jnp.float32(gap))
    line = "the largest difference is .* more than 1 "
    with pytest.raises(RunStopped, match=line) if stops else contextlib.nullcontext():
        require_agreement(done, 1, GapBounds(1.0))


@pytest.mark.parametrize(
    "largest, mean, wide, stops",
    [
        # SmolLM2-135M in bfloat16: 0.40 nats at most and 0.029 in the mean of 360 tokens.
        (0.40, 0.029, 0, None),
        (1.9, 0.029, 3, None),
        (1.9, 0.029, 4, "the share of tokens past 0.5 nats is 0.0111, more than 0.01"),
        (0.40, 0.11, 0, "the mean difference is 0.11, more than 0.1"),
        (2.1, 0.029, 1, "the largest difference is 2.1, more than 2"),
        (0.40, float("nan"), 0, "the mean difference is nan"),
    ],
)
def test_bf16_is_judged_by_largest_mean_and_share(
    largest: float, mean: float, wide: int, stops: str | None
) -> None:
    count, nothing = np.float32(360), _no_stats()
    gaps = {GAP_MEAN: np.float32(mean) * count, GAP_WIDE: np.float32(wide)}
    terms = nothing.terms | {key: LossTerm(gap, count) for key, gap in gaps.items()}
    done = dataclasses.replace(nothing, logprob_gap=np.float32(largest), terms=terms)
    with pytest.raises(RunStopped, match=stops) if stops else contextlib.nullcontext():
        require_agreement(done, 1, LOGPROB_GAP["bfloat16"])


def test_bad_steps_are_counted_by_all_their_updates() -> None:
    checked, bad = health(optim={"max_bad_steps": 2}), [stats(finite=False)] * 3
    checked.check(7, state(5), bad)
    with pytest.raises(RunStopped, match=r"for 6 updates in a row \(optim.max_bad_steps = 2\)"):
        checked.check(8, state(6), bad)


def test_a_sampler_that_disagrees_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step passes; resumed with a sampler that is off, the second does not."""
    config = small_config(steps=1, optim={"learning_rate": 1e-5})
    devices = jax.devices()[:1]
    train(config, tmp_path, devices=devices)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["rollout/logprob_gap_max"] < 1e-3 and 0 < line["rollout/slot_occupancy"] <= 1

    sample = JaxEngine.sample

    def off(*arguments: Any, **settings: Any) -> Rollouts:
        rollouts = sample(*arguments, **settings)
        wrong = rollouts.rollout_logprobs + np.float32(10)
        return dataclasses.replace(rollouts, rollout_logprobs=wrong)

    monkeypatch.setattr(JaxEngine, "sample", off)
    with pytest.raises(RunStopped, match=r"step 2: .* the largest difference is 10"):
        train(dataclasses.replace(config, steps=2), tmp_path, devices=devices)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
