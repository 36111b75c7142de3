"""The gate between sampler and trainer: when it looks, and what stops a run."""

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
from echorl_jax.training.step import _no_stats, require_healthy
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
def test_a_gap_past_the_bound_or_no_number_stops(gap: float, stops: bool) -> None:
    done = dataclasses.replace(_no_stats(), logprob_gap=jnp.float32(gap))
    state: Any = None
    require_healthy(state, done, step=1, max_gap=None, max_bad_steps=3)
    if not stops:
        require_healthy(state, done, step=1, max_gap=1.0, max_bad_steps=3)
        return
    with pytest.raises(RunStopped, match="more than rollout.max_logprob_gap = 1"):
        require_healthy(state, done, step=1, max_gap=1.0, max_bad_steps=3)


def test_bad_steps_are_counted_by_all_their_updates() -> None:
    done = dataclasses.replace(_no_stats(), finite=np.array(False))
    limits: Any = {"step": 7, "max_gap": None, "max_bad_steps": 2, "updates_per_step": 3}
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
    with pytest.raises(RunStopped, match=r"step 2: .* 10 nats apart"):
        train(dataclasses.replace(config, steps=2), tmp_path, devices=devices)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
