"""The method: pure functions from arrays to arrays, on JAX and the shared types alone."""

from echorl_jax.core.advantages import (
    group_advantages,
    judged_groups,
    mixed_groups,
    opo_advantages,
    overlong_punishment,
    rloo_advantages,
    whitened_advantages,
)
from echorl_jax.core.clips import (
    active_coef,
    clip_weights,
    clips_above,
    echo_loss,
    echo_weights,
    mine_echo_clips,
)
from echorl_jax.core.entropy import logprobs_and_entropy, token_entropy, token_logprobs
from echorl_jax.core.loss import LOSS_TERMS, aggregation_weights, batch_loss, mean_scale
from echorl_jax.core.losses import (
    cispo_loss,
    clipped_tokens,
    kl_cov_loss,
    kl_penalty,
    policy_loss,
    sequence_log_ratio,
    shaped_policy_loss,
    token_log_ratio,
    truncated_importance_weights,
)
from echorl_jax.core.objectives import OBJECTIVES, Objective, load_objective
from echorl_jax.core.selection import clip_cov_selection, kl_cov_selection, token_covariance
from echorl_jax.core.steps import hint_probability, joined_steps, step_entropy, step_ids

__all__ = [
    "LOSS_TERMS",
    "OBJECTIVES",
    "Objective",
    "active_coef",
    "aggregation_weights",
    "batch_loss",
    "cispo_loss",
    "clip_cov_selection",
    "clip_weights",
    "clipped_tokens",
    "clips_above",
    "echo_loss",
    "echo_weights",
    "group_advantages",
    "hint_probability",
    "joined_steps",
    "judged_groups",
    "kl_cov_loss",
    "kl_cov_selection",
    "kl_penalty",
    "load_objective",
    "logprobs_and_entropy",
    "mean_scale",
    "mine_echo_clips",
    "mixed_groups",
    "opo_advantages",
    "overlong_punishment",
    "policy_loss",
    "rloo_advantages",
    "sequence_log_ratio",
    "shaped_policy_loss",
    "step_entropy",
    "step_ids",
    "token_covariance",
    "token_entropy",
    "token_log_ratio",
    "token_logprobs",
    "truncated_importance_weights",
    "whitened_advantages",
]
