"""An objective: its settings, and the functions for advantages, token loss and selection.

The functions fit the estimators and losses of this package to an objective: they read what an
estimator needs from the step or the batch, and its settings from the objective.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from echorl_jax.choices import (
    Aggregation,
    Baseline,
    Divergence,
    ImportanceMask,
    ImportanceWeight,
    KLEstimator,
    OrderStatistic,
    Spread,
)
from echorl_jax.core import advantages as adv
from echorl_jax.core import losses, selection
from echorl_jax.core.divergences import hold_penalty
from echorl_jax.core.groups import group_means
from echorl_jax.core.order_statistics import order_advantages
from echorl_jax.types import Array, StepData, TrainBatch


def by_group(step: StepData, objective: "Objective") -> Array:
    """:func:`group_advantages` with the objective's baseline and deviation, perhaps for each reward
    (:func:`decoupled_advantages`).
    """
    settings: dict[str, Any] = {
        "num_groups": step.num_groups,
        "on_policy": step.on_policy if objective.baseline == "on_policy" else None,
        "divide_by_std": objective.divide_by_std,
        "std_of": objective.std_of,
        "counted": step.lengths > 0,
        "virtual_rewards": objective.virtual_rewards,
    }
    if not objective.normalise_each:
        return adv.group_advantages(step.rewards, step.group, **settings)
    parts, weights = step.reward_parts, step.reward_weights
    if parts is None or weights is None:
        parts, weights = step.rewards[:, None], jnp.ones(1)
    return adv.decoupled_advantages(parts, weights, step.group, **settings)


def leave_one_out(step: StepData, objective: "Objective") -> Array:
    """:func:`rloo_advantages` of a step."""
    return adv.rloo_advantages(step.rewards, step.group, num_groups=step.num_groups)


def by_length(step: StepData, objective: "Objective") -> Array:
    """:func:`opo_advantages` of a step."""
    return adv.opo_advantages(step.rewards, step.group, step.lengths, num_groups=step.num_groups)


def whitened(step: StepData, objective: "Objective") -> Array:
    """:func:`whitened_advantages` of a step."""
    return adv.whitened_advantages(
        step.rewards, step.group, step.lengths, num_groups=step.num_groups
    )


def whitened_by_group(step: StepData, objective: "Objective") -> Array:
    """:func:`whitened_advantages` of a step, with each group's mean taken off first."""
    return adv.whitened_advantages(
        step.rewards, step.group, step.lengths, num_groups=step.num_groups, group_baseline=True
    )


def by_mean(step: StepData, objective: "Objective") -> Array:
    """:func:`maxrl_advantages` of a step."""
    return adv.maxrl_advantages(step.rewards, step.group, num_groups=step.num_groups)


def by_curve(step: StepData, objective: "Objective") -> Array:
    """:func:`curve_advantages` of a step and the success rates before it."""
    past = jnp.full(1, jnp.nan) if step.past_rates is None else step.past_rates
    return adv.curve_advantages(
        step.rewards,
        step.group,
        past,
        num_groups=step.num_groups,
        bins=step.group_size + 1,
        counted=step.lengths > 0,
    )


def by_verdict(step: StepData, objective: "Objective") -> Array:
    """:func:`verdict_advantages` with the objective's weights."""
    return adv.verdict_advantages(
        step.correct, success=objective.success_weight, failure=objective.failure_weight
    )


def by_order(step: StepData, objective: "Objective") -> Array:
    """:func:`order_advantages` with the objective's statistic."""
    return order_advantages(
        step.rewards,
        step.group,
        num_groups=step.num_groups,
        samples=objective.order_samples,
        statistic=objective.order_statistic,
        amount=objective.order_amount,
    )


def zero_variance(step: StepData, objective: "Objective") -> Array:
    """:func:`zero_variance_advantages` over GRPO's."""
    return adv.zero_variance_advantages(
        by_group(step, objective),
        step.correct,
        step.group,
        step.token_entropy,
        step.mask,
        num_groups=step.num_groups,
        alpha=objective.zero_variance_alpha,
        failures=objective.zero_variance_failures,
    )


def mastery(step: StepData, objective: "Objective") -> Array:
    """GRPO's advantages, divided by 2 sqrt(p (1 - p)) where the success rate p is above a half.

    MCPO's weight: prompts that are nearly solved keep their pull. Source: arXiv 2604.16972.
    """
    rate = group_means(step.correct, step.group, num_groups=step.num_groups)
    scale = 2.0 * jnp.sqrt(rate * (1.0 - rate))
    scale = jnp.where((rate > 0.5) & (rate < 1.0), scale, 1.0)
    return by_group(step, objective) / scale[step.group]


def alike(step: StepData, objective: "Objective") -> Array:
    """Ones: every row counts alike, whatever its reward."""
    return jnp.ones_like(step.rewards)


def token_ratio(logprobs: Array, batch: TrainBatch) -> Array:
    """:func:`token_log_ratio` of a batch."""
    return losses.token_log_ratio(logprobs, batch.old_logprobs)


def sequence_ratio(logprobs: Array, batch: TrainBatch) -> Array:
    """:func:`sequence_log_ratio` of a batch."""
    return losses.sequence_log_ratio(logprobs, batch.old_logprobs, batch.loss_mask)


def clipped_loss(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss` with the objective's ratio and bounds."""
    return losses.policy_loss(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        dual_clip=objective.dual_clip,
    )


def cispo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`cispo_loss` with the objective's bounds."""
    return losses.cispo_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )


def luffy(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss` on rows the policy wrote, :func:`shaped_policy_loss` on the expert's."""
    own = clipped_loss(logprobs, batch, objective)
    expert = losses.shaped_policy_loss(logprobs, batch.advantages, shaping=objective.shaping)
    return jnp.where(batch.on_policy[:, None], own, expert)


def kl_cov(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`kl_cov_loss` on ``batch.selected``."""
    return losses.kl_cov_loss(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        _selected(batch),
        kl_cov_coef=objective.kl_cov_coef,
    )


def clip_cov(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss`, without the tokens in ``batch.selected``."""
    # A product, not a choice: a NaN on a selected token still shows.
    kept = jnp.where(_selected(batch), 0.0, 1.0)
    return kept * clipped_loss(logprobs, batch, objective)


def sapo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`sapo_loss` with the objective's temperatures."""
    return losses.sapo_loss(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        tau_positive=objective.tau_positive,
        tau_negative=objective.tau_negative,
    )


def gmpo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`gmpo_loss` with the objective's bounds, of the log-ratio."""
    return losses.gmpo_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )


def dppo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`dppo_loss` with the objective's trust region."""
    return losses.dppo_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        bound=objective.trust_bound,
        divergence=objective.trust_divergence,
        cap=objective.ratio_cap,
    )


def topr(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`topr_loss` of a batch."""
    return losses.topr_loss(logprobs, batch.old_logprobs, batch.advantages)


def vespo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`vespo_loss` of a batch."""
    return losses.vespo_loss(logprobs, batch.old_logprobs, batch.advantages, batch.loss_mask)


def m2po(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """Policy gradient -A rho, without the tokens in ``batch.selected``."""
    kept = jnp.where(_selected(batch), 0.0, 1.0)
    return kept * losses.policy_loss(objective.log_ratio(logprobs, batch), batch.advantages)


def mcpo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss`, and :func:`hold_penalty` on the rows of solved prompts."""
    if batch.solved is None:
        raise ValueError("this objective needs batch.solved")
    held = hold_penalty(objective.log_ratio(logprobs, batch), delta=objective.hold_delta)
    held = jnp.where(batch.solved[:, None], objective.hold_coef * held, 0.0)
    return clipped_loss(logprobs, batch, objective) + held


def nll(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """Negative log-likelihood."""
    del batch, objective
    return -logprobs


def select_kl_cov(batch: TrainBatch, logprobs: Array, key: Array, objective: "Objective") -> Array:
    """:func:`kl_cov_selection` in the form that an objective calls."""
    return selection.kl_cov_selection(
        logprobs, batch.advantages, batch.loss_mask, fraction=objective.selected_fraction
    )


def select_clip_cov(
    batch: TrainBatch, logprobs: Array, key: Array, objective: "Objective"
) -> Array:
    """:func:`clip_cov_selection` in the form that an objective calls."""
    return selection.clip_cov_selection(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        key,
        fraction=objective.selected_fraction,
        low=objective.covariance_low,
        high=objective.covariance_high,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )


def select_m2po(batch: TrainBatch, logprobs: Array, key: Array, objective: "Objective") -> Array:
    """:func:`second_moment_selection` in the form that an objective calls."""
    return selection.second_moment_selection(
        losses.token_log_ratio(logprobs, batch.old_logprobs),
        batch.advantages,
        batch.loss_mask,
        budget=objective.second_moment,
    )


def _selected(batch: TrainBatch) -> Array:
    if batch.selected is None:
        raise ValueError("this objective needs batch.selected, from its select_tokens")
    return batch.selected


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective: small pure functions and their settings; hashable, so static in jit.

    EchoRL is not an objective: its loss is added to any of these.
    """

    # (step, objective) -> [N], or [N, T] where tokens have advantages of their own.
    advantages: Callable[[StepData, "Objective"], Array] = by_group
    # Rows that a group's mean is of: all, or those that the policy wrote (LUFFY's option).
    baseline: Baseline = "all"
    # Divide a group's advantages by a deviation, and by which.
    divide_by_std: bool = True
    std_of: Spread = "group"
    # Normalise each of several rewards by itself, then their weighted sum over the batch (GDPO).
    normalise_each: bool = False
    # Earlier steps whose success rates the advantages see, in step.past_rates; 0 is none.
    rate_steps: int = 0
    # Equal rewards that are added to a group whose rewards are all equal (AVSPO).
    virtual_rewards: int = 0
    # (logprobs [B, T], batch, objective) -> [B, T]
    token_loss: Callable[[Array, TrainBatch, "Objective"], Array] = clipped_loss
    # How token losses become one number.
    aggregation: Aggregation = "token-mean"
    # Clip range of the ratio; None is no bound.
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    # Bound c on the loss where the advantage is negative: -A c.
    dual_clip: float | None = None
    # Weight and estimator of the KL term against the reference policy; 0 needs no reference.
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    # Weight of the entropy bonus.
    entropy_coef: float = 0.0
    # Weight of the negative log-likelihood of hint tokens.
    nll_coef: float = 0.0
    # Weight of each token by the trainer's probability over the sampler's: its own, or its row's
    # product, and the cap C of the weight (None is none; a cap alone is of tokens' weights).
    importance_weight: ImportanceWeight = "none"
    tis_cap: float | None = None
    # Tokens or rows whose weight lies outside [low, high] are left out of the policy loss.
    importance_mask: ImportanceMask = "none"
    importance_low: float = 0.0
    importance_high: float = float("inf")
    # Rows with negative advantage that are further from the sampler than this (nats a token, mean)
    # are left out of the policy loss; None keeps them.
    drift_limit: float | None = None
    # Shapes any advantages by entropy: A + min(alpha H, |A| / kappa); 0 leaves them.
    entropy_alpha: float = 0.0
    entropy_kappa: float = 2.0
    # Share of tokens, those of highest entropy, that have an advantage (80/20).
    entropy_fraction: float = 1.0
    # (logprobs [B, T], batch) -> [B, T], the log-ratio that is clipped and whose clipping is
    # reported.
    log_ratio: Callable[[Array, TrainBatch], Array] = token_ratio
    # (batch, logprobs [N, T] before the update, key, objective) -> bool [N, T]: picks
    # batch.selected from the whole batch; None where the loss does not use it.
    select_tokens: Callable[..., Array] | None = None
    # Whether zero advantage means zero loss, so that such rows are skipped. Set False for a custom
    # loss where it does not.
    zero_without_advantage: bool = True
    # The token loss acts on rows of solved prompts, which have no advantage (MCPO).
    acts_on_solved: bool = False
    # Rows without an advantage count in the means of the policy loss.
    count_zero_advantage: bool = True
    # Share of tokens to pick, bounds of their covariance, weight of KL-Cov's penalty.
    selected_fraction: float = 0.0002
    covariance_low: float = 1.0
    covariance_high: float = 5.0
    kl_cov_coef: float = 1.0
    # gamma of LUFFY's policy shaping.
    shaping: float = 0.1
    # Advantage of a correct row, and what a wrong one loses (PSR, NSR, W-REINFORCE).
    success_weight: float = 1.0
    failure_weight: float = 1.0
    # RL-ZVP's alpha, and whether groups without a success are shaped too.
    zero_variance_alpha: float = 0.1
    zero_variance_failures: bool = True
    # SAPO's temperatures where A > 0 and elsewhere.
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    # DPPO's bound delta, its measure, and the largest ratio.
    trust_bound: float = 0.15
    trust_divergence: Divergence = "tv"
    ratio_cap: float = 20.0
    # MCPO's hinge on solved prompts: weight beta and free range delta of the log-ratio.
    hold_coef: float = 1.0
    hold_delta: float = 0.01
    # M2PO's bound on the mean squared log-ratio of harmful tokens.
    second_moment: float = 0.04
    # OrderGrad's statistic of K samples and its amount.
    order_statistic: OrderStatistic = "max"
    order_samples: int = 4
    order_amount: float = 0.5
    # Expert trajectories placed in each group.
    expert_rows: int = 0
    # Leave groups with a single outcome out of the policy loss and sample others for them.
    dynamic_sampling: bool = False
    # Slope of the overlong punishment, as a share of the completion limit; 0 punishes nothing.
    overlong_buffer: float = 0.0
    # Append hints to prompts (UFT).
    hints: bool = False
    # Learn from demonstrations alone: nothing is sampled.
    supervised: bool = False
