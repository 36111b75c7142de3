"""Distances between policies: KL terms, and corrections for a sampler that is not the trainer."""

from typing import get_args

import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import ImportanceMask, ImportanceWeight, KLEstimator
from echorl_jax.core.losses import MAX_LOG_RATIO, token_log_ratio
from echorl_jax.types import Array


def kl_penalty(
    logprobs: Array,
    ref_logprobs: Array,
    *,
    estimator: KLEstimator = "k3",
    log_ratio: Array | None = None,
) -> Array:
    """Per-token estimate of KL(pi || ref) from a token that pi drew.

    k1 = log pi - log ref; abs = |k1|; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1, never negative. The
    exponent is cut to +-20. ``k3_unbiased`` is rho k3 with rho the ratio to the policy that drew
    the token, differentiated: value and gradient are then those of the current policy's KL.
    Sources: J. Schulman, "Approximating KL divergence", 2020; arXiv 2512.02556 (unbiased).

    Args:
      logprobs: ``[B, T]``, differentiated.
      ref_logprobs: ``[B, T]``.
      log_ratio: ``[B, T]``, log rho, for ``k3_unbiased``.

    Returns:
      ``[B, T]``.

    Raises:
      ValueError: on an unknown estimator, or ``k3_unbiased`` without ``log_ratio``.

    >>> logprobs, ref_logprobs = jnp.array([[0.0]]), jnp.array([[-1.0]])
    >>> kl_penalty(logprobs, ref_logprobs, estimator="k2").item()
    0.5
    >>> print(kl_penalty(logprobs, ref_logprobs).round(2))  # 1/e + 1 - 1
    [[0.37]]
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return jnp.abs(difference)
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return _k3(difference)
    if estimator == "k3_unbiased" and log_ratio is not None:
        return jnp.exp(log_ratio) * _k3(difference)
    raise ValueError(
        f"estimator must be one of {get_args(KLEstimator)}, k3_unbiased with a log_ratio; "
        f"got {estimator!r}"
    )


def hold_penalty(log_ratio: Array, *, delta: float = 0.01) -> Array:
    """A hinge on how far a token's probability has moved: 0 within ``delta`` (MCPO).

    With d = log pi - log pi_old and k(d) = exp(d) - d - 1: 0 where |d| <= delta, else k(d) minus
    its value at the bound on that side, so that it is continuous. Source: arXiv 2604.16972.

    Args:
      log_ratio: ``[B, T]``, d.
      delta: half width of the free range.

    Returns:
      ``[B, T]``.

    >>> hold_penalty(jnp.array([[0.0, -0.25, 1.0]]), delta=0.25).round(2).tolist()[0][:2]
    [0.0, 0.0]
    """
    bound = jnp.clip(log_ratio, -delta, delta)
    return _k3(-log_ratio) - _k3(-bound)


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


def _k3(difference: Array) -> Array:
    difference = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(-difference) + difference - 1.0
