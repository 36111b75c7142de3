"""The sampler: prompts in, completions with their log-probabilities and entropies out."""

from echorl_jax.rollout.generate import Progress, generate, generate_with_progress, rollout_params
from echorl_jax.rollout.memory import RolloutMemory, choose_slots, rollout_memory
from echorl_jax.rollout.scoring import join_rows, score, score_rollouts, score_rows

__all__ = [
    "Progress",
    "RolloutMemory",
    "choose_slots",
    "generate",
    "generate_with_progress",
    "join_rows",
    "rollout_memory",
    "rollout_params",
    "score",
    "score_rollouts",
    "score_rows",
]
