"""Sweeps: intervals against scipy, the options of a setting, and two real runs of two steps."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats
from synthetic_run import dump_lines

from echorl_jax.config_file import load_config, to_dict
from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.runs import read_run
from echorl_jax.tools.report.sweep import (
    Outcome,
    estimate,
    paired,
    read_outcome,
    sweep_section,
    sweep_table,
)

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "countdown.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


def outcome(setting, seed, pass_1):
    numbers = {"before": 0.3, "pass_k": pass_1 + 0.2, "entropy": 0.1, "all_right": 0.2}
    numbers |= {"clips": 4.0, "clip_tokens": 5.0, "tokens": 10.0}
    return Outcome(setting=setting, seed=seed, steps=9, pass_1=pass_1, k=8, **numbers)


def test_the_interval_is_that_of_students_t():
    values = [0.41, 0.44, 0.47, 0.43, 0.45]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert estimate([0.4]).low is None and estimate([0.4]).text() == "40.0%"


def test_runs_are_paired_by_seed():
    plain = [outcome("plain", 0, 0.40), outcome("plain", 1, 0.50), outcome("plain", 7, 0.9)]
    echo = [outcome("echo", 1, 0.53), outcome("echo", 0, 0.41)]
    found = paired(echo, plain, "pass_1")
    assert found is not None and found.seeds == 2 and found.mean == pytest.approx(0.02)
    assert paired(echo, [outcome("plain", 5, 0.1)], "pass_1") is None
    columns, rows = sweep_table([*plain, *echo], {"echo": "plain"})
    assert [row[0] for row in rows] == ["plain", "echo"] and len(columns) == len(rows[0])
    assert rows[0][4] == "–" and rows[1][4] == "plain" and rows[1][5].startswith("+2.0 [")


def write_metrics(directory, count):
    directory.mkdir()
    rows = [{"step": 0, "eval/countdown/pass@1": 0.25, "eval/countdown/pass@4": 0.5}]
    rows += [{"step": i, "reward/mean": 0.1 * i, "entropy/token_mean": 1 / i} for i in (1, 2, 3)]
    rows[-1] |= {"eval/countdown/pass@1": 0.75, "eval/countdown/pass@4": 0.9}
    dump_lines(directory / "metrics.jsonl", rows[: count + 1])
    return directory


def test_only_a_finished_run_has_an_outcome(tmp_path):
    half = write_metrics(tmp_path / "half", 2)
    whole = write_metrics(tmp_path / "whole", 3)
    assert read_outcome(tmp_path / "none", setting="a", seed=0, steps=3) is None
    assert read_outcome(half, setting="a", seed=0, steps=3) is None
    # Done, but fewer steps than are asked for now.
    assert read_outcome(whole, setting="a", seed=0, steps=4) is None
    found = read_outcome(whole, setting="a", seed=4, steps=3)
    assert found is not None
    assert (found.before, found.pass_1, found.pass_k, found.k) == (0.25, 0.75, 0.9, 4)
    assert (found.steps, found.seed, found.entropy) == (3, 4, pytest.approx(1 / 3))
    section = sweep_section([found], {}, {"a": [read_run(whole)]})
    assert [panel.title for panel in section.panels] == ["Reward", "Token entropy"]


def test_a_setting_changes_only_its_own_options(sweep):
    assert sweep.Setting(echo=False).options(10) == {
        "objective.name": "grpo",
        "echo.enabled": "false",
    }
    early = sweep.Setting(window="early")
    assert early.options(10)["echo.end_step"] == "5" and "echo.start_step" not in early.options(10)
    assert early.name == "grpo + echo, window=early" and early.plain.name == "grpo"
    names = [s.name for s in sweep.GRIDS["objectives"]]
    assert names == [n + e for n in ("grpo", "dapo", "luffy", "uft") for e in ("", " + echo")]


def test_a_grid_lists_each_setting_once(sweep):
    both = sweep.parse(["--grid=main,coef", "--out=x"])
    assert [s.name for s in sweep.settings_of(both)] == [
        "grpo",
        "grpo + echo",
        "grpo + echo, coef=1e-4",
        "grpo + echo, coef=1e-2",
        "grpo + echo, coef=1e-1",
    ]
    own = sweep.parse(["--coef=0,1e-3", "--select=max,min", "--out=x"])
    assert [s.name for s in sweep.settings_of(own)] == [
        "grpo",
        "grpo + echo",
        "grpo + echo, select=min",
    ]


def test_a_directory_with_a_run_of_other_options_is_refused(tmp_path, sweep):
    def job_of(*words):
        arguments = sweep.parse([f"--out={tmp_path}", f"--config={CONFIG}", *words])
        job = sweep.Job(sweep.ECHO, 0, tmp_path / "run", arguments.steps)
        return job, arguments

    job, arguments = job_of("--steps=4")
    options = sweep.options_of(job, arguments)
    job.directory.mkdir()
    made = json.dumps(to_dict(load_config(str(CONFIG), options)))
    (job.directory / "config.json").write_text(made)
    sweep.require_same(job, arguments)
    sweep.require_same(*job_of("--steps=8"))
    with pytest.raises(SystemExit, match="other options .eval."):
        sweep.require_same(*job_of("--steps=4", "--samples=2"))
    with pytest.raises(SystemExit, match="other options .rollout."):
        sweep.require_same(*job_of("--steps=8", "--config.rollout.group_size=4"))


@pytest.mark.slow
def test_two_runs_of_two_steps(tmp_path):
    out = tmp_path / "sweep"
    program = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--grid=main", "--seeds=1"]
    program += [f"--out={out}", "--problems=8", "--samples=2", "--processes=2"]
    program += ["--config.rollout.prompts_per_step=4", "--config.rollout.group_size=4"]

    def do(*more):
        return subprocess.run([*program, *more], cwd=ROOT, capture_output=True, text=True)

    # One step, then the same with two: the runs go on from where they stopped.
    first = do("--steps=1")
    assert first.returncode == 0, first.stdout + first.stderr
    before = (out / "grpo" / "seed-0" / "metrics.jsonl").read_text()
    second = do("--steps=2")
    assert second.returncode == 0, second.stdout + second.stderr
    metrics = (out / "grpo" / "seed-0" / "metrics.jsonl").read_text()
    assert metrics.startswith(before.splitlines()[0]) and len(metrics.splitlines()) == 3
    rows = list(read_jsonl(out / "sweep.jsonl"))
    assert {row["setting"] for row in rows} == {"grpo", "grpo + echo"}
    assert "| grpo + echo | 1 |" in (out / "table.md").read_text()
    assert "Settings compared" in (out / "report.html").read_text()
    # Finished runs are kept as they are.
    third = do("--steps=2")
    assert "2 runs, 2 of them finished before" in third.stdout
    assert (out / "grpo" / "seed-0" / "metrics.jsonl").read_text() == metrics
