"""The sampler: prompts in, completions with their log-probabilities and entropies out."""

from echorl_jax.rollout.engine import generate, sample_request
from echorl_jax.rollout.host import Finished, Progress
from echorl_jax.rollout.memory import (
    Capacity,
    RolloutMemory,
    choose_capacity,
    rollout_memory,
)
from echorl_jax.rollout.request import Request, Resources, Sampling, make_request, pad_lists
from echorl_jax.rollout.scoring import join_rows, score, score_rollouts, score_rows
from echorl_jax.rollout.weights import rollout_params

__all__ = [
    "Capacity",
    "Finished",
    "Progress",
    "Request",
    "Resources",
    "RolloutMemory",
    "Sampling",
    "choose_capacity",
    "generate",
    "join_rows",
    "make_request",
    "pad_lists",
    "rollout_memory",
    "rollout_params",
    "sample_request",
    "score",
    "score_rollouts",
    "score_rows",
]
