"""Trains a tiny model with a vision tower on generated pictures, from random weights."""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 600
    # Architecture, tokenizer and chat template; there are no weights.
    config.model.path = "builtin:shapes"
    config.model.init = "random"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = "shapes:count=1000000"
    config.data.eval = "shapes:split=eval&count=512"
    config.data.grader = "shapes"
    config.data.grader_workers = 0
    config.data.max_prompt_tokens = 48
    config.data.max_image_tokens = 16
    config.rollout.max_new_tokens = 32
    config.objective.name = "sft"
    config.echo.enabled = False
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.optim.beta2 = 0.98
    config.optim.compile_ahead = False
    config.optim.sft_rows_per_step = 64
    config.checkpoint.every = 100
    config.eval.every = 100
    config.eval.temperature = 1.0
    return config
