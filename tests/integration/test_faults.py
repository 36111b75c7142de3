"""Runs that are killed, spoiled and starved: what comes out is what an undisturbed run gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax import cli
from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import to_dict
from echorl_jax.data import load_tokenizer
from echorl_jax.errors import RunStopped
from echorl_jax.files import read_steps
from echorl_jax.models import load_decoder, load_model
from echorl_jax.training import loop
from echorl_jax.training.checkpoints import read_params
from tests.integration.conftest import ROOT, small_config
from tests.integration.test_train import same, steady, train

SHAPES = load_decoder(ROOT / "echorl_jax" / "assets" / "countdown").param_shapes()
PHASES = ("rollout", "grading", "update", "save")


def command(config: Config, workdir: Path, **environment: str) -> subprocess.Popen[bytes]:
    """`echorl train` as a user starts it, on one device."""
    file = workdir.with_suffix(".py")
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(to_dict(config))!r}))\n"
    )
    words = ["train", f"--config={file}", f"--workdir={workdir}"]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "echorl_jax", *words],
            env={**os.environ, "XLA_FLAGS": "", **environment},
            stderr=subprocess.STDOUT,
            stdout=log,
        )


def params_of(workdir: Path) -> dict[str, np.ndarray]:
    """The final parameters, read back from the checkpoint, by the name of the tensor."""
    return read_params(workdir, "latest", SHAPES)[1]


def require_same_run(one: Path, other: Path) -> None:
    assert steady(one) == steady(other)
    for name in ("ledger.jsonl", "step_000002.jsonl"):
        assert (one / "samples" / name).read_text() == (other / "samples" / name).read_text()
    pairs = zip(jax.tree.leaves(params_of(one)), jax.tree.leaves(params_of(other)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


EVALUATED: dict[str, Any] = {
    "data": {"eval": "countdown:split=eval&count=8"},
    "eval": {"every": 1},
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, each evaluated, without a fault."""
    workdir = tmp_path_factory.mktemp("evaluated")
    train(small_config(steps=2, **EVALUATED), workdir)
    return workdir


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps without a fault; both checkpoints are kept, and the model is exported."""
    workdir = tmp_path_factory.mktemp("two_steps")
    train(small_config(steps=2, checkpoint={"keep": 2, "export": True}), workdir)
    return workdir


def test_a_kill_during_a_save_leaves_no_trace(evaluated: Path, tmp_path: Path) -> None:
    """The command is killed for real before the checkpoint of step 1 is committed."""
    config = small_config(steps=2, **EVALUATED, debug={"inject": "kill@save:1"})
    assert command(config, tmp_path / "killed").wait() == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert len(left) == 1 and left[0].startswith("1.orbax")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    train(config, tmp_path / "killed")
    assert [line["step"] for line in steady(tmp_path / "killed")] == [0, 1, 2]
    require_same_run(tmp_path / "killed", evaluated)


def test_a_gradient_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Skipped, counted, dumped, computed again to the bit, and in the end the run stops."""
    config = small_config(
        steps=4,
        optim={"max_bad_steps": 2, "micro_batch_tokens": 512},
        checkpoint={"keep": 9},
        debug={"inject": "nan@2,nan@3", "dump_step": 1},
    )
    with pytest.raises(RunStopped, match="step 3: the gradient was not finite for 2 updates"):
        train(config, tmp_path)
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert [line["optim/skipped"] for line in lines] == [0, 1]
    assert lines[1]["loss/total"] is None
    first, second = (read_params(tmp_path, step, SHAPES)[1] for step in "12")
    assert same(first, second)
    dumps = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert dumps == [f"step_00000{step}_update_00" for step in (1, 2, 3)]

    healthy = replayed(tmp_path / "dumps" / dumps[0], capsys)
    facts = json.loads((tmp_path / "dumps" / dumps[0] / "dump.json").read_text())
    assert facts["loss"] == lines[0]["loss/total"]
    assert facts["grad_norm"] == lines[0]["optim/grad_norm"]
    assert healthy[-1] == "reproduced" and "not finite" not in " ".join(healthy)
    assert f"the run saw {facts['loss']}" in healthy[-3]

    spoiled = replayed(tmp_path / "dumps" / dumps[1], capsys)
    assert spoiled[-1] == "reproduced" and "the run saw nan" in spoiled[-2]
    (named,) = (line for line in spoiled if "not finite in the data" in line)
    assert "advantages[" in named and "token_weights[" in named
    (rows,) = (line for line in spoiled if "by row(s)" in line)
    assert "," not in rows

    changed = {**facts, "grad_norm": facts["grad_norm"] * 1.001}
    (tmp_path / "dumps" / dumps[0] / "dump.json").write_text(json.dumps(changed))
    assert replayed(tmp_path / "dumps" / dumps[0], capsys, code=1)[-1] == "NOT reproduced"


def replayed(dump: Path, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> list[str]:
    capsys.readouterr()
    assert cli.run(["replay", str(dump)]) == code
    return capsys.readouterr().out.splitlines()


def test_bad_graders_and_a_failing_evaluation_cost_themselves(tmp_path: Path) -> None:
    config = small_config(
        steps=2,
        data={
            **{"eval": "countdown:split=eval&count=4", "grader": "countdown"},
            **{"grader_workers": 2, "grader_timeout_s": 2.0},
        },
        eval={"every": 1},
        debug={"inject": "reward_crash@0.3,reward_hang@0.1,reward_leak@0.1,eval_fail@1"},
    )
    train(config, tmp_path)
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert [line["eval/failed"] for line in lines] == [0, 1, 0]
    assert ["eval/countdown/pass@1" in line for line in lines] == [True, False, True]
    for step in (1, 2):
        samples = list(read_steps(tmp_path / "samples" / f"step_{step:06d}.jsonl"))
        bad = [s for s in samples if s["reason"].startswith(("no verdict", "the grad"))]
        assert bad and all(s["reward"] == 0 for s in bad)
        assert lines[step]["reward/ungraded_fraction"] == len(bad) / len(samples)
        assert len(bad) < len(samples)


def test_a_signal_ends_an_evaluation_which_is_made_up_for(evaluated: Path, tmp_path: Path) -> None:
    config = small_config(steps=2, **EVALUATED, debug={"inject": "term@evaluation:1"})
    train(config, tmp_path / "run")
    before = steady(tmp_path / "run")
    assert [line["step"] for line in before] == [0, 1] and "eval/failed" not in before[1]
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
    train(config, tmp_path / "run")
    require_same_run(tmp_path / "run", evaluated)


@pytest.mark.slow
def test_a_kill_in_an_evaluation_costs_the_evaluation_alone(tmp_path: Path) -> None:
    """The checkpoint of the step is there before the evaluation ends, and is not written again."""
    data = {"eval": "countdown:split=eval&count=64"}
    config = small_config(steps=1, data=data, eval={"every": 1, "samples": 8})
    workdir = tmp_path / "run"
    process, checkpoint = command(config, workdir), workdir / "checkpoints" / "1"
    deadline = time.monotonic() + 500
    while not checkpoint.is_dir() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    start, trained = steady(workdir)
    assert "eval/failed" in start and "eval/failed" not in trained
    written = checkpoint.stat()
    train(config, workdir)
    again, evaluated = steady(workdir)
    assert again == start and evaluated["eval/failed"] == 0
    assert {k: v for k, v in evaluated.items() if not k.startswith("eval/")} == trained
    assert os.path.samestat(written, checkpoint.stat())


def test_a_signal_before_the_first_step_is_heeded_at_once(tmp_path: Path) -> None:
    """The evaluation of the start would take many minutes."""
    config = small_config(
        data={"eval": "countdown:split=eval&count=4096"},
        eval={"every": 1, "rows": 4096, "samples": 64},
        optim={"compile_ahead": True},
    )
    process, metrics = command(config, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert metrics.read_text() == ""


@pytest.mark.slow
def test_a_signal_from_the_switch(tmp_path: Path) -> None:
    config = small_config(steps=3, checkpoint={"every": 0}, debug={"inject": "term@2"})
    train(config, tmp_path)
    assert [line["step"] for line in steady(tmp_path)] == [1, 2]
    train(config, tmp_path)
    assert [line["step"] for line in steady(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = small_config(steps=3, debug={"inject": "disk_full@checkpoint:2"})
    with pytest.raises(RunStopped, match="No space left on device.*; step 1 stays"):
        train(config, tmp_path)
    train(config, tmp_path)
    assert [line["step"] for line in steady(tmp_path)] == [1, 2, 3]


def test_a_workdir_is_never_started_over(two_steps: Path) -> None:
    before = (two_steps / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run .*resume = none"):
        train(small_config(steps=2, checkpoint={"resume": "none"}), two_steps)
    assert (two_steps / "metrics.jsonl").read_bytes() == before


def test_any_checkpoint_can_be_exported(two_steps: Path, tmp_path: Path) -> None:
    for step, out in (("latest", "new"), ("1", "old")):
        options = [f"--model={two_steps}", f"--step={step}", f"--out={tmp_path / out}"]
        assert cli.run(["convert", *options]) == 0
    load = {"dtype": "float32"}
    exported, newest, oldest = (
        load_model(str(path), **load)[1]
        for path in (two_steps / "export", tmp_path / "new", tmp_path / "old")
    )
    assert same(exported, newest) and not same(exported, oldest)
    assert load_tokenizer(str(tmp_path / "old")).vocab_size == 495


@pytest.mark.slow
def test_eight_devices_go_on_where_one_stopped(tmp_path: Path) -> None:
    one = train(small_config(steps=1), tmp_path)
    one = jax.device_get(one.params)
    wide = small_config(steps=1, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    eight = loop.train(wide, tmp_path, devices=jax.devices()[:8])
    assert same(one, jax.device_get(eight.params))
    more = small_config(steps=2, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    loop.train(more, tmp_path, devices=jax.devices()[:8])
    assert [line["step"] for line in steady(tmp_path)] == [1, 2]


LONG: dict[str, Any] = {
    "steps": 6,
    "data": {"eval": "countdown:split=eval&count=8"},
    "eval": {"every": 3},
}


def test_a_restart_with_the_programs_that_were_kept(two_steps: Path, tmp_path: Path) -> None:
    """Nothing compiled is in memory, as in a new process."""
    kept = {"every": 1, "export": False, "compiled": "on"}
    seconds = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[seconds]
    jax.config.update(seconds, 0.0)  # a small model compiles fast
    try:
        for steps in (1, 2):
            jax.clear_caches()
            train(small_config(steps=steps, checkpoint=kept), tmp_path / "run")
    finally:
        jax.config.update(seconds, before)
    names = [path.name for path in (tmp_path / "run" / "compiled").iterdir()]
    for program in ("jit_assemble", "jit__apply"):  # of one shape in both
        assert sum(name.startswith(program) for name in names) == 1
    require_same_run(tmp_path / "run", two_steps)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps by the command; it fills the compile cache that the killed runs use."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert command(small_config(**LONG), workdir, **cache_of(workdir)).wait() == 0
    return workdir


def cache_of(workdir: Path) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.slow
def test_kills_in_every_phase(undisturbed: Path, tmp_path: Path) -> None:
    """The same command each time; it is killed in another phase of another step."""
    inject = ",".join(f"kill@{phase}:{step}" for step, phase in enumerate(PHASES, start=2))
    config = small_config(**LONG, debug={"inject": inject})
    workdir = tmp_path / "run"
    for _ in PHASES:
        assert command(config, workdir, **cache_of(undisturbed)).wait() == -signal.SIGKILL
    assert command(config, workdir, **cache_of(undisturbed)).wait() == 0
    assert (workdir / "injected.txt").read_text().split() == inject.split(",")
    require_same_run(undisturbed, workdir)


@pytest.mark.slow
def test_kills_at_random_times(undisturbed: Path, tmp_path: Path) -> None:
    """Sixteen of them, while a run starts, or some time after its next or next but one line."""
    config, draw, kills = small_config(**LONG), random.Random(0), 0
    for workdir in (tmp_path / f"run{number}" for number in range(16)):
        code = None
        while code != 0:
            process = command(config, workdir, **cache_of(undisturbed))
            if kills < 16:
                kill_somewhere(process, workdir, draw)
            code = process.wait()
            assert code in (0, -signal.SIGKILL), workdir.with_suffix(".log").read_text()[-2000:]
            kills += code != 0
        require_same_run(undisturbed, workdir)
        if kills == 16:
            return
    pytest.fail(f"only {kills} kills")


def kill_somewhere(process: subprocess.Popen[bytes], workdir: Path, draw: random.Random) -> None:
    lines = lines_in(workdir) + draw.choice([0, 1, 1, 2])
    while process.poll() is None and lines_in(workdir) < lines:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 1.0))
    process.kill()


def lines_in(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_policy_that_has_diverged_stops_the_run(tmp_path: Path) -> None:
    """Its logits are NaN, so all its answers are wrong and no update would ever show it."""
    config = small_config(steps=9, optim={"learning_rate": 1e30, "max_bad_steps": 2})
    line = r"log-probabilities or entropies of 16 of 16 rollouts are not finite, .* 2 bad step"
    with pytest.raises(RunStopped, match=line):
        train(config, tmp_path)
    assert len(list(read_steps(tmp_path / "metrics.jsonl"))) <= 3


def test_rewards_whose_deviation_overflows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their groups teach nothing, and no update is lost."""
    grader = "tests.rewards.hostile_graders:huge"
    train(small_config(steps=1, data={"grader": grader}), tmp_path)
    told = capsys.readouterr().err
    assert "warning: step 1: a reward of 1e+30 for row " in told and "overflows float32" in told
    (line,) = read_steps(tmp_path / "metrics.jsonl")
    assert line["reward/mean"] == 0 and line["optim/skipped"] == 0


@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_responses_that_a_reward_does_not_judge_are_left_out(
    tmp_path: Path, objective: str
) -> None:
    """A TRL reward that returns None for texts of an odd length."""
    config = small_config(
        steps=2,
        data={
            "grader": "tests.rewards.hostile_graders:trl_even",
            "eval": "countdown:split=eval&count=8",
        },
        eval={"every": 2, "samples": 2},
        objective={"name": objective, "max_rounds": 2},
        echo={"coef": 0.1},
        log={"samples_groups": 4},
    )
    train(config, tmp_path)
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    ledger = list(read_steps(tmp_path / "samples" / "ledger.jsonl"))
    assert 0 <= lines[-1]["eval/countdown/pass@1"] <= 1 and lines[-1]["eval/failed"] == 0
    for line, entry in zip(lines[1:], ledger, strict=True):
        samples = read_steps(tmp_path / "samples" / f"step_{line['step']:06d}.jsonl")
        groups: list[list[dict[str, Any]]] = [[], [], [], []]
        for sample in samples:
            assert (sample["reward"] is None) == (len(sample["response"]) % 2 == 1)
            assert (sample["correct"] is None) == (sample["reward"] is None)
            if sample["reward"] is None:
                assert sample["advantage"] == sample["clip_tokens"] == 0
            else:
                groups[sample["group"]].append(sample)
        assert [group["size"] for group in entry["groups"][:4]] == [*map(len, groups)]
        for group in groups:
            rewards = [sample["reward"] for sample in group]
            # (r - mean) / deviation over the judged rows; nothing for one alone.
            centred = np.array(rewards) - np.mean(rewards or [0])
            scale = np.std(rewards, ddof=1) + 1e-6 if len(rewards) > 1 else np.inf
            found = [sample["advantage"] for sample in group]
            np.testing.assert_allclose(found, centred / scale, atol=1e-4)
        assert np.isfinite(line["loss/total"]) and line["optim/skipped"] == 0
        if line["rollout/rounds"] == 1:
            judged = [sample for group in groups for sample in group]
            assert line["reward/ungraded_fraction"] == 1 - len(judged) / 16 > 0
            assert line["reward/mean"] == pytest.approx(np.mean([s["reward"] for s in judged]))


def test_a_grader_that_judges_nothing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grader = "tests.rewards.hostile_graders:trl_none"
    train(small_config(steps=1, data={"grader": grader}, echo={"coef": 0.1}), tmp_path)
    assert "step 1: the grader returned None for all 16 responses" in capsys.readouterr().err
    (line,) = read_steps(tmp_path / "metrics.jsonl")
    assert line["reward/ungraded_fraction"] == 1 and line["optim/grad_norm"] == 0
