"""Sweeps: statistics against scipy, the options of a setting, and real runs of two steps."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_run import dump_lines

from echorl_jax.config_file import load_config, to_dict
from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.runs import read_run
from echorl_jax.tools.report.sweep import (
    Outcome,
    detectable,
    estimate,
    holm,
    paired,
    read_outcome,
    sweep_section,
    sweep_tables,
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


def outcome(setting, seed, pass_1, **after):
    return Outcome(
        setting=setting,
        seed=seed,
        steps=9,
        before={"sums/pass@1": 0.3},
        after={"sums/pass@1": pass_1, **after},
        late={"entropy/token_mean": 0.1},
        step_s=2.0,
    )


def test_the_interval_is_that_of_students_t():
    values = [0.41, 0.44, 0.47, 0.43, 0.45]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert estimate([0.4]).low is None and estimate([0.4]).text() == "40.0%"
    assert (estimate([0.0, 0.0]).p, estimate([0.1, 0.1]).p, estimate([0.1]).p) == (1.0, 0.0, 1.0)


def test_holms_correction_is_the_step_down_of_bonferroni():
    # Worked by hand: 4 x 0.005, then 3 x 0.01, then 2 x 0.03, and 0.04 not below that.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (8, 3), (20, 10)])
def test_a_detectable_difference_is_found_with_the_power_asked_for(seeds, comparisons):
    """The power of the t-test at that difference, from the non-central t distribution."""
    size = detectable(0.02, seeds=seeds, comparisons=comparisons)
    limit = stats.t.isf(0.025 / comparisons, seeds - 1)
    shift = size / (0.02 / np.sqrt(seeds))
    assert stats.nct.sf(limit, seeds - 1, shift) == pytest.approx(0.8, abs=1e-3)
    assert detectable(0.02, seeds=seeds + 1, comparisons=comparisons) < size


def test_runs_are_paired_by_seed():
    plain = [outcome("plain", 0, 0.40), outcome("plain", 1, 0.50), outcome("plain", 7, 0.9)]
    echo = [outcome("echo", 1, 0.53), outcome("echo", 0, 0.41)]
    found = paired(echo, plain, "sums/pass@1")
    assert found is not None and found.seeds == 2 and found.mean == pytest.approx(0.02)
    assert paired(echo, [outcome("plain", 5, 0.1)], "sums/pass@1") is None
    success, differences, training = sweep_tables([*plain, *echo], {"echo": "plain"})
    assert success[0] == ["Setting", "Seeds", "sums/pass@1"]
    assert [row[:2] for row in success[1]] == [["plain", "3"], ["echo", "2"]]
    assert [row[:3] for row in differences[1]] == [["echo", "plain", "2"]]
    assert differences[1][0][3].startswith("+2.0 [") and training[1][0] == [
        "plain",
        "0.1 [0.1, 0.1]",
        "2",
    ]


def test_differences_are_corrected_over_the_settings_of_a_column():
    rng = np.random.default_rng(0)
    values = rng.normal([[0.5], [0.51], [0.53], [0.56]], 0.01, (4, 6))
    names = ["plain", "a", "b", "c"]
    outcomes = [
        outcome(name, seed, row[seed], **{"long/steps/mean": 3.0 + seed})
        for name, row in zip(names, values, strict=True)
        for seed in range(6)
    ]
    (columns, rows) = sweep_tables(outcomes, dict.fromkeys("abc", "plain"))[1]
    assert columns == ["Setting", "Compared with", "Pairs", "sums/pass@1", "long/steps"]
    raw = [stats.ttest_rel(row, values[0]).pvalue for row in values[1:]]
    order = np.argsort(raw)
    corrected = np.maximum.accumulate(np.minimum(1, np.sort(raw) * [3, 2, 1]))
    for rank, place in enumerate(order):
        assert rows[place][3].endswith(f", p {corrected[rank]:.2g}")
    # Not a share: plain numbers, and no difference anywhere.
    assert rows[0][4] == "0 [0, 0], p 1"


def write_metrics(directory, count):
    directory.mkdir()
    rows = [{"step": 0, "eval/countdown/pass@1": 0.25, "eval/countdown/pass@4": 0.5}]
    step = {"time/rollout_s": 0.5, "time/update_s": 1.5}
    rows += [
        {"step": i, "reward/mean": 0.1 * i, "entropy/token_mean": 1 / i, **step} for i in (1, 2, 3)
    ]
    rows[-1] |= {"eval/countdown/pass@1": 0.75, "eval/countdown/pass@4": 0.9}
    rows[-1]["memory/peak_bytes"] = 2.5e9
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
    assert found.before == {"countdown/pass@1": 0.25, "countdown/pass@4": 0.5}
    assert found.after == {"countdown/pass@1": 0.75, "countdown/pass@4": 0.9}
    assert found.main == "countdown/pass@1" and found.step_s == 2.0
    assert (found.steps, found.seed) == (3, 4)
    assert found.late == {"entropy/token_mean": pytest.approx(1 / 3), "memory/peak_bytes": 2.5e9}
    assert sweep_tables([found], {})[-1][1] == [["a", "0.333", "2.50 GB", "2"]]
    section = sweep_section([found], {}, {"a": [read_run(whole)]})
    assert [panel.title for panel in section.panels] == [
        "countdown/pass@1",
        "countdown/pass@4",
        "Reward",
        "Token entropy",
    ]


def test_a_setting_changes_only_its_own_options(sweep):
    assert sweep.Setting(echo=False).options(10) == {
        "objective.name": "grpo",
        "echo.enabled": "false",
    }
    early = sweep.Setting(window="early")
    assert early.options(10)["echo.end_step"] == "5" and "echo.start_step" not in early.options(10)
    assert early.name == "grpo + echo, window=early" and early.plain.name == "grpo"
    rival = sweep.Setting("psr", echo=False, more=("objective.mini_batches=2",))
    assert rival.name == "psr, mini_batches=2" and rival.reference == sweep.PLAIN
    assert rival.options(10)["objective.mini_batches"] == "2"
    twin = sweep.Setting(more=("echo.top_k=8", "objective.mini_batches=2"))
    assert twin.reference.name == "grpo, mini_batches=2"
    full, adapters = sweep.GRIDS["lora"]
    assert adapters.name == "grpo, rank=8, learning_rate=4e-4" and adapters.reference == full
    assert load_config(str(CONFIG), adapters.options(10)).lora.rank == 8
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


def test_every_setting_of_every_grid_is_a_config_and_has_a_name_of_its_own(tmp_path, sweep):
    arguments = sweep.parse([f"--out={tmp_path}", f"--config={CONFIG}", "--steps=4"])
    settings = {setting for grid in sweep.GRIDS.values() for setting in grid}
    assert len({setting.name for setting in settings}) == len(settings)
    assert len({sweep.folder_of(setting) for setting in settings}) == len(settings)
    jobs = [sweep.Job(s, 0, tmp_path / "run", 4, coef="0.5") for s in settings]
    digests = {sweep.digest(sweep.config_of(job, arguments)) for job in jobs}
    # With one coefficient for all, settings that differ in it alone are one config.
    assert len(digests) > len(settings) / 2


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


def test_power_is_told_from_pairs_and_without_them(sweep, capsys):
    jobs = [sweep.Job(s, 0, Path("x"), 9) for s in (sweep.PLAIN, sweep.ECHO)]
    plain = [outcome("grpo", seed, 0.5 + 0.01 * (seed % 2)) for seed in range(4)]
    sweep.print_power(plain, jobs)
    # Deviation of 0.5, 0.51, 0.5, 0.51 is 0.577 points; sqrt(2) of it 0.82.
    assert "deviation 0.82 points (as if runs were not paired)" in capsys.readouterr().out
    echo = [outcome("grpo + echo", seed, 0.52 + 0.01 * (seed % 2)) for seed in range(3)]
    echo += [outcome("grpo + echo", 3, 0.55)]
    sweep.print_power([*plain, *echo], jobs)
    told = capsys.readouterr().out
    # Differences 2, 2, 2 and 4 points.
    assert "deviation 1.00 points (of paired differences)" in told
    assert f"8 seeds {100 * detectable(0.01, seeds=8):+.1f}" in told


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
    results = (out / "results.jsonl").read_text()
    rows = {row["setting"]: row for row in read_jsonl(out / "results.jsonl") if row["steps"] == 2}
    assert set(rows) == {"grpo", "grpo + echo"}
    assert rows["grpo"]["config"] != rows["grpo + echo"]["config"]
    assert rows["grpo"]["versions"]["jax"] and rows["grpo"]["options"]["objective.name"] == "grpo"
    assert "| grpo + echo | grpo | 1 |" in (out / "table.md").read_text()
    assert "Settings compared" in (out / "report.html").read_text()
    # Finished runs are kept as they are, and known from the file of results alone.
    shutil.rmtree(out / "grpo-echo")
    third = do("--steps=2")
    assert "2 runs, 2 of them finished before" in third.stdout
    assert (out / "grpo" / "seed-0" / "metrics.jsonl").read_text() == metrics
    assert (out / "results.jsonl").read_text() == results
    again = do("--steps=2", "--again=1")
    assert again.returncode == 0 and "grpo, seed 0: equal" in again.stdout


@pytest.mark.slow
def test_a_matched_coefficient_gives_solved_prompts_the_rivals_weight(tmp_path, sweep):
    words = [f"--out={tmp_path}", f"--config={CONFIG}", "--rival=psr"]
    words += ["--config.rollout.prompts_per_step=16", "--config.rollout.group_size=2"]
    arguments = sweep.parse(words)
    coef = float(sweep.matched_coef(sweep.MATCH, arguments))
    job = sweep.Job(sweep.MATCH, 0, tmp_path / "check", 8, str(coef))
    frozen = {"optim.learning_rate": "1e-20", "eval.every": "0"}
    options = sweep.options_of(job, arguments) | frozen
    assert sweep.train(job.directory, options, arguments) == 0
    own, rival = (
        read_run(directory).series("echo/solved_weight")[1]
        for directory in (job.directory, tmp_path / "matched" / "psr")
    )
    assert any(rival)
    assert sum(own) == pytest.approx(sum(rival), rel=0.01)
    third = sweep.matched_coef(sweep.Setting(coef="matched*0.3"), arguments)
    assert float(third) == pytest.approx(0.3 * coef, rel=0.01)
