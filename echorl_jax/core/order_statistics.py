"""Advantages that raise an order statistic of K samples, such as their best (OrderGrad)."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import OrderStatistic
from echorl_jax.core.groups import checked
from echorl_jax.types import Array


def order_advantages(
    rewards: Array,
    group: Array,
    *,
    num_groups: int,
    samples: int,
    statistic: OrderStatistic = "max",
    amount: float = 0.5,
) -> Array:
    """The gradient of an order statistic of K samples, from n > K rollouts (OrderGrad).

    A_i is the mean of the statistic over the K-subsets of the group that hold i, minus its mean
    over those that do not. K = ``samples`` is at most n - 1; a group of one keeps A = r.
    Source: arXiv 2606.06096.

    Args:
      rewards: ``[N]`` float32.
      group: ``[N]`` int32 in ``[0, num_groups)``.
      num_groups: P, static under jit.
      samples: K, static.
      statistic, amount: see :func:`rank_weights`.

    Returns:
      ``[N]`` float32, sums to 0 over a group.

    >>> rewards, group = jnp.array([1.0, 1.0, 0, 0, 0, 0]), jnp.zeros(6, jnp.int32)
    >>> print(order_advantages(rewards, group, num_groups=1, samples=3).round(3))
    [ 0.4  0.4 -0.2 -0.2 -0.2 -0.2]
    """
    rewards = checked(rewards, group)
    rows = rewards.shape[0]
    above = rewards - jax.ops.segment_min(rewards, group, num_groups)[group]
    size = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)[group]
    # Sorted by group, then by reward; `rank` counts from 1 inside the group.
    by_group, value, place = lax.sort(
        (group, above, jnp.arange(rows, dtype=jnp.int32)), num_keys=2, is_stable=True
    )
    first = jnp.searchsorted(by_group, by_group)
    rank = (jnp.arange(rows) - first + 1).astype(jnp.float32)
    count = size[place]
    result = jnp.zeros_like(rewards)
    for kept in range(1, min(samples, rows - 1) + 1):
        alpha = rank_weights(statistic, kept, amount)
        whole = _segment_total(_subset_weights(rank, count, alpha) * value, by_group, num_groups)
        # Without row i, those above it move down by one rank.
        as_they_are = _subset_weights(rank, count - 1.0, alpha) * value
        moved = _subset_weights(rank - 1.0, count - 1.0, alpha) * value
        below = _running(as_they_are, rank) - as_they_are
        over = _segment_total(moved, by_group, num_groups) - _running(moved, rank)
        scores = (count / kept) * (whole - (below + over))
        usable = jnp.minimum(jnp.float32(samples), count - 1.0)
        result = jnp.where(usable == kept, scores, result)
    result = jnp.where(count > 1, result, rewards[place])
    return jnp.zeros_like(rewards).at[place].set(result)


def rank_weights(statistic: OrderStatistic, samples: int, amount: float = 0.5) -> tuple[float, ...]:
    """Weights of K sorted samples, lowest first, that make an order statistic; they sum to 1.

    ``max``, ``min``, ``median``; ``top`` is the mean of the ``amount`` best samples, ``trimmed``
    leaves out that many at both ends; ``upper_tail`` and ``lower_tail`` are means of that share of
    the samples, rounded up (CVaR).

    >>> rank_weights("max", 3), rank_weights("median", 4), rank_weights("lower_tail", 3, 0.5)
    ((0.0, 0.0, 1.0), (0.0, 0.5, 0.5, 0.0), (0.5, 0.5, 0.0))
    """
    if statistic in ("median", "trimmed"):
        most = (samples - 1) // 2
        low = most if statistic == "median" else min(round(amount), most)
        high = samples - low
    else:
        tail = math.ceil(amount * samples) if statistic.endswith("tail") else round(amount)
        kept = 1 if statistic in ("max", "min") else min(max(1, tail), samples)
        from_top = statistic in ("max", "top", "upper_tail")
        low, high = (samples - kept, samples) if from_top else (0, kept)
    return tuple(float(low <= rank < high) / (high - low) for rank in range(samples))


def _subset_weights(rank: Array, count: Array, alpha: tuple[float, ...]) -> Array:
    """Weight of the value at ``rank`` in the mean of the statistic over all K-subsets.

    sum_j alpha_j C(rank - 1, j - 1) C(n - rank, K - j) / C(n, K), as products of ratios of at most
    1: binomials of large groups overflow.
    """
    samples, total = len(alpha), jnp.zeros_like(rank)
    for place, weight in enumerate(alpha):
        if not weight:
            continue
        factors = [rank - 1.0 - i for i in range(place)]
        factors += [count - rank - i for i in range(samples - place - 1)]
        product = jnp.float32(weight * samples * math.comb(samples - 1, place))
        for i, factor in enumerate([*factors, jnp.ones_like(rank)]):
            product = product * jnp.maximum(factor, 0.0) / jnp.maximum(count - i, 1.0)
        total = total + product
    return total


def _segment_total(values: Array, group: Array, num_groups: int) -> Array:
    return jax.ops.segment_sum(values, group, num_groups)[group]


def _running(values: Array, rank: Array) -> Array:
    """Sums of each group's values up to and with each row; ``rank`` is 1 where a group begins."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    return lax.associative_scan(join, (values, rank == 1))[0]
