"""Picks tokens out of a batch: by covariance with the advantage, log-ratio or entropy."""

import fractions

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Shaped

from echorl_jax.core.losses import clipped_tokens
from echorl_jax.types import AnyArray as Array


def token_covariance(
    logprobs: Float[Array, "N T"],
    advantages: Float[Array, " N"] | Float[Array, "N T"],
    loss_mask: Shaped[Array, "N T"],
) -> Float[Array, "N T"]:
    """Each token's share of the covariance between advantage and log-probability.

    (A - mean A) (log pi - mean log pi), the means over all tokens of the batch. Where it is large,
    the update pushes the policy's entropy down most. Source: arXiv 2505.22617, section 3.2.

    Args:
      logprobs: ``[N, T]``, constants.
      advantages: ``[N]`` or ``[N, T]``.
      loss_mask: ``[N, T]``, the tokens of the batch.

    Returns:
      ``[N, T]`` float32, 0 where masked.

    >>> logprobs, advantages = jnp.array([[-1.0], [-3.0]]), jnp.array([1.0, -1.0])
    >>> token_covariance(logprobs, advantages, jnp.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    mask = loss_mask.astype(jnp.bool_)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

    def centred(value):
        value = jnp.where(mask, value, 0.0)
        return jnp.where(mask, value - jnp.sum(value) / count, 0.0)

    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return centred(advantages) * centred(lax.stop_gradient(logprobs))


def kl_cov_selection(
    logprobs: Float[Array, "N T"],
    advantages: Float[Array, " N"] | Float[Array, "N T"],
    loss_mask: Shaped[Array, "N T"],
    *,
    fraction: float = 0.0002,
) -> Bool[Array, "N T"]:
    """The ``max(1, floor(fraction * tokens))`` tokens of the batch with the largest covariance.

    Chosen once over the whole batch, before it is cut into micro-batches, so that the split does
    not matter; ties go to the first.

    Args:
      logprobs: ``[N, T]``, the policy's at the time of choosing.
      advantages: ``[N]`` or ``[N, T]``.
      loss_mask: ``[N, T]``.
      fraction: share of the tokens.

    Returns:
      ``[N, T]`` bool; all False for an empty mask.

    >>> logprobs, advantages = jnp.array([[-1.0, -2.0], [-1.0, -9.0]]), jnp.array([1.0, -1.0])
    >>> kl_cov_selection(logprobs, advantages, jnp.ones((2, 2)), fraction=0.25).tolist()
    [[False, False], [False, True]]
    """
    eligible = loss_mask.astype(jnp.bool_)
    return _largest(token_covariance(logprobs, advantages, loss_mask), eligible, eligible, fraction)


def clip_cov_selection(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, " N"] | Float[Array, "N T"],
    loss_mask: Shaped[Array, "N T"],
    key: Array,
    *,
    fraction: float = 0.0002,
    low: float = 1.0,
    high: float = 5.0,
    epsilon_low: float | None = 0.2,
    epsilon_high: float | None = 0.2,
) -> Bool[Array, "N T"]:
    """A random pick among tokens with covariance in ``(low, high)``; they lose their gradient.

    At most ``max(1, floor(fraction * tokens))`` tokens, chosen once over the whole batch; tokens
    that are clipped anyway are not candidates. Source: arXiv 2505.22617, section 4.1 (Clip-Cov).

    Args:
      logprobs: ``[N, T]``, the policy's at the time of choosing.
      old_logprobs: ``[N, T]``.
      advantages: ``[N]`` or ``[N, T]``.
      loss_mask: ``[N, T]``.
      key: PRNG key of the pick.
      fraction: share of the tokens.
      low: covariance above this.
      high: covariance below this.
      epsilon_low: clip range below 1.
      epsilon_high: clip range above 1.

    Returns:
      ``[N, T]`` bool; all False where no token qualifies.

    >>> old = jnp.array([[-4.0], [-1.0]])
    >>> advantages, mask, key = jnp.array([-1.0, 1.0]), jnp.ones((2, 1)), jax.random.key(0)
    >>> clip_cov_selection(old, old, advantages, mask, key, fraction=0.5).sum().item()
    1
    """
    mask = loss_mask.astype(jnp.bool_)
    covariance = token_covariance(logprobs, advantages, loss_mask)
    clipped = clipped_tokens(
        logprobs - old_logprobs, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high
    )
    eligible = mask & (covariance > low) & (covariance < high) & ~clipped
    return _largest(jax.random.uniform(key, mask.shape), eligible, mask, fraction)


def second_moment_selection(
    log_ratio: Array, advantages: Array, loss_mask: Array, *, budget: float = 0.04
) -> Array:
    """The tokens to clip so that the second moment of harmful log-ratios stays in a budget (M2PO).

    Harmful is where the ratio has moved as the advantage pushes it: A > 0 and rho > 1, or A < 0 and
    rho < 1. From the largest on, as many of them are selected as it takes for the mean of
    (log rho)^2 over the harmful ones, with the selected counted at the bound, to fall below
    ``budget``; the bound is then the largest |log rho| that is kept. Source: arXiv 2510.01161,
    section 4, and the authors' code, which takes the bound from the tokens there are.

    Args:
      log_ratio: ``[N, T]``, of the policy before the update.
      advantages: ``[N]`` or ``[N, T]``.
      loss_mask: ``[N, T]``.
      budget: see above.

    Returns:
      ``[N, T]`` bool.

    >>> log_ratio = jnp.array([[0.1, 0.2, 0.9, -2.0]])
    >>> second_moment_selection(log_ratio, jnp.array([1.0]), jnp.ones((1, 4))).tolist()
    [[False, False, True, False]]
    """
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    harmful = (loss_mask > 0) & (advantages * log_ratio > 0)
    size = jnp.where(harmful, jnp.abs(log_ratio), 0.0).reshape(-1)
    count = jnp.maximum(jnp.sum(harmful, dtype=jnp.float32), 1.0)
    ordered = jnp.sort(size)[::-1]
    # With the k largest cut to the next one's size: their number times its square, and the rest.
    squares = ordered**2
    rest = jnp.cumsum(squares[::-1])[::-1]
    cut = jnp.arange(size.size, dtype=jnp.float32) * squares + rest
    bound = ordered[jnp.argmax(cut / count < budget)]
    over = jnp.all(cut / count >= budget)
    return harmful & (over | (jnp.abs(log_ratio) > bound))


def top_entropy_tokens(token_entropy: Array, mask: Array, *, fraction: float) -> Array:
    """The share of tokens with the highest entropy (80/20).

    A token is in if its entropy reaches the (1 - fraction) quantile, linearly interpolated, of all
    tokens in ``mask``; ties at the bound are all in. Source: arXiv 2506.01939, as TRL computes it.

    Args:
      token_entropy: ``[N, T]``, nats.
      mask: ``[N, T]`` bool.
      fraction: share to keep, in (0, 1].

    Returns:
      ``[N, T]`` bool.

    >>> entropy, mask = jnp.array([[0.1, 0.5, 0.3, 0.2, 9.0]]), jnp.arange(5)[None] < 4
    >>> top_entropy_tokens(entropy, mask, fraction=0.5).tolist()
    [[False, True, True, False, False]]
    """
    bound = jnp.nanquantile(jnp.where(mask, token_entropy, jnp.nan), 1.0 - fraction)
    return mask & (token_entropy >= bound)


def _largest(score: Array, eligible: Array, mask: Array, fraction: float) -> Array:
    """The ``max(1, floor(fraction * sum(mask)))`` eligible entries with the highest score."""
    bound = max(1, int(fraction * mask.size) + 1)
    flat = jnp.where(eligible, score, -jnp.inf).reshape(-1)
    value, index = lax.top_k(flat, min(bound, mask.size))
    wanted = jnp.maximum(_share(jnp.sum(mask, dtype=jnp.int32), fraction), 1)
    chosen = (value > -jnp.inf) & (jnp.arange(value.size, dtype=jnp.int32) < wanted)
    return jnp.zeros(flat.shape, jnp.bool_).at[index].set(chosen).reshape(mask.shape)


def _share(count: Array, fraction: float) -> Array:
    """``floor(count * fraction)`` in whole numbers: float32 cannot hold the product exactly."""
    exact = fractions.Fraction(fraction).limit_denominator(40_000)
    whole, rest = count // exact.denominator, count % exact.denominator
    return whole * exact.numerator + rest * exact.numerator // exact.denominator
