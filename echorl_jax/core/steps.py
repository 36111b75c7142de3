"""Reasoning steps: where a response is cut, the entropy of each, and the share that hints show."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Shaped

from echorl_jax.types import AnyArray as Array
from echorl_jax.types import named_shapes


@named_shapes
def step_ids(
    tokens: Int[Array, "N T"], mask: Shaped[Array, "N T"], is_delimiter: Bool[Array, " V"]
) -> Int[Array, "N T"]:
    """Numbers the reasoning step of each token.

    A delimiter closes the step it belongs to; delimiters that follow at once join that step; a
    leading run of delimiters joins the first step; what follows the last delimiter is a step too.
    So a step starts at each content token whose predecessor is a delimiter, and at the first
    content token. Masked tokens are passed over. Source: arXiv 2605.31228, section 3; the treatment
    of runs is a choice of this package.

    Args:
      tokens: ``[N, T]`` int32. An id outside the vocabulary is no delimiter.
      mask: ``[N, T]`` bool or float, the real tokens.
      is_delimiter: ``[V]`` bool.

    Returns:
      ``[N, T]`` int32, counting from 0; -1 where masked.

    Raises:
      ValueError: if a shape does not fit.

    >>> tokens = jnp.array([[9, 7, 7, 9, 9, 7]])  # 9 is the delimiter; the last token is padding
    >>> step_ids(tokens, jnp.array([[1, 1, 1, 1, 1, 0]]), jnp.arange(10) == 9).tolist()
    [[0, 0, 0, 0, 0, -1]]
    >>> step_ids(jnp.array([[7, 9, 9, 7, 9, 7]]), jnp.ones((1, 6)), jnp.arange(10) == 9).tolist()
    [[0, 0, 0, 1, 1, 2]]
    """
    real = mask.astype(jnp.bool_)
    known = (tokens >= 0) & (tokens < is_delimiter.shape[0])
    delimiter = real & known & is_delimiter[jnp.where(known, tokens, 0)]
    content = real & ~delimiter
    # The position of the last real token before each one, -1 if there is none.
    position = jnp.where(real, lax.broadcasted_iota(jnp.int32, tokens.shape, 1), -1)
    before = jnp.pad(lax.cummax(position, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    after_delimiter = jnp.take_along_axis(delimiter, jnp.maximum(before, 0), axis=1) | (before < 0)
    starts = lax.cumsum((content & after_delimiter).astype(jnp.int32), axis=1)
    return jnp.where(real, jnp.maximum(starts - 1, 0), -1)


@named_shapes
def step_entropy(
    token_entropy: Float[Array, "N T"], step_ids: Int[Array, "N T"], num_steps: int
) -> tuple[Float[Array, "N num_steps"], Int[Array, "N num_steps"]]:
    """Mean token entropy of each step: segment sum over segment count.

    Args:
      token_entropy: ``[N, T]``, in nats.
      step_ids: ``[N, T]`` int32, -1 where masked.
      num_steps: static bound on steps; later ones join the last (count them with
        :func:`joined_steps`).

    Returns:
      ``(mean [N, num_steps] float32, count [N, num_steps] int32)``; a step without tokens has mean
      0 and count 0.

    Raises:
      ValueError: if the shapes differ or ``num_steps`` is not above 0.

    >>> mean, count = step_entropy(jnp.array([[1.0, 2.0, 6.0]]), jnp.array([[0, 0, 1]]), 3)
    >>> mean.tolist(), count.tolist()
    ([[1.5, 6.0, 0.0]], [[2, 1, 0]])
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be above 0")
    # Masked tokens go to one segment more, which is cut off.
    segment = jnp.where(step_ids < 0, num_steps, jnp.minimum(step_ids, num_steps - 1))
    value = jnp.where(step_ids < 0, 0.0, token_entropy.astype(jnp.float32))
    sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_steps + 1))
    total = sums(value, segment)[:, :num_steps]
    count = sums(jnp.ones_like(segment), segment)[:, :num_steps]
    return total / jnp.maximum(count, 1).astype(jnp.float32), count


def joined_steps(step_ids: Int[Array, "N T"], num_steps: int) -> Int[Array, " N"]:
    """The number of steps of each rollout past the static bound, which joined its last step.

    Args:
      step_ids: ``[N, T]`` int32, -1 where masked.
      num_steps: the bound given to :func:`step_entropy`.

    Returns:
      ``[N]`` int32.

    >>> joined_steps(jnp.array([[0, 1, 2, 3], [0, 1, -1, -1]]), 2).tolist()
    [2, 0]
    """
    return jnp.maximum(jnp.max(step_ids, axis=1, initial=-1) + 1 - num_steps, 0)


def hint_probability(
    step: Int[Array, "*axes"] | int, *, horizon: int, low: float = 0.05, high: float = 0.95
) -> Float[Array, "*axes"]:
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
