"""From graded rollouts to a :class:`TrainBatch`: advantages, steps, EchoClips, final weights."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.config import EchoConfig
from echorl_jax.core import (
    Objective,
    aggregation_weights,
    clip_weights,
    judged_groups,
    mean_scale,
    mine_echo_clips,
    step_entropy,
    step_ids,
)
from echorl_jax.rollout import join_rows
from echorl_jax.types import Array, EchoClips, Graded, HostArray, Rollouts, TrainBatch, pytree


@pytree
class Assembled:
    """A batch, and the clips and steps behind its echo weights, which the logs show."""

    batch: TrainBatch
    clips: EchoClips
    step_ids: Array  # i32 [N, T]
    step_entropy: Array  # f32 [N, num_steps]


def step_advantages(rollouts: Rollouts, graded: Graded, *, objective: Objective) -> Array:
    """Advantages ``[N]`` f32 over the whole batch of a step; not under jit.

    A row without a verdict has advantage 0 and no part in the others'. So have the other rows of
    its group if fewer than two are left in the group's baseline.
    """
    groups, judged = rollouts.prompt_ids.shape[0], jnp.asarray(graded.with_verdict)
    if judged.all():
        return _advantages(rollouts, graded, objective=objective, num_groups=groups)
    own = graded.on_policy if objective.baseline == "on_policy" else None
    group = judged_groups(rollouts.group, judged, num_groups=groups, baseline=own)
    kept = group < groups
    found = _advantages(
        dataclasses.replace(
            rollouts,
            group=group,
            completion_length=jnp.where(kept, rollouts.completion_length, 0),
        ),
        graded,
        objective=objective,
        num_groups=groups + 1,
    )
    return jnp.where(kept, found, 0.0)


@functools.partial(jax.jit, static_argnames=("objective", "num_groups"))
def _advantages(
    rollouts: Rollouts, graded: Graded, *, objective: Objective, num_groups: int
) -> Array:
    own = graded.on_policy
    choice = {"baseline": own} if objective.baseline == "on_policy" else {}
    return objective.advantages(
        graded.rewards,
        rollouts.group,
        num_groups=num_groups,
        lengths=rollouts.completion_length,
        on_policy=own,
        **choice,
    )


@functools.partial(jax.jit, static_argnames=("objective", "echo", "max_tokens"))
def assemble(
    rollouts: Rollouts,
    graded: Graded,
    advantages: Array,
    in_policy: Array,
    in_echo: Array,
    is_delimiter: Array,
    key: Array,
    *,
    objective: Objective,
    echo: EchoConfig,
    max_tokens: int,
) -> Assembled:
    """Steps, clips and final weights of the rows of one update.

    Args:
      rollouts: as sampled, with P prompts and N rows.
      graded: their verdicts.
      advantages: f32 ``[N]``, from :func:`step_advantages`.
      in_policy: bool ``[N]``, rows of the policy loss; a row without a verdict is in neither.
      in_echo: bool ``[N]``, rows that may give clips.
      is_delimiter: bool ``[V]``, tokens that end a reasoning step.
      key: for random choices of clips.
      objective: static.
      echo: static; ``enabled`` off mines nothing.
      max_tokens: the constant length of ``seq-mean-token-sum-norm``.
    """
    num_rows, width = rollouts.completion_ids.shape
    num_groups = rollouts.prompt_ids.shape[0]
    mask = _completion_mask(rollouts)
    loss_mask = mask & in_policy[:, None]
    num_steps = min(echo.max_steps, width)
    steps = step_ids(rollouts.completion_ids, mask, is_delimiter)
    judged = graded.with_verdict
    mean_entropy, _ = step_entropy(rollouts.token_entropy, steps, num_steps)
    clips = mine_echo_clips(
        rollouts.token_entropy,
        steps,
        # A group whose judged rows are all correct is degenerate, whatever its other rows are.
        ((graded.correct & in_echo) | ~judged) & echo.enabled,
        rollouts.group,
        num_groups=num_groups,
        num_steps=num_steps,
        on_policy=graded.on_policy & judged,
        select=echo.select,
        top_k=echo.top_k,
        min_step_tokens=echo.min_step_tokens,
        when=echo.when,
        key=key,
    )
    tokens, length = join_rows(rollouts)
    weights = aggregation_weights(loss_mask, mode=objective.aggregation, max_tokens=max_tokens)
    batch = TrainBatch(
        tokens=tokens,
        prompt_length=rollouts.prompt_length[rollouts.group],
        length=length,
        loss_mask=loss_mask.astype(jnp.float32),
        advantages=advantages,
        old_logprobs=rollouts.rollout_logprobs,
        rollout_logprobs=rollouts.rollout_logprobs,
        token_weights=weights,
        echo_weights=clip_weights(clips, (num_rows, width), normalise=echo.normalise),
        on_policy=graded.on_policy,
    )
    if objective.entropy_coef:
        batch = dataclasses.replace(batch, entropy_scale=mean_scale(weights))
    return Assembled(batch, clips, steps, mean_entropy)


def select_tokens(
    batch: TrainBatch, logprobs: HostArray, key: Array, *, objective: Objective
) -> TrainBatch:
    """Fills ``batch.selected`` (NumPy) where the objective selects tokens.

    Args:
      batch: all rows of an update, before it is cut into micro-batches.
      logprobs: f32 ``[N, T]``, of the policy that the update starts from.
      key: for random choices, different from those of the clips.
      objective: static.
    """
    if objective.select_tokens is None:
        return batch
    old = batch.old_logprobs, batch.advantages, batch.loss_mask
    selected = _selected(logprobs, *old, key, objective=objective)
    return dataclasses.replace(batch, selected=np.asarray(selected))


@functools.partial(jax.jit, static_argnames=("objective",))
def _selected(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    loss_mask: Array,
    key: Array,
    *,
    objective: Objective,
) -> Array:
    assert objective.select_tokens is not None
    return objective.select_tokens(logprobs, old_logprobs, advantages, loss_mask, key, objective)


def join_assembled(parts: Sequence[Assembled]) -> Assembled:
    """Concatenates mini-batches (NumPy); the clips' row numbers count over all of them."""
    starts = np.cumsum([0] + [len(part.batch.advantages) for part in parts[:-1]])
    moved = [
        dataclasses.replace(part, clips=dataclasses.replace(part.clips, row=part.clips.row + start))
        for part, start in zip(parts, starts, strict=True)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *moved)


def _completion_mask(rollouts: Rollouts) -> Array:
    width = rollouts.completion_ids.shape[1]
    return jnp.arange(width)[None, :] < rollouts.completion_length[:, None]
