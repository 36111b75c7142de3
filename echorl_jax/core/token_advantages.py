"""Advantages of single tokens, by their entropy."""

import jax.numpy as jnp

from echorl_jax.core.advantages import collapsed_groups
from echorl_jax.types import Array


def zero_variance_advantages(
    advantages: Array,
    correct: Array,
    group: Array,
    token_entropy: Array,
    mask: Array,
    *,
    num_groups: int,
    alpha: float = 0.1,
    failures: bool = True,
) -> Array:
    """Token-level advantages for groups with one outcome, by each token's entropy H (RL-ZVP).

    All correct: alpha H_t. None correct: -alpha (max H - H_t), the maximum over the row's tokens.
    Other groups, and groups of one, keep their advantages. Source: arXiv 2509.21880.

    Args:
      advantages: ``[N]``, of the mixed groups.
      correct: ``[N]`` bool.
      group: ``[N]`` int32 in ``[0, num_groups)``.
      token_entropy: ``[N, T]``, nats.
      mask: ``[N, T]`` bool, the completions' tokens.
      num_groups: P, static under jit.
      alpha: see above.
      failures: False leaves groups without a success as they are.

    Returns:
      ``[N, T]`` float32, 0 where masked.

    >>> correct, group = jnp.array([True, True, False, False]), jnp.array([0, 0, 1, 1])
    >>> entropy, mask = jnp.array([[0.2, 0.8]] * 4), jnp.ones((4, 2), jnp.bool_)
    >>> found = zero_variance_advantages(jnp.zeros(4), correct, group, entropy, mask, num_groups=2)
    >>> print(found[jnp.array([0, 2])].round(2))
    [[ 0.02  0.08]
     [-0.06 -0.  ]]
    """
    outcome = correct.astype(jnp.float32)
    one_outcome = collapsed_groups(outcome, group, num_groups=num_groups)[group]
    entropy = jnp.where(mask, token_entropy, 0.0)
    failed = -alpha * (jnp.max(entropy, axis=1, keepdims=True, initial=0.0) - entropy)
    shaped = jnp.where(correct[:, None], alpha * entropy, failed)
    chosen = one_outcome & (correct | failures)
    return jnp.where(mask, jnp.where(chosen[:, None], shaped, advantages[:, None]), 0.0)


def entropy_shaped_advantages(
    advantages: Array, token_entropy: Array, *, alpha: float = 0.4, kappa: float = 2.0
) -> Array:
    """Adds a bounded share of each token's entropy: A + min(alpha H, |A| / kappa).

    Tokens without an advantage keep none, and no advantage changes its sign. Source: arXiv
    2506.14758.

    Args:
      advantages: ``[N]`` or ``[N, T]``.
      token_entropy: ``[N, T]``, nats.
      alpha, kappa: see above; kappa is at least 1.

    Returns:
      ``[N, T]`` float32.

    >>> entropy = jnp.array([[0.5, 9.0]])
    >>> entropy_shaped_advantages(jnp.array([-1.0]), entropy, alpha=0.5).tolist()
    [[-0.75, -0.5]]
    """
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return advantages + jnp.minimum(alpha * token_entropy, jnp.abs(advantages) / kappa)


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
