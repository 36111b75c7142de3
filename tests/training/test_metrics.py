"""Numbers of a step: whose rows they count, and how updates are joined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.config import EchoConfig
from echorl_jax.core import OBJECTIVES, LossTerms
from echorl_jax.training.batch import assemble
from echorl_jax.training.metrics import batch_metrics, covariance_metric
from echorl_jax.training.step import UpdateStats, add_stats
from echorl_jax.types import Graded, LossTerm, Rollouts, TrainBatch


def batch_of(logprobs, advantages, loss_mask, on_policy) -> TrainBatch:
    rows, width = loss_mask.shape
    nothing = np.zeros((rows, width), np.float32)
    return TrainBatch(
        tokens=np.zeros((rows, width + 1), np.int32),
        prompt_length=np.ones(rows, np.int32),
        length=np.full(rows, width + 1, np.int32),
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=nothing,
        rollout_logprobs=logprobs,
        token_weights=nothing,
        echo_weights=nothing,
        on_policy=on_policy,
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_covariance_over_the_policys_own_tokens(seed):
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (12, 9)).astype(np.float32)
    advantages = rng.normal(size=12).astype(np.float32)
    mask = (rng.random((12, 9)) < 0.7).astype(np.float32)
    own = rng.random(12) < 0.8
    pairs = [
        (logprobs[n, t], advantages[n])
        for n in range(12)
        for t in range(9)
        if own[n] and mask[n, t]
    ]
    expected = np.cov(np.array(pairs, np.float64).T, bias=True)[0, 1]
    found = covariance_metric(batch_of(logprobs, advantages, mask, own))
    assert found["entropy/covariance"] == pytest.approx(expected, rel=1e-9)


def test_by_hand():
    # log pi -1 and -3 about their mean -2, A +1 and -1 about 0: (1 * 1 + -1 * -1) / 2 = 1.
    logprobs = np.array([[-1.0, -7.0], [-3.0, np.nan]], np.float32)
    mask = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    advantages = np.array([1.0, -1.0], np.float32)
    batch = batch_of(logprobs, advantages, mask, np.array([True, True]))
    assert covariance_metric(batch) == {"entropy/covariance": 1.0}


def test_no_token_and_equal_advantages_give_zero():
    logprobs = np.array([[-1.0], [-3.0]], np.float32)
    ones = np.ones((2, 1), np.float32)
    own = np.array([True, True])
    assert covariance_metric(batch_of(logprobs, np.zeros(2, np.float32), ones, own)) == {
        "entropy/covariance": 0.0
    }
    nothing = batch_of(logprobs, np.array([1.0, -1.0], np.float32), 0 * ones, own)
    assert covariance_metric(nothing) == {"entropy/covariance": 0.0}


def test_an_experts_rows_are_not_the_policys_results():
    """Two groups of two policy rows and an expert row, which is right, long and without entropy."""
    own = np.array([True, True, False] * 2)
    length = np.array([2, 4, 8] * 2, np.int32)
    rollouts = Rollouts(
        prompt_ids=jnp.ones((2, 1), jnp.int32),
        prompt_length=jnp.ones(2, jnp.int32),
        group=jnp.array([0, 0, 0, 1, 1, 1]),
        completion_ids=jnp.ones((6, 8), jnp.int32),
        completion_length=jnp.asarray(length),
        rollout_logprobs=jnp.zeros((6, 8)),
        token_entropy=jnp.where(own[:, None], 0.5, 0.0) * jnp.ones((6, 8)),
        truncated=jnp.array([False, True, True] * 2),
    )
    correct = np.array([False, False, True, True, True, True])
    made = assemble(
        rollouts,
        Graded(rewards=correct.astype(np.float32), correct=correct, on_policy=own),
        jnp.zeros(6),
        np.ones(6, bool),
        np.ones(6, bool),
        np.zeros(4, bool),
        jax.random.key(0),
        objective=OBJECTIVES["luffy"],
        echo=EchoConfig(),
        max_tokens=8,
    )
    found = batch_metrics(jax.device_get(made.stats))
    assert found["reward/mean"] == found["reward/correct"] == 0.5
    assert found["group/all_failure_fraction"] == found["group/all_success_fraction"] == 0.5
    assert found["completion/length_mean"] == 3 and found["completion/truncated_fraction"] == 0.5
    assert found["entropy/token_mean"] == 0.5


def test_losses_are_means_over_updates_and_the_echos_over_those_with_a_clip():
    def update(policy: float, echo: tuple[float, float], gap: float) -> UpdateStats:
        zero = LossTerm(np.float32(0), np.float32(0))
        terms = LossTerms(*[zero] * len(dataclasses.fields(LossTerms)))
        terms = dataclasses.replace(
            terms,
            policy=LossTerm(np.float32(policy), np.float32(1)),
            echo=LossTerm(*map(np.float32, echo)),
        )
        loss = np.float32(policy + echo[0])
        return UpdateStats(loss, terms, np.float32(gap), zero, np.float32(gap), np.array(True))

    done = add_stats(
        [update(1.0, (0.8, 1), 0.1), update(3.0, (0, 0), 0.2), update(2.0, (0.4, 1), 0)]
    )
    assert done.terms.policy.sum == 2.0 and done.terms.echo.sum == pytest.approx(0.6)
    assert done.loss == pytest.approx(7.2 / 3)
    assert done.logprob_gap == np.float32(0.1) and done.grad_norm == np.float32(0.2)
