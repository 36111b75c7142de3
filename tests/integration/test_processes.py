"""Two processes of four devices train as one of eight does, and neither is ever left alone."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from echorl_jax.files import read_steps
from echorl_jax.training import loop
from tests.integration.conftest import ROOT, small_config
from tests.integration.test_train import require_close, steady, untrained
from tests.several import free_port, gone

STEPS = 6
LOST_AFTER_S = 20.0
OPTIONS = {
    "steps": STEPS,
    "data.max_prompt_tokens": 32,
    "data.eval": "",
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 16,
    "eval.every": 0,
    "checkpoint.every": 1,
    "log.tensorboard": "true",
    "log.samples_every": 2,
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "mesh.lost_after_s": LOST_AFTER_S,
}


@dataclasses.dataclass
class Launch:
    """Starts runs with a compilation cache in common, so that only the first one compiles."""

    cache: Path
    started: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    def start(
        self, workdir: Path, *, processes: int, **options: Any
    ) -> list[subprocess.Popen[str]]:
        values = {**OPTIONS, **{key.replace("__", "."): v for key, v in options.items()}}
        words = [f"--config.{key}={value}" for key, value in values.items()]
        flags = f"--xla_force_host_platform_device_count={8 // processes}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        address = f"127.0.0.1:{free_port()}"
        made = []
        for process in range(processes):
            place = {
                "ECHORL_COORDINATOR": address,
                "ECHORL_PROCESSES": str(processes),
                "ECHORL_PROCESS_ID": str(process),
            }
            with (workdir.parent / f"{workdir.name}.{process}.log").open("a") as log:
                made.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "echorl_jax", "train", f"--workdir={workdir}"]
                        + [f"--config={ROOT / 'configs' / 'countdown.py'}", *words],
                        stderr=log,
                        stdout=subprocess.DEVNULL,
                        text=True,
                        env={**environment, **(place if processes > 1 else {})},
                    )
                )
        self.started += made
        return made

    def complete(self, workdir: Path, *, processes: int, **options: Any) -> None:
        made = self.start(workdir, processes=processes, **options)
        codes = [process.wait(timeout=400) for process in made]
        assert codes == [0] * processes, last_lines(workdir, processes)


def last_lines(workdir: Path, processes: int = 2) -> list[str]:
    logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(processes)]
    return [(log.read_text().splitlines() or [""])[-1] for log in logs]


def wait_for_step(workdir: Path, step: int, *, within_s: float = 300) -> None:
    """Returns as soon as metrics.jsonl shows the step."""
    deadline = time.monotonic() + within_s
    path = workdir / "metrics.jsonl"
    while not (path.exists() and any(line["step"] >= step for line in read_steps(path))):
        assert time.monotonic() < deadline, f"no step {step}: {last_lines(workdir)}"
        time.sleep(0.05)


def trained_by(supervisor: subprocess.Popen[str]) -> int:
    """The training process under a supervisor."""
    number = supervisor.pid
    (child,) = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return int(child)


def exported(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "export" / "model.safetensors")


def same_run(first: Path, second: Path) -> bool:
    """The same metrics, ledger, samples and weights, to the last bit."""
    weights = [exported(workdir) for workdir in (first, second)]
    texts = [sorted((d / "samples").iterdir()) for d in (first, second)]
    return (
        steady(first) == steady(second)
        and [path.read_text() for path in texts[0]] == [path.read_text() for path in texts[1]]
        and weights[0].keys() == weights[1].keys()
        and all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    )


def check_close_metrics(first: Path, second: Path) -> None:
    """The same prompts, samples and verdicts; numbers within rounding.

    gloo adds the parts of a sum in another order than devices of one process do, so that bits
    differ between one process and two.
    """
    lines = [steady(first), steady(second)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"rollout/logprob_gap_max"}:
            assert np.isclose(a[key], b[key], rtol=1e-3, atol=2e-5), (
                a["step"],
                key,
                a[key],
                b[key],
            )
    groups = [list(read_steps(d / "samples" / "ledger.jsonl")) for d in (first, second)]
    assert groups[0] == groups[1]


def check_close_run(first: Path, second: Path) -> None:
    """Metrics as of :func:`check_close_metrics`, and weights within rounding."""
    check_close_metrics(first, second)
    start = load_file(ROOT / "echorl_jax" / "assets" / "countdown" / "model.safetensors")
    weights = [{name: exported(workdir)[name] for name in start} for workdir in (first, second)]
    require_close(*weights, start)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    made = Launch(Path(given) if given else tmp_path_factory.mktemp("cache"))
    yield made
    for process in made.started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, undisturbed."""
    workdir = tmp_path_factory.mktemp("two") / "whole"
    launch.complete(workdir, processes=2)
    return workdir


@pytest.mark.slow
def test_two_processes_equal_one(launch: Launch, whole: Path, tmp_path: Path) -> None:
    launch.complete(tmp_path / "one", processes=1)
    assert [line["step"] for line in steady(whole)] == list(range(1, STEPS + 1))
    check_close_run(tmp_path / "one", whole)
    record = json.loads((whole / "environment.json").read_text())
    assert record["processes"] == 2 and len(record["devices"]) == 8
    assert list((whole / "tensorboard").iterdir()) and (whole / "report.html").exists()


@pytest.mark.slow
def test_two_processes_train_the_adapters_that_one_does(launch: Launch, tmp_path: Path) -> None:
    options = {"lora__rank": 4, "optim__learning_rate": 1e-3, "steps": 3}
    launch.complete(tmp_path / "one", processes=1, **options)
    launch.complete(tmp_path / "two", processes=2, **options)
    check_close_metrics(tmp_path / "one", tmp_path / "two")
    # b begins with zeros.
    one, two = (
        {name: value for name, value in load_file(file).items() if "lora_B" in name}
        for file in (
            tmp_path / name / "export" / "adapter" / "adapter_model.safetensors"
            for name in ("one", "two")
        )
    )
    require_close(one, two, {name: np.zeros_like(value) for name, value in one.items()})


@pytest.mark.slow
def test_one_is_killed_and_the_run_goes_on_later(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    workdir, victim = tmp_path / "run", 1
    pair = launch.start(workdir, processes=2)
    wait_for_step(workdir, 2)
    os.kill(trained_by(pair[victim]), signal.SIGKILL)
    begin = time.monotonic()
    assert [process.wait(timeout=LOST_AFTER_S + 10) for process in pair] == [1, 1]
    assert time.monotonic() - begin < LOST_AFTER_S
    for line in last_lines(workdir):
        assert line.startswith(f"echorl: process {victim} of 2 on ") and "SIGKILL" in line, line
    assert all(line["step"] < STEPS for line in read_steps(workdir / "metrics.jsonl"))
    launch.complete(workdir, processes=2)
    assert same_run(workdir, whole)


@pytest.mark.slow
def test_a_host_that_vanishes(launch: Launch, tmp_path: Path) -> None:
    """Supervisor and training process killed together: no last words."""
    workdir = tmp_path / "run"
    pair = launch.start(workdir, processes=2)
    wait_for_step(workdir, 1)
    trained = [trained_by(process) for process in pair]
    pair[0].kill()
    os.kill(trained[0], signal.SIGKILL)
    assert pair[1].wait(timeout=LOST_AFTER_S) == 1
    assert last_lines(workdir)[1] == "echorl: process 0 of 2 on 127.0.0.1 is gone"
    assert gone(trained[1])


@pytest.mark.slow
def test_a_signal_at_one_stops_all_and_one_goes_on(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    pair = launch.start(workdir, processes=2)
    wait_for_step(workdir, 1)
    pair[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in pair] == [0, 0]
    reached = [line["step"] for line in read_steps(workdir / "metrics.jsonl")]
    assert 1 <= reached[-1] < STEPS
    assert str(reached[-1]) in {path.name for path in (workdir / "checkpoints").iterdir()}
    # Another number of processes on the same mesh: the same data, the same result.
    launch.complete(workdir, processes=1)
    check_close_run(workdir, whole)


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_costs_all_only_itself(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    evaluation = {"data__eval": "countdown:split=eval&count=8", "eval__every": 1}
    launch.complete(workdir, processes=2, steps=3, **evaluation, debug__inject="eval_fail@2")
    lines = list(read_steps(workdir / "metrics.jsonl"))
    assert [line["eval/failed"] for line in lines] == [0, 0, 1, 0]
    assert ["eval/countdown/pass@1" in line for line in lines] == [True, True, False, True]
    trained = list(read_steps(whole / "metrics.jsonl"))
    for line, other in zip(lines[1:], trained, strict=False):
        assert line["optim/grad_norm"] == other["optim/grad_norm"]
    logs = [(tmp_path / f"run.{process}.log").read_text() for process in (0, 1)]
    said = [line for line in "".join(logs).splitlines() if "the evaluation failed" in line]
    reason = "PoolError: process 1: PoolError: the grading pool is closed"
    assert said == [f"warning: step 2: the evaluation failed ({reason})"] and said[0] in logs[0]


def test_a_disagreement_is_named_before_anything_is_written(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    port = f"127.0.0.1:{free_port()}"
    pair = []
    for process in (0, 1):
        place = {"ECHORL_COORDINATOR": port, "ECHORL_PROCESSES": "2"}
        pair.append(
            subprocess.Popen(
                [sys.executable, "-m", "echorl_jax", "train", f"--workdir={workdir}"]
                + [f"--config={ROOT / 'configs' / 'countdown.py'}", f"--config.seed={process}"],
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    **place,
                    "ECHORL_PROCESS_ID": str(process),
                },
            )
        )
    for process in pair:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2 and "has config.seed = 1, but process 0" in said, said
    assert [path.name for path in workdir.iterdir()] == [".secret"]


@pytest.mark.slow
def test_eight_copies_equal_one_device(tmp_path: Path) -> None:
    one = loop.train(small_config(steps=2), tmp_path / "one", devices=jax.devices()[:1])
    axes = {"data": 8, "fsdp": 1, "tensor": 1}
    eight = loop.train(small_config(steps=2, mesh=axes), tmp_path / "eight")
    for a, b in zip(steady(tmp_path / "one"), steady(tmp_path / "eight"), strict=True):
        for key in ("reward/mean", "echo/clips", "loss/echo", "optim/grad_norm"):
            assert np.isclose(a[key], b[key], rtol=1e-3), (key, a[key], b[key])
    require_close(one.params, eight.params, untrained())
