"""Sampling and grading as one act, for training and for evaluation, and the engine that samples."""

from echorl_jax.environment.attempts import (
    Attempts,
    GradedTexts,
    Grading,
    append_experts,
    end_settings,
    end_tokens,
    expert_completions,
    sample_and_grade,
    target_ids,
)
from echorl_jax.environment.engines import MOST_SAMPLES, Engine, JaxEngine, make_engine

__all__ = [
    "MOST_SAMPLES",
    "Attempts",
    "Engine",
    "GradedTexts",
    "Grading",
    "JaxEngine",
    "append_experts",
    "end_settings",
    "end_tokens",
    "expert_completions",
    "make_engine",
    "sample_and_grade",
    "target_ids",
]
