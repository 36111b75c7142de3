"""Programs compiled ahead: a closed set, and none after the first step."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.environment.engines import slot_limits
from echorl_jax.files import read_steps
from echorl_jax.training import loop
from echorl_jax.training.run import open_run
from echorl_jax.training.sft import train_supervised
from echorl_jax.training.warmup import CompileJob, Compiles, warm_up
from tests.integration.conftest import small_config


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "grpo", "kl_coef": 0.0},
        pytest.param({"name": "grpo", "kl_coef": 0.001}, marks=pytest.mark.slow),
        pytest.param({"name": "dapo", "max_rounds": 2}, marks=pytest.mark.slow),
        pytest.param({"name": "luffy", "mini_batches": 2}, marks=pytest.mark.slow),
        pytest.param({"name": "clip_cov", "mini_batches": 2, "epochs": 2}, marks=pytest.mark.slow),
        pytest.param({"name": "kl_cov", "mini_batches": 2}, marks=pytest.mark.slow),
        pytest.param({"name": "uft", "old_logprobs": "trainer"}, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_compiled_after_the_first_step(
    objective: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        steps=3,
        objective=objective,
        optim={"compile_ahead": True, "compile_in_background": False},
        rollout={"prompts_per_step": 4, "group_size": 4, "slots": 8},
        log={"profile_steps": (2,)},
    )
    loop.train(config, tmp_path / "ahead", devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "ahead" / "metrics.jsonl"))
    assert len({line["compile/count"] for line in lines}) == 1
    said = capsys.readouterr().err
    assert "micro-batch 1/" in said and "after the warm-up" not in said
    own = 3 if objective["name"] == "luffy" else 4  # of each group of 4; the expert wrote one
    assert f"4 prompts x {own} = {4 * own} rows a step" in said
    assert "optimizer 6.8 MB" in said and "8 decoded at once" in said
    (trace,) = (tmp_path / "ahead" / "profile" / "step_2").rglob("*.xplane.pb")
    seen = {event.name for event in host_events(trace)}
    assert {"rollout", "grade", "update"} <= seen
    # Python's calls are left out: to take them beside a save's threads crashes the process.
    assert not any(name.startswith("$") for name in seen)
    assert not (tmp_path / "ahead" / "profile" / "step_1").exists()


@pytest.mark.parametrize(
    ("objective", "lora"),
    [
        ({"name": "grpo", "kl_coef": 0.001}, {}),
        pytest.param({"name": "uft", "old_logprobs": "trainer"}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "grpo", "kl_coef": 0.0}, {"rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_background_jobs_compile_the_programs_that_updates_run(
    objective: dict, lora: dict, tmp_path: Path
) -> None:
    jax.clear_caches()  # tests before this one may have compiled the same programs
    config = small_config(
        objective=objective,
        lora=lora,
        optim={"compile_ahead": True},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 20},
    )
    with open_run(config, tmp_path, prompts_per_step=4, devices=jax.devices()[:1]) as (run, state):

        def all_shapes(later: Callable[[CompileJob], None] | None) -> None:
            warm_up(
                run.setup,
                state.params,
                run.stream.peek(),
                engine=run.engine,
                frozen=run.frozen,
                reference=run.reference,
                say=print,
                later=later,
            )

        jobs: list[CompileJob] = []
        all_shapes(later=jobs.append)
        before = run.compiles.count
        for job in jobs:
            job()
        compiled = run.compiles.count
        assert len(jobs) > 1 and compiled - before == len(jobs)
        all_shapes(later=None)  # runs every shape
        assert run.compiles.count == compiled


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_steps_run_while_the_thread_compiles(
    shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2 has a micro-batch that only the thread has compiled, for parameters of an update."""
    jax.clear_caches()
    config = small_config(
        steps=2,
        mesh=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)),
        optim={"compile_ahead": True},
        checkpoint={"every": 0},
    )
    loop.train(config, tmp_path, devices=jax.devices()[: math.prod(shape)])
    said = capsys.readouterr().err
    assert "more while the first steps run" in said and "after the warm-up" not in said
    assert "micro-batch 2/" not in said
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())


def test_a_job_that_fails_is_raised_once_it_is_done() -> None:
    def fail() -> None:
        raise ConfigError("config.optim.micro_batch_tokens = 9: too many")

    with closing(Compiles()) as compiles:
        compiles.later(fail)
        with pytest.raises(ConfigError, match="too many"):
            while not compiles.surprised():
                time.sleep(0.01)


def host_events(trace: Path) -> Iterator[jax.profiler.ProfileEvent]:
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if plane.name.startswith("/host:CPU"):
            for line in plane.lines:
                yield from line.events


@pytest.mark.parametrize("packing", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_demonstrations_compile_nothing_either(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        steps=6,
        data={"train": "countdown:split=train", "max_prompt_tokens": 32},
        rollout={"max_new_tokens": 32},
        objective={"name": "sft", "kl_coef": None},
        echo={"enabled": False},
        optim={
            **{"compile_ahead": True, "compile_in_background": False, "sft_packing": packing},
            **{"sft_rows_per_step": 16, "micro_batch_tokens": 256},
        },
        checkpoint={"every": 0},
    )
    train_supervised(config, tmp_path / "ahead", devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "ahead" / "metrics.jsonl"))
    assert len({line["compile/count"] for line in lines}) == 1
    said = capsys.readouterr().err
    assert "micro-batch 1/" in said and "after the warm-up" not in said


def test_slots_pass_through_every_level() -> None:
    # 64 rows in 64 slots: programs for 64, 32, 16 and 8; so many rows live 1, 2, 3 and 4 turns.
    limits = slot_limits(64, 64, shards=1, longest=100)
    assert limits == [4] * 8 + [3] * 8 + [2] * 16 + [1] * 32
    # On two shards the first half of each stays for 16 -> 8. After the first turn 36 rows pass
    # through the 8 other slots in 5 turns; one turn more for the last of them, one for the level.
    split = slot_limits(52, 16, shards=2, longest=100)
    assert split[:16] == [8] * 4 + [1] * 4 + [8] * 4 + [1] * 4 and set(split[16:]) == {1}
    assert max(slot_limits(64, 64, shards=1, longest=2)) == 2


def test_a_late_compile_surprises_once() -> None:
    counter = Compiles()
    assert not counter.surprised()
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert counter.surprised() and not counter.surprised()
    patient = Compiles()
    assert not patient.surprised()
    with patient.expected():
        jax.jit(lambda x: x * 5 + 1)(np.float32(2))
    assert not patient.surprised()
