"""Damaged files of a run: each command takes the step before, or says in one line what is wrong."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from echorl_jax import cli
from echorl_jax.config import Config
from echorl_jax.errors import RunStopped, UserError
from echorl_jax.evaluation.benchmark import Benchmark, run_benchmark
from echorl_jax.tools.report.page import write_report
from echorl_jax.training.run import open_run
from tests.integration.conftest import small_config
from tests.integration.test_train import train

# When one of several reads fails, Orbax leaves the others behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(128, 256)) * 3 + b"\n",
    "list": lambda content: b"[1, 2]\n",
    "object": lambda content: b"{}\n",
}
DUMP = "dumps/step_000001_update_00"


def config() -> Config:
    return small_config(
        steps=2,
        checkpoint={"keep": 2},
        # The last fault never comes, but makes a start read which ones have come.
        debug={"dump_step": 1, "inject": "term@90"},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a dump, and an evaluation in ``eval``."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(config(), workdir)
    (workdir / "injected.txt").write_text("kill@save:1\n")
    run_benchmark(evaluation(), workdir / "eval")
    return workdir


def evaluation() -> Benchmark:
    data = "countdown:split=eval&count=2"
    return Benchmark("builtin:countdown", data, max_new_tokens=8, workers=0, devices=1)


def resume(workdir: Path) -> None:
    """Opens the run where it stopped, which reads all files that a resume reads."""
    with open_run(config(), workdir, prompts_per_step=4, devices=jax.devices()[:1]) as (_, state):
        assert int(state.step) in (1, 2)


def convert(workdir: Path) -> None:
    cli.run(["convert", f"--model={workdir}", f"--out={workdir}.out"])


def replay(workdir: Path) -> None:
    cli.run(["replay", str(workdir / DUMP)])


def evaluate(workdir: Path) -> None:
    run_benchmark(evaluation(), workdir / "eval")


LOGS = ("metrics.jsonl", "samples/ledger.jsonl", "samples/step_000001.jsonl")
SMALL = ("_CHECKPOINT_METADATA", "notes/metadata", "state/_METADATA")
OF_CHECKPOINT = tuple(f"checkpoints/2/{name}" for name in SMALL)
READERS: dict[Callable[[Path], Any], tuple[str, ...]] = {
    resume: ("config.json", "environment.json", "injected.txt", *LOGS, *OF_CHECKPOINT),
    write_report: ("config.json", "environment.json", *LOGS),
    convert: ("config.json", *OF_CHECKPOINT),
    replay: tuple(
        f"{DUMP}/{name}" for name in ("dump.json", "micro_batches.safetensors", "params/_METADATA")
    ),
    evaluate: ("eval/options.json", "eval/generations.jsonl"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "read,file",
    [
        pytest.param(read, file, id=f"{getattr(read, '__name__', '')}-{file}")
        for read, files in READERS.items()
        for file in files
    ],
)
def test_a_damaged_file_is_passed_over_or_named_in_one_line(
    read: Callable[[Path], Any], file: str, how: str, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    path = workdir / file
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    try:
        read(workdir)
    except (UserError, RunStopped) as error:
        assert "\n" not in str(error) and str(workdir) in str(error)


@pytest.mark.parametrize("seed", range(4))
def test_a_report_survives_values_of_other_types(whole: Path, tmp_path: Path, seed: int) -> None:
    """One value in eight of every JSON file is of another type."""
    workdir, draw = tmp_path / "run", random.Random(seed)
    shutil.copytree(whole, workdir)
    for file in ("config.json", "environment.json", *LOGS):
        text = (workdir / file).read_text()
        parts = text.splitlines() if file.endswith("l") else [text]
        spoiled = [json.dumps(spoil(json.loads(part), draw)) for part in parts]
        (workdir / file).write_text("\n".join(spoiled) + "\n")
    assert write_report(workdir).stat().st_size > 0


def spoil(value: Any, draw: random.Random) -> Any:
    if draw.random() < 1 / 8:
        return draw.choice([None, True, -3, 1e300, "words", [], [[1], "x"], {}, {"a": {"b": 1}}])
    if isinstance(value, dict):
        return {name: spoil(part, draw) for name, part in value.items()}
    return [spoil(part, draw) for part in value] if isinstance(value, list) else value


def test_a_damaged_line_costs_that_line_alone(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines after it stay, and the file as it was is kept aside."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    first, second = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text(f"{first[:30]}\n{second}\n")
    resume(workdir)
    assert [json.loads(second)] == [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert (workdir / "set_aside" / "metrics.jsonl-1").read_text() == f"{first[:30]}\n{second}\n"
    assert "has 1 of the 2 lines that were there at the checkpoint" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_gone_says_that_it_starts_over(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    with open_run(config(), workdir, prompts_per_step=4, devices=jax.devices()[:1]) as (_, state):
        assert int(state.step) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "no checkpoint" in warning and "goes to step 2" in warning
    assert (workdir / "set_aside" / "metrics.jsonl-1").read_text() == before
