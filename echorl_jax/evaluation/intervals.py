"""Uncertainty of small measurements: 95% intervals for a share and for a mean, by SciPy."""

from collections.abc import Sequence

import numpy as np

# Redraws of the units in a bootstrap.
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a share; ``(0, 1)`` without trials.

    It stays inside [0, 1] and does not collapse at shares of 0 and 1. Source: Wilson 1927, JASA 22.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    from scipy.stats import binomtest  # a second to import, which few commands need

    if trials == 0:
        return 0.0, 1.0
    low, high = binomtest(round(successes), trials).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of a (weighted) mean over independent units.

    The same numbers give the same interval.

    Args:
      values: one mean per unit, such as a trajectory.
      weights: how much each unit counts, such as its tokens; equal by default.

    Raises:
      ValueError: there are no values, or no weight.

    >>> bootstrap_mean([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    from scipy.stats import bootstrap

    unit = np.asarray(values, np.float64)
    weight = np.ones_like(unit) if weights is None else np.asarray(weights, np.float64)
    if unit.size == 0 or weight.sum() <= 0:
        raise ValueError("bootstrap_mean: nothing to average")
    if len(set(values)) == 1:
        return float(unit[0]), float(unit[0])

    def mean(unit: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
        total = weight.sum(axis=axis)
        # A redraw without weight has no mean; the overall one takes its place.
        mean = (weight * unit).sum(axis=axis) / np.where(total > 0, total, 1.0)
        return np.where(total > 0, mean, overall)

    overall = float((weight * unit).sum() / weight.sum())
    result = bootstrap(
        (unit, weight), mean, paired=True, n_resamples=RESAMPLES, method="percentile", rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
