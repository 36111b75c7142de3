"""The launch scripts: what they print, do and return, without a cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from echorl_jax.cluster import Place, find_place

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
TRAIN = ["train", "--config=configs/countdown.py", "--workdir=runs/it's"]


def bash(script: str, *words: str, path: Path | None = None, **environment: str):
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PATH"] = f"{path}{os.pathsep}{variables['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}/usr/bin")
    assert program, "pip install -r requirements-dev.txt"
    scripts = sorted(map(str, [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]))
    found = subprocess.run([program, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


# A run that reaches a step of 4 and ends with a code; with "wait", only after SIGTERM.
RUN = """
import json, pathlib, signal, sys, time
step, code, wait, workdir = sys.argv[1:]
at = pathlib.Path(workdir.removeprefix("--workdir="))
at.mkdir(exist_ok=True)
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
(at / "config.json").write_text(json.dumps({"steps": 4, "seed": 0, "eval": {"steps": 9}}, indent=2))
lines = [json.dumps({"step": n, "echo/step": 7}) for n in range(int(step) + 1)]
(at / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
while wait == "wait" and not seen:
    time.sleep(0.02)
time.sleep(0.3 * (wait == "wait"))
sys.exit(int(code))
"""


@pytest.mark.parametrize(
    ("step", "code", "expected"), [(4, 0, 0), (3, 0, 75), (0, 0, 75), (3, 2, 2), (4, 1, 1)]
)
def test_an_attempt_says_whether_there_is_more_to_do(
    tmp_path: Path, step: int, code: int, expected: int
) -> None:
    words = [sys.executable, "-c", RUN, str(step), str(code), "", f"--workdir={tmp_path / 'run'}"]
    assert bash("attempt.sh", *words).returncode == expected


def test_an_attempt_passes_signals_on_and_waits(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, "3", "0", "wait", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(["bash", str(LAUNCH / "attempt.sh"), *words])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 20
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_an_attempt_needs_a_workdir(tmp_path: Path) -> None:
    assert bash("attempt.sh", "true").returncode == 2
    assert bash("attempt.sh", "true", f"--workdir={tmp_path}").returncode == 1
    found = bash("attempt.sh", "true", "--workdir=gs://bucket/run")
    assert found.returncode == 2 and "must be a path" in found.stderr


def test_help_is_the_head_of_the_script() -> None:
    for script in ("tpu_pod.sh", "local_multiprocess.sh"):
        found = bash(script, "--help")
        assert found.returncode == 0 and f"bash launch/{script}" in found.stdout
        assert "#" not in found.stdout and "set -" not in found.stdout


def pods() -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    return {
        document["metadata"]["labels"]["echorl/accelerator"]: document for document in documents
    }


def test_the_job_sets_are_consistent() -> None:
    assert pods().keys() == {"tpu", "gpu"}
    for document in pods().values():
        (job,) = document["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert spec["parallelism"] == spec["completions"]
        assert spec["completionMode"] == "Indexed"
        (container,) = spec["template"]["spec"]["containers"]
        assert (ROOT / container["command"][1]).exists()
        workdir = next(a for a in container["args"] if a.startswith("--workdir="))
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(workdir.startswith(f"--workdir={path}/") for path in mounts)
        assert (ROOT / container["args"][1].removeprefix("--config=")).exists()
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["values"] == [2]


def test_gpu_pods_find_each_other() -> None:
    document = pods()["gpu"]
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    variables = spec["template"]["spec"]["containers"][0]["env"]
    environment = {entry["name"]: entry["value"] for entry in variables}
    # JobSet names pods SET-JOB-REPLICA-INDEX, in a subdomain of the set's name.
    name = document["metadata"]["name"]
    address = f"{name}-{job['name']}-0-0.{name}:8491"
    last = spec["completions"] - 1
    place = find_place({**environment, "JOB_COMPLETION_INDEX": str(last)})
    assert place == Place(address, spec["completions"], last)


def test_slurm_is_asked_for_time_to_save() -> None:
    options = re.findall(r"^#SBATCH (\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= set(options)


def test_local_processes_are_marked_and_their_code_is_returned(tmp_path: Path) -> None:
    program = tmp_path / "echorl"
    program.write_text(
        '#!/bin/sh\necho "$ECHORL_PROCESS_ID of $ECHORL_PROCESSES at $ECHORL_COORDINATOR: $*"\n'
        'exit "$((ECHORL_PROCESS_ID * 2))"\n'
    )
    program.chmod(0o755)
    found = bash("local_multiprocess.sh", "3", *TRAIN, path=tmp_path, JAX_PLATFORMS="cpu")
    assert found.returncode == 2
    lines = sorted(found.stdout.splitlines())
    assert [line[:8] for line in lines] == ["[0] 0 of", "[1] 1 of", "[2] 2 of"]
    assert len({line.split(" at ")[1] for line in lines}) == 1
    assert json.dumps(" ".join(TRAIN))[1:-1] in lines[0]


def test_documented_commands_exist() -> None:
    text = (ROOT / "docs" / "launch.md").read_text()
    for path in set(re.findall(r"(?:launch|configs|tests)/[\w/]+\.(?:sh|sbatch|yaml|py)", text)):
        assert (ROOT / path).exists(), path
    assert text.count("- *Resume.*") == 3
