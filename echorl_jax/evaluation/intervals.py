"""Uncertainty of small measurements: 95% intervals for a share and for a mean."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
# Redraws of the units in a bootstrap.
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a share; ``(0, 1)`` without trials.

    Stays inside [0, 1] and does not collapse at shares of 0 and 1. Source: Wilson 1927, JASA 22.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = Z95 * spread / (1 + z2 / trials)
    # At a share of 0 or 1 the bound is exact; rounding must not push it out.
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of a (weighted) mean over independent units.

    The same numbers give the same interval.

    Args:
      values: one mean per unit, such as a trajectory.
      weights: how much each unit counts, such as its tokens; all the same by default.

    Raises:
      ValueError: there are no values, or no weight.

    >>> bootstrap_mean([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    unit = np.asarray(values, np.float64)
    weight = np.ones_like(unit) if weights is None else np.asarray(weights, np.float64)
    if unit.size == 0 or weight.sum() <= 0:
        raise ValueError("bootstrap_mean: nothing to average")
    draws = np.random.default_rng(0).integers(0, unit.size, (RESAMPLES, unit.size))
    totals = weight[draws].sum(axis=1)
    means = (weight * unit)[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
