"""Corrections for a sampler whose probabilities differ from the trainer's, and for stale rows."""

import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import ImportanceMask, ImportanceWeight
from echorl_jax.core.losses import MAX_LOG_RATIO, token_log_ratio
from echorl_jax.types import Array


def importance_weights(
    old_logprobs: Array,
    rollout_logprobs: Array,
    loss_mask: Array,
    *,
    level: ImportanceWeight = "token",
    cap: float | None = None,
) -> Array:
    """Constant factors of the policy loss: how much likelier the trainer makes what was sampled.

    w = exp(log pi_old - log pi_sampler) of each token, or their product over the row
    (``sequence``), at most ``cap`` (truncated importance sampling). ``none`` gives ones.
    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    2025.

    Args:
      old_logprobs: ``[B, T]``, the trainer's, for the weights that sampled.
      rollout_logprobs: ``[B, T]``, the sampler's.
      loss_mask: ``[B, T]`` float, the tokens of a row's product.
      level: see above.
      cap: C; None is no cap.

    Returns:
      ``[B, T]``, or ``[B, 1]`` for a row's product.

    >>> old, rollout = jnp.log(jnp.array([[0.3, 0.9]])), jnp.log(jnp.array([[0.6, 0.1]]))
    >>> print(importance_weights(old, rollout, jnp.ones((1, 2)), cap=2.0).round(3))
    [[0.5 2. ]]
    >>> print(importance_weights(old, rollout, jnp.ones((1, 2)), level="sequence").round(1))
    [[4.5]]
    """
    if level == "none":
        return jnp.ones_like(old_logprobs)
    log_weight = token_log_ratio(old_logprobs, rollout_logprobs)
    if level == "sequence":
        log_weight = _row_sum(old_logprobs - rollout_logprobs, loss_mask)
    weight = jnp.exp(jnp.clip(log_weight, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return lax.stop_gradient(weight if cap is None else jnp.minimum(weight, cap))


def importance_mask(
    old_logprobs: Array,
    rollout_logprobs: Array,
    loss_mask: Array,
    *,
    level: ImportanceMask,
    low: float = 0.0,
    high: float = float("inf"),
) -> Array:
    """Tokens on which trainer and sampler agree well enough to be learnt from.

    w as in :func:`importance_weights` must lie in ``[low, high]``: the token's own (IcePop), the
    product of its row (``sequence``), or the row's geometric mean.
    Sources: arXiv 2510.18855 (IcePop); TRL's ``sequence_mask``.

    Args:
      old_logprobs, rollout_logprobs, loss_mask: see :func:`importance_weights`.
      level: see above; ``none`` keeps every token.
      low, high: bounds of w.

    Returns:
      ``[B, T]`` bool.

    >>> old, rollout = jnp.log(jnp.array([[0.3, 0.9]])), jnp.log(jnp.array([[0.6, 0.1]]))
    >>> mask = jnp.ones((1, 2))
    >>> importance_mask(old, rollout, mask, level="token", low=0.4, high=5.0).tolist()
    [[True, False]]
    >>> importance_mask(old, rollout, mask, level="sequence", high=3.0).tolist()  # 4.5
    [[False, False]]
    """
    difference = old_logprobs - rollout_logprobs
    if level == "none":
        return jnp.ones(difference.shape, jnp.bool_)
    if level != "token":
        total = _row_sum(difference, loss_mask)
        tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
        mean = total / (tokens if level == "geometric" else 1.0)
        difference = jnp.broadcast_to(mean, difference.shape)
    weight = jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    # Not a comparison from inside: a NaN is kept, and shows in the loss.
    return ~((weight < low) | (weight > high))


def drifted_failures(
    logprobs: Array,
    behaviour_logprobs: Array,
    advantages: Array,
    loss_mask: Array,
    *,
    delta: float,
) -> Array:
    """Tokens with negative advantage in rows that the policy has moved away from (OPSM).

    A row has where the mean of log pi_behaviour - log pi over its tokens is above ``delta``: it is
    unlikely by now, and pushing it down further is noise. Source: arXiv 2512.02556 (off-policy
    sequence masking).

    Args:
      logprobs: ``[B, T]``, the current policy's; constants here.
      behaviour_logprobs: ``[B, T]``, of the policy that wrote the rows.
      advantages: ``[B]`` or ``[B, T]``.
      loss_mask: ``[B, T]`` float, the tokens of the mean.
      delta: bound, nats.

    Returns:
      ``[B, T]`` bool, tokens to leave out of the policy loss.

    >>> logprobs, behaviour = jnp.array([[-2.0], [-2.0]]), jnp.array([[-1.0], [-1.0]])
    >>> mask, advantages = jnp.ones((2, 1)), jnp.array([1.0, -1.0])
    >>> drifted_failures(logprobs, behaviour, advantages, mask, delta=0.5).tolist()
    [[False], [True]]
    """
    tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
    drift = _row_sum(lax.stop_gradient(behaviour_logprobs - logprobs), loss_mask) / tokens
    negative = advantages < 0
    return (negative[:, None] if advantages.ndim == 1 else negative) & (drift > delta)


def _row_sum(values: Array, loss_mask: Array) -> Array:
    """Sums ``[B, 1]`` over a row's tokens; what is masked may hold anything."""
    return jnp.sum(jnp.where(loss_mask > 0, values, 0.0), axis=1, keepdims=True)
