"""The words that an option may be, each set once: for config.py and for the functions it reaches.

Nothing here imports JAX.
"""

from typing import Literal

# Aggregations of token losses to one number (verl's names, and the mean over prompts).
Aggregation = Literal[
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "prompt-mean",
    "token-sum",
    "token-sum-norm",
]
# Estimators of the divergence from the reference policy.
KLEstimator = Literal["k1", "k2", "k3", "k3_unbiased", "abs"]
# Rewards whose deviation divides advantages: the group's, the batch's, or the batch's after each
# group's mean is taken off.
Spread = Literal["group", "batch", "batch_centred"]
# Statistic of the best of K samples that OrderGrad's advantages raise.
OrderStatistic = Literal["max", "top", "upper_tail", "lower_tail", "median", "trimmed", "min"]
# Measure of DPPO's trust region.
Divergence = Literal["tv", "kl"]
# Units over which the trainer's and the sampler's probabilities are compared.
ImportanceWeight = Literal["none", "token", "sequence"]
ImportanceMask = Literal["none", "token", "sequence", "geometric"]
# Which step ends an EchoClip, which prompts give clips, and what their mean is over.
Select = Literal[
    "max", "min", "full", "random", "first", "last", "random_length", "longest", "shortest"
]
When = Literal["any_success", "degenerate_only"]
Normalise = Literal["prompts_with_clip", "all_prompts", "tokens"]
# Rematerialisation (what the backward pass recomputes), and the attention kernel.
Remat = Literal["layer", "dots", "none"]
Kernel = Literal["auto", "xla", "splash", "cudnn"]
# Type of the sampler's keys and values.
KVDtype = Literal["float32", "bfloat16", "int8"]
# Linears that may have adapters, by PEFT's names: of the text model, and of the vision tower.
# Then the part of the model that has them, and how a fresh adapter's A is drawn.
LINEARS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}
TOWER_LINEARS = {
    "qkv": "vision/qkv",
    "attn.proj": "vision/o",
    **{f"{name}_proj": f"vision/{name}" for name in ("gate", "up", "down")},
    "merger.mlp.0": "vision/merger/up",
    "merger.mlp.2": "vision/merger/down",
}
LoraModules = Literal["text", "tower", "both"]
LoraInit = Literal["kaiming", "gaussian"]
# Type of the frozen weights beside adapters.
BaseDtype = Literal["float32", "bfloat16", "int8"]
# Rows that a group's mean reward is of.
Baseline = Literal["all", "on_policy"]
