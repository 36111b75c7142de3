"""Groups of rollouts with one prompt: their means, outcomes, and rows without a verdict.

``group`` is the prompt of each row, in ``[0, num_groups)`` and in any order; ``num_groups`` is P,
static under jit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from echorl_jax.types import Array


def collapsed_groups(
    rewards: Float[Array, " N"], group: Int[Array, " N"], *, num_groups: int
) -> Bool[Array, " P"]:
    """``[P]`` bool: groups of at least two rows whose rewards ``[N]`` are all equal.

    >>> rewards, group = jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([0, 0, 1, 1])
    >>> collapsed_groups(rewards, group, num_groups=2).tolist()
    [True, False]
    """
    low = jax.ops.segment_min(rewards, group, num_groups)
    high = jax.ops.segment_max(rewards, group, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(group), group, num_groups)
    return (count > 1) & (low == high)


def mixed_groups(
    correct: Shaped[Array, " N"], group: Int[Array, " N"], *, num_groups: int
) -> Bool[Array, " P"]:
    """The prompts whose rollouts differ in outcome: those with something to compare (DAPO).

    A group of one counts as mixed: by convention its advantage is its reward. Source: arXiv
    2503.14476, section 3.2.

    Args:
      correct: ``[N]``, bool or rewards.

    Returns:
      ``[P]`` bool; False for a prompt without rollouts. ``mixed[group]`` is the mask over rollouts.

    >>> correct, group = jnp.array([True, False, True, True]), jnp.array([0, 0, 1, 1])
    >>> mixed_groups(correct, group, num_groups=2).tolist()
    [True, False]
    """
    value = checked(correct.astype(jnp.float32), group)
    low = jax.ops.segment_min(value, group, num_groups)
    high = jax.ops.segment_max(value, group, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(group), group, num_groups)
    return (count == 1) | ((count > 1) & (high > low))


def group_means(
    values: Shaped[Array, " N"], group: Int[Array, " N"], *, num_groups: int
) -> Float[Array, " P"]:
    """Means ``[P]`` float32 of each group's values ``[N]``; 0 for a group without rows.

    >>> group_means(jnp.array([True, False]), jnp.array([0, 0]), num_groups=2).tolist()
    [0.5, 0.0]
    """
    total = jax.ops.segment_sum(values.astype(jnp.float32), group, num_groups)
    count = jax.ops.segment_sum(jnp.ones(group.shape, jnp.float32), group, num_groups)
    return total / jnp.maximum(count, 1.0)


def judged_groups(
    group: Int[Array, " N"],
    judged: Bool[Array, " N"],
    *,
    num_groups: int,
    baseline: Bool[Array, " N"] | None = None,
) -> Int[Array, " N"]:
    """Groups without the rows that have no verdict, which move to one more group, ``num_groups``.

    An estimator that is given the result and ``num_groups + 1`` groups leaves these rows out of all
    other groups, whatever it computes. The other rows of a group move with them if fewer than two
    rows of its baseline are left: there is nothing to compare them with.

    Args:
      judged: ``[N]`` bool, the rows with a verdict.
      baseline: ``[N]`` bool, the rows that a group's mean is of; None takes all.

    Returns:
      ``[N]`` int32 in ``[0, num_groups]``; ``group`` itself where all rows are judged.

    >>> group, judged = jnp.array([0, 0, 0, 1, 1]), jnp.array([True, True, False, True, False])
    >>> judged_groups(group, judged, num_groups=2).tolist()
    [0, 0, 2, 2, 2]
    """
    compared = judged if baseline is None else judged & baseline
    count = jax.ops.segment_sum(compared.astype(jnp.int32), group, num_groups)
    whole = jax.ops.segment_min(judged.astype(jnp.int32), group, num_groups) > 0
    kept = judged & (whole | (count > 1))[group]
    return jnp.where(kept, group, num_groups)


def checked(rewards: Array, group: Array) -> Array:
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"expected rewards [N] and group [N], got {rewards.shape}, {group.shape}")
    return rewards.astype(jnp.float32)


def centred(
    rewards: Array,
    group: Array,
    num_groups: int,
    weights: Array | None = None,
    alone_below: float | None = 2.0,
) -> tuple[Array, Array]:
    """Rewards minus their group's weighted mean ``[N]``, and the group's weight ``[P]``.

    A group whose weight is below ``alone_below`` (None: with fewer than two rows) has mean 0 by
    convention.
    """
    rewards = checked(rewards, group)
    weights = jnp.ones_like(rewards) if weights is None else weights
    count = jax.ops.segment_sum(weights, group, num_groups)
    # Differences from the group's least reward are exactly 0 where all agree, and so is their mean:
    # no rounding makes up a signal.
    least = jax.ops.segment_min(jnp.where(weights > 0, rewards, jnp.inf), group, num_groups)
    least = jnp.where(count > 0, least, 0.0)[group]
    above = jax.ops.segment_sum(weights * (rewards - least), group, num_groups)
    mean_above = above / jnp.where(count > 0, count, 1.0)
    if alone_below is None:
        alone = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups) < 2
    else:
        alone = count < alone_below
    return jnp.where(alone[group], rewards, (rewards - least) - mean_above[group]), count
