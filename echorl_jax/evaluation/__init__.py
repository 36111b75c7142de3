"""Generate, grade, and count: pass@1, avg@k and pass@k over benchmark rows."""

from echorl_jax.evaluation.evaluate import Attempt, attempt_rows, end_tokens
from echorl_jax.evaluation.grading import GradedTexts, grade_rollouts
from echorl_jax.evaluation.scores import Score, pass_at_k, score_by_source, wilson_interval

__all__ = [
    "Attempt",
    "GradedTexts",
    "Score",
    "attempt_rows",
    "end_tokens",
    "grade_rollouts",
    "pass_at_k",
    "score_by_source",
    "wilson_interval",
]
