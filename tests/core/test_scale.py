"""Coefficients weigh the same at any batch size, for every objective and every mean."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax import core
from echorl_jax.choices import Aggregation
from echorl_jax.config import EchoConfig
from echorl_jax.training.batch import assemble, step_advantages
from echorl_jax.types import Graded, Rollouts

GROUPS, SIZE, WIDTH = 4, 4, 6
SUMS = {"token-sum", "token-sum-norm"}


def rollouts(copies: int) -> tuple[Rollouts, Graded, np.ndarray]:
    """Four groups: solved, failed, and two with both outcomes; every row ``copies`` times."""
    rng = np.random.default_rng(0)
    rows = GROUPS * SIZE
    correct = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]], bool).reshape(-1)
    lengths = rng.integers(1, WIDTH + 1, rows)
    one = {
        "completion_ids": rng.integers(0, 9, (rows, WIDTH)).astype(np.int32),
        "completion_length": lengths.astype(np.int32),
        "rollout_logprobs": -rng.random((rows, WIDTH)).astype(np.float32),
        "token_entropy": rng.random((rows, WIDTH)).astype(np.float32),
        "truncated": np.zeros(rows, bool),
    }
    groups = GROUPS * copies
    made = Rollouts(
        prompt_ids=np.ones((groups, 1), np.int32),
        prompt_length=np.ones(groups, np.int32),
        group=np.repeat(np.arange(groups, dtype=np.int32), SIZE),
        **{name: np.concatenate([value] * copies) for name, value in one.items()},
    )
    correct = np.concatenate([correct] * copies)
    graded = Graded(
        rewards=correct.astype(np.float32), correct=correct, on_policy=np.ones(len(correct), bool)
    )
    moved = np.concatenate([0.1 * rng.standard_normal((rows, WIDTH))] * copies)
    return made, graded, (made.rollout_logprobs + moved).astype(np.float32)


def gradients(objective: core.Objective, copies: int) -> dict[str, np.ndarray]:
    """Gradients of the policy term and of the echo, summed over the copies of each row."""
    made, graded, logprobs = rollouts(copies)
    in_policy = np.ones(len(graded.correct), bool)
    key = jax.random.key(0)
    # Operations and programs are shared by the objectives, not compiled for each.
    with jax.disable_jit():
        advantages = step_advantages(made, graded, in_policy, objective=objective)
    read = ("aggregation", "count_zero_advantage", "acts_on_solved", "entropy_coef")
    weighed = core.Objective(**{name: vars(objective)[name] for name in read})
    assembled, _ = assemble(
        made,
        graded,
        np.asarray(advantages),
        in_policy,
        in_policy,
        jnp.arange(9) % 2 == 0,
        key,
        0,
        objective=weighed,
        echo=EchoConfig(coef=1.0),
        max_tokens=WIDTH,
    )
    batch = assembled.batch
    if objective.select_tokens is not None:
        # Every second token: what is selected depends on a number of tokens, not on a mean.
        selected = jnp.broadcast_to(jnp.arange(WIDTH) % 2 == 0, logprobs.shape)
        batch = dataclasses.replace(batch, selected=selected & (batch.loss_mask > 0))

    def loss(logprobs, echo_coef):
        entropy = jnp.zeros_like(logprobs)
        return core.batch_loss(logprobs, entropy, batch, objective, echo_coef=echo_coef)[0]

    policy = jax.grad(loss)(jnp.asarray(logprobs), 0.0)
    both = jax.grad(loss)(jnp.asarray(logprobs), 1.0)
    shape = (copies, GROUPS * SIZE, WIDTH)
    return {
        "policy": np.asarray(policy).reshape(shape).sum(axis=0),
        "echo": np.asarray(both - policy).reshape(shape).sum(axis=0),
    }


def check(objective: core.Objective) -> None:
    once, twice = gradients(objective, 1), gradients(objective, 2)
    assert np.abs(once["policy"]).max() > 1e-4 and np.abs(once["echo"]).max() > 1e-3
    for name, expected in once.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(twice[name] / scale, expected / scale, atol=2e-5)


# REINFORCE++ and batch deviations divide by n - 1 over the batch, which is not a mean.
WHITENED = {"reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "scale_rl"}


@pytest.mark.parametrize("name", sorted(set(core.OBJECTIVES) - WHITENED - {"sft"}))
def test_a_batch_twice_as_large_has_the_same_gradient_and_ratio_of_terms(name):
    check(dataclasses.replace(core.OBJECTIVES[name], kl_coef=0.0))


@pytest.mark.parametrize("mode", sorted(set(get_args(Aggregation)) - SUMS))
def test_every_mean_keeps_the_weight_of_lambda(mode):
    check(dataclasses.replace(core.OBJECTIVES["maxrl"], aggregation=mode))


@pytest.mark.parametrize("mode", sorted(SUMS))
def test_the_sums_grow_with_the_batch(mode):
    objective = dataclasses.replace(core.OBJECTIVES["maxrl"], aggregation=mode)
    once, twice = gradients(objective, 1), gradients(objective, 2)
    np.testing.assert_allclose(twice["policy"], 2 * once["policy"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(twice["echo"], once["echo"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WHITENED))
def test_whitening_changes_by_the_sample_deviation_alone(name):
    once = gradients(core.OBJECTIVES[name], 1)["policy"]
    twice = gradients(core.OBJECTIVES[name], 2)["policy"]
    seen = np.abs(once) > 1e-6
    ratios = twice[seen] / once[seen]
    # sqrt((2n - 1) / (2n - 2)) for n between 16 rows and 96 tokens: 1.003 to 1.017.
    assert 1.0 < ratios.min() and ratios.max() < 1.02
