"""Terms that hold the policy near another: KL estimates, and the hinge on solved prompts."""

from typing import get_args

import jax.numpy as jnp

from echorl_jax.choices import KLEstimator
from echorl_jax.core.losses import MAX_LOG_RATIO
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
      estimator: see above.
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


def _k3(difference: Array) -> Array:
    difference = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(-difference) + difference - 1.0
