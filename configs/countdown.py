"""GRPO + EchoRL on Countdown with the tiny model of this package: minutes on a laptop CPU."""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 250
    config.model.path = "builtin:countdown"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = "countdown:split=train"
    config.data.eval = "countdown:split=eval&count=1024"
    config.data.grader_workers = 0
    config.data.max_prompt_tokens = 512
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 32
    config.objective.kl_coef = 0.0
    config.optim.learning_rate = 4e-5
    config.optim.warmup_steps = 5
    config.optim.beta2 = 0.98
    # Programs of this size compile in a second or two, when they are first needed.
    config.optim.compile_ahead = False
    config.checkpoint.every = 50
    config.eval.every = 50
    config.eval.temperature = 1.0
    config.log.samples_every = 20
    return config
