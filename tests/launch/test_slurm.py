"""launch/slurm.sbatch on a real Slurm: both nodes train, and a signal requeues and resumes."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from echorl_jax.files import read_steps
from tests.launch import slurm_cluster

ROOT = Path(__file__).parent.parent.parent
OPTIONS = """steps=10 data.max_prompt_tokens=32 data.eval= eval.every=0 rollout.prompts_per_step=4
rollout.group_size=4 rollout.max_new_tokens=16 checkpoint.every=5 log.tensorboard=false
log.report=false mesh.data=1 mesh.fsdp=-1""".split()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(reason)
    # Slurm's sockets stand in it, and their paths may have 108 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as here:
        with slurm_cluster.cluster(Path(here)) as environment:
            yield environment


def call(*words: str, environment: dict[str, str], **options) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def job(number: str, environment: dict[str, str]) -> dict[str, str]:
    text = call("scontrol", "show", "job", number, environment=environment)
    return dict(re.findall(r"(\w+)=(\S*)", text))


def wait_until(ready, log: Path, *, within_s: float = 600) -> None:
    deadline = time.monotonic() + within_s
    while not ready():
        said = log.read_text()[-3000:] if log.exists() else "no log"
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_trains_on_two_nodes_saves_requeues_and_ends(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    workdir, log = tmp_path / "run", tmp_path / "job.log"
    environment = {
        **slurm,
        "ECHORL_ROOT": str(ROOT),
        "ECHORL_VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    submitted = call(
        *("sbatch", "--parsable", "--nodes=2", "--time=30", f"--output={log}"),
        *(str(ROOT / "launch" / "slurm.sbatch"), "train", "--config=configs/countdown.py"),
        *(f"--workdir={workdir}", *(f"--config.{option}" for option in OPTIONS)),
        environment=environment,
        cwd=tmp_path,
    )
    number = submitted.strip()
    metrics = workdir / "metrics.jsonl"

    def reached(step: int) -> bool:
        return metrics.exists() and any(line["step"] >= step for line in read_steps(metrics))

    running = ("PENDING", "CONFIGURING", "RUNNING")
    wait_until(lambda: reached(1) or job(number, environment)["JobState"] not in running, log)
    now = job(number, environment)
    assert now["JobState"] == "RUNNING" and now["NodeList"] == "echorl-node[1-2]"
    # What Slurm does by itself 300 s before the time limit.
    call("scancel", "--batch", "--signal=USR1", number, environment=environment)
    wait_until(lambda: "back into the queue" in log.read_text(), log)
    said = log.read_text()
    (stopped,) = re.findall(r"stopped after step (\d+); ", said)
    assert 1 <= int(stopped) < 10 and "signal: saving" in said
    assert (workdir / "checkpoints" / stopped).is_dir()

    wait_until(lambda: job(number, environment)["JobState"] == "COMPLETED", log)
    now, said = job(number, environment), log.read_text()
    assert now["Restarts"] == "1" and now["ExitCode"] == "0:0", said
    assert re.findall(r"start (\d), on (\S+)", said) == [
        ("1", "echorl-node[1-2]"),
        ("2", "echorl-node[1-2]"),
    ]
    assert f"resumed after step {stopped}" in said
    assert [line["step"] for line in read_steps(metrics)] == list(range(1, 11))
    record = json.loads((workdir / "environment.json").read_text())
    assert record["processes"] == 2 and len(record["devices"]) == 4
    assert (workdir / "export").is_dir()
    # A wrong option is not worth another start.
    broken = call(
        *("sbatch", "--parsable", "--nodes=2", "--time=30", f"--output={log}.broken"),
        *(str(ROOT / "launch" / "slurm.sbatch"), "train", "--config=configs/countdown.py"),
        *(f"--workdir={workdir}", "--config.stepss=3"),
        environment=environment,
        cwd=tmp_path,
    ).strip()
    states = ("COMPLETED", "FAILED")
    wait_until(lambda: job(broken, environment)["JobState"] in states, Path(f"{log}.broken"))
    now = job(broken, environment)
    assert now["JobState"] == "FAILED" and now["ExitCode"] == "2:0" and now["Restarts"] == "0"
    assert "did you mean config.steps?" in Path(f"{log}.broken").read_text()
