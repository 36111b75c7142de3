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
    """Estimates the gradient of an order statistic of K samples from each group (OrderGrad).

    A_i is the mean of the statistic over the K-subsets of the group that hold i, minus its mean
    over those that do not. K is ``samples``, or n - 1 in a group of n rollouts if that is less; a
    group of one keeps A = r. Source: arXiv 2606.06096.

    Args:
      rewards: ``[N]`` float32.
      group: ``[N]`` int32 in ``[0, num_groups)``.
      num_groups: P, static under jit.
      samples: K of a large enough group, static.
      statistic, amount: see :func:`rank_weights`.

    Returns:
      ``[N]`` float32, sums to 0 over a group of two or more.

    >>> rewards, group = jnp.array([1.0, 1.0, 0, 0, 0, 0]), jnp.zeros(6, jnp.int32)
    >>> print(order_advantages(rewards, group, num_groups=1, samples=3).round(3))
    [ 0.4  0.4 -0.2 -0.2 -0.2 -0.2]
    """
    rewards = checked(rewards, group)
    rows = rewards.shape[0]
    # The group's lowest reward is subtracted, which does not change A, so that equal rewards give
    # exactly 0.
    shifted = rewards - jax.ops.segment_min(rewards, group, num_groups)[group]
    size = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)[group]
    # Sorted by group, then by reward; `rank` counts from 1 inside the group.
    by_group, value, row = lax.sort(
        (group, shifted, jnp.arange(rows, dtype=jnp.int32)), num_keys=2, is_stable=True
    )
    first = jnp.searchsorted(by_group, by_group)
    rank = (jnp.arange(rows) - first + 1).astype(jnp.float32)
    count = size[row]
    result = jnp.zeros_like(rewards)
    # K differs between groups but is static here: compute every K for all rows, then choose.
    for k in range(1, min(samples, rows - 1) + 1):
        alpha = rank_weights(statistic, k, amount)
        mean = _segment_total(_subset_weights(rank, count, alpha) * value, by_group, num_groups)
        # Without row i, those above it move down by one rank.
        same_rank = _subset_weights(rank, count - 1.0, alpha) * value
        rank_below = _subset_weights(rank - 1.0, count - 1.0, alpha) * value
        below = _running(same_rank, rank) - same_rank
        above = _segment_total(rank_below, by_group, num_groups) - _running(rank_below, rank)
        # A = (mean - mean without i) n / K, as mean = K/n (mean with i) + (1 - K/n) (mean without).
        scores = (count / k) * (mean - (below + above))
        group_k = jnp.minimum(jnp.float32(samples), count - 1.0)
        result = jnp.where(group_k == k, scores, result)
    result = jnp.where(count > 1, result, rewards[row])
    return jnp.zeros_like(rewards).at[row].set(result)


def rank_weights(statistic: OrderStatistic, samples: int, amount: float = 0.5) -> tuple[float, ...]:
    """The statistic as weights of K sorted samples, lowest first; the weights sum to 1.

    ``max``, ``min`` and ``median`` ignore ``amount``. ``top`` is the mean of the ``amount`` best
    samples; ``trimmed`` leaves out ``amount`` samples at each end. ``upper_tail`` and
    ``lower_tail`` (CVaR) are means of the best or worst ``amount * K`` samples, rounded up.

    >>> rank_weights("max", 3), rank_weights("median", 4), rank_weights("lower_tail", 3, 0.5)
    ((0.0, 0.0, 1.0), (0.0, 0.5, 0.5, 0.0), (0.5, 0.5, 0.0))
    """
    if statistic in ("median", "trimmed"):
        most = (samples - 1) // 2
        low = most if statistic == "median" else min(round(amount), most)
        high = samples - low
    else:
        wanted = math.ceil(amount * samples) if statistic.endswith("tail") else round(amount)
        kept = 1 if statistic in ("max", "min") else min(max(1, wanted), samples)
        from_top = statistic in ("max", "top", "upper_tail")
        low, high = (samples - kept, samples) if from_top else (0, kept)
    return tuple(float(low <= rank < high) / (high - low) for rank in range(samples))


def _subset_weights(rank: Array, count: Array, alpha: tuple[float, ...]) -> Array:
    """Weight of the value at ``rank`` in the mean of the statistic over all K-subsets.

    sum_j alpha_j C(rank - 1, j) C(n - rank, K - 1 - j) / C(n, K), with j from 0 and n = ``count``.
    Each term is a product of ratios of at most 1, because binomials of large groups overflow.
    """
    samples, total = len(alpha), jnp.zeros_like(rank)
    for j, weight in enumerate(alpha):
        if not weight:
            continue
        factors = [rank - 1.0 - i for i in range(j)]
        factors += [count - rank - i for i in range(samples - 1 - j)]
        product = jnp.float32(weight * samples * math.comb(samples - 1, j))
        # These are K - 1 numerators for the K denominators n, n - 1, ...; the last one is 1.
        for i, factor in enumerate([*factors, jnp.ones_like(rank)]):
            product = product * jnp.maximum(factor, 0.0) / jnp.maximum(count - i, 1.0)
        total = total + product
    return total


def _segment_total(values: Array, group: Array, num_groups: int) -> Array:
    return jax.ops.segment_sum(values, group, num_groups)[group]


def _running(values: Array, rank: Array) -> Array:
    """Cumulative sums within each group; ``rank`` is 1 where a group begins."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    return lax.associative_scan(join, (values, rank == 1))[0]
