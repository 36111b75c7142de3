"""What a run needs before its first step, built from the config: mesh, model, text, optimizer."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective, load_objective
from echorl_jax.data import load_tokenizer, newline_delimiters, require_vocabulary
from echorl_jax.data.tokens import model_path
from echorl_jax.evaluation.evaluate import end_tokens
from echorl_jax.models import Decoder, init_params, load_decoder, load_model
from echorl_jax.parallel import make_mesh
from echorl_jax.training.job import run_bounds
from echorl_jax.training.micro_batches import Bounds
from echorl_jax.training.optimizer import learning_rate_schedule, make_optimizer
from echorl_jax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Session:
    """The static parts of a run."""

    config: Config
    mesh: Mesh
    model: Decoder
    tokenizer: "PreTrainedTokenizerBase"
    is_delimiter: np.ndarray  # bool [V]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return end_tokens(self.tokenizer, self.model)

    @property
    def bounds(self) -> Bounds:
        """What every micro-batch keeps to."""
        return run_bounds(self.config, self.mesh)


def start_session(
    config: Config, *, devices: Sequence[Any] | None = None
) -> tuple[Session, PyTree]:
    """Builds the session and the sharded initial parameters, on all devices unless some are given.

    Raises:
      UserError: a model directory, tokenizer or mesh that does not work, named in one line.
    """
    sizes = config.mesh
    mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=devices)
    tokenizer = load_tokenizer(config.model.path)
    path = model_path(config.model.path)
    options = model_options(config)
    if config.model.init == "pretrained":
        model, params = load_model(path, mesh=mesh, **options)
    else:
        model = load_decoder(path, **options)
        params = init_params(model, jax.random.key(config.seed), mesh=mesh)
    require_vocabulary(tokenizer, model.config.vocab_size)
    schedule, optimizer = configured_optimizer(config)
    is_delimiter = step_delimiters(config, tokenizer, model.config.vocab_size)
    return Session(config, mesh, model, tokenizer, is_delimiter, schedule, optimizer), params


def model_options(config: Config) -> dict[str, Any]:
    """How the model computes, as :func:`load_decoder` takes it."""
    return {
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "attention": config.model.attention,
    }


def configured_objective(config: Config) -> Objective:
    """The objective that ``config.objective`` names, with the settings it changes."""
    settings = {
        name: value
        for name, value in vars(config.objective).items()
        if name in {field.name for field in dataclasses.fields(Objective)}
    }
    try:
        objective = load_objective(config.objective.name, **settings)
    except ValueError as error:
        raise ConfigError(f"config.objective.name: {error}") from error
    if objective.expert_rows >= config.rollout.group_size:
        raise ConfigError(
            f"config.rollout.group_size = {config.rollout.group_size}: must be above the "
            f"{objective.expert_rows} expert row(s) in each group"
        )
    return objective


def configured_optimizer(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and the optimizer at rate 1."""
    schedule = learning_rate_schedule(
        peak=config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        total_steps=config.steps,
        kind=config.optim.schedule,
    )
    optimizer = make_optimizer(
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        moment_dtype=config.optim.moment_dtype,
    )
    return schedule, optimizer


def step_delimiters(
    config: Config, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> np.ndarray:
    """Marks the tokens that end a reasoning step, ``[V]`` bool."""
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
