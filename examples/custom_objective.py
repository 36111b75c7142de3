"""A custom objective, grader, clip rule and metric, named in a config by import path.

With this file on the Python path:

    echorl train --config=configs/countdown.py --workdir=runs/mine \
        --config.objective.name=custom_objective:half_baseline \
        --config.data.grader=custom_objective:ends_with_answer \
        --config.echo.select=custom_objective:surprising_and_long \
        --config.log.metrics=custom_objective:repeated_tokens

An objective is data: how a rollout is scored (``half_baseline``), or each of its tokens
(``by_surprise``), what a token costs, how the costs add up. EchoRL is added to it like to any
other.
"""

import jax.numpy as jnp
import numpy as np

from echorl_jax.core import Objective, group_advantages
from echorl_jax.rewards import Verdict


def above_half(step, objective):
    """-> [N]: a fixed baseline in place of the group's mean, so equal groups keep a signal."""
    return step.rewards - 0.5


def soft_clip(logprobs, batch, objective):
    """[B, T] -> [B, T]: the ratio saturates smoothly, -A tanh(rho - 1)."""
    ratio = jnp.exp(objective.log_ratio(logprobs, batch))
    return -batch.advantages[:, None] * jnp.tanh(ratio - 1.0)


half_baseline = Objective(advantages=above_half, token_loss=soft_clip, aggregation="token-mean")


def surprise(step, objective):
    """-> [N, T]: what a rollout earns above its group goes to its tokens by their entropy."""
    rows = group_advantages(step.rewards, step.group, num_groups=step.num_groups)
    entropy = jnp.where(step.mask, step.token_entropy, 0.0)
    mean = entropy.sum(axis=1) / jnp.maximum(step.mask.sum(axis=1), 1).astype(jnp.float32)
    return (rows / (mean + 1e-6))[:, None] * entropy


by_surprise = Objective(advantages=surprise, epsilon_low=0.2, epsilon_high=0.2)


def ends_with_answer(response, row):
    """(str, row) -> Verdict: right if the response's last word is the row's answer."""
    correct = response.split()[-1:] == [str(row["reward_model"]["ground_truth"])]
    return Verdict(score=float(correct), correct=correct, reason="last word")


def surprising_and_long(step_entropy, step_ids, *, step_tokens):
    """-> [N, num_steps]: the clip ends at the step with the largest sum of token entropies."""
    return step_entropy * step_tokens.astype(jnp.float32)


def repeated_tokens(rollouts):
    """-> share of tokens that are equal to the one before, logged as ``custom/repeated_tokens``."""
    ids, length = rollouts.completion_ids, rollouts.completion_length
    inside = np.arange(1, ids.shape[1])[None, :] < length[:, None]
    return ((ids[:, 1:] == ids[:, :-1]) & inside).sum() / max(inside.sum(), 1)
