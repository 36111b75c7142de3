"""The sampler: prompts in, completions with their log-probabilities and entropies out."""

from echorl_jax.rollout.cost import TurnCost, turn_cost
from echorl_jax.rollout.generate import generate, generate_with_progress, rollout_params
from echorl_jax.rollout.lanes import Progress
from echorl_jax.rollout.memory import RolloutMemory, choose_slots, rollout_memory
from echorl_jax.rollout.request import pad_lists
from echorl_jax.rollout.scoring import join_rows, score, score_rollouts, score_rows
from echorl_jax.rollout.watch import Finished

__all__ = [
    "Finished",
    "Progress",
    "RolloutMemory",
    "TurnCost",
    "choose_slots",
    "generate",
    "generate_with_progress",
    "join_rows",
    "pad_lists",
    "rollout_memory",
    "rollout_params",
    "score",
    "score_rollouts",
    "score_rows",
    "turn_cost",
]
