"""The gate between sampler and trainer: when it looks, and what stops a run."""

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

from echorl_jax.errors import RunStopped
from echorl_jax.rollout import generate_with_progress
from echorl_jax.training import collect
from echorl_jax.training.loop import train
from echorl_jax.training.run import GapCheck
from echorl_jax.training.step import (
    GAP_MEAN,
    GAP_WIDE,
    LOGPROB_GAP,
    GapBounds,
    _no_stats,
    require_healthy,
)
from echorl_jax.types import LossTerm
from tests.integration.conftest import small_config


def test_it_looks_at_the_first_step_of_a_process_and_every_n() -> None:
    check, looked = GapCheck(5), []
    for step in range(3, 13):  # resumed after step 2
        if check.due(step):
            looked.append(step)
            if step != 3:  # nothing to compare there
                check.passed()
    assert looked == [3, 4, 6, 11]
    assert not any(GapCheck(0).due(step) for step in range(1, 9))


@pytest.mark.parametrize("gap, stops", [(0.5, False), (2.0, True), (float("nan"), True)])
def test_a_gap_past_the_bound_or_nan_stops(gap: float, stops: bool) -> None:
    done = dataclasses.replace(_no_stats(), logprob_gap=jnp.float32(gap))
    state: Any = None
    require_healthy(state, done, step=1, bounds=None, max_bad_steps=3)
    if not stops:
        require_healthy(state, done, step=1, bounds=GapBounds(1.0), max_bad_steps=3)
        return
    with pytest.raises(RunStopped, match="the largest difference is .* more than 1 "):
        require_healthy(state, done, step=1, bounds=GapBounds(1.0), max_bad_steps=3)


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
    state: Any = None
    with pytest.raises(RunStopped, match=stops) if stops else contextlib.nullcontext():
        require_healthy(state, done, step=1, bounds=LOGPROB_GAP["bfloat16"], max_bad_steps=3)


def test_bad_steps_are_counted_by_all_their_updates() -> None:
    done = dataclasses.replace(_no_stats(), finite=np.array(False))
    limits: Any = {"step": 7, "bounds": None, "max_bad_steps": 2, "updates_per_step": 3}
    state: Any = SimpleNamespace(bad_updates=5)
    require_healthy(state, done, **limits)
    state = SimpleNamespace(bad_updates=6)
    with pytest.raises(RunStopped, match=r"for 6 updates in a row \(optim.max_bad_steps = 2\)"):
        require_healthy(state, done, **limits)


def test_a_sampler_that_disagrees_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step passes; resumed with a sampler that is off, the second does not."""
    config = small_config(steps=1, optim={"learning_rate": 1e-5})
    devices = jax.devices()[:1]
    train(config, tmp_path, devices=devices)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["rollout/logprob_gap_max"] < 1e-3 and 0 < line["rollout/slot_occupancy"] <= 1

    def off(*arguments: Any, **settings: Any) -> Any:
        rollouts, progress = generate_with_progress(*arguments, **settings)
        wrong = rollouts.rollout_logprobs + np.float32(10)
        return dataclasses.replace(rollouts, rollout_logprobs=wrong), progress

    monkeypatch.setattr(collect, "generate_with_progress", off)
    with pytest.raises(RunStopped, match=r"step 2: .* the largest difference is 10"):
        train(dataclasses.replace(config, steps=2), tmp_path, devices=devices)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
