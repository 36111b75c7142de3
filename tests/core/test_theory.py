"""Expected gradients on solved prompts, over all groups that a policy of two tokens can sample.

Every response is correct. Token 1 is 1 with probability q = sigmoid(0.8) = 0.69; token 2 is 1 with
probability sigmoid(-4) after a 0 and 1/2 after a 1. Each token is a step. The entropies are 0.09 at
token 2 after a 0, 0.62 at token 1, and 0.69 at token 2 after a 1. Groups have two rows, so that
there are 16, each with an exact probability: they are the prompts of one batch. See docs/method.md,
"The echo against constant weights".
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax import core
from echorl_jax.types import StepData

THETA = jnp.array([0.8, -4.0, 0.0])  # logits: of token 1, of token 2 after a 0, after a 1
Q = 1 / (1 + np.exp(-0.8))
RESPONSES = list(itertools.product((0, 1), repeat=2))
TOKENS = jnp.array(list(itertools.product(RESPONSES, repeat=2)), jnp.int32).reshape(32, 2)
GROUPS = 16
GROUP = jnp.repeat(jnp.arange(GROUPS), 2)
STEPS = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (32, 2))
ONES = jnp.ones((32, 2))


def logits(theta):
    """``[32, 2, 2]``, of both values of each token."""
    of_one = jnp.stack([jnp.broadcast_to(theta[0], 32), theta[1 + TOKENS[:, 0]]], axis=1)
    return jnp.stack([jnp.zeros_like(of_one), of_one], axis=-1)


ENTROPY = core.token_entropy(logits(THETA))
PROBABILITY = jnp.exp(
    jax.ops.segment_sum(core.token_logprobs(logits(THETA), TOKENS).sum(axis=1), GROUP, GROUPS)
)


@jax.jit
def expected_push(weights):
    """The expected ascent direction of theta ``[3]``, for weights ``[32, 2]`` of each group."""

    def loss(theta):
        nll = -core.token_logprobs(logits(theta), TOKENS)
        return jnp.sum(PROBABILITY[GROUP][:, None] * weights * nll)

    return -jax.grad(loss)(THETA)


@functools.partial(jax.jit, static_argnames=("select", "normalise"))
def echo_weights(select, key=None, normalise="prompts_with_clip"):
    """The weights of each group's echo alone."""
    clips = core.mine_echo_clips(
        ENTROPY,
        STEPS,
        jnp.ones(32, jnp.bool_),
        GROUP,
        num_groups=GROUPS,
        num_steps=2,
        select=select,
        key=key,
    )
    weights = core.clip_weights(clips, (32, 2), normalise=normalise)
    count = GROUPS if normalise == "prompts_with_clip" else jnp.sum(clips.length)
    return weights * jnp.asarray(count, jnp.float32)


def token_means():
    """The mean over a group's two rows of token means."""
    weights = core.aggregation_weights(ONES, mode="seq-mean-token-mean", max_tokens=2)
    return weights * GROUPS


def test_the_groups_are_all_there_is():
    assert float(PROBABILITY.sum()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(ENTROPY[0], [0.6191, 0.0901], atol=1e-4)
    np.testing.assert_allclose(ENTROPY[-1], [0.6191, np.log(2)], atol=1e-4)


@pytest.mark.parametrize("name", ["psr", "w_reinforce", "avspo", "rl_zvp"])
def test_constant_weights_and_entropy_weights_push_nowhere(name):
    """Constants of one sign, and RL-ZVP's 0.1 H_t: all are fixed before the token is drawn."""
    objective = core.OBJECTIVES[name]
    step = StepData.plain(
        rewards=jnp.ones(32),
        group=GROUP,
        num_groups=GROUPS,
        correct=jnp.ones(32, jnp.bool_),
        mask=jnp.ones((32, 2), jnp.bool_),
        token_entropy=ENTROPY,
    )
    advantages = objective.advantages(step, objective)
    assert (advantages > 0.008).all()
    weights = token_means() * jnp.reshape(advantages, (32, -1))
    np.testing.assert_allclose(expected_push(weights), 0, atol=1e-7)


def test_constant_weights_push_only_through_failures():
    """If (0, 0) is wrong, all-correct groups are those without it: away from its tokens."""
    wrong = (TOKENS == 0).all(axis=1).reshape(GROUPS, 2).any(axis=1)
    push = expected_push(jnp.where(wrong[GROUP][:, None], 0.0, token_means()))
    assert push[0] > 0.05 and push[1] > 0


def test_the_echo_pushes_towards_the_branch_of_high_entropy():
    """By hand, for the logit of token 1: with a 1 in the group (1 - (1 - q)^2) the clip is the row
    with that 1, of two tokens, else the token 0 alone. (1 - q)(1 - (1 - q)^2) / 2 - q (1 - q)^2 =
    q^2 (1 - q) / 2. Token 2 is drawn after its entropy is known: nothing. Without the division by
    the length it is q (1 - q), whatever token 2.
    """
    push = expected_push(echo_weights("max"))
    np.testing.assert_allclose(push, [Q**2 * (1 - Q) / 2, 0, 0], atol=1e-7)
    push = expected_push(echo_weights("max", normalise="tokens"))
    np.testing.assert_allclose(push, [Q * (1 - Q), 0, 0], atol=1e-6)


def test_random_clips_push_nearly_nowhere():
    """The mean over draws of the clip; an error of 1000 draws remains (4 of its deviations)."""
    keys = jax.random.split(jax.random.key(0), 1000)
    pushes = jax.vmap(lambda key: expected_push(echo_weights("random", key)))(keys)
    pushes = np.asarray(pushes)
    error = pushes.std(axis=0) / np.sqrt(len(pushes))
    assert (abs(pushes.mean(axis=0)) < 4 * error + 1e-7).all() and (error < 0.003).all()
    assert abs(pushes.mean(axis=0)).max() < 0.1 * expected_push(echo_weights("max"))[0]
