"""The algorithm on one page: sample, grade, advantages, EchoClips, update, log, save, evaluate."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echorl_jax.config import Config
from echorl_jax.training.batch import Assembled, assemble, join_assembled, step_advantages
from echorl_jax.training.collect import Experience, collect, split
from echorl_jax.training.experts import learn_hints
from echorl_jax.training.learning import count_dead_rollouts, improve
from echorl_jax.training.logs import timed
from echorl_jax.training.metrics import step_metrics, throughput_metrics
from echorl_jax.training.opening import open_run
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.rehearsal import rehearse
from echorl_jax.training.run import Run
from echorl_jax.training.samples import record_samples
from echorl_jax.training.step import update_metrics
from echorl_jax.types import Array


def train(
    config: Config, workdir: str | Path, *, devices: Sequence[Any] | None = None
) -> TrainState:
    """Trains for ``config.steps`` steps, from the newest checkpoint in ``workdir`` if there is one.

    Args:
      config: validated options.
      workdir: where the run lives.
      devices: those to use; all unless given.

    Returns:
      The final state.

    Raises:
      UserError: config, data, model or workdir that cannot be used.
      RunStopped: sampler and trainer disagree, or gradients stay non-finite.
    """
    prompts = config.rollout.prompts_per_step
    with open_run(config, workdir, prompts_per_step=prompts, devices=devices) as opened:
        run, state = opened
        if config.optim.compile_ahead and not run.stopping():
            rehearse(run, state.params, make_batches)
        for step in run.steps():
            sample_key, clip_key = jax.random.split(run.key(step))
            found = collect(run, state.params, sample_key, step=step)
            with timed(found.seconds, "update"):
                parts = make_batches(run, found, clip_key)
                bad_before = int(state.bad_updates)
                state, updates, used = improve(run, state, [part.batch for part in parts], step)
            state = count_dead_rollouts(run, state, found.rollouts, step, bad_before=bad_before)
            made = join_assembled(parts)
            record_samples(
                run.directory,
                step,
                found,
                made,
                groups=groups_to_show(config, step),
                tokenizer=run.setup.tokenizer,
            )
            metrics = {
                **step_metrics(found, made, hints=run.objective.hints),
                **update_metrics(updates),
                **throughput_metrics(
                    used=used,
                    trained_tokens=int(used.sum()) * config.objective.epochs,
                    sampled_tokens=int(
                        found.rollouts.completion_length[found.graded.on_policy].sum()
                    ),
                    seconds=found.seconds,
                ),
            }
            if not run.end_step(step, state, metrics):
                break
        run.finish(state)
    return state


def make_batches(run: Run, found: Experience, key: Array) -> list[Assembled]:
    """Advantages over the whole step; then clips and final weights for each mini-batch (NumPy)."""
    config, objective = run.setup.config, run.objective
    advantages = np.asarray(step_advantages(found.rollouts, found.graded, objective=objective))
    parts = split(found, config.objective.mini_batches)
    made = []
    for number, (part, own) in enumerate(zip(parts, np.split(advantages, len(parts)), strict=True)):
        assembled = assemble(
            part.rollouts,
            part.graded,
            own,
            part.in_policy,
            part.in_echo,
            run.setup.is_delimiter,
            jax.random.fold_in(key, number),
            objective=objective,
            echo=config.echo,
            max_tokens=config.rollout.max_new_tokens,
        )
        assembled = jax.device_get(assembled)
        if objective.hints:
            hint_tokens = np.array([prompt.hint_tokens for prompt in part.prompts], np.int32)
            batch = learn_hints(assembled.batch, part.rollouts.group, hint_tokens)
            assembled = dataclasses.replace(assembled, batch=batch)
        made.append(assembled)
    return made


def groups_to_show(config: Config, step: int) -> range:
    """The prompts whose rollouts are written in full at this step."""
    every = config.log.samples_every
    due = every and (step % every == 0 or step in (1, config.steps))
    shown = min(config.log.samples_groups, config.rollout.prompts_per_step)
    return range(shown if due else 0)
