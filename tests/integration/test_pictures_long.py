"""Longer runs with pictures: one that is killed, and one that learns to look at them."""

import dataclasses
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from echorl_jax.evaluation.benchmark import Benchmark, run_benchmark
from echorl_jax.files import read_steps
from echorl_jax.models import load_decoder
from echorl_jax.training import loop
from echorl_jax.training.checkpoints import read_params
from echorl_jax.training.sft import train_supervised
from tests.integration.test_faults import cache_of, command
from tests.integration.test_pictures import ONE, shapes_config
from tests.integration.test_train import steady

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_within_steps_with_pictures_goes_on_bit_for_bit(tmp_path: Path):
    """SIGKILL while it samples, and before its update; the same command goes on."""
    config = shapes_config(
        steps=3,
        rollout={"check_every": 1},
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1},
        objective={"kl_coef": 0.01},
        checkpoint={"every": 1, "keep": 3},
    )
    inject = "kill@rollout:2,kill@update:3"
    killed = dataclasses.replace(config, debug=dataclasses.replace(config.debug, inject=inject))
    whole, run = tmp_path / "whole", tmp_path / "run"
    cache = cache_of(whole)
    assert command(config, whole, **cache).wait() == 0, whole.with_suffix(".log").read_text()
    codes = [command(killed, run, **cache).wait() for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0], run.with_suffix(".log").read_text()
    assert (run / "injected.txt").read_text().split() == inject.split(",")
    assert steady(run) == steady(whole) and len(steady(run)) == 3
    assert all(line["optim/skipped"] == 0 for line in steady(run))
    for name in ("ledger.jsonl", "step_000002.jsonl", "step_000003.jsonl"):
        assert (run / "samples" / name).read_text() == (whole / "samples" / name).read_text()
    assert '"pictures": ["/9j/' in (run / "samples" / "step_000003.jsonl").read_text()
    shapes = load_decoder("builtin:shapes").param_shapes()
    ours, theirs = (read_params(workdir, "latest", shapes)[1] for workdir in (run, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_model_learns_to_look_at_pictures(tmp_path: Path):
    """Which colour has the larger of at most four shapes: a guess is right one time in three.

    The task of configs/shapes_sft.py and shapes.py made smaller, so that minutes are enough:
    supervised training from random weights, then GRPO with EchoRL. Held-out rows with blank
    pictures show that the answers come from the pixels.
    """
    task, data = "shapes:ask=largest&cells=2&count=1000000", {"max_image_tokens": 4}
    taught = shapes_config(
        steps=120,
        data={"train": task, **data},
        rollout={"max_new_tokens": 32},
        objective={"name": "sft"},
        echo={"enabled": False},
        optim={"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 10, "beta2": 0.98}
        | {"sft_rows_per_step": 64},
        checkpoint={"every": 0, "export": True},
    )
    train_supervised(taught, tmp_path / "sft", devices=ONE)
    model = str(tmp_path / "sft" / "export")
    rewarded = shapes_config(
        steps=20,
        model={"path": model, "init": "pretrained"},
        data={"train": f"{task}&seed=1", **data},
        rollout={"prompts_per_step": 16, "group_size": 8, "max_new_tokens": 32},
        objective={"kl_coef": 0.0},
        optim={"learning_rate": 2e-4, "warmup_steps": 3, "beta2": 0.98},
        checkpoint={"every": 0, "export": True},
    )
    loop.train(rewarded, tmp_path / "grpo", devices=ONE)
    lines = list(read_steps(tmp_path / "grpo" / "metrics.jsonl"))
    assert sum(line["echo/clips"] for line in lines) > 0
    held_out = "shapes:ask=largest&cells=2&split=eval&count=128"
    options = Benchmark(
        model="",
        data=f"{held_out},{held_out}&blank=yes&name=blank",
        grader="shapes",
        samples="2",
        temperature=1.0,
        max_new_tokens=32,
        max_image_tokens=4,
        dtype="float32",
        workers=1,
    )
    scores = {}
    for name in ("sft", "grpo"):
        of_run = dataclasses.replace(options, model=str(tmp_path / name / "export"))
        found = run_benchmark(of_run, tmp_path / name / "scores")
        scores[name] = {source: each.main.mean for source, each in found.items()}
    # 256 answers: the deviation of a share of 1/3 is 0.03.
    assert max(scores[name]["blank"] for name in scores) < 0.43, scores
    assert scores["sft"]["shapes"] > 0.45, scores
    assert scores["grpo"]["shapes"] > scores["sft"]["shapes"] + 0.06, scores
