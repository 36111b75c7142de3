"""A working directory holds one config and one history."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from echorl_jax.config import Config, ConfigError, EchoConfig
from echorl_jax.config_file import from_dict, to_dict
from echorl_jax.errors import UserError
from echorl_jax.files import read_steps
from echorl_jax.training.logs import RunLog
from echorl_jax.training.workdir import open_workdir, require_new, rewind


def opened(workdir: Path, config: Config) -> dict[str, Any]:
    with open_workdir(workdir, config) as (_, before):
        return before


def test_another_config_is_refused_by_its_key(tmp_path: Path) -> None:
    opened(tmp_path / "run", Config())
    # A start that failed before its first line of metrics binds nothing.
    opened(tmp_path / "run", dataclasses.replace(Config(), seed=7))
    opened(tmp_path / "run", Config())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    other = dataclasses.replace(Config(), echo=EchoConfig(coef=0.1))
    with pytest.raises(ConfigError, match="config.echo.coef = 0.001, not 0.1"):
        opened(tmp_path / "run", other)
    faster = dataclasses.replace(Config().optim, learning_rate=1e-5, schedule="wsd")
    longer = dataclasses.replace(Config(), steps=500, optim=faster)
    before = opened(tmp_path / "run", longer)
    assert (before["steps"], before["optim.learning_rate"]) == (Config().steps, 1e-6)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 500


def test_a_workdir_of_an_older_version_goes_on(tmp_path: Path) -> None:
    config = to_dict(Config())
    config["optim"]["max_bad_updates"] = config["optim"].pop("max_bad_steps") + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert from_dict(config).optim.max_bad_steps == Config().optim.max_bad_steps + 1
    opened(tmp_path, Config())


def test_a_failed_start_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    require_new(tmp_path / "none")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    require_new(tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir()
    with pytest.raises(ConfigError, match="holds a run already, and .*resume = none"):
        require_new(tmp_path)


def test_a_second_run_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with open_workdir(tmp_path, Config()):
        before = (tmp_path / "config.json").read_text()
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing there"):
            opened(tmp_path, dataclasses.replace(Config(), steps=500))
        assert (tmp_path / "config.json").read_text() == before
    opened(tmp_path, Config())


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workdir .*file"):
        opened(tmp_path / "file", Config())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{torn")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="config.json: not JSON"):
        opened(tmp_path / "run", Config())


def test_rewind_drops_what_comes_again_and_what_is_torn(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 5, "rew')
    (tmp_path / "samples" / "ledger.jsonl").write_text(lines)
    for step in (1, 3):
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text("{}\n")
    rewind(tmp_path, 2)
    for name in ("metrics.jsonl", "samples/ledger.jsonl"):
        assert [line["step"] for line in read_steps(tmp_path / name)] == [0, 1, 2]
    assert [p.name for p in (tmp_path / "samples").glob("step_*")] == ["step_000001.jsonl"]


def test_the_log_writes_json_that_everything_reads(tmp_path: Path) -> None:
    with RunLog(tmp_path, first_step=0, total_steps=2, tensorboard=True) as log:
        log.write({"step": 1, "reward/mean": 0.5, "loss/total": float("nan")})
        log.write({"step": 2, "reward/mean": 1.0, "loss/total": float("inf")})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "reward/mean": 0.5, "loss/total": None}
    assert lines[1]["loss/total"] is None
    assert any((tmp_path / "tensorboard").iterdir())
