"""Supervised training on expert trajectories, with the same update, checkpoints and logs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import aggregation_weights, mean_scale
from echorl_jax.data import Prompt
from echorl_jax.environment import target_ids
from echorl_jax.models import Decoder
from echorl_jax.remote import Mirror
from echorl_jax.training.batch import show_images
from echorl_jax.training.logs import timed
from echorl_jax.training.metrics import training_speed
from echorl_jax.training.micro_batches import pack_rows, packed_width
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.run import open_run
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import update, update_metrics
from echorl_jax.training.warmup import warm_up_updates
from echorl_jax.types import HostArray, TrainBatch


def train_supervised(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[Any] | None = None,
    mirror: Mirror | None = None,
) -> TrainState:
    """Lowers the mean negative log-likelihood of the rows' ``target`` tokens, EOS included.

    Targets longer than ``rollout.max_new_tokens`` are cut there.

    Returns:
      The final state.

    Raises:
      UserError: config, data, model or workdir that cannot be used; an objective that samples.
      RunStopped: gradients stay non-finite.
    """
    rows = config.optim.sft_rows_per_step
    with open_run(
        config, workdir, prompts_per_step=rows, supervised=True, devices=devices, mirror=mirror
    ) as (
        run,
        state,
    ):
        setup = run.setup
        if config.optim.compile_ahead and not run.stopping():
            # As wide as any batch of the run.
            peeked = run.stream.peek()
            batch = demonstrations(setup, peeked)
            if packs(config, setup.model):
                batch = pack_rows(batch, width=batch.tokens.shape[1])
            with run.compiling() as later:
                warm_up_updates(
                    setup,
                    state.params,
                    batch,
                    rows=rows,
                    frozen=run.frozen,
                    reference=run.reference,
                    images=[[image for prompt in peeked for image in prompt.images]],
                    say=run.log.say,
                    later=later,
                )
        for step in run.steps():
            seconds: dict[str, float] = {}
            with timed(seconds, "data"):
                prompts = next(run.stream)
                batch = demonstrations(setup, prompts)
                tokens = int(batch.length.sum())
                if packs(config, setup.model):
                    batch = pack_rows(
                        batch, width=packed_width(batch.length.tolist(), setup.bounds)
                    )
                batches = run.faults.spoil([batch], step)
            with timed(seconds, "update"):
                state, updates, used = update(
                    setup,
                    state,
                    batches,
                    run.key(step),
                    step=step,
                    echo_coef=0.0,
                    frozen=run.frozen,
                    reference=run.reference,
                    images=[[image for prompt in prompts for image in prompt.images]],
                    dumps=run.dumps,
                )
            run.faults.reach("update", step)
            state = run.health.check(step, state, updates)
            metrics = update_metrics(updates)
            metrics |= {
                "loss/nll": metrics["loss/total"],
                "train/rows_skipped_fraction": float(np.mean(used == 0)),
                "rollout/tokens_per_second": 0.0,
                **training_speed(tokens, seconds),
            }
            if not run.end_step(step, state, metrics):
                break
        run.finish(state)
    return state


def packs(config: Config, model: Decoder) -> bool:
    """True if demonstrations share rows.

    Raises:
      ConfigError: asked for with pictures, or with rotary angles that depend on a row's length.
    """
    choice = config.optim.sft_packing
    alone = model.config.rope.kind == "dynamic" or model.config.vision is not None
    if choice == "on" and alone:
        raise ConfigError(
            "config.optim.sft_packing = 'on': must be off or auto with dynamic rope scaling and "
            "with pictures"
        )
    return choice == "on" or (choice == "auto" and not alone and jax.default_backend() != "gpu")


def demonstrations(setup: Setup, prompts: Sequence[Prompt]) -> TrainBatch:
    """Prompts and expert trajectories as a batch (NumPy) whose token losses all count."""
    config, objective = setup.config, setup.objective
    width = config.rollout.max_new_tokens
    targets = [target_ids(setup.tokenizer, prompt)[:width] for prompt in prompts]
    tokens = np.zeros((len(prompts), config.data.max_prompt_tokens + width), np.int32)
    mask = np.zeros((len(prompts), width), np.float32)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids = [*prompt.ids, *target]
        tokens[row, : len(ids)] = ids
        mask[row, : len(target)] = 1.0
    prompt_length: HostArray = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    weights = aggregation_weights(jnp.asarray(mask), mode=objective.aggregation, max_tokens=width)
    batch = TrainBatch.plain(
        tokens=tokens,
        prompt_length=prompt_length,
        length=prompt_length + mask.sum(axis=1).astype(np.int32),
        loss_mask=mask,
        advantages=np.ones(len(prompts), np.float32),
        token_weights=np.asarray(weights),
        entropy_scale=np.asarray(mean_scale(weights)) if objective.entropy_coef else None,
    )
    return show_images(setup, batch, prompts, np.arange(len(prompts)))
