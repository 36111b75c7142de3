"""The loss of a batch or a micro-batch, and how token losses are aggregated."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from echorl_jax.choices import Aggregation
from echorl_jax.core.divergences import (
    drifted_failures,
    importance_mask,
    importance_weights,
    kl_penalty,
)
from echorl_jax.core.losses import clipped_tokens, token_log_ratio
from echorl_jax.core.objectives import importance_level
from echorl_jax.core.pieces import Objective
from echorl_jax.types import Array, LossTerm, Metrics, TrainBatch


def aggregation_weights(
    loss_mask: Array,
    *,
    mode: Aggregation,
    max_tokens: int,
    group: Array | None = None,
    num_groups: int | None = None,
) -> Array:
    """Weights under which ``sum(weights * token_loss)`` is the loss of the whole batch.

    ======================= =======================================================
    token-mean              m / sum m
    seq-mean-token-sum      m / rows, rows = sequences with a token in the loss
    seq-mean-token-mean     m / (rows * tokens of the sequence)
    seq-mean-token-sum-norm m / (rows * max_tokens)
    prompt-mean             m / (prompts * tokens of the prompt's sequences)
    token-sum               m
    token-sum-norm          m / max_tokens
    ======================= =======================================================

    The names are verl's but for ``prompt-mean`` and ``token-sum-norm``, which is what
    ``seq-mean-token-sum-norm`` meant there until February 2026. All but the two sums are means, so
    that a coefficient weighs the same at any batch size. Because the denominators are those of the
    whole batch, any split into micro-batches adds up to the same loss.

    Args:
      loss_mask: ``[N, T]`` float or bool, the tokens that enter the loss, of the whole batch.
      max_tokens: the constant of the norms, T_max.
      group: ``[N]`` int32 in ``[0, num_groups)``, each row's prompt, for ``prompt-mean``; None
        makes each row a separate prompt.
      num_groups: P, static, with ``group``.

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
    if mode == "seq-mean-token-sum-norm":
        return mask / (rows * max_tokens)
    if mode == "prompt-mean":
        group = jnp.arange(mask.shape[0]) if group is None else group
        of_prompt = jax.ops.segment_sum(tokens, group, num_groups or mask.shape[0])
        prompts = jnp.maximum(jnp.sum(of_prompt > 0, dtype=jnp.float32), 1.0)
        return mask / (prompts * jnp.maximum(of_prompt, 1.0)[group])
    return mask / (max_tokens if mode == "token-sum-norm" else 1)


def mean_scale(token_weights: Array) -> Array:
    """The factor that turns a sum under these weights into a mean: one over their sum.

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


# Keys of the terms that batch_loss returns.
LOSS_TERMS = (
    "loss/policy",
    "loss/echo",
    "loss/nll",
    "kl/ref",
    "entropy/weighted",
    "ratio/clip_fraction",
    "ratio/masked_fraction",
    "ratio/importance_weight_mean",
)


def batch_loss(
    logprobs: Array,
    entropy: Array,
    batch: TrainBatch,
    objective: Objective,
    *,
    echo_coef: Array | float,
) -> tuple[Array, Metrics]:
    """The loss of some rows of a batch; summed over micro-batches it is the loss of the whole.

    L = sum w l + kl_coef sum w kl - entropy_coef mean H + echo_coef sum w_echo nll + nll_coef sum
    w_nll nll, with w the batch's final ``token_weights`` and l the objective's token loss. On rows
    that the policy sampled l is multiplied by importance weights, and is 0 on tokens that a mask
    leaves out, where the objective asks for them; denominators stay as they are.
    Mean H is the mean entropy with the weights w, over the whole batch (``entropy_scale``).
    Terms whose coefficient is 0 or whose field is None are left out of the program. Entries without
    a weight may hold anything, NaN included, and get exactly zero gradient; a NaN that has a weight
    shows in the loss.

    Args:
      logprobs: ``[B, T]``, the current policy's, differentiated.
      entropy: ``[B, T]``, differentiated where ``entropy_coef`` is not 0.
      batch: the rows, with final weights.
      echo_coef: lambda at this step, see :func:`active_coef`; 0 costs nothing.

    Returns:
      The total, float32 ``[]``, and its terms before their coefficients, by metric key.
      ``loss/policy``, ``loss/echo``, ``loss/nll``, ``kl/ref``, ``entropy/weighted``: (weighted sum,
      sum of weights). ``ratio/clip_fraction`` and ``ratio/masked_fraction``: (clipped or masked,
      all weighted) tokens of rows that the policy sampled; ``ratio/importance_weight_mean``: the
      sum of their factors, masked ones 0.

    Raises:
      ValueError: if ``kl_coef`` is not 0 and the batch has no ``ref_logprobs``.

    >>> logprobs, weights, zeros = jnp.array([[-1.0, -2.0]]), jnp.full((1, 2), 0.5), jnp.zeros(1)
    >>> batch = TrainBatch(
    ...     tokens=jnp.zeros((1, 3), jnp.int32),
    ...     prompt_length=jnp.array([1]),
    ...     length=jnp.array([3]),
    ...     loss_mask=jnp.ones((1, 2)),
    ...     advantages=zeros,  # an all-success group: nothing to learn from, but for the clip
    ...     old_logprobs=logprobs,
    ...     rollout_logprobs=logprobs,
    ...     token_weights=weights,
    ...     echo_weights=weights,
    ...     on_policy=zeros == 0,
    ... )
    >>> total, terms = batch_loss(logprobs, -logprobs, batch, Objective(), echo_coef=2.0)
    >>> total.item(), terms["loss/echo"].mean().item()
    (3.0, 1.5)
    """
    batch, used = _quiet(batch)
    logprobs = jnp.where(used, logprobs, 0.0)
    entropy = jnp.where(used, entropy, 0.0)
    token_loss = objective.token_loss(logprobs, batch, objective)
    factor = _correction(logprobs, batch, objective)
    if factor is not None:
        # A product, not a choice: a NaN on a masked token still shows.
        token_loss *= factor
    terms = {
        "loss/policy": _weighted(batch.token_weights, token_loss),
        "loss/echo": _weighted(batch.echo_weights, -logprobs),
        "loss/nll": _nll_term(logprobs, batch, objective),
        "kl/ref": _kl_term(logprobs, batch, objective),
        "entropy/weighted": _entropy_term(entropy, batch),
        "ratio/clip_fraction": _clip_term(logprobs, batch, objective),
        "ratio/masked_fraction": _share(batch, None if factor is None else factor == 0),
        "ratio/importance_weight_mean": _share(batch, factor),
    }
    total = terms["loss/policy"].sum
    for coef, key in (
        (objective.kl_coef, "kl/ref"),
        (-objective.entropy_coef, "entropy/weighted"),
        (echo_coef, "loss/echo"),
        (objective.nll_coef, "loss/nll"),
    ):
        if not (isinstance(coef, float | int) and coef == 0):
            total += coef * terms[key].sum
    return total, terms


def _weighted(weights: Array, values: Array) -> LossTerm:
    return LossTerm(jnp.sum(jnp.where(weights != 0, weights * values, 0.0)), jnp.sum(weights))


def _nothing() -> LossTerm:
    return LossTerm.of(0.0, 0.0)


def _quiet(batch: TrainBatch) -> tuple[TrainBatch, Array]:
    """The batch with zeros where no token has a weight, and the mask of those that have."""
    used = (batch.loss_mask > 0) | (batch.token_weights != 0) | (batch.echo_weights != 0)
    if batch.nll_weights is not None:
        used |= batch.nll_weights != 0
    ref = batch.ref_logprobs
    quiet = dataclasses.replace(
        batch,
        old_logprobs=jnp.where(used, batch.old_logprobs, 0.0),
        rollout_logprobs=jnp.where(used, batch.rollout_logprobs, 0.0),
        ref_logprobs=None if ref is None else jnp.where(used, ref, 0.0),
    )
    return quiet, used


def _nll_term(logprobs: Array, batch: TrainBatch, objective: Objective) -> LossTerm:
    if objective.nll_coef == 0 or batch.nll_weights is None:
        return _nothing()
    return _weighted(batch.nll_weights, -logprobs)


def _entropy_term(entropy: Array, batch: TrainBatch) -> LossTerm:
    weights, scale = batch.token_weights, batch.entropy_scale
    return _weighted(weights if scale is None else weights * scale[:, None], entropy)


def _kl_term(logprobs: Array, batch: TrainBatch, objective: Objective) -> LossTerm:
    if objective.kl_coef == 0:
        return _nothing()
    if batch.ref_logprobs is None:
        raise ValueError("a KL term needs batch.ref_logprobs")
    kl = kl_penalty(
        logprobs,
        batch.ref_logprobs,
        estimator=objective.kl_estimator,
        log_ratio=token_log_ratio(logprobs, batch.old_logprobs),
    )
    return _weighted(batch.token_weights, kl)


def _clip_term(logprobs: Array, batch: TrainBatch, objective: Objective) -> LossTerm:
    if objective.epsilon_low is None and objective.epsilon_high is None:
        return _nothing()
    clipped = clipped_tokens(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )
    return _share(batch, clipped)


def _correction(logprobs: Array, batch: TrainBatch, objective: Objective) -> Array | None:
    """Factors ``[B, T]`` of the token loss, 1 on experts' rows; None where nothing is corrected."""
    level, mask = importance_level(objective), objective.importance_mask
    if level == mask == "none" and objective.drift_limit is None:
        return None
    compared = batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask
    factor = importance_weights(*compared, level=level, cap=objective.tis_cap)
    kept = importance_mask(
        *compared, level=mask, low=objective.importance_low, high=objective.importance_high
    )
    if objective.drift_limit is not None:
        kept &= ~drifted_failures(
            logprobs,
            batch.rollout_logprobs,
            batch.advantages,
            batch.loss_mask,
            delta=objective.drift_limit,
        )
    factor *= jnp.where(kept, 1.0, 0.0)
    return jnp.where(batch.on_policy[:, None], factor, 1.0)


def _share(batch: TrainBatch, values: Array | None) -> LossTerm:
    """The mean of values ``[B, T]`` over weighted tokens of rows that the policy sampled."""
    if values is None:
        return _nothing()
    counted = (batch.token_weights != 0) & batch.on_policy[:, None]
    return LossTerm(
        jnp.sum(jnp.where(counted, values.astype(jnp.float32), 0.0)),
        jnp.sum(counted, dtype=jnp.float32),
    )
