"""The share of an expert's solution that a prompt shows, by training step (UFT)."""

import jax.numpy as jnp

from echorl_jax.types import Array


def hint_probability(
    step: Array | int, *, horizon: int, low: float = 0.05, high: float = 0.95
) -> Array:
    """The share of the solution that is shown, in expectation, at a training step.

    A cosine from ``high`` to ``low``, then nothing: p(t) = low + (high - low) (1 + cos(pi t /
    horizon)) / 2 for t < horizon, 0 afterwards. Source: arXiv 2505.16984, section 3.1.

    Args:
      step: training step t, counting from 0.
      horizon: T_hint, steps that have hints; 0 never shows any.
      low: value that the cosine ends at.
      high: value that it starts from.

    Returns:
      float32, shaped like ``step``.

    >>> print(hint_probability(jnp.array([0, 2, 4]), horizon=4).round(2))
    [0.95 0.5  0.  ]
    """
    t = jnp.asarray(step).astype(jnp.float32)
    cosine = low + (high - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * t / max(horizon, 1)))
    return jnp.where(t < horizon, cosine, 0.0)
