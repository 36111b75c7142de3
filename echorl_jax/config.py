"""Every option of a run, once: frozen dataclasses and one ``validate``.

How a file under ``configs/`` and ``--config.key=value`` become a :class:`Config` is in
config_file.py. Nothing here imports JAX, so that ``--help`` and wrong keys answer at once.
"""

import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple

from echorl_jax.choices import (
    LINEARS,
    TOWER_LINEARS,
    Aggregation,
    BaseDtype,
    Baseline,
    ImportanceMask,
    ImportanceWeight,
    Kernel,
    KLEstimator,
    KVDtype,
    LoraInit,
    LoraModules,
    Normalise,
    OrderStatistic,
    Remat,
    Select,
    Spread,
    When,
)
from echorl_jax.errors import UserError

# Devices count in 32 bits: larger whole numbers would fail or wrap there.
LARGEST = 2**31 - 1


class ConfigError(UserError):
    """A wrong option: names the key and what is allowed."""


class Bound(NamedTuple):
    """The values that a field may have, in words and as a check; None is always allowed."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    """The numbers from ``low`` on."""
    return Bound(f"at least {low:g}", lambda value: value >= low)


def above(low: float) -> Bound:
    """The numbers above ``low``."""
    return Bound(f"above {low:g}", lambda value: value > low)


# Logits are divided by the temperature; below 1e-30 they overflow.
ZERO_OR_NORMAL = Bound("0 or at least 1e-30", lambda value: value == 0 or value >= 1e-30)
SHARE = Bound("in [0, 1]", lambda share: 0 <= share <= 1)
POSITIVE_SHARE = Bound("in (0, 1]", lambda share: 0 < share <= 1)
QUANTILE = Bound("in (0, 1)", lambda share: 0 < share < 1)
DECAY = Bound("in [0, 1)", lambda rate: 0 <= rate < 1)
# The program of OrderGrad's advantages grows with the cube of its samples.
ORDER_SAMPLES = Bound("in [1, 32]", lambda samples: 1 <= samples <= 32)
DEVICES = Bound("-1 or at least 1", lambda devices: devices == -1 or devices >= 1)
STEPS = Bound("steps from 1 on", lambda steps: min(steps, default=1) >= 1)
TARGETS = Bound(
    f"all-linear, or names of {', '.join(LINEARS | TOWER_LINEARS)} with commas between",
    lambda text: text == "all-linear" or set(text.split(",")) <= {*LINEARS, *TOWER_LINEARS},
)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(text, str) and text for text in values)


JSON_OBJECT = Bound(
    'a JSON object, such as {"name": 1}', lambda text: isinstance(_json(text), dict)
)
JSON_TEXTS = Bound('a JSON list of texts, such as ["###"]', lambda text: _are_texts(_json(text)))
RESUME = Bound(
    "auto, none, or the step of a checkpoint",
    lambda text: text in ("auto", "none") or (text.isdecimal() and len(text) < 11),
)
REPOSITORY = Bound(
    'OWNER/NAME, or ""', lambda text: not text or re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    # Hugging Face directory, repository id, or "builtin:countdown", the tiny model in this package.
    path: str = "builtin:countdown"
    # Branch, tag or commit of a repository id; "" takes its default branch.
    revision: str = ""
    # "pretrained" reads the weights; "random" takes architecture and tokenizer, with fresh weights.
    init: Literal["pretrained", "random"] = "pretrained"
    # Type of activations and matrix products. Master weights and optimizer state are float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Type of the frozen weights beside LoRA adapters: int8 rounds the layers' matrices, each output
    # with its factor, and leaves the rest in bfloat16. None takes bfloat16.
    base_dtype: BaseDtype | None = None
    # What the backward pass recomputes: everything in a layer, all but matrix products, or nothing.
    remat: Remat = "layer"
    # The weights of a vision tower: trained with the rest, or frozen. None trains them, but not
    # beside LoRA adapters, which lora.modules places.
    vision: Literal["trained", "frozen"] | None = None
    # Attention kernel; "auto" takes splash on TPU, cuDNN on GPU, XLA elsewhere.
    attention: Kernel = "auto"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    # Rank r of the adapters, which are trained in place of the weights; 0 trains the weights.
    rank: Annotated[int, at_least(0)] = 0
    # An adapter's output is multiplied by alpha / rank.
    alpha: Annotated[float, above(0)] = 32.0
    # The part of a model with a vision tower that has adapters: text, tower or both.
    modules: LoraModules = "text"
    # Adapted linears of that part: all-linear, or names such as "q_proj,v_proj".
    targets: Annotated[str, TARGETS] = "all-linear"
    # How A is drawn, as by PEFT: kaiming from U(-1/sqrt(in), 1/sqrt(in)), or gaussian from
    # N(0, 1/rank^2). B begins as zeros.
    init: LoraInit = "kaiming"
    # Multiply by alpha / sqrt(rank) instead.
    rslora: bool = False
    # PEFT directory of an adapter to go on from, with its ranks, alphas and targets; "" takes a
    # fresh one.
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Training rows: files (parquet, JSON), folders or patterns with *, also on s3:// and gs://;
    # "countdown:operands=3&max_number=29&..." for generated ones, "tfds:NAME?split=train" or
    # "hf:OWNER/NAME?split=train"; a comma separates several. Rows are filtered as in
    # "FILE?level=3-5&limit=100" and mixed as in "A@0.7,B@0.3" (docs/data.md).
    train: str = "countdown:"
    # Held-out rows for the periodic evaluation, in the same form; "" evaluates nothing.
    eval: str = ""
    # The prompt template: "chat" is the tokenizer's chat template, "plain" the message contents
    # as they stand; luffy, qwen-math, boxed and uft write the problem into that prompt; a .jinja
    # file is a chat template in place of the tokenizer's.
    template: str = "chat"
    # Arguments of the chat template as a JSON object, such as {"enable_thinking": false}.
    template_kwargs: Annotated[str, JSON_OBJECT] = "{}"
    # The system message of every prompt in place of the rows' own, with chat, plain or a .jinja
    # file; "" has none, None keeps the rows' own.
    system_prompt: str | None = None
    # Prompts longer than this are left out and counted (tokens).
    max_prompt_tokens: Annotated[int, at_least(1)] = 1024
    # Pictures are scaled so that they have so many pixels, at least and at most: they decide how
    # many tokens a picture has, 1 for 28 x 28 pixels of Qwen2.5-VL.
    min_pixels: Annotated[int, at_least(1)] = 3136
    max_pixels: Annotated[int, at_least(1)] = 1003520
    # Prompts with more image tokens are left out and counted; there is memory for so many of each.
    max_image_tokens: Annotated[int, at_least(1)] = 1280
    # A prompt whose rows succeed at this rate or a higher one at a visit never returns (ScaleRL's
    # no-positive-resampling, 0.9 there); None retires none.
    retire_above: Annotated[float | None, POSITIVE_SHARE] = None
    # A broken row stops the run with its file and number, or is skipped and counted.
    on_bad_row: Literal["error", "skip"] = "error"
    # The grader: auto (by the row's data source), math, choice, countdown, format, reduce, shapes,
    # "package.module:function" or "FILE.py:function". Several are a list with weights, such as
    # "math@0.9, mine.py:format@0.1": the reward is the weighted sum, and success is the verdict of
    # the first, or of the one with a star before it (docs/graders.md).
    grader: str = "auto"
    # Keyword arguments of the grader functions, as a JSON object; each function gets those that it
    # has parameters for.
    grader_kwargs: Annotated[str, JSON_OBJECT] = "{}"
    # Limit for one verdict (seconds); a hang costs that one item.
    grader_timeout_s: Annotated[float, above(0)] = 10.0
    # Grading processes. 0 grades choice, countdown, reduce and shapes here, whose costs are
    # bounded; every other grader gets one process.
    grader_workers: Annotated[int, at_least(0)] = 2


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    # The sampler: "" is the sampler of this package; "package.module:factory" makes another one
    # (docs/architecture.md, "Where a change goes").
    engine: str = ""
    # Prompts per training step, P.
    prompts_per_step: Annotated[int, at_least(1)] = 128
    # Rollouts per prompt, G.
    group_size: Annotated[int, at_least(1)] = 8
    # Longest completion, T (tokens).
    max_new_tokens: Annotated[int, at_least(1)] = 8192
    # Sampling temperature; also divides the logits of every log-probability and entropy.
    temperature: Annotated[float, at_least(1e-30)] = 1.0
    # Keep the k likeliest tokens; 0 keeps all.
    top_k: Annotated[int, at_least(0)] = 0
    # Keep the likeliest tokens that hold this much probability.
    top_p: Annotated[float, POSITIVE_SHARE] = 1.0
    # Tokens that end a completion besides the tokenizer's and the model's.
    stop_ids: tuple[int, ...] = ()
    # Texts that end a completion, as a JSON list, such as ["\n\nQuestion:"]: it ends with the token
    # that completes one.
    stop_strings: Annotated[str, JSON_TEXTS] = "[]"
    # Rows decoded at once; 0 takes all rows of a step if they fit beside weights, optimizer and
    # prompts, else as many as do. Samples do not depend on it.
    slots: Annotated[int, at_least(0)] = 0
    # Mean length of completions (tokens), from which slots and pages are chosen where completions
    # are long; 0 takes slots for a quarter of max_new_tokens, and the memory that they may take for
    # pages. Samples do not depend on it.
    expected_tokens: Annotated[int, at_least(0)] = 0
    # Type of the sampler's keys and values; None takes the model's. int8 halves the memory of
    # bfloat16 and rounds log-probabilities (docs/performance.md).
    kv_dtype: KVDtype | None = None
    # Steps between checks that sampler and trainer agree on log-probabilities, the first step of a
    # run and the first after a resume included; 0 never stops a run for it.
    check_every: Annotated[int, at_least(0)] = 50
    # Largest accepted gap between the two (nats); 0 takes the bounds on the largest and mean gap
    # and on the share of wide ones of the narrower type of model.dtype and rollout.kv_dtype
    # (docs/performance.md).
    max_logprob_gap: Annotated[float, at_least(0)] = 0.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    # Name in OBJECTIVES, or "package.module:objective".
    name: str = "grpo"
    # Verified success: None takes the grader's verdict (of a plain score: 1 or more), a number any
    # score from there on; of a list of graders it is the score of the one that decides, unweighted.
    success_threshold: float | None = None
    # Clip range below and above 1; None takes the objective's own.
    epsilon_low: Annotated[float | None, at_least(0)] = None
    epsilon_high: Annotated[float | None, at_least(0)] = None
    # Aggregation of token losses to one number (verl's names); None takes the objective's own.
    aggregation: Aggregation | None = None
    # Weight of the KL term against the reference policy, and its estimator; None takes the
    # objective's own.
    kl_coef: Annotated[float | None, at_least(0)] = None
    kl_estimator: KLEstimator | None = None
    # Weight of the entropy bonus; None takes the objective's own.
    entropy_coef: float | None = None
    # Bound c on the loss of a token with negative advantage, -A c; None takes the objective's own.
    dual_clip: Annotated[float | None, above(1)] = None
    # Corrections for a sampler whose probabilities differ from the trainer's, with old_logprobs =
    # "trainer" (else the ratio itself is against the sampler); None takes the objective's own.
    # The loss of a token is weighed by trainer / sampler: its own ratio or its row's product, up to
    # the cap C of truncated importance sampling (a cap alone is of tokens).
    importance_weight: ImportanceWeight | None = None
    tis_cap: Annotated[float | None, above(0)] = None
    # Leaves out tokens, or rows by the product or the geometric mean of their tokens, whose ratio
    # lies outside [low, high] (IcePop: token, 0.5, 5; TRL: sequence, 0, 3).
    importance_mask: ImportanceMask | None = None
    importance_low: Annotated[float | None, at_least(0)] = None
    importance_high: Annotated[float | None, above(0)] = None
    # Leaves out rows with negative advantage that the policy has moved away from by more than this
    # (mean log sampler / policy, nats; OPSM).
    drift_limit: Annotated[float | None, at_least(0)] = None
    # Shapes any advantages by entropy, A + min(alpha H, |A| / kappa); 0 leaves them.
    entropy_alpha: Annotated[float | None, at_least(0)] = None
    entropy_kappa: Annotated[float | None, at_least(1)] = None
    # Share of tokens that learn, those of highest entropy (80/20: 0.2).
    entropy_fraction: Annotated[float | None, Bound("in (0, 1]", lambda p: 0 < p <= 1)] = None
    # Rows without an advantage count in the means of the policy loss.
    count_zero_advantage: bool | None = None
    # The deviation that divides a group's advantages: the group's, the batch's (Lite PPO), or the
    # batch's after group means are taken off (ScaleRL).
    std_of: Spread | None = None
    # Each score of a list of graders (and the overlong punishment) is normalised in its group by
    # itself, and their weighted sum over the batch (GDPO).
    normalise_each: bool | None = None
    # Virtual rewards added to a group with equal rewards, K (avspo).
    virtual_rewards: Annotated[int | None, at_least(0)] = None
    # Advantage of a correct row, and what a wrong one loses (psr, nsr, w_reinforce, topr).
    success_weight: Annotated[float | None, at_least(0)] = None
    failure_weight: Annotated[float | None, at_least(0)] = None
    # Weight alpha of entropies in groups with one outcome, and whether failed groups get it too
    # (rl_zvp).
    zero_variance_alpha: Annotated[float | None, at_least(0)] = None
    zero_variance_failures: bool | None = None
    # Sharpness of the gate where the advantage is positive, and elsewhere (sapo).
    tau_positive: Annotated[float | None, above(0)] = None
    tau_negative: Annotated[float | None, above(0)] = None
    # Bound delta of the trust region and the largest ratio (dppo_tv, dppo_kl).
    trust_bound: Annotated[float | None, above(0)] = None
    ratio_cap: Annotated[float | None, above(0)] = None
    # Weight beta and free range delta (of the log-ratio) of the hinge on solved prompts (mcpo).
    hold_coef: Annotated[float | None, at_least(0)] = None
    hold_delta: Annotated[float | None, at_least(0)] = None
    # Bound on the mean squared log-ratio of harmful tokens (m2po).
    second_moment: Annotated[float | None, above(0)] = None
    # The statistic of K samples that advantages raise, K, and its amount: best samples (top),
    # samples cut at both ends (trimmed), or share of the mass (upper_tail, lower_tail) (ordergrad).
    order_statistic: OrderStatistic | None = None
    order_samples: Annotated[int | None, ORDER_SAMPLES] = None
    order_amount: Annotated[float | None, above(0)] = None
    # Rows that a group's mean is of: all, or those that the policy wrote, without the expert's
    # (luffy); None takes the objective's own.
    baseline: Baseline | None = None
    # Expert trajectories in each group, of group_size rows; None takes the objective's own.
    expert_rows: Annotated[int | None, at_least(0)] = None
    # Leave all-right and all-wrong groups out of the policy loss and sample others for them; None
    # takes the objective's own.
    dynamic_sampling: bool | None = None
    # Rounds of sampling for one step, at most, with dynamic_sampling.
    max_rounds: Annotated[int, at_least(1)] = 4
    # Width of the overlong punishment's slope, as a share of max_new_tokens; None takes the
    # objective's own.
    overlong_buffer: Annotated[float | None, SHARE] = None
    # Training steps with hints in the prompts (UFT), T_hint; 0 takes 60% of all steps.
    hint_steps: Annotated[int, at_least(0)] = 0
    # Mini-batches of whole groups; each gives one update.
    mini_batches: Annotated[int, at_least(1)] = 1
    # Passes over them.
    epochs: Annotated[int, at_least(1)] = 1
    # The policy that is improved upon: as the sampler computed it, or as the trainer does (costs a
    # forward pass).
    old_logprobs: Literal["rollout", "trainer"] = "rollout"


@dataclasses.dataclass(frozen=True)
class EchoConfig:
    # Adds the echo loss; False is the plain objective.
    enabled: bool = True
    # lambda, the weight of L_echo.
    coef: Annotated[float, at_least(0)] = 1e-3
    # Delimiters of reasoning steps: every vocabulary entry with a newline, or the ids below.
    delimiter: Literal["newline", "ids"] = "newline"
    # Token ids that end a step, with delimiter = "ids" (the authors' Qwen2.5 setting: 198,271).
    delimiter_ids: tuple[int, ...] = ()
    # The step that ends the clip: max (highest entropy, the paper), min, random, first or last;
    # full takes the whole rollout that holds the highest entropy, longest and shortest a whole
    # success by its tokens; random_length cuts random successes to the lengths that max finds; a
    # custom rule is package.module:function or FILE.py:function (docs/method.md).
    select: Select | str = "max"
    # Clips per prompt, K.
    top_k: Annotated[int, at_least(1)] = 1
    # Only a step whose entropy is above this quantile of the policy's step entropies over recent
    # training steps ends a clip (docs/method.md); None takes any.
    threshold: Annotated[float | None, QUANTILE] = None
    # Shorter steps do not compete (tokens).
    min_step_tokens: Annotated[int, at_least(1)] = 1
    # Prompts that give clips: any with a success, or only those whose whole group succeeded.
    when: When = "any_success"
    # Mean over the prompts with a clip, over all prompts, or over clip tokens.
    normalise: Normalise = "prompts_with_clip"
    # Active in [start_step, end_step), counted from 0: 0, 100 is the first hundred steps; None is
    # open.
    start_step: Annotated[int, at_least(0)] = 0
    end_step: int | None = None
    # Whether all-right groups that dynamic sampling leaves out of the policy loss give clips.
    filtered_groups: Literal["keep", "drop"] = "keep"
    # Static bound on steps per rollout; later ones join the last (counted in a metric).
    max_steps: Annotated[int, at_least(1)] = 512


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    # AdamW, or Muon for the layers' matrices (one moment, with a decay of 0.95, in place of two;
    # updates of AdamW's size) with AdamW for the rest; not with adapters.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Peak learning rate. It and the keys of its course may change when a run goes on.
    learning_rate: Annotated[float, above(0)] = 1e-6
    # Steps of linear warm-up; or a share of all steps.
    warmup_steps: Annotated[int, at_least(0)] = 0
    warmup_ratio: Annotated[float, SHARE] = 0.0
    # After warm-up: constant; linear or cosine down to the floor at the last step; or wsd
    # (warm-up, stable, decay): constant, then linear over the last part of all steps.
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    # The floor, as a share of the peak.
    min_lr_ratio: Annotated[float, SHARE] = 0.0
    # The last part of wsd, as a share of all steps.
    decay_ratio: Annotated[float, SHARE] = 0.1
    # Decoupled weight decay, on matrices only.
    weight_decay: Annotated[float, at_least(0)] = 0.0
    # Momentum decay rates.
    beta1: Annotated[float, DECAY] = 0.9
    beta2: Annotated[float, DECAY] = 0.999
    # Type of the first moment; bfloat16 saves 2 bytes a parameter. The second stays float32.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # Global gradient norm is cut to this.
    max_grad_norm: Annotated[float, above(0)] = 1.0
    # Tokens in a micro-batch, padding included, on each data-parallel device.
    micro_batch_tokens: Annotated[int, at_least(1)] = 32768
    # Compile every shape that a run can meet ahead of the steps that need it. What does not fit in
    # memory shows before step 1. False compiles each when it is first needed.
    compile_ahead: bool = True
    # Smaller micro-batches than the largest are compiled while the first steps run (one process).
    # False compiles them before step 1, so that no step waits and all take their usual time.
    compile_in_background: bool = True
    # Rows per step of supervised training (`echorl sft`).
    sft_rows_per_step: Annotated[int, at_least(1)] = 256
    # Several demonstrations in a row of `echorl sft`, which leaves little padding: the same loss
    # and gradient. auto packs but on GPU, whose fast attention kernel (cuDNN) takes one a row.
    sft_packing: Literal["auto", "on", "off"] = "auto"
    # Steps in a row whose updates were all skipped, for gradients that are not finite, before the
    # run stops.
    max_bad_steps: Annotated[int, at_least(1)] = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    # Devices along each mesh axis; -1 takes what is left (at most one of them).
    data: Annotated[int, DEVICES] = 1
    fsdp: Annotated[int, DEVICES] = -1
    tensor: Annotated[int, DEVICES] = 1
    # Limit for all processes of a run to come and agree (seconds).
    start_timeout_s: Annotated[float, above(0)] = 300.0
    # A process without a sign of life for so long is lost, and the run ends (seconds).
    lost_after_s: Annotated[float, at_least(1)] = 60.0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints; 0 saves at the end only.
    every: Annotated[int, at_least(0)] = 5
    # Newest checkpoints kept.
    keep: Annotated[int, at_least(1)] = 2
    # Best checkpoints kept besides, by the mean pass@1 of the evaluation at their step, or by
    # reward/mean where nothing is evaluated.
    keep_best: Annotated[int, at_least(0)] = 1
    # Checkpoints of steps that this divides are kept for good; 0 keeps none for good.
    keep_every: Annotated[int, at_least(0)] = 0
    # The checkpoint that a run goes on from: auto takes the newest one that can be read, a number
    # that of a step (later ones are set aside), none refuses a workdir that has a run.
    resume: Annotated[str, RESUME] = "auto"
    # Write the Hugging Face directory `export/` at the end, also when a signal ends the run.
    export: bool = True
    # Steps between exports to it during the run; 0 writes none before the end.
    export_every: Annotated[int, at_least(0)] = 0
    # Push `export/` with a model card to this repository of the Hugging Face Hub, OWNER/NAME, after
    # the last step and every export_every steps (a new one is private); "" pushes nothing.
    push: Annotated[str, REPOSITORY] = ""
    # With LoRA also write the merged model there; the adapter is in `export/adapter/`.
    merge: bool = False
    # Keep compiled programs in `compiled/`: a restart begins sooner, and on GPU with the kernels
    # that were chosen before. auto keeps those for accelerators, unless JAX has a cache already.
    compiled: Literal["auto", "on", "off"] = "auto"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Steps between evaluations, also before the first and after the last step; 0 evaluates nothing.
    every: Annotated[int, at_least(0)] = 0
    # Rows of data.eval that are used; 0 uses all.
    rows: Annotated[int, at_least(0)] = 0
    # Completions per row; pass@1 is their mean.
    samples: Annotated[int, at_least(1)] = 1
    # Sampling temperature; 0 is greedy.
    temperature: Annotated[float, ZERO_OR_NORMAL] = 0.6
    # Keep the likeliest tokens that hold this much probability.
    top_p: Annotated[float, POSITIVE_SHARE] = 1.0
    # Longest completion (tokens); None takes rollout.max_new_tokens.
    max_new_tokens: Annotated[int | None, at_least(1)] = None


@dataclasses.dataclass(frozen=True)
class LogConfig:
    # Steps between files of sampled groups, and groups in each.
    samples_every: Annotated[int, at_least(0)] = 5
    samples_groups: Annotated[int, at_least(1)] = 4
    # Write TensorBoard events.
    tensorboard: bool = True
    # Also send metrics, config and samples to this Weights & Biases project (WANDB_MODE=offline
    # keeps them in the workdir; needs the package wandb); "" sends nothing.
    wandb_project: str = ""
    # Also send them to this MLflow experiment, at MLFLOW_TRACKING_URI or else in mlruns/ of the
    # workdir (needs the package mlflow-skinny or mlflow); "" sends nothing.
    mlflow_experiment: str = ""
    # The run's name at both trackers; "" takes the name of the workdir.
    run_name: str = ""
    # The group of runs that it belongs to there, such as the seeds of one setting; "" is none.
    group: str = ""
    # Tags of the run there, with commas between.
    tags: str = ""
    # Steps that the JAX profiler traces (the device, XLA and the run's phases, no Python calls),
    # each into profile/ of the workdir, for TensorBoard or Perfetto.
    profile_steps: Annotated[tuple[int, ...], STEPS] = ()
    # Write report.html at the end.
    report: bool = True
    # Functions for custom metrics, package.module:function, with commas between (docs/analysis.md).
    metrics: str = ""


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    # Faults to inject, separated by commas: kill@rollout:3 (or grading, update, save), term@4,
    # nan@5, eval_fail@6, disk_full@checkpoint:2, reward_hang@0.01 (or reward_crash, reward_leak).
    inject: str = ""
    # Write the first update of this step to dumps/ for `echorl replay`; 0 writes none.
    dump_step: Annotated[int, at_least(0)] = 0
    # Updates with a non-finite gradient that are written to dumps/, each with the parameters, in
    # a workdir's life.
    max_dumps: Annotated[int, at_least(0)] = 3


@dataclasses.dataclass(frozen=True)
class Config:
    # Training steps.
    steps: Annotated[int, at_least(0)] = 100
    # Passes over the rows of data.train; above 0 it sets the steps, rounded up. Rounds of dynamic
    # sampling read more rows, and prompts that are too long are rows too.
    epochs: Annotated[float, at_least(0)] = 0.0
    # Seed of data order, sampling and fresh weights.
    seed: Annotated[int, at_least(0)] = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    echo: EchoConfig = dataclasses.field(default_factory=EchoConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    debug: DebugConfig = dataclasses.field(default_factory=DebugConfig)


def validate(config: Config) -> Config:
    """Checks what types alone cannot; returns the config unchanged.

    Raises:
      ConfigError: names the first key that is out of range and what is allowed.
    """
    for key, holds, allowed in itertools.chain(_bounds(config), _relations(config)):
        if not holds:
            raise ConfigError(f"config.{key} = {attrgetter(key)(config)!r}: must be {allowed}")
    return config


def _bounds(values: Any, prefix: str = "") -> Iterator[tuple[str, bool, str]]:
    """Every bound beside a field: the key, whether the bound holds, and what is allowed."""
    for name, kind in typing.get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        if dataclasses.is_dataclass(kind):
            yield from _bounds(value, f"{name}.")
        elif typing.get_origin(kind) is Annotated:
            of, bound = typing.get_args(kind)
            none = "None or " if type(None) in typing.get_args(of) else ""
            yield f"{prefix}{name}", value is None or bound.holds(value), none + bound.words


def _relations(c: Config) -> Iterator[tuple[str, bool, str]]:
    """Requirements of one option on another, in the same form; the bounds hold already."""
    lora = c.lora.rank > 0 or bool(c.lora.adapter)
    yield "model.base_dtype", lora or c.model.base_dtype is None, "None without lora.rank"
    yield "lora.rank", not (c.lora.rank and c.lora.adapter), "0 with lora.adapter, which has ranks"
    fresh = c.lora.rank > 0 or c.lora.modules == "text"
    yield "lora.modules", fresh, "text without lora.rank"
    parts = {"text": LINEARS, "tower": TOWER_LINEARS, "both": LINEARS | TOWER_LINEARS}
    linears = {"all-linear"} | parts[c.lora.modules].keys()
    inside = set(c.lora.targets.split(",")) <= linears
    yield "lora.targets", inside, f"linears of lora.modules = {c.lora.modules!r}"
    export = c.checkpoint.export
    yield "checkpoint.export_every", export or not c.checkpoint.export_every, "0 without export"
    yield "checkpoint.push", export or not c.checkpoint.push, '"" without checkpoint.export'
    yield "checkpoint.merge", lora or not c.checkpoint.merge, "false without lora.rank"
    yield "data.max_pixels", c.data.max_pixels >= c.data.min_pixels, "at least data.min_pixels"
    unadapted = not (lora and c.model.vision == "trained")
    yield "model.vision", unadapted, "None or frozen with lora.rank or lora.adapter"
    divides = c.rollout.prompts_per_step % c.objective.mini_batches == 0
    yield "objective.mini_batches", divides, "a divisor of rollout.prompts_per_step"
    fewer = (c.objective.expert_rows or 0) < c.rollout.group_size
    yield "objective.expert_rows", fewer, "below rollout.group_size"
    open_axes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor).count(-1)
    yield "mesh.fsdp", open_axes <= 1, "a number when another axis is -1"
    both = (c.echo.delimiter == "ids") == bool(c.echo.delimiter_ids)
    yield "echo.delimiter_ids", both, 'set exactly when echo.delimiter = "ids"'
    later = c.echo.end_step is None or c.echo.end_step >= c.echo.start_step
    yield "echo.end_step", later, "None or at least echo.start_step"
    yield "optim.optimizer", c.optim.optimizer != "muon" or not lora, "adamw with adapters"
    once = not (c.optim.warmup_steps and c.optim.warmup_ratio)
    yield "optim.warmup_ratio", once, "0 with optim.warmup_steps"
    yield "eval.every", not c.eval.every or bool(c.data.eval), "0 without data.eval"
    unguarded = "without reward_* when data.grader_workers = 0: a hang would stop the run"
    yield "debug.inject", c.data.grader_workers > 0 or "reward_" not in c.debug.inject, unguarded
