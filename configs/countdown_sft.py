"""Trains the tiny Countdown model of this package from scratch on generated solutions."""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 700
    config.model.path = "builtin:countdown"
    config.model.init = "random"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = "countdown:split=train&count=1000000"
    config.data.eval = "countdown:split=eval&count=512"
    config.data.max_prompt_tokens = 64
    config.data.grader_workers = 0
    config.rollout.max_new_tokens = 32
    config.objective.name = "sft"
    config.echo.enabled = False
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 20
    config.optim.beta2 = 0.98
    config.optim.compile_ahead = False
    config.optim.sft_rows_per_step = 256
    config.checkpoint.every = 100
    config.eval.every = 100
    config.eval.temperature = 1.0
    return config
