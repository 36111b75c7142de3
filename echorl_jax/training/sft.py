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
from echorl_jax.models import Decoder
from echorl_jax.training.experts import target_ids
from echorl_jax.training.learning import improve
from echorl_jax.training.logs import timed
from echorl_jax.training.metrics import throughput_metrics
from echorl_jax.training.opening import open_run
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.packing import pack_rows, packed_width
from echorl_jax.training.rehearsal import rehearse_updates
from echorl_jax.training.run import Run
from echorl_jax.training.step import update_metrics
from echorl_jax.types import TrainBatch


def train_supervised(
    config: Config, workdir: str | Path, *, devices: Sequence[Any] | None = None
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
        config, workdir, prompts_per_step=rows, supervised=True, devices=devices
    ) as opened:
        run, state = opened
        if config.optim.compile_ahead and not run.stopping():
            rehearse_updates(run, state.params, _widest(run), rows=rows)
        for step in run.steps():
            seconds: dict[str, float] = {}
            with timed(seconds, "data"):
                batch = demonstrations(run, next(run.stream))
                real_tokens = int(batch.length.sum())
                batch = _packed(run, batch)
            with timed(seconds, "update"):
                state, updates, used = improve(run, state, [batch], step)
            speed = throughput_metrics(
                used=used,
                trained_tokens=real_tokens,
                sampled_tokens=0,
                seconds=seconds,
            )
            metrics = update_metrics(updates) | speed
            if not run.end_step(step, state, {**metrics, "loss/nll": metrics["loss/total"]}):
                break
        run.finish(state)
    return state


def packs(config: Config, model: Decoder) -> bool:
    """Whether demonstrations share rows.

    Raises:
      ConfigError: asked for with rotary angles that depend on a whole row's length.
    """
    choice, dynamic = config.optim.sft_packing, model.config.rope.kind == "dynamic"
    if choice == "on" and dynamic:
        raise ConfigError(
            "config.optim.sft_packing = 'on': must be off or auto with dynamic rope scaling"
        )
    return choice == "on" or (choice == "auto" and not dynamic and jax.default_backend() != "gpu")


def _widest(run: Run) -> TrainBatch:
    """The next rows, as wide as any of the run can be; the stream stays where it is."""
    setup = run.setup
    position = run.stream.get_state()
    batch = demonstrations(run, next(run.stream))
    run.stream.set_state(position)
    if not packs(setup.config, setup.model):
        return batch
    return pack_rows(batch, width=batch.tokens.shape[1])


def _packed(run: Run, batch: TrainBatch) -> TrainBatch:
    """The batch in packed rows, or as it is."""
    setup = run.setup
    if not packs(setup.config, setup.model):
        return batch
    return pack_rows(
        batch,
        width=packed_width(batch.length.tolist(), setup.bounds),
    )


def demonstrations(run: Run, prompts: Sequence[Prompt]) -> TrainBatch:
    """Prompts and expert trajectories as a batch (NumPy) whose token losses all count."""
    config = run.setup.config
    width = config.rollout.max_new_tokens
    targets = [target_ids(run.setup.tokenizer, prompt)[:width] for prompt in prompts]
    tokens = np.zeros((len(prompts), config.data.max_prompt_tokens + width), np.int32)
    mask = np.zeros((len(prompts), width), np.float32)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids = [*prompt.ids, *target]
        tokens[row, : len(ids)] = ids
        mask[row, : len(target)] = 1.0
    prompt_length = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    weights = aggregation_weights(
        jnp.asarray(mask), mode=run.objective.aggregation, max_tokens=width
    )
    scale = np.asarray(mean_scale(weights)) if run.objective.entropy_coef else None
    zeros = np.zeros_like(mask)
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "prompt_length": prompt_length,
        "length": prompt_length + mask.sum(axis=1).astype(np.int32),
        "loss_mask": mask,
        "advantages": np.ones(len(prompts), np.float32),
        "old_logprobs": zeros,
        "rollout_logprobs": zeros,
        "token_weights": np.asarray(weights),
        "echo_weights": zeros,
        "entropy_scale": scale,
        "on_policy": np.zeros(len(prompts), bool),
    }
    return TrainBatch(**arrays)
