"""Every objective trains, with and without EchoRL, and its own policy of the loop holds."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.files import read_steps
from echorl_jax.training import loop
from echorl_jax.training.optimizer import TrainState
from tests.integration.conftest import small_config
from tests.integration.test_train import require_close, untrained

# Those that differ in what they need of the loop, not only in a formula; two, which need the most,
# for the default suite, and one with advantages of tokens.
QUICK = ("dapo", "luffy", "rl_zvp")
TRAINED = (*QUICK, *"grpo gspo reinforce_pp uft kl_cov clip_cov mcpo m2po psr scale_rl".split())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRAINED],
)
def test_two_steps(name: str, tmp_path: Path) -> None:
    config = small_config(
        steps=2,
        objective={"name": name, "max_rounds": 2, "mini_batches": 2, "kl_coef": None},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24},
        data={"max_prompt_tokens": 64},
    )
    state = loop.train(config, tmp_path, devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    assert all(line["optim/skipped"] == 0 for line in lines)
    assert sum(line["echo/clips"] for line in lines) > 0
    ledger = list(read_steps(tmp_path / "samples" / "ledger.jsonl"))
    assert all(group["size"] == 4 for line in ledger for group in line["groups"])
    if name in ("grpo", "uft"):
        # At the first step policy and reference are the same; then they part.
        assert abs(lines[0]["kl/ref"]) < 1e-3
    if name == "uft":
        assert lines[0]["loss/nll"] > 0
        # Nearly whole solutions are shown at first, and judged together with what follows them.
        assert lines[0]["reward/mean"] > 0.5
    if name in ("rl_zvp", "psr"):
        # Solved and failed groups are learnt from, or rows of one kind are left out.
        assert (lines[0]["train/rows_skipped_fraction"] == 0) == (name == "rl_zvp")
    if name == "dapo":
        assert all(len(line["groups"]) in (4, 8) for line in ledger)


def test_an_objective_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_objectives.py").write_text(
        "import echorl_jax as echo\n\n\n"
        "def push(logprobs, batch, objective):\n"
        "    return -(batch.advantages[:, None] + 1.0) * logprobs\n\n\n"
        "mine = echo.Objective(token_loss=push, zero_without_advantage=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = small_config(steps=1, objective={"name": "my_objectives:mine", "kl_coef": None})
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    (line,) = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert line["train/rows_skipped_fraction"] == 0 and line["loss/policy"] > 0
    missing = small_config(steps=1, objective={"name": "my_objectives:yours"})
    with pytest.raises(ConfigError, match="config.objective.name.*yours"):
        loop.train(missing, tmp_path / "missing", devices=jax.devices()[:1])


SELECTING = """
import dataclasses
import jax
import jax.numpy as jnp
import numpy as np
import echorl_jax as echo
from echorl_jax.core import clipped_tokens

KEYS = []


def clipped(objective, logprobs, old, advantages):
    bounds = {"epsilon_low": objective.epsilon_low, "epsilon_high": objective.epsilon_high}
    return clipped_tokens(logprobs - old, advantages, **bounds)


def select(batch, logprobs, key, objective):
    jax.debug.callback(keep, jax.random.key_data(key))
    return cov.select_tokens(batch, logprobs, key, objective)


def loss(logprobs, batch, objective):
    wrong = batch.selected & clipped(objective, logprobs, batch.old_logprobs, batch.advantages)
    wrong = wrong & (batch.loss_mask > 0) & (batch.advantages != 0)[:, None]
    return jnp.where(wrong, jnp.nan, grpo.token_loss(logprobs, batch, objective))


def keep(data):
    KEYS.append(tuple(np.ravel(data).tolist()))


cov, grpo = echo.OBJECTIVES["clip_cov"], echo.OBJECTIVES["grpo"]
# Every token that is not clipped is selected; one that is and is selected all the same gives NaN.
mine = dataclasses.replace(
    cov,
    token_loss=loss,
    select_tokens=select,
    selected_fraction=1.0,
    covariance_low=-1e9,
    covariance_high=1e9,
)
"""


@pytest.mark.parametrize("old_logprobs", ["rollout", "trainer"])
def test_tokens_are_selected_by_the_policy_before_each_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_logprobs: str
) -> None:
    """Clip-Cov leaves out what the ratio clips already; clips and tokens draw from other keys."""
    (tmp_path / f"selecting_{old_logprobs}.py").write_text(SELECTING)
    monkeypatch.syspath_prepend(tmp_path)
    updates = {"mini_batches": 2, "epochs": 2, "old_logprobs": old_logprobs}
    config = small_config(
        steps=1,
        objective={"name": f"selecting_{old_logprobs}:mine", "kl_coef": None, **updates},
        optim={"learning_rate": 1e-3},
        echo={"select": "random"},
    )
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    (line,) = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert line["optim/skipped"] == 0 and line["ratio/clip_fraction"] > 0
    keys = importlib.import_module(f"selecting_{old_logprobs}").KEYS
    _, for_clips = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    used = [jax.random.fold_in(for_clips, number) for number in range(2)]
    used = {tuple(jax.random.key_data(key).tolist()) for key in used}
    assert len(keys) == len(set(keys)) == 4 and not used & set(keys)


def train_one_step(workdir: Path, **objective: Any) -> TrainState:
    config = small_config(steps=1, objective=objective, optim={"learning_rate": 1e-3})
    return loop.train(config, workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def one_update(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """A step of one update, with the sampler's log-probabilities as the old ones."""
    workdir = tmp_path_factory.mktemp("one")
    return train_one_step(workdir), workdir


def test_several_updates_in_a_step(one_update: tuple[TrainState, Path], tmp_path: Path) -> None:
    """Ratios leave 1 only after the first update; old log-probabilities stay frozen."""
    train_one_step(tmp_path, mini_batches=2, epochs=3)
    lines = [
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
        for workdir in (tmp_path, one_update[1])
    ]
    assert lines[0]["ratio/clip_fraction"] > 0 == lines[1]["ratio/clip_fraction"]
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"]


def test_old_logprobs_by_sampler_or_trainer_agree(
    one_update: tuple[TrainState, Path], tmp_path: Path
) -> None:
    """In float32 both compute the same policy, so the update is the same within rounding."""
    trainer = train_one_step(tmp_path, old_logprobs="trainer")
    require_close(one_update[0].params, trainer.params, untrained())
