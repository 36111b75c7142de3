"""GRPO + EchoRL on Reduce, a task of many steps: fresh problems at every step.

The base model is made by ``echorl sft --config=configs/reduce_sft.py --workdir=runs/reduce_sft``.
"""

from ml_collections import ConfigDict

from echorl_jax.config_file import default_config

PROBLEMS = "max_result=9&operators=+-"


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 200
    config.model.path = "runs/reduce_sft/export"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = f"reduce:min_operands=6&max_operands=8&{PROBLEMS}&count=1000000"
    # Held-out problems of the sizes trained on, and longer ones.
    config.data.eval = (
        f"reduce:min_operands=6&max_operands=8&{PROBLEMS}&split=eval&count=512,"
        f"reduce:min_operands=9&max_operands=12&{PROBLEMS}&split=eval&count=256&name=reduce-long"
    )
    config.data.grader = "reduce"
    config.data.grader_workers = 0
    config.data.max_prompt_tokens = 64
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    # The longest held-out solutions have 200 tokens.
    config.rollout.max_new_tokens = 224
    config.objective.kl_coef = 0.0
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 5
    config.optim.beta2 = 0.98
    # Programs of this size compile in a second or two, when they are first needed.
    config.optim.compile_ahead = False
    config.checkpoint.every = 50
    config.eval.every = 50
    config.eval.temperature = 1.0
    config.log.samples_every = 20
    return config
