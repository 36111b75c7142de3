"""Trains a tiny Reduce model on generated solutions, the base of configs/reduce.py.

It goes on from the Countdown model, which knows the digits' sums and differences already.
"""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config

PROBLEMS = "max_result=9&operators=+-"


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 3000
    config.model.path = "builtin:countdown"
    config.model.dtype = "float32"
    config.model.remat = "none"
    # Short expressions teach the facts, long ones the form.
    config.data.train = f"reduce:min_operands=2&max_operands=8&{PROBLEMS}&count=10000000"
    config.data.eval = f"reduce:min_operands=6&max_operands=8&{PROBLEMS}&split=eval&count=512"
    config.data.grader = "reduce"
    config.data.grader_workers = 0
    config.data.max_prompt_tokens = 64
    config.rollout.max_new_tokens = 96
    config.objective.name = "sft"
    config.echo.enabled = False
    config.optim.learning_rate = 1.5e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.optim.beta2 = 0.98
    config.optim.compile_ahead = False
    config.optim.sft_rows_per_step = 96
    config.checkpoint.every = 100
    config.eval.every = 500
    config.eval.temperature = 1.0
    return config
