"""GRPO + EchoRL on pictures: the model of configs/shapes_sft.py, fresh pictures at every step."""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 60
    # What `echorl sft --config=configs/shapes_sft.py --workdir=runs/shapes-sft` writes.
    config.model.path = "runs/shapes-sft/export"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = "shapes:count=1000000&seed=1"
    config.data.eval = "shapes:split=eval&count=512"
    config.data.grader = "shapes"
    config.data.grader_workers = 0
    config.data.max_prompt_tokens = 48
    config.data.max_image_tokens = 16
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 32
    config.objective.kl_coef = 0.0
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 5
    config.optim.beta2 = 0.98
    # Programs of this size compile in a second or two, when they are first needed.
    config.optim.compile_ahead = False
    config.checkpoint.every = 20
    config.eval.every = 20
    config.eval.temperature = 1.0
    config.log.samples_every = 20
    return config
