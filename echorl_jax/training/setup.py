"""Everything static about a run or a plan: config, mesh, model, tokenizer, optimizer."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.choices import LINEARS, TOWER_LINEARS
from echorl_jax.config import Config, ConfigError
from echorl_jax.core import (
    Objective,
    importance_level,
    load_clip_rule,
    load_objective,
    mine_echo_clips,
)
from echorl_jax.custom import load_custom
from echorl_jax.data import load_tokenizer, newline_delimiters, require_vocabulary
from echorl_jax.data.pictures import Processor, configured_processor
from echorl_jax.environment import end_settings
from echorl_jax.errors import one_line
from echorl_jax.files import model_path
from echorl_jax.models import (
    Decoder,
    Lora,
    init_adapters,
    init_params,
    load_adapter,
    load_decoder,
    load_model,
    read_adapter,
    split_params,
    with_adapters,
)
from echorl_jax.parallel import Platform, make_mesh, platform_of
from echorl_jax.rollout import Sampling
from echorl_jax.training.micro_batches import Bounds, micro_batch_shapes
from echorl_jax.training.optimizer import learning_rate_schedule, make_optimizer
from echorl_jax.types import HostArray, PyTree


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything static about a run, once. The properties follow from the fields."""

    config: Config
    mesh: Any  # a Mesh; an AbstractMesh only in a plan for devices that are not present
    platform: Platform
    model: Decoder
    objective: Objective
    optimizer: optax.GradientTransformation  # at learning rate 1, see make_optimizer
    schedule: optax.Schedule  # learning rate by training step, counted from 0
    slots: int  # rows decoded at once
    page_tokens: int = dataclasses.field(default=0, kw_only=True)  # see rollout.Capacity
    # A transformers tokenizer; None in a plan, which reads no text.
    tokenizer: Any = dataclasses.field(default=None, compare=False)
    # bool [V], tokens that end a reasoning step; None in a plan.
    is_delimiter: HostArray = dataclasses.field(default=None, compare=False)
    # Of a model with a vision tower; None in a plan.
    processor: Processor | None = dataclasses.field(default=None, compare=False)

    @property
    def ends(self) -> Mapping[str, Any]:
        """The fields of ``Sampling`` that say where completions end."""
        rollout = self.config.rollout
        stops = rollout.stop_ids, tuple(json.loads(rollout.stop_strings))
        return end_settings(self.tokenizer, self.model, *stops)

    @property
    def of_reference(self) -> "Setup":
        """This setup with the model of the reference policy, which has no adapters."""
        return dataclasses.replace(self, model=self.model.base)

    @property
    def trains_tower(self) -> bool:
        """True if the gradient goes through images' features into the vision tower."""
        return "vision" in split_params(self.model, self.model.param_shapes())[1]

    @property
    def image_tokens(self) -> int:
        """The most image tokens of a prompt; 0 for a model without a vision tower."""
        if self.model.config.vision is None:
            return 0
        return min(self.config.data.max_image_tokens, self.config.data.max_prompt_tokens)

    @property
    def feature_slots(self) -> int:
        """F, room for the features of all images of an update."""
        if self.objective.supervised:
            return self.config.optim.sft_rows_per_step * self.image_tokens
        prompts = self.max_rows // self.config.rollout.group_size
        return prompts // self.mini_batches * self.image_tokens

    @property
    def shards(self) -> int:
        """Devices that rows are split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def sampled_group_size(self) -> int:
        """Rows of a group that the policy samples; experts are the rest."""
        return self.config.rollout.group_size - self.objective.expert_rows

    @property
    def sampling(self) -> Sampling:
        """Settings with which the policy draws its rows of each group."""
        rollout = self.config.rollout
        return Sampling(
            group_size=self.sampled_group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            **self.ends,
        )

    @property
    def sampled_rows(self) -> int:
        """Rows of one round of sampling."""
        return self.config.rollout.prompts_per_step * self.sampled_group_size

    @property
    def rows(self) -> int:
        """Rows that a step with one round of sampling trains on."""
        if self.objective.supervised:
            return self.config.optim.sft_rows_per_step
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    @property
    def max_rows(self) -> int:
        """Rows that a step trains on after the most rounds of sampling."""
        rounds = self.config.objective.max_rounds if self.objective.dynamic_sampling else 1
        return self.rows * rounds

    @property
    def mini_batches(self) -> int:
        """Updates in one pass over a step's rows; demonstrations take one."""
        return 1 if self.objective.supervised else self.config.objective.mini_batches

    @property
    def scores_old_policy(self) -> bool:
        """True if the trainer, not the sampler, computes the old policy's log-probabilities."""
        return self.config.objective.old_logprobs == "trainer" and not self.objective.supervised

    @property
    def selection_passes(self) -> int:
        """Forward passes over the step's rows, rounded up, for the tokens that updates select."""
        if self.objective.select_tokens is None:
            return 0
        # The first update starts from the old policy, whose log-probabilities are there.
        return -(-(self.config.objective.epochs * self.mini_batches - 1) // self.mini_batches)

    @property
    def scores_policy(self) -> bool:
        """True if a step scores its rows with the parameters in training."""
        return self.scores_old_policy or self.selection_passes > 0

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the step's rows besides its updates."""
        reference = int(self.objective.kl_coef != 0)
        return int(self.scores_old_policy) + reference + self.selection_passes

    @property
    def bounds(self) -> Bounds:
        """Limits of every micro-batch."""
        return Bounds(
            longest=self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens,
            token_budget=self.config.optim.micro_batch_tokens * self.shards,
            row_multiple=self.shards,
        )

    @property
    def micro_batch_shapes(self) -> list[tuple[int, int]]:
        """Every (rows, length) that a step may meet, the largest first."""
        return micro_batch_shapes(max(self.max_rows // self.mini_batches, 1), self.bounds)

    @property
    def micro_batch(self) -> tuple[int, int]:
        """The largest micro-batch: rows on all devices, and their length."""
        return self.micro_batch_shapes[0]


def make_setup(config: Config, *, devices: Sequence[Any] | None = None) -> tuple[Setup, PyTree]:
    """Builds the setup and the sharded initial parameters, on all devices unless some are given.

    ``slots`` is one for each device; :func:`~echorl_jax.training.capacity.with_slots` chooses more.

    Raises:
      UserError: an objective, model directory, tokenizer or mesh that does not work, in one line.
    """
    objective = configured_objective(config)
    require_custom(config)
    sizes = config.mesh
    mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=devices)
    tokenizer = load_tokenizer(model_path(config.model.path, config.model.revision))
    model, params = load_policy(config, mesh)
    require_vocabulary(tokenizer, model.config.vocab_size)
    setup = static_setup(config, mesh, model, objective, platform=platform_of(mesh))
    is_delimiter = step_delimiters(config, tokenizer, model.config.vocab_size)
    texts = {
        "tokenizer": tokenizer,
        "is_delimiter": is_delimiter,
        "processor": configured_processor(config, model.config.vision),
    }
    return dataclasses.replace(setup, **texts), params


def load_policy(config: Config, mesh: Mesh | None) -> tuple[Decoder, PyTree]:
    """The model and all parameters that training begins with, adapters included.

    Raises:
      ModelError: a directory of the model or of an adapter that cannot be used.
    """
    path, options = model_path(config.model.path, config.model.revision), model_options(config)
    key, settings = jax.random.key(config.seed), config.lora
    if config.model.init == "pretrained":
        model, params = load_model(path, mesh=mesh, **options)
    else:
        model = load_decoder(path, **options)
        params = init_params(model, key, mesh=mesh)
    model = _with_frozen_tower(config, model)
    if settings.adapter:
        return load_adapter(settings.adapter, model, params, mesh=mesh)
    lora = configured_lora(config, model)
    if lora is None:
        return model, params
    key = jax.random.fold_in(key, 0)
    adapters = init_adapters(model, lora, key, init=settings.init, mesh=mesh)
    return with_adapters(model, params, lora, adapters, mesh)


def _with_frozen_tower(config: Config, model: Decoder) -> Decoder:
    """The model, with a vision tower that is not trained if the config says so.

    Beside adapters all weights are frozen anyway, and the tower's adapters are trained.
    """
    frozen = config.model.vision == "frozen" and model.config.vision is not None
    frozen = frozen and not _adapted(config)
    return dataclasses.replace(model, frozen=("vision",) if frozen else ())


def configured_model(config: Config, model: Decoder) -> Decoder:
    """The model with the adapters of ``config.lora``, which may be in a directory; no weights."""
    model = _with_frozen_tower(config, model)
    if config.lora.adapter:
        return dataclasses.replace(model, lora=read_adapter(config.lora.adapter, model)[0])
    return dataclasses.replace(model, lora=configured_lora(config, model))


def static_setup(
    config: Config,
    mesh: Mesh | AbstractMesh,
    model: Decoder,
    objective: Objective,
    *,
    platform: Platform,
) -> Setup:
    """The setup without text: what an update, a replay or a plan needs."""
    optim = config.optim
    schedule = learning_rate_schedule(
        peak=optim.learning_rate,
        warmup_steps=optim.warmup_steps or round(optim.warmup_ratio * config.steps),
        total_steps=config.steps,
        kind=optim.schedule,
        min_ratio=optim.min_lr_ratio,
        decay_ratio=optim.decay_ratio,
    )
    optimizer = make_optimizer(
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        moment_dtype=config.optim.moment_dtype,
        kind=config.optim.optimizer,
    )
    slots = mesh.shape["data"] * mesh.shape["fsdp"]
    return Setup(config, mesh, platform, model, objective, optimizer, schedule, slots)


def model_options(config: Config) -> dict[str, Any]:
    """Options of :func:`load_decoder` that say how the model computes."""
    return {
        "dtype": config.model.dtype,
        "param_dtype": (config.model.base_dtype or "bfloat16") if _adapted(config) else "float32",
        "remat": config.model.remat,
        "attention": config.model.attention,
    }


def _adapted(config: Config) -> bool:
    return config.lora.rank > 0 or bool(config.lora.adapter)


def configured_lora(config: Config, model: Decoder) -> Lora | None:
    """The fresh adapters that ``config.lora`` describes; None if all weights are trained.

    Raises:
      ConfigError: adapters of the tower for a model without one.
    """
    settings = config.lora
    if not settings.rank:
        return None
    if settings.modules != "text" and model.config.vision is None:
        raise ConfigError(
            f"config.lora.modules = {settings.modules!r}: {config.model.path} has no vision tower"
        )
    parts = {"text": [LINEARS], "tower": [TOWER_LINEARS], "both": [LINEARS, TOWER_LINEARS]}
    every, named = settings.targets == "all-linear", settings.targets.split(",")
    linears = [
        linear
        for part in parts[settings.modules]
        for name, linear in part.items()
        if every or name in named
    ]
    return Lora.uniform(
        model.config,
        tuple(linears),
        rank=settings.rank,
        alpha=settings.alpha,
        rslora=settings.rslora,
    )


def configured_objective(config: Config) -> Objective:
    """The objective that ``config.objective`` names, with the settings that it changes.

    Raises:
      ConfigError: an unknown objective, or groups too small for its expert rows.
    """
    settings = {
        name: value
        for name, value in vars(config.objective).items()
        if name in {field.name for field in dataclasses.fields(Objective)}
    }
    try:
        objective = load_objective(config.objective.name, **settings)
    except ValueError as error:
        raise ConfigError(f"config.objective.name: {error}") from error
    corrected = not importance_level(objective) == objective.importance_mask == "none"
    if corrected and config.objective.old_logprobs == "rollout":
        raise ConfigError(
            'config.objective.old_logprobs = "rollout": tis_cap, importance_weight and '
            'importance_mask compare the trainer with the sampler and need "trainer"'
        )
    if objective.expert_rows >= config.rollout.group_size:
        raise ConfigError(
            f"config.rollout.group_size = {config.rollout.group_size}: must be above the "
            f"{objective.expert_rows} expert row(s) in each group"
        )
    return objective


def require_custom(config: Config) -> None:
    """Refuses a clip rule or metric that cannot be imported, or a rule that fails on arrays.

    Raises:
      ConfigError: names the key.
    """
    for path in metric_paths(config):
        load_custom(path, "config.log.metrics =")
    rule = load_clip_rule(config.echo.select)
    if callable(rule):
        rows, steps, flags = jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, bool)
        sizes = {"num_groups": 1, "num_steps": 3, "select": rule, "key": jax.random.key(0)}
        try:
            jax.eval_shape(
                functools.partial(mine_echo_clips, **sizes), rows, steps, flags, steps[:, 0]
            )
        # The rule is the user's program: anything can go wrong in it.
        except Exception as error:
            path = config.echo.select
            raise ConfigError(f"config.echo.select = {path!r}: {one_line(error)}") from error


def metric_paths(config: Config) -> list[str]:
    """The import paths of custom metrics."""
    return [path.strip() for path in config.log.metrics.split(",") if path.strip()]


def step_delimiters(config: Config, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Marks the tokens that end a reasoning step, bool ``[V]``."""
    if config.echo.delimiter == "newline":
        return newline_delimiters(tokenizer, vocab_size)
    ids = config.echo.delimiter_ids
    if not all(0 <= token < vocab_size for token in ids):
        raise ConfigError(
            f"config.echo.delimiter_ids = {ids}: the vocabulary has ids from 0 to {vocab_size - 1}"
        )
    marks = np.zeros(vocab_size, bool)
    marks[list(ids)] = True
    return marks
