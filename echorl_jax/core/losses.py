"""Per-token losses: log-probabilities in, one number per token out; nothing here masks or averages.

rho = exp(log pi - log pi_old) is the probability ratio to the policy that wrote the rollout. A
log-ratio is cut to +-20 before it is exponentiated, which no sane ratio reaches, so that an unused
branch never turns into inf * 0.
"""

from typing import get_args

import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import KLEstimator
from echorl_jax.types import Array

_MAX_LOG_RATIO = 20.0


def token_log_ratio(logprobs: Array, old_logprobs: Array) -> Array:
    """log rho per token, cut to +-20.

    >>> token_log_ratio(jnp.array([[-1.0, 50.0]]), jnp.array([[-3.0, -1.0]])).tolist()
    [[2.0, 20.0]]
    """
    return jnp.clip(logprobs - old_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def sequence_log_ratio(logprobs: Array, old_logprobs: Array, loss_mask: Array) -> Array:
    """GSPO's log-ratio in token form: log(sg[s] pi / sg[pi]), log s the sequence's mean of log rho.

    Every token carries the value of its sequence, and the gradient of its own log-probability. Cut
    to at most 10.
    Source: arXiv 2507.18071, sections 4.1 and 4.3.

    Args:
      logprobs: ``[B, T]``, differentiated.
      old_logprobs: ``[B, T]``.
      loss_mask: ``[B, T]`` float, the tokens of the mean.

    Returns:
      ``[B, T]``; a sequence without tokens has 0.

    >>> logprobs, old_logprobs = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -4.0]])
    >>> sequence_log_ratio(logprobs, old_logprobs, jnp.ones((1, 2))).tolist()
    [[1.5, 1.5]]
    """
    tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
    # Masked before the product: padding may hold anything.
    difference = jnp.where(loss_mask > 0, logprobs - old_logprobs, 0.0)
    mean = jnp.sum(loss_mask * difference, axis=1, keepdims=True) / tokens
    own = logprobs - lax.stop_gradient(logprobs)
    return jnp.minimum(own + lax.stop_gradient(mean), 10.0)


def policy_loss(
    log_ratio: Array,
    advantages: Array,
    *,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
) -> Array:
    """The clipped surrogate of PPO, its relatives, and without bounds the plain policy gradient.

    max(-A rho, -A clip(rho, 1 - e_low, 1 + e_high)); where A < 0, ``dual_clip`` c bounds it by -A c
    from above. A bound of None is no bound: with neither, the loss is -A rho. A NaN passes through.
    Sources: arXiv 1707.06347, equation 7; arXiv 2503.14476, section 3.1 (two bounds); arXiv
    1912.09729, equation 5 (dual clip).

    Args:
      log_ratio: ``[B, T]`` from :func:`token_log_ratio` or :func:`sequence_log_ratio`.
      advantages: ``[B]``.
      epsilon_low: how far below 1 the ratio still earns.
      epsilon_high: how far above 1.
      dual_clip: c > 1, or None.

    Returns:
      ``[B, T]``.

    Raises:
      ValueError: if the shapes do not fit or ``dual_clip`` is not above 1.

    >>> log_ratio, advantages = jnp.log(jnp.array([[1.5, 0.5]])), jnp.array([2.0])
    >>> policy_loss(log_ratio, advantages, epsilon_low=0.25, epsilon_high=0.25).tolist()
    [[-2.5, -1.0]]
    """
    advantages = _column(log_ratio, advantages)
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"{dual_clip=} must be above 1")
    ratio = jnp.exp(log_ratio)
    loss = -advantages * ratio
    if epsilon_low is not None or epsilon_high is not None:
        loss = jnp.maximum(loss, -advantages * _clipped(ratio, epsilon_low, epsilon_high))
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    return loss


def clipped_tokens(
    log_ratio: Array, advantages: Array, *, epsilon_low: float | None, epsilon_high: float | None
) -> Array:
    """Tokens whose ratio is past the bound its advantage pushes towards: no gradient there.

    Args:
      log_ratio: ``[B, T]``.
      advantages: ``[B]``.
      epsilon_low: as in :func:`policy_loss`.
      epsilon_high: as in :func:`policy_loss`.

    Returns:
      ``[B, T]`` bool.

    >>> log_ratio, advantages = jnp.log(jnp.array([[1.5, 0.5]] * 2)), jnp.array([1.0, -1.0])
    >>> clipped_tokens(log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.2).tolist()
    [[True, False], [False, True]]
    """
    advantages, ratio = _column(log_ratio, advantages), jnp.exp(log_ratio)
    above = jnp.zeros_like(ratio, jnp.bool_) if epsilon_high is None else ratio > 1.0 + epsilon_high
    below = jnp.zeros_like(ratio, jnp.bool_) if epsilon_low is None else ratio < 1.0 - epsilon_low
    return (above & (advantages > 0)) | (below & (advantages < 0))


def cispo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
) -> Array:
    """REINFORCE with the clipped ratio as a constant weight: every token keeps a gradient (CISPO).

    -sg[clip(rho, 1 - e_low, 1 + e_high)] A log pi. Source: arXiv 2506.13585, section 3.1.

    Args:
      logprobs: ``[B, T]``, differentiated.
      old_logprobs: ``[B, T]``.
      advantages: ``[B]``.
      epsilon_low: bound below 1 (1 or None: none in effect).
      epsilon_high: bound above 1.

    Returns:
      ``[B, T]``.

    >>> logprobs, old_logprobs = jnp.array([[-1.0]]), jnp.array([[-3.0]])  # rho = e^2, cut to 1.5
    >>> cispo_loss(logprobs, old_logprobs, jnp.array([2.0]), epsilon_high=0.5).tolist()
    [[3.0]]
    """
    ratio = jnp.exp(token_log_ratio(logprobs, old_logprobs))
    weight = lax.stop_gradient(_clipped(ratio, epsilon_low, epsilon_high))
    return -weight * _column(logprobs, advantages) * logprobs


def shaped_policy_loss(logprobs: Array, advantages: Array, *, shaping: float = 0.1) -> Array:
    """LUFFY's loss for tokens that an expert wrote: -A f(pi) with f(x) = x / (x + shaping).

    f'(x) is largest where the policy gives the expert's token little probability, so rare but
    decisive tokens are learned first.
    Source: arXiv 2504.14945, section 3.3.

    Args:
      logprobs: ``[B, T]``, differentiated.
      advantages: ``[B]``.
      shaping: gamma, above 0.

    Returns:
      ``[B, T]``.

    >>> shaped_policy_loss(jnp.log(jnp.array([[0.5]])), jnp.array([1.0]), shaping=0.5).item()
    -0.5
    """
    probability = jnp.exp(logprobs)
    return -_column(logprobs, advantages) * probability / (probability + shaping)


def kl_cov_loss(
    log_ratio: Array, advantages: Array, selected: Array, *, kl_cov_coef: float = 1.0
) -> Array:
    """Policy gradient -A rho, plus a penalty coef |log rho| on the selected tokens.

    Source: arXiv 2505.22617, section 4.2 (KL-Cov).

    Args:
      log_ratio: ``[B, T]``.
      advantages: ``[B]``.
      selected: ``[B, T]`` bool from :func:`kl_cov_selection`.
      kl_cov_coef: weight of the penalty.

    Returns:
      ``[B, T]``.

    >>> log_ratio, selected = jnp.array([[0.0, 0.0, -1.0]]), jnp.array([[False, True, True]])
    >>> print(kl_cov_loss(log_ratio, jnp.array([1.0]), selected).round(3))  # 1 - 1/e in the end
    [[-1.    -1.     0.632]]
    """
    penalty = jnp.where(selected, kl_cov_coef * jnp.abs(log_ratio), 0.0)
    return policy_loss(log_ratio, advantages) + penalty


def kl_penalty(logprobs: Array, ref_logprobs: Array, *, estimator: KLEstimator = "k3") -> Array:
    """Per-token estimate of KL(pi || ref) from a token that pi drew.

    k1 = log pi - log ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1, never negative. The exponent is
    cut to +-20.
    Source: J. Schulman, "Approximating KL divergence", 2020.

    Args:
      logprobs: ``[B, T]``, differentiated.
      ref_logprobs: ``[B, T]``.
      estimator: see above.

    Returns:
      ``[B, T]``.

    Raises:
      ValueError: on an unknown estimator.

    >>> logprobs, ref_logprobs = jnp.array([[0.0]]), jnp.array([[-1.0]])
    >>> kl_penalty(logprobs, ref_logprobs, estimator="k2").item()
    0.5
    >>> print(kl_penalty(logprobs, ref_logprobs).round(2))  # 1/e + 1 - 1
    [[0.37]]
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        difference = jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return jnp.exp(-difference) + difference - 1.0
    raise ValueError(f"estimator must be one of {get_args(KLEstimator)}, got {estimator!r}")


def truncated_importance_weights(
    old_logprobs: Array, rollout_logprobs: Array, *, cap: float = 2.0
) -> Array:
    """Corrects for a sampler whose numbers differ from the trainer's.

    min(exp(log pi_old - log pi_sampler), cap), a constant factor of the policy loss. Source: F. Yao
    et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.

    Args:
      old_logprobs: ``[B, T]``, the trainer's, for the weights that sampled.
      rollout_logprobs: ``[B, T]``, the sampler's.
      cap: C.

    Returns:
      ``[B, T]``.

    >>> old, rollout = jnp.log(jnp.array([[0.3, 0.9]])), jnp.log(jnp.array([[0.6, 0.1]]))
    >>> print(truncated_importance_weights(old, rollout).round(3))
    [[0.5 2. ]]
    """
    log_ratio = token_log_ratio(old_logprobs, rollout_logprobs)
    return lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))


def _clipped(ratio: Array, epsilon_low: float | None, epsilon_high: float | None) -> Array:
    low = None if epsilon_low is None else 1.0 - epsilon_low
    high = None if epsilon_high is None else 1.0 + epsilon_high
    # minimum and maximum let a NaN through; fmin and fmax would hide it.
    return jnp.clip(ratio, low, high)


def _column(per_token: Array, advantages: Array) -> Array:
    if per_token.ndim != 2 or advantages.shape != per_token.shape[:1]:
        raise ValueError(
            f"expected [B, T] and advantages [B], got {per_token.shape}, {advantages.shape}"
        )
    return advantages[:, None]
