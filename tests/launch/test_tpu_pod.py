"""launch/tpu_pod.sh, run against a stand-in for gcloud whose hosts are folders."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tpu_pod.txt"
POD = ["--name=pod", "--zone=us-east5-a"]
TYPE = "--type=v5litepod-16"
TRAIN = ["train", "--config=configs/countdown.py", "--workdir=runs/it's"]
QUEUE = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]

# Google's program needs an account. Here queued resources tell the states of a story one by one;
# scp copies to every host's folder, and ssh runs its command there without the variables of this
# machine.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path(sys.argv[0]).parent
words = sys.argv[1:]
kind, verb = words[2:4]
with (here / "asked").open("a") as file:
    file.write(json.dumps(words) + "\\n")
hosts = sorted((here / "hosts").iterdir())
if kind == "queued-resources" and verb == "describe":
    state, *rest = (here / "states").read_text().split("\\n")
    (here / "states").write_text("\\n".join(rest))
    print(state)
    sys.exit(state == "")
if verb == "scp":
    for host in hosts:
        shutil.copy(words[4], host / words[5].partition(":")[2])
if verb == "ssh":
    command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
    hosts = hosts[:1] if "--worker=0" in words else hosts
    variables = {"PATH": os.environ["PATH"]}
    runs = [subprocess.run(["bash", "-c", command], cwd=h, env=variables) for h in hosts]
    sys.exit(max(run.returncode for run in runs))
"""
# The run on a host: host 0 ends with the next code of a story, 75 for a stop after step 2 of 4;
# with "wait" it stops at SIGTERM.
PYTHON = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if pathlib.Path.cwd().parent.name != "0":
    sys.exit(0)
workdir = pathlib.Path(next(w for w in sys.argv if w.startswith("--workdir=")).partition("=")[2])
workdir.mkdir(exist_ok=True)
code, *rest = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(rest))
(here / "seen").write_text(json.dumps([sys.argv[2:], dict(os.environ)]))
(workdir / "config.json").write_text(json.dumps({"steps": 4}, indent=2))
(workdir / "metrics.jsonl").write_text(json.dumps({"step": 4 if code in "012" else 2}) + "\\n")
while code == "wait" and not stopped:
    time.sleep(0.05)
sys.exit(int(code) if code in "012" else 0)
"""
SHARED = 'rmdir "$3" && mkdir -p "$HERE/bucket" && ln -s "$HERE/bucket" "$3"'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A folder for PATH with the stand-ins, and two hosts that have an environment already."""
    here = tmp_path / "cloud"
    program(here / "gcloud", f"#!{sys.executable}\n{GCLOUD}")
    program(here / "sleep", "#!/bin/sh\n")
    program(here / "mountpoint", '#!/bin/sh\ntest -L "$2"\n')
    program(here / "gcsfuse", f"#!/bin/sh\nHERE={here}\n{SHARED}\n")
    program(here / "python3.11", "#!/bin/sh\n")
    (here / "run.py").write_text(PYTHON)
    for host in ("0", "1"):
        bin = here / "hosts" / host / "echorl" / ".venv" / "bin"
        program(bin / "python", f'#!/bin/sh\nexec {sys.executable} {here}/run.py {here} "$@"\n')
        program(bin / "pip", f'#!/bin/sh\nprintf "%s\\n" "$@" > {here}/pip-{host}\n')
    return here


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with large and private files in it."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    kept = ["echorl_jax/data/rows.py", "echorl_jax/models/rope.py", "configs/mine.py"]
    large = [".git/config", ".venv/bin/python", ".env", "runs/a/metrics.jsonl", "data/rows.jsonl"]
    large += [
        "models/a/model.safetensors",
        "echorl_jax/__pycache__/cli.pyc",
        "examples/big.parquet",
    ]
    for name in (*kept, *large):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    os.truncate(root / "examples/big.parquet", 21 * 2**20)
    return root


def launch(
    *words: str, path: Path | None = None, root: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", str(root / "launch" / "tpu_pod.sh"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
    )


def story(cloud: Path, states: list[str], codes: list[str]) -> None:
    (cloud / "states").write_text("\n".join(states))
    (cloud / "codes").write_text(" ".join(codes))


def asked(cloud: Path) -> list[list[str]]:
    return [json.loads(line) for line in (cloud / "asked").read_text().splitlines()]


def test_a_dry_run_prints_every_command(checkout: Path) -> None:
    """Against a golden file; nothing is run, whatever gcloud is or is not there."""
    options = [*POD, "--type=v5p-64", "--project=mine", "--spot", "--bucket=my-runs", "--delete"]
    options += ["--extras=wandb", "--env=HF_TOKEN", "--dry-run"]
    found = launch(*options, "--", *TRAIN, root=checkout, HF_TOKEN="secret", TMPDIR="/tmp")
    assert found.returncode == 0, found.stderr
    printed = found.stdout.replace(str(checkout), "ROOT")
    if "ECHORL_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(printed)
    assert printed == GOLDEN.read_text()
    # Each line can be pasted: it is one command of the shell, or a heading.
    for line in printed.splitlines():
        words = shlex.split(line.replace("$'", "'").replace("\\'", "")) if line[0] != "=" else []
        assert not words or words[0] in ("gcloud", "tar")


@pytest.mark.parametrize(
    ("given", "accelerator", "image"),
    [
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5e-4", "v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v5p-64", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_the_image_is_that_of_the_type(given: str, accelerator: str, image: str) -> None:
    """Images: docs.cloud.google.com/tpu/docs/runtimes."""
    words = [*POD, f"--type={given}", "--bucket=b", "--dry-run", "--", *TRAIN]
    printed = launch(*words).stdout
    (create,) = re.findall(r"^gcloud .*queued-resources create .*$", printed, re.M)
    assert f"--accelerator-type={accelerator} --runtime-version={image}" in create
    other = launch("--version=mine", *words).stdout
    assert "--runtime-version=mine" in other and image not in other


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--zone=z", TYPE, "--", *TRAIN], "--name=NAME is missing"),
        ([*POD, TYPE, "--", "train", "--config=x"], "--workdir=DIR is missing"),
        ([*POD, TYPE], "what to run is missing"),
        ([*POD, TYPE, "--spott", "--", *TRAIN], "unknown option --spott"),
        ([*POD, "--type=v9-8", "--", *TRAIN], "--type=v9-8: known are v5litepod-16"),
        ([*POD, "--type=v6e", "--", *TRAIN], "--type=v6e: known are"),
        ([*POD, TYPE, "--", *TRAIN], "v5litepod-16 has several hosts"),
        ([*POD, TYPE, "--bucket=b", "--", "train", "--workdir=out"], "is a folder of each host"),
        ([*POD, TYPE, "--bucket=b", "--", "train", "--workdir=gs://c/a"], "is not in --bucket=b"),
        ([*POD, TYPE, "--", "train", "--workdir=s3://c/a"], "must be gs://BUCKET/DIR or a path"),
        ([*POD, "--type=v6e-8", "--extras=wand", "--", *TRAIN], "has no such extra"),
        ([*POD, "--type=v6e-8", "--env=NOT_HERE", "--", *TRAIN], "--env=NOT_HERE: no such"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], expected: str) -> None:
    found = launch(*options, "--dry-run") if "--" not in options else launch(*options)
    assert found.returncode == 2 and expected in found.stderr
    assert len(found.stderr.splitlines()) == 1 and not found.stdout


@pytest.mark.parametrize(
    ("type", "options", "workdir"),
    [("v5p-8", [], "runs/a"), ("v6e-8", [], "out"), ("v6e-16", [], "/mnt/share/a")],
)
def test_a_workdir_of_one_host_or_of_a_mount_passes(
    type: str, options: list[str], workdir: str
) -> None:
    words = [*POD, f"--type={type}", *options, "--dry-run", "--", "train", f"--workdir={workdir}"]
    found = launch(*words)
    assert found.returncode == 0 and ("touch" in found.stdout) == (type == "v6e-16"), found.stderr


@pytest.mark.parametrize(
    ("states", "codes", "code", "verbs"),
    [
        # There is no request, then the slice is preempted after the run had saved itself.
        ([*QUEUE, "SUSPENDED", "ACTIVE"], ["75", "0"], 0, "create run delete create run"),
        (["ACTIVE"] * 4, ["1", "0"], 0, "run run"),
        (["PROVISIONING", "PROVISIONING", "ACTIVE"], ["2"], 2, "run"),
        (["ACTIVE"] * 6, ["1"] * 3, 1, "run run run"),
        (["", "ACCEPTED", "FAILED", "over quota"], [], 2, "create"),
    ],
)
def test_a_run_begins_again(
    cloud: Path, checkout: Path, states: list[str], codes: list[str], code: int, verbs: str
) -> None:
    story(cloud, states, codes)
    words = [*POD, TYPE, "--bucket=b", "--restarts=2", "--", *TRAIN]
    found = launch(*words, path=cloud, root=checkout)
    assert found.returncode == code, found.stdout + found.stderr
    known = {"create": "create", "delete": "delete", "scp": "run"}
    assert " ".join(known[w[3]] for w in asked(cloud) if w[3] in known) == verbs
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
        assert (f"== pod is {state} after 0 min" in found.stdout) == (state in states)
    assert ("over quota" in found.stderr) == ("over quota" in states)


def test_files_variables_and_extras_reach_the_hosts(cloud: Path, checkout: Path) -> None:
    """The workdir is in a bucket; a quote in a value or a word goes through every shell."""
    story(cloud, QUEUE, ["0"])
    token = "hf_it's a $SECRET"
    run = ["train", "--config.data.grader=a.py:f('x', \"y\")", "--workdir=gs://b/it's"]
    options = [*POD, TYPE, "--extras=wandb", "--env=HF_TOKEN,ECHORL_A*", "--delete"]
    variables = {"HF_TOKEN": token, "ECHORL_A1": "1", "ECHORL_A2": "2", "ECHORL_B": "3"}
    found = launch(*options, "--", *run, path=cloud, root=checkout, **variables)
    assert found.returncode == 0, found.stdout + found.stderr
    words, seen = json.loads((cloud / "seen").read_text())
    assert words == ["-m", "echorl_jax", "train", run[1], "--workdir=runs/it's"]
    assert (seen["HF_TOKEN"], seen["ECHORL_A1"], seen["ECHORL_A2"]) == (token, "1", "2")
    assert "ECHORL_B" not in seen
    assert (cloud / "bucket" / "it's" / "metrics.jsonl").exists()
    assert not (cloud / "bucket" / "it's" / ".seen-by-all").exists()
    # The value is in no command and no log.
    for text in (found.stdout, found.stderr, (cloud / "asked").read_text()):
        assert "SECRET" not in text
    for host in (cloud / "hosts").iterdir():
        assert "-e\n.[wandb,gcs]\n" in (cloud / f"pip-{host.name}").read_text()
        home = host / "echorl"
        assert (home / "launch.env").stat().st_mode & 0o777 == 0o600
        files = {str(f.relative_to(home)) for f in home.rglob("*") if f.is_file()}
        assert {"echorl_jax/data/rows.py", "echorl_jax/models/rope.py"} <= files
        assert {"configs/mine.py", "launch/attempt.sh", "requirements.txt"} <= files
        assert not [f for f in files if re.match(r"\.(git|env)|data|models|.*(\.pyc|parquet)$", f)]
    assert "left out, over 20 MB: ./examples/big.parquet" in found.stdout
    assert asked(cloud)[-1][2:4] == ["queued-resources", "delete"]


def test_a_workdir_that_hosts_do_not_share_ends_the_launch(cloud: Path, checkout: Path) -> None:
    program(cloud / "gcsfuse", "#!/bin/sh\n")
    story(cloud, QUEUE, [])
    found = launch(*POD, TYPE, "--bucket=b", "--", *TRAIN, path=cloud, root=checkout)
    assert found.returncode == 2 and "is not seen by all hosts" in found.stderr
    assert not (cloud / "seen").exists()


def test_the_documented_stop_saves_and_ends_the_run(cloud: Path, checkout: Path) -> None:
    text = (ROOT / "docs" / "launch.md").read_text()
    (stop,) = re.findall(r"--worker=0 --command='([^']*run\.pid[^']*)'` saves", text)
    story(cloud, QUEUE, ["wait"])
    words = [*POD, TYPE, "--bucket=b", "--restarts=0", "--", *TRAIN]
    environment = os.environ | {"PATH": f"{cloud}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(checkout / "launch" / "tpu_pod.sh"), *words]
    following = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cloud / "bucket" / "it's" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    host = cloud / "hosts" / "0"
    subprocess.run(["bash", "-c", stop], cwd=host, check=True)
    assert following.wait(timeout=60) == 1
    assert (host / "echorl" / "run.code").read_text() == "75\n"
