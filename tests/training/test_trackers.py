"""Trackers get each step once, also after a kill, under one id; missing packages are named."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import from_dict
from echorl_jax.errors import UserError
from echorl_jax.training.logs import RunLog
from echorl_jax.training.loop import train
from echorl_jax.training.trackers import trackers
from echorl_jax.training.workdir import rewind


def config_of(**log: str) -> Config:
    return from_dict({"log": {**log, "run_name": "seed-3", "group": "lambda", "tags": "a, b"}})


def run_until(workdir: Path, config: Config, steps: range) -> None:
    """Logs steps as a run does; every second one is evaluated after its line."""
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    with (
        trackers(workdir, config) as senders,
        RunLog(
            workdir,
            first_step=steps[0] - 1,
            total_steps=9,
            tensorboard=False,
            senders=senders,
        ) as log,
    ):
        for step in steps:
            sample = {"step": step, "prompt": f"p{step}", "response": "r", "reward": 1.0}
            file = workdir / "samples" / f"step_{step:06d}.jsonl"
            if step % 2 == 0:
                file.write_text(json.dumps(sample) + "\n")
            log.write({"step": step, "reward/mean": step / 8, "loss/total": float("nan")})
            if step % 2 == 0:
                log.amend({"eval/x/pass@1": step / 16, "eval/failed": 0.0})


def wandb_records(workdir: Path) -> Iterator[Any]:
    """The records of W&B's offline files: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                yield wandb_internal_pb2.Record.FromString(whole)
                whole = b""


@pytest.mark.filterwarnings("default")
def test_wandb_gets_each_step_once_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(wandb_project="echo")
    run_until(tmp_path, config, range(1, 5))
    rewind(tmp_path, 2)  # killed, with a checkpoint of step 2
    run_until(tmp_path, config, range(3, 7))
    records = list(wandb_records(tmp_path))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.display_name, run.run_group, *run.tags) for run in runs} == {
        ("echo", "seed-3", "lambda", "a", "b")
    }
    configs = [
        *(change for run in runs for change in run.config.update),
        *(change for record in records for change in record.config.update),
    ]
    log = next(json.loads(c.value_json) for c in configs if c.key == "log")
    assert log["wandb_project"] == "echo"
    seen: dict[str, list[tuple[int, Any]]] = {}
    tables = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            tables += [items["step"]] * ("samples/path" in items)
            for name in ("reward/mean", "eval/x/pass@1"):
                if name in items:
                    seen.setdefault(name, []).append((items["step"], items[name]))
    assert seen["reward/mean"] == [(step, step / 8) for step in range(1, 7)]
    assert seen["eval/x/pass@1"] == [(2, 0.125), (4, 0.25), (6, 0.375)]
    assert tables == [2, 4, 6]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name("echo").experiment_id])
    return run


@pytest.mark.filterwarnings("default")
def test_mlflow_gets_each_step_once_under_one_id(tmp_path: Path, mlflow_client: Any) -> None:
    workdir = tmp_path / "run"
    config = config_of(mlflow_experiment="echo")
    run_until(workdir, config, range(1, 5))
    rewind(workdir, 2)
    run_until(workdir, config, range(3, 7))
    run = only_run(mlflow_client)
    rewards = mlflow_client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((m.step, m.value) for m in rewards) == [(s, s / 8) for s in range(1, 7)]
    scores = mlflow_client.get_metric_history(run.info.run_id, "eval/x/pass_1")
    assert sorted((m.step, m.value) for m in scores) == [(2, 0.125), (4, 0.25), (6, 0.375)]
    assert run.info.run_name == "seed-3" and run.info.status == "FINISHED"
    assert run.data.params["echo.coef"] == "0.001"
    assert run.data.tags.items() >= {"group": "lambda", "a": "true", "b": "true"}.items()
    files = [file.path for file in mlflow_client.list_artifacts(run.info.run_id, "samples")]
    assert files == [f"samples/step_{step:06d}.jsonl" for step in (2, 4, 6)]


@pytest.mark.filterwarnings("default")
def test_a_lost_record_of_what_was_sent_does_not_double_steps(
    tmp_path: Path, mlflow_client: Any
) -> None:
    workdir = tmp_path / "run"
    config = config_of(mlflow_experiment="echo")
    run_until(workdir, config, range(1, 4))
    early = (workdir / "trackers.json").read_text()
    run_until(workdir, config, range(4, 6))
    (workdir / "trackers.json").write_text(early)
    rewind(workdir, 2)
    run_until(workdir, config, range(3, 7))
    rewards = mlflow_client.get_metric_history(only_run(mlflow_client).info.run_id, "reward/mean")
    assert sorted(m.step for m in rewards) == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("default")
def test_an_outage_costs_a_warning_and_no_step(
    tmp_path: Path, mlflow_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = config_of(mlflow_experiment="echo"), tmp_path / "run"
    workdir.mkdir()
    with (
        trackers(workdir, config) as senders,
        RunLog(workdir, first_step=0, total_steps=3, tensorboard=False, senders=senders) as log,
    ):
        log.write({"step": 1, "reward/mean": 0.5})
        (tmp_path / "store").rename(tmp_path / "gone")
        log.write({"step": 2, "reward/mean": 0.25})
        assert "echorl: warning: mlflow echo was not reached" in capsys.readouterr().err
        (tmp_path / "gone").rename(tmp_path / "store")
        log.write({"step": 3, "reward/mean": 1.0})
    rewards = mlflow_client.get_metric_history(only_run(mlflow_client).info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in rewards] == [(1, 0.5), (2, 0.25), (3, 1.0)]


@pytest.mark.parametrize(
    ("key", "module", "requirement"),
    [("wandb_project", "wandb", "wandb"), ("mlflow_experiment", "mlflow", "mlflow-skinny")],
)
def test_a_missing_package_is_told_before_the_model_is_looked_for(
    key: str, module: str, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = from_dict({"model": {"path": "/no/such/model"}, "log": {key: "mine"}})
    expected = rf"^config.log.{key} = 'mine' needs a package: pip install '{requirement}>="
    with pytest.raises(UserError, match=expected):
        train(config, tmp_path / "run")


@pytest.mark.filterwarnings("default")
def test_a_tracker_that_refuses_is_told_before_the_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://host")
    config = from_dict({"model": {"path": "/no/such/model"}, "log": {"mlflow_experiment": "e"}})
    with pytest.raises(ConfigError, match="^mlflow e cannot be used: "):
        train(config, tmp_path / "run")
