"""Storage that fails: one line, exit code 1, and the process ends at once."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echorl_jax.training.logs import RunLog
from tests.integration.conftest import ROOT

COUNTDOWN = str(ROOT / "echorl_jax" / "assets" / "countdown")
FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of memory, where the test may."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def echorl(*words: str, within_s: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echorl_jax", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=within_s)


def require_one_line(done: subprocess.CompletedProcess[str], named: str) -> None:
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("echorl: ") and named in last and FULL in last, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_a_run_on_a_full_disk_may_be_started_again(disk: Callable[[str], Path]) -> None:
    """Launchers give up after exit code 2, and a disk does not stay full."""
    workdir = disk("4k") / "run"
    done = echorl("train", f"--config={ROOT / 'configs' / 'countdown.py'}", f"--workdir={workdir}")
    require_one_line(done, str(workdir))
    assert len(done.stderr.splitlines()) == 1


def test_graded_lines_that_do_not_fit(disk: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"response": "x" * 9000, "answer": "4"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = disk("16k") / "graded.jsonl"
    options = ["--grader=math", "--workers=0", f"--out={out}"]
    require_one_line(echorl("grade", str(tmp_path / "rows.jsonl"), *options), str(out))
    command = [sys.executable, "-m", "echorl_jax", "grade", str(tmp_path / "rows.jsonl")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*command, *options[:2]], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    require_one_line(done, "standard output")


def test_a_report_and_a_model_that_do_not_fit(disk: Callable[[str], Path], tmp_path: Path) -> None:
    place = disk("64k")
    (tmp_path / "run").mkdir()
    report = echorl("report", f"--workdir={tmp_path / 'run'}", f"--out={place / 'page.html'}")
    require_one_line(report, str(place / "page.html"))
    converted = echorl("convert", f"--model={COUNTDOWN}", f"--out={place / 'model'}")
    require_one_line(converted, str(place / "model"))
    assert not (place / "model").exists()


@pytest.mark.slow
def test_generations_that_do_not_fit(disk: Callable[[str], Path]) -> None:
    out = disk("8k") / "eval"
    options = ["--data=countdown:split=eval&count=32", "--max_new_tokens=16", "--workers=0"]
    done = echorl("evaluate", f"--model={COUNTDOWN}", *options, f"--out={out}")
    require_one_line(done, str(out))


def test_a_log_on_a_full_disk_raises_where_it_is_written(disk: Callable[[str], Path]) -> None:
    """TensorBoard's events too: no thread of a library waits or complains afterwards."""
    threads = threading.active_count()
    log = RunLog(disk("16k"), first_step=0, total_steps=9, tensorboard=True)
    with pytest.raises(OSError, match=FULL), log:
        for step in range(1, 1000):
            log.write({"step": step, **{f"metric/{i}": 0.5 for i in range(20)}})
    assert threading.active_count() == threads


def test_a_checkpoint_that_fails_ends_the_process_at_once(tmp_path: Path) -> None:
    """Orbax leaves threads that wait for five minutes when it cannot make a directory."""
    program = f"""
import shutil
from pathlib import Path
from echorl_jax import cli
from tests.training.test_checkpoints import opened, save

def work(_):
    workdir = Path({str(tmp_path)!r})
    checkpoints = opened(workdir)
    save(checkpoints, 1)
    checkpoints.manager.wait_until_finished()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("not a directory any more")
    save(checkpoints, 2)
    checkpoints.close()

cli.run = work
cli.main([])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("echorl: "))
    assert "a checkpoint cannot be written: Not a directory" in line
    assert done.stderr.splitlines()[-1] == line
