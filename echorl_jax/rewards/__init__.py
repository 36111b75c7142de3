"""Graders and the guarded pool that runs them. Nothing here imports JAX: processes start fast."""

from echorl_jax.rewards.loading import (
    GRADERS,
    Grader,
    Verdict,
    grading_failed,
    judge,
    load_grader,
    mean_metrics,
    metric_values,
)
from echorl_jax.rewards.pool import GraderPool, PoolError

__all__ = [
    "GRADERS",
    "Grader",
    "GraderPool",
    "PoolError",
    "Verdict",
    "grading_failed",
    "judge",
    "load_grader",
    "mean_metrics",
    "metric_values",
]
