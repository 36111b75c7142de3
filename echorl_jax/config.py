"""Every option of a run, once: frozen dataclasses and one ``validate``.

How a file under ``configs/`` and ``--config.key=value`` become a :class:`Config` is in
config_file.py. Nothing here imports JAX, so that ``--help`` and wrong keys answer at once.
"""

import dataclasses
from typing import Any, Literal

from echorl_jax.choices import (
    Aggregation,
    Baseline,
    Kernel,
    KLEstimator,
    KVDtype,
    Normalise,
    Remat,
    Select,
    When,
)
from echorl_jax.errors import UserError

# Devices count in 32 bits: larger whole numbers would fail or wrap there.
LARGEST = 2**31 - 1


class ConfigError(UserError):
    """A wrong option: names the key and what is allowed."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    # Hugging Face directory, repository id, or "builtin:countdown", the tiny model in this package.
    path: str = "builtin:countdown"
    # "pretrained" reads the weights; "random" takes architecture and tokenizer, with fresh weights.
    init: Literal["pretrained", "random"] = "pretrained"
    # Type of activations and matrix products. Master weights and optimizer state are float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass recomputes: everything in a layer, all but matrix products, or nothing.
    remat: Remat = "layer"
    # Attention kernel; "auto" takes splash on TPU, cuDNN on GPU, XLA elsewhere.
    attention: Kernel = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Training rows: files (parquet, JSONL), "countdown:operands=3&max_number=29&..." for generated
    # ones, "tfds:NAME?split=train" or "hf:OWNER/NAME?split=train"; a comma separates several. Rows
    # are filtered as in "FILE?level=3-5&limit=100" and mixed as in "A@0.7,B@0.3" (docs/data.md).
    train: str = "countdown:"
    # Held-out rows for the periodic evaluation, in the same form; "" evaluates nothing.
    eval: str = ""
    # The prompt template: "chat" is the tokenizer's chat template, "plain" the message contents
    # as they stand; luffy, qwen-math, boxed and uft write the problem into that prompt.
    template: str = "chat"
    # Prompts longer than this are left out and counted (tokens).
    max_prompt_tokens: int = 1024
    # A broken row stops the run with its file and number, or is skipped and counted.
    on_bad_row: Literal["error", "skip"] = "error"
    # The grader: auto (by the row's data source), math, choice, countdown, or
    # "package.module:function".
    grader: str = "auto"
    # Limit for one verdict (seconds); a hang costs that one item.
    grader_timeout_s: float = 10.0
    # Grading processes. 0 grades choice and countdown, whose costs are bounded, in this process;
    # every other grader gets one process.
    grader_workers: int = 2


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    # The sampler: "" is the sampler of this package; "package.module:factory" makes another one
    # (docs/architecture.md, "Where a change goes").
    engine: str = ""
    # Prompts per training step, P.
    prompts_per_step: int = 128
    # Rollouts per prompt, G.
    group_size: int = 8
    # Longest completion, T (tokens).
    max_new_tokens: int = 8192
    # Sampling temperature; also divides the logits of every log-probability and entropy.
    temperature: float = 1.0
    # Keep the k likeliest tokens; 0 keeps all.
    top_k: int = 0
    # Keep the likeliest tokens that hold this much probability.
    top_p: float = 1.0
    # Rows decoded at once; 0 takes all rows of a step if they fit beside weights, optimizer and
    # prompts, else as many as do. Samples do not depend on it.
    slots: int = 0
    # Type of the sampler's keys and values; None takes the model's. int8 halves the memory of
    # bfloat16 and rounds log-probabilities (docs/performance.md).
    kv_dtype: KVDtype | None = None
    # Steps between checks that sampler and trainer agree on log-probabilities, the first step of a
    # run and the first after a resume included; 0 never stops a run for it.
    check_every: int = 50
    # Largest accepted gap between the two (nats); 0 takes the bounds on the largest and mean gap
    # and on the share of wide ones of the narrower type of model.dtype and rollout.kv_dtype
    # (docs/performance.md).
    max_logprob_gap: float = 0.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    # Name in OBJECTIVES, or "package.module:objective".
    name: str = "grpo"
    # Verified success: None takes the grader's verdict (of a plain score: 1 or more),
    # a number any score from there on.
    success_threshold: float | None = None
    # Clip range below and above 1; None takes the objective's own.
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    # Aggregation of token losses to one number (verl's names); None takes the objective's own.
    aggregation: Aggregation | None = None
    # Weight of the KL term against the reference policy, and its estimator; None takes the
    # objective's own.
    kl_coef: float | None = None
    kl_estimator: KLEstimator | None = None
    # Weight of the entropy bonus; None takes the objective's own.
    entropy_coef: float | None = None
    # Bound c on the loss of a token with negative advantage, -A c; None takes the objective's own.
    dual_clip: float | None = None
    # Cap C of truncated importance weights against the sampler, with old_logprobs = "trainer" (else
    # the ratio itself is against the sampler); None takes the objective's own.
    tis_cap: float | None = None
    # Rows that a group's mean is of: all, or those that the policy wrote, without the expert's
    # (luffy); None takes the objective's own.
    baseline: Baseline | None = None
    # Expert trajectories in each group, of group_size rows; None takes the objective's own.
    expert_rows: int | None = None
    # Leave all-right and all-wrong groups out of the policy loss and sample others for them; None
    # takes the objective's own.
    dynamic_sampling: bool | None = None
    # Rounds of sampling for one step, at most, with dynamic_sampling.
    max_rounds: int = 4
    # Width of the overlong punishment's slope, as a share of max_new_tokens; None takes the
    # objective's own.
    overlong_buffer: float | None = None
    # Training steps with hints in the prompts (UFT), T_hint; 0 takes 60% of all steps.
    hint_steps: int = 0
    # Mini-batches of whole groups, each with an update of its own.
    mini_batches: int = 1
    # Passes over them.
    epochs: int = 1
    # The policy that is improved upon: as the sampler computed it, or as the trainer does (costs a
    # forward pass).
    old_logprobs: Literal["rollout", "trainer"] = "rollout"


@dataclasses.dataclass(frozen=True)
class EchoConfig:
    # Adds the echo loss; False is the plain objective.
    enabled: bool = True
    # lambda, the weight of L_echo.
    coef: float = 1e-3
    # Delimiters of reasoning steps: every vocabulary entry with a newline, or the ids below.
    delimiter: Literal["newline", "ids"] = "newline"
    # Token ids that end a step, with delimiter = "ids" (the authors' Qwen2.5 setting: 198,271).
    delimiter_ids: tuple[int, ...] = ()
    # Which step ends the clip: highest entropy (the paper), lowest, the whole rollout, or by
    # chance or place.
    select: Select = "max"
    # Clips per prompt, K.
    top_k: int = 1
    # Shorter steps do not compete (tokens).
    min_step_tokens: int = 1
    # Prompts that give clips: any with a success, or only those whose whole group succeeded.
    when: When = "any_success"
    # Mean over the prompts with a clip, over all prompts, or over clip tokens.
    normalise: Normalise = "prompts_with_clip"
    # Active in [start_step, end_step), counted from 0: 0, 100 is the first hundred steps; None is
    # open.
    start_step: int = 0
    end_step: int | None = None
    # Whether all-right groups that dynamic sampling leaves out of the policy loss give clips.
    filtered_groups: Literal["keep", "drop"] = "keep"
    # Static bound on steps per rollout; later ones join the last (counted in a metric).
    max_steps: int = 512


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate of AdamW.
    learning_rate: float = 1e-6
    # Steps of linear warm-up.
    warmup_steps: int = 0
    # After warm-up: constant, or cosine to 0 at the last step.
    schedule: Literal["constant", "cosine"] = "constant"
    # Decoupled weight decay, on matrices only.
    weight_decay: float = 0.0
    # Momentum decay rates.
    beta1: float = 0.9
    beta2: float = 0.999
    # Type of the first moment; bfloat16 saves 2 bytes a parameter. The second stays float32.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # Global gradient norm is cut to this.
    max_grad_norm: float = 1.0
    # Tokens in a micro-batch, padding included, on each data-parallel device.
    micro_batch_tokens: int = 32768
    # Compile every shape that a run can meet before its first step: no step waits later, and what
    # does not fit shows at once. False compiles each when it is first needed.
    compile_ahead: bool = True
    # Rows per step of supervised training (`echorl sft`).
    sft_rows_per_step: int = 256
    # Several demonstrations in a row of `echorl sft`, which leaves little padding: the same loss
    # and gradient. auto packs but on GPU, whose fast attention kernel (cuDNN) takes one a row.
    sft_packing: Literal["auto", "on", "off"] = "auto"
    # Steps in a row whose updates were all skipped, for gradients that are not finite, before the
    # run stops.
    max_bad_steps: int = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    # Devices along each mesh axis; -1 takes what is left (at most one of them).
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    # Limit for all processes of a run to come and agree (seconds).
    start_timeout_s: float = 300.0
    # A process without a sign of life for so long is lost, and the run ends (seconds).
    lost_after_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints; 0 saves at the end only.
    every: int = 5
    # Newest checkpoints kept.
    keep: int = 2
    # Best checkpoints kept besides, by the mean pass@1 of the evaluation at their step, or by
    # reward/mean where nothing is evaluated.
    keep_best: int = 1
    # Checkpoints of steps that this divides are kept for good; 0 keeps none for good.
    keep_every: int = 0
    # The checkpoint that a run goes on from: auto takes the newest one that can be read, a number
    # that of a step (later ones are set aside), none refuses a workdir that has a run.
    resume: str = "auto"
    # Write the Hugging Face directory `export/` at the end.
    export: bool = True
    # Keep compiled programs in `compiled/`: a restart begins sooner, and on GPU with the kernels
    # that were chosen before. auto keeps those for accelerators, unless JAX has a cache already.
    compiled: Literal["auto", "on", "off"] = "auto"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Steps between evaluations, also before the first and after the last step; 0 evaluates nothing.
    every: int = 0
    # Rows of data.eval that are used; 0 uses all.
    rows: int = 0
    # Completions per row; pass@1 is their mean.
    samples: int = 1
    # Sampling temperature; 0 is greedy.
    temperature: float = 0.6


@dataclasses.dataclass(frozen=True)
class LogConfig:
    # Steps between files of sampled groups, and groups in each.
    samples_every: int = 5
    samples_groups: int = 4
    # Write TensorBoard events.
    tensorboard: bool = True
    # Also send the metrics to this Weights & Biases project (extra [wandb]; WANDB_MODE=offline
    # keeps them in the workdir); "" sends nothing.
    wandb_project: str = ""
    # Steps that the JAX profiler traces (the device, XLA and the run's phases, no Python calls),
    # each into profile/ of the workdir, for TensorBoard or Perfetto.
    profile_steps: tuple[int, ...] = ()
    # Write report.html at the end.
    report: bool = True


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    # Faults to inject, separated by commas: kill@rollout:3 (or grading, update, save), term@4,
    # nan@5, eval_fail@6, disk_full@checkpoint:2, reward_hang@0.01 (or reward_crash, reward_leak).
    inject: str = ""
    # Write the first update of this step to dumps/ for `echorl replay`; 0 writes none.
    dump_step: int = 0
    # Updates with a non-finite gradient that are written to dumps/, each with the parameters, in
    # a workdir's life.
    max_dumps: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    # Training steps.
    steps: int = 100
    # Seed of data order, sampling and fresh weights.
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
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
    for key, holds, allowed in _rules(config):
        if not holds:
            raise ConfigError(f"config.{key} = {_value(config, key)!r}: must be {allowed}")
    return config


def _rules(c: Config) -> list[tuple[str, bool, str]]:
    positive = ["rollout.prompts_per_step", "rollout.group_size", "rollout.max_new_tokens"]
    positive += ["echo.top_k", "echo.min_step_tokens", "echo.max_steps", "data.max_prompt_tokens"]
    positive += ["objective.max_rounds", "objective.mini_batches", "objective.epochs"]
    positive += ["optim.micro_batch_tokens", "optim.sft_rows_per_step", "optim.max_bad_steps"]
    positive += ["checkpoint.keep", "eval.samples", "log.samples_groups"]
    at_least_zero = ["steps", "rollout.top_k", "rollout.slots", "rollout.check_every", "eval.every"]
    at_least_zero += ["rollout.max_logprob_gap", "optim.warmup_steps", "optim.weight_decay"]
    at_least_zero += ["checkpoint.every", "eval.rows", "eval.temperature", "log.samples_every"]
    at_least_zero += ["seed", "data.grader_workers", "echo.coef", "echo.start_step"]
    at_least_zero += ["checkpoint.keep_best", "checkpoint.keep_every"]
    at_least_zero += ["debug.dump_step", "debug.max_dumps", "objective.hint_steps"]
    above_zero = ["optim.learning_rate", "optim.max_grad_norm"]
    above_zero += ["data.grader_timeout_s", "mesh.start_timeout_s"]
    axes = {"data": c.mesh.data, "fsdp": c.mesh.fsdp, "tensor": c.mesh.tensor}
    return [
        *((key, _value(c, key) >= 1, "at least 1") for key in positive),
        *((key, _value(c, key) >= 0, "at least 0") for key in at_least_zero),
        *((key, _value(c, key) > 0, "above 0") for key in above_zero),
        ("rollout.temperature", c.rollout.temperature >= 1e-30, "at least 1e-30"),
        ("eval.temperature", not 0 < c.eval.temperature < 1e-30, "0 or at least 1e-30"),
        ("log.profile_steps", min(c.log.profile_steps, default=1) >= 1, "steps from 1 on"),
        ("rollout.top_p", 0 < c.rollout.top_p <= 1, "in (0, 1]"),
        (
            "objective.mini_batches",
            c.objective.mini_batches > 0
            and c.rollout.prompts_per_step % c.objective.mini_batches == 0,
            "a divisor of rollout.prompts_per_step",
        ),
        (
            "objective.dual_clip",
            c.objective.dual_clip is None or c.objective.dual_clip > 1,
            "None or above 1",
        ),
        (
            "objective.tis_cap",
            c.objective.tis_cap is None or c.objective.tis_cap > 0,
            "None or above 0",
        ),
        (
            "objective.overlong_buffer",
            0 <= (c.objective.overlong_buffer or 0) <= 1,
            "None or in [0, 1]",
        ),
        *(
            (f"objective.{key}", (_value(c, f"objective.{key}") or 0) >= 0, "None or at least 0")
            for key in ("epsilon_low", "epsilon_high", "kl_coef")
        ),
        (
            "objective.expert_rows",
            0 <= (c.objective.expert_rows or 0) < c.rollout.group_size,
            "below rollout.group_size",
        ),
        ("optim.beta1", 0 <= c.optim.beta1 < 1, "in [0, 1)"),
        ("optim.beta2", 0 <= c.optim.beta2 < 1, "in [0, 1)"),
        ("mesh.fsdp", list(axes.values()).count(-1) <= 1, "a number when another axis is -1"),
        *((f"mesh.{k}", n == -1 or n >= 1, "-1 or at least 1") for k, n in axes.items()),
        ("mesh.lost_after_s", c.mesh.lost_after_s >= 1, "at least 1"),
        (
            "echo.delimiter_ids",
            (c.echo.delimiter == "ids") == bool(c.echo.delimiter_ids),
            'set exactly when echo.delimiter = "ids"',
        ),
        (
            "echo.end_step",
            c.echo.end_step is None or c.echo.end_step >= c.echo.start_step,
            "None or at least echo.start_step",
        ),
        (
            "eval.every",
            c.eval.every == 0 or bool(c.data.eval),
            "0 without data.eval",
        ),
        (
            "checkpoint.resume",
            c.checkpoint.resume in ("auto", "none")
            or (c.checkpoint.resume.isdecimal() and len(c.checkpoint.resume) < 11),
            "auto, none, or the step of a checkpoint",
        ),
        (
            "debug.inject",
            c.data.grader_workers > 0 or "reward_" not in c.debug.inject,
            "without reward_* when data.grader_workers = 0: a hang would stop the run",
        ),
    ]


def _value(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
