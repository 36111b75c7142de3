"""Opening a run again: what may have changed, and what is said about it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.config import Config, ConfigError
from echorl_jax.data import DataError
from echorl_jax.errors import RunStopped
from echorl_jax.parallel import place_whole
from echorl_jax.training.run import open_run, with_steps
from tests.integration.conftest import small_config


@pytest.mark.parametrize("name,supervised", [("sft", False), ("grpo", True)])
def test_the_command_for_the_objective_is_named(
    name: str, supervised: bool, tmp_path: Path
) -> None:
    config = small_config(objective={"name": name})
    wanted = "sft" if name == "sft" else "train"
    with pytest.raises(ConfigError, match=f"objective.name = '{name}': use `echorl {wanted}`"):
        with open_run(config, tmp_path / "run", prompts_per_step=4, supervised=supervised):
            pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections,told",
    [
        ({"optim": {"schedule": "cosine"}}, "optim.schedule = cosine"),
        ({"objective": {"name": "uft"}}, "objective.hint_steps = 0"),
        ({"objective": {"name": "uft", "hint_steps": 5}}, None),
        ({"optim": {"schedule": "constant", "warmup_steps": 2}}, None),
    ],
)
def test_other_steps_are_told_where_they_change_the_course(
    sections: dict[str, Any], told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(steps=4, **sections)
    again = dataclasses.replace(config, steps=8)
    opened(config, tmp_path)
    opened(config, tmp_path)
    assert "warning" not in capsys.readouterr().err
    opened(again, tmp_path)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if told is None:
        assert not warnings
    else:
        (warning,) = warnings
        assert warning.startswith("echorl: warning: config.steps = 8, not 4 as before")
        assert told in warning
    opened(again, tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_epochs_set_the_steps(tmp_path: Path) -> None:
    """One and a half passes over 10 rows, 4 at a time: 3.75 steps. No epochs leave the steps."""
    config = small_config(steps=7, data={"train": "countdown:count=10"})
    assert with_steps(config, 4).steps == 7
    config = dataclasses.replace(config, epochs=1.5)
    assert with_steps(config, 4).steps == 4 and with_steps(config, 5).steps == 3
    with open_run(config, tmp_path, prompts_per_step=4, devices=jax.devices()[:1]) as (run, _):
        assert (
            run.setup.config.steps
            == 4
            == json.loads((tmp_path / "config.json").read_text())["steps"]
        )


def test_another_learning_rate_is_told_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(steps=4)
    opened(config, tmp_path)
    optim = dataclasses.replace(config.optim, learning_rate=0.5, schedule="linear", warmup_steps=0)
    again = dataclasses.replace(config, optim=optim)
    with open_run(again, tmp_path, prompts_per_step=4, devices=jax.devices()[:1]) as (run, _):
        assert [float(run.setup.schedule(step)) for step in (0, 2)] == [0.5, 0.25]
    told = capsys.readouterr().err
    rate = config.optim.learning_rate
    assert f"from here on config.optim.learning_rate = 0.5, not {rate} as before" in told
    assert "from here on config.optim.schedule = linear, not constant as before" in told


def test_a_run_without_prompts_left_saves_and_says_so(tmp_path: Path) -> None:
    """The only prompt had 4 of 4 successes at its last visit, as a checkpoint tells it."""
    data = {"train": "countdown:count=1", "retire_above": 0.9}
    config = small_config(steps=9, data=data, checkpoint={"every": 0})
    opening = {"prompts_per_step": 1, "devices": jax.devices()[:1]}
    solved = {"index": [0], "visits": [1], "correct": [4], "judged": [4]}
    with pytest.raises(RunStopped, match="step 1: every prompt has reached data.retire_above"):
        with open_run(config, tmp_path, **opening) as (run, state):
            assert len(next(run.stream)) == 1
            run.history.set_state({"prompts": solved, "step_entropies": []})
            state = dataclasses.replace(state, step=place_whole(np.int32(1), run.setup.mesh))
            run.end_step(1, state, {})
    with open_run(config, tmp_path, **opening) as (run, state):
        assert run.first_step == 1
        with pytest.raises(DataError, match="no prompt is left"):
            next(run.stream)


def opened(config: Config, workdir: Path) -> None:
    """Opens a run and ends one step in which nothing is learnt."""
    with open_run(config, workdir, prompts_per_step=4, devices=jax.devices()[:1]) as (run, state):
        step = run.first_step + 1
        state = dataclasses.replace(state, step=place_whole(np.int32(step), run.setup.mesh))
        run.end_step(step, state, {})
        run.finish(state)
