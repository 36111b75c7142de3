"""The paper's runs: ``configs/paper.py:MODEL,METHOD`` or ``configs/paper.py:MODEL,METHOD,echo``.

    echorl plan  --config=configs/paper.py:qwen2.5-math-7b,grpo,echo --topology=v5p:2x2x2
    echorl plan  --config=configs/paper.py:qwen2.5-vl-7b,grpo,echo --topology=v5p:2x2x2
    echorl train --config=configs/paper.py:qwen2.5-math-7b,luffy,echo --workdir=runs/luffy-echo \\
        --config.data.train=openr1.parquet --config.data.eval=valid.parquet

Sources of the numbers: [paper] is arXiv 2605.31228; [scripts] are the authors' public training
scripts for Qwen2.5-Math-7B on OpenR1-Math 46k. Where the two differ, the scripts are followed and
the comment says so. [ours] marks what neither fixes.
"""

from ml_collections import ConfigDict

from echorl_jax.config import ConfigError
from echorl_jax.config_file import default_config

# [paper] Its text backbones. Qwen2.5-Math was trained with a context of 4,096 tokens, less than a
# prompt and a completion may take here. LUFFY, on whose scripts the authors build, therefore starts
# from a copy with rope_theta 40000 and max_position_embeddings 16384 in its config.json
# (Elliott/Qwen2.5-Math-7B-16k-think); for the paper's numbers edit your copy likewise, rope_theta
# also inside rope_parameters if the file has that field.
MODELS = {
    "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
}
# [paper] Its vision backbone, trained on Geometry3K, and its smaller sister.
VISION = {
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
# METHOD -> name in OBJECTIVES. [scripts] What the authors run as GRPO centres rewards without the
# division by their deviation, and divides token sums by the constant longest completion: dr_grpo
# here. [paper] Its formula divides and takes token means: --config.objective.name=grpo.
METHODS = {
    "grpo": "dr_grpo",
    **{
        name: name
        for name in (
            "dapo luffy uft dr_grpo gspo cispo rloo reinforce_pp reinforce_pp_baseline opo kl_cov "
            "clip_cov sft rl_zvp avspo mcpo psr nsr w_reinforce maxrl lite_ppo ordergrad curverl "
            "scale_rl sapo gmpo luspo dppo_tv dppo_kl vespo m2po topr"
        ).split()
    },
}
# [scripts] These share one recipe; the others keep the settings of their own papers.
_AUTHORS = ("grpo", "luffy")
# [scripts] "up to 30 epochs" of 46k rows at 128 prompts a step: a limit, not a goal.
_EPOCHS, _ROWS = 30, 46_000


def get_config(argument: str = "") -> ConfigDict:
    model, method, echo = _parse(argument)
    config = default_config()
    config.steps = _EPOCHS * _ROWS // 128
    config.model.path = {**MODELS, **VISION}[model]
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"  # [scripts] gradient checkpointing

    # OpenR1-Math 46k as LUFFY prepared it (prompt, target, reward_model), see docs/data.md, "The
    # paper's data"; any file of such rows.
    config.data.train = "data/openr1_math_46k.parquet"
    config.data.eval = "data/valid.parquet"
    config.data.template = "luffy"  # [scripts] system prompt with <think> and \boxed{}
    config.data.grader = "math"  # [scripts] math-verify on the text after </think>
    config.data.max_prompt_tokens = 1024  # [scripts]

    config.rollout.prompts_per_step = 128  # [scripts]
    config.rollout.group_size = 8  # [paper] and [scripts], G
    config.rollout.max_new_tokens = 8192  # [paper] and [scripts]
    config.rollout.temperature = 1.0  # [scripts]; the paper's text says 0.6, used for validation

    config.objective.name = METHODS[method]
    config.objective.mini_batches = 2  # [scripts] updates of 64 prompts
    if method in _AUTHORS:
        config.objective.kl_coef = 0.0  # [scripts]; the paper's formula has a KL term
        # [scripts] With it every row contributes a gradient, so none is left out of an update.
        config.objective.entropy_coef = 0.001
        # [scripts] Token sums over 8192, without a mean over tokens. The scripts add up the m
        # micro-batches of a GPU's 64 rows, each with its own mean of bonus and echo; written as
        # means over rows that makes coefficients 0.001 m / 64 against the policy term (m is 2 to
        # 5: lambda 3e-5 to 8e-5), another number whenever lengths change m. Here every term is a
        # mean over the update, and lambda is the paper's 1e-3 as its formula has it.
        config.objective.aggregation = "seq-mean-token-sum-norm"
    if method == "grpo":
        config.objective.epsilon_low = config.objective.epsilon_high = 0.2  # [paper], [scripts]
    if method == "luffy":
        config.objective.expert_rows = 1  # [scripts] 1 expert trajectory in a group of 8

    config.echo.enabled = echo
    config.echo.coef = 1e-3  # [paper] lambda, the best of its sweep
    config.echo.select = "max"  # [paper] the step of highest entropy
    config.echo.when = "any_success"  # [paper] V(q), all verified successes
    if not model.startswith("llama"):
        # [scripts] For Qwen2.5: "\n" and "\n\n". [ours] For Llama every token with a newline.
        config.echo.delimiter = "ids"
        config.echo.delimiter_ids = (198, 271)

    config.optim.learning_rate = 1e-6  # [scripts], constant
    config.optim.schedule = "constant"
    config.optim.max_grad_norm = 1.0  # [scripts]
    config.optim.micro_batch_tokens = 32768  # [scripts] for each of their 8 GPUs
    config.mesh.fsdp = -1  # [ours] all devices share one copy of the weights

    config.checkpoint.every = 5  # [scripts]
    config.eval.every = 5  # [scripts]
    config.eval.temperature = 0.6  # [paper] and [scripts], validation
    if model in VISION:
        _geometry(config, method)
    return config


def _geometry(config: ConfigDict, method: str) -> None:
    """Geometry3K with pictures. The authors published no settings for it, and their repository has
    no code for pictures: [EasyR1] is its example qwen2_5_vl_7b_geo3k_grpo, [verl] verl's script.
    """
    config.steps = 15 * 2101 // 512  # [EasyR1] 15 epochs of 2,101 rows at 512 prompts a step
    config.data.train = "hf:hiyouga/geometry3k?split=train"
    config.data.eval = "hf:hiyouga/geometry3k?split=test"
    config.data.template = "think"  # [EasyR1], [verl] think within tags, box the answer
    config.data.grader = "math@0.9, format@0.1"  # [EasyR1], [verl]
    config.data.max_prompt_tokens = 1024  # [verl]; [EasyR1] 2,048
    config.data.min_pixels, config.data.max_pixels = 262_144, 4_194_304  # [EasyR1]
    config.data.max_image_tokens = 768  # [ours] its drawings have 320 to 350, few have more
    config.rollout.prompts_per_step = 512  # [EasyR1], [verl]
    config.rollout.group_size = 5  # [EasyR1], [verl]
    config.rollout.max_new_tokens = 2048  # [EasyR1], [verl]
    if method == "grpo":  # [EasyR1], [verl] with the deviation, a mean over tokens
        config.objective.name, config.objective.aggregation = "grpo", "token-mean"
    config.objective.mini_batches = 4  # [EasyR1], [verl] updates of 128 prompts
    config.objective.kl_coef = 0.01  # [EasyR1], [verl]
    config.objective.kl_estimator = "k3"  # [EasyR1], [verl] "low_var_kl"
    config.objective.entropy_coef = 0.0  # [EasyR1], [verl]
    config.optim.weight_decay = 1e-2  # [EasyR1]
    config.model.vision = "trained"  # [EasyR1] the tower is not frozen


def _parse(argument: str) -> tuple[str, str, bool]:
    model, _, rest = argument.partition(",")
    method, _, echo = rest.partition(",")
    for kind, name, allowed in (
        ("MODEL", model, {**MODELS, **VISION}),
        ("METHOD", method, METHODS),
    ):
        if name not in allowed:
            raise ConfigError(
                f"configs/paper.py:MODEL,METHOD[,echo]: {kind} is {name!r}, must be one of "
                f"{', '.join(allowed)}"
            )
    if echo not in ("", "echo"):
        raise ConfigError(
            f"configs/paper.py:MODEL,METHOD[,echo]: the third word is {echo!r}, must be echo or "
            "left out"
        )
    if method == "sft" and echo:
        raise ConfigError(
            "configs/paper.py:MODEL,sft,echo: supervised training samples nothing to echo; "
            "leave out echo"
        )
    return model, method, bool(echo)
