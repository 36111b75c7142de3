"""How token losses become one number: weights that are known before the first micro-batch."""

from typing import get_args

import jax.numpy as jnp

from echorl_jax.choices import Aggregation
from echorl_jax.types import Array


def aggregation_weights(loss_mask: Array, *, mode: Aggregation, max_tokens: int) -> Array:
    """Weights under which ``sum(weights * token_loss)`` is the loss of the whole batch.

    ======================= =======================================================
    token-mean              m / sum m
    seq-mean-token-sum      m / rows, rows = sequences with a token in the loss
    seq-mean-token-mean     m / (rows * tokens of the sequence)
    seq-mean-token-sum-norm m / max_tokens, not divided by the number of sequences
    ======================= =======================================================

    The names are verl's. Because the denominators are those of the whole batch, any split into
    micro-batches adds up to the same loss.

    Args:
      loss_mask: ``[N, T]`` float or bool, the tokens that enter the loss, of the whole batch.
      mode: see above.
      max_tokens: the constant of the last mode, T_max.

    Returns:
      ``[N, T]`` float32; all zeros for an empty mask.

    Raises:
      ValueError: on an unknown mode, a mask that is not ``[N, T]``, or ``max_tokens`` below 1.

    >>> mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    >>> aggregation_weights(mask, mode="seq-mean-token-mean", max_tokens=4).tolist()
    [[0.25, 0.25, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]]
    """
    if mode not in get_args(Aggregation):
        raise ValueError(f"mode must be one of {get_args(Aggregation)}, got {mode!r}")
    if loss_mask.ndim != 2 or max_tokens < 1:
        raise ValueError(f"expected a mask [N, T] and {max_tokens=} above 0, got {loss_mask.shape}")
    mask = loss_mask.astype(jnp.float32)
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    rows = jnp.maximum(jnp.sum(tokens > 0, dtype=jnp.float32), 1.0)
    if mode == "token-mean":
        return mask / jnp.maximum(jnp.sum(tokens), 1.0)
    if mode == "seq-mean-token-sum":
        return mask / rows
    if mode == "seq-mean-token-mean":
        return mask / (rows * jnp.maximum(tokens, 1.0))
    return mask / max_tokens


def mean_scale(token_weights: Array) -> Array:
    """What turns a sum under these weights into a mean: one over their sum.

    Args:
      token_weights: ``[N, T]``, of the whole batch.

    Returns:
      ``[N]`` float32, the same for every row; 0 where nothing has a weight.

    >>> mean_scale(jnp.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.5, 0.5]
    """
    total = jnp.sum(token_weights)
    scale = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.broadcast_to(scale, token_weights.shape[:1])
