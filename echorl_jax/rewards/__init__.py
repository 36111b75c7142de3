"""Graders and the guarded pool that runs them. Nothing here imports JAX: processes start fast."""

from echorl_jax.rewards.dispatch import PoolError
from echorl_jax.rewards.loading import GRADERS, Grader, judge, load_grader
from echorl_jax.rewards.pool import GraderPool
from echorl_jax.rewards.verdict import Verdict, grading_failed

__all__ = [
    "GRADERS",
    "Grader",
    "GraderPool",
    "PoolError",
    "Verdict",
    "grading_failed",
    "judge",
    "load_grader",
]
