"""How much of an expert's solution a prompt shows as training goes on (UFT)."""

import jax
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


def hint_lines(
    key: Array,
    lines: Array,
    step: Array | int,
    *,
    horizon: int,
    low: float = 0.05,
    high: float = 0.95,
    max_segments: int = 5,
) -> Array:
    """How many leading lines of each expert solution to append to its prompt.

    A solution falls into n = min(max_segments, lines) segments, the first ones a line longer where
    it does not divide; k ~ Binomial(n, p(step)) segments are shown. Source: arXiv 2505.16984,
    section 3.1.

    Args:
      key: PRNG key.
      lines: ``[P]`` int32, lines of each solution.
      step: training step.
      horizon: see :func:`hint_probability`.
      low: see :func:`hint_probability`.
      high: see :func:`hint_probability`.
      max_segments: see above.

    Returns:
      ``[P]`` int32, between 0 and ``lines``.

    >>> hint_lines(jax.random.key(0), jnp.array([7, 2]), 0, horizon=10, low=1.0, high=1.0).tolist()
    [7, 2]
    """
    segments = jnp.minimum(lines, max_segments)
    p = hint_probability(step, horizon=horizon, low=low, high=high)
    heads = jax.random.uniform(key, (lines.shape[0], max_segments)) < p
    index = jnp.arange(max_segments, dtype=jnp.int32)[None, :]
    shown = jnp.sum(heads & (index < segments[:, None]), axis=1, dtype=jnp.int32)
    size = jnp.maximum(segments, 1)
    return shown * (lines // size) + jnp.minimum(shown, lines % size)
