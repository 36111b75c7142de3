"""Updates of a run: which rows have a gradient, and when a run must not be trusted."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from echorl_jax.core import active_coef
from echorl_jax.parallel import place_whole
from echorl_jax.training.dumps import begin_dump, finish_dump, room_for_dump
from echorl_jax.training.micro_batches import micro_batches, trainable_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.run import Run
from echorl_jax.training.step import (
    GAP_MEAN,
    UpdateStats,
    apply_update,
    require_healthy,
    score_batch,
)
from echorl_jax.types import PyTree, TrainBatch

# Largest accepted gap between sampler and trainer log-probabilities (nats), by the narrowest type
# in use, computation's or cache's. Measured largest gaps: docs/performance.md.
LOGPROB_GAP = {"float32": 1e-2, "bfloat16": 0.5, "int8": 2.0}


def improve(
    run: Run, state: TrainState, batches: Sequence[TrainBatch], step: int
) -> tuple[TrainState, list[UpdateStats], np.ndarray]:
    """One update for each batch (NumPy), ``objective.epochs`` times over; donates ``state``.

    Returns:
      The new state, the results of each update (NumPy), and the number of tokens of each row that
      had a gradient, i32 ``[N]`` over all batches; 0 for a row that was left out.

    Raises:
      RunStopped: the run cannot be trusted any more.
    """
    config = run.setup.config
    window = {"start_step": config.echo.start_step, "end_step": config.echo.end_step}
    coef = float(active_coef(step - 1, config.echo.coef, **window)) * config.echo.enabled
    batches = [run.faults.spoil(batches[0], step), *batches[1:]]
    ready = [_ready(run, state.params, batch, echo_active=coef != 0) for batch in batches]
    updates = config.objective.epochs * len(ready)
    done: list[UpdateStats] = []
    for epoch in range(config.objective.epochs):
        for number, (batch, rows) in enumerate(ready):
            state, stats = _apply(run, state, batch, rows, coef, step=step, number=len(done))
            done.append(stats)
            first = epoch == 0 and number == 0
            _require_healthy(run, state, stats, step, updates=updates, check_gap=first)
    run.faults.reach("update", step)
    done_steps = place_whole(np.int32(step), run.setup.mesh)
    state = dataclasses.replace(state, step=done_steps)
    used = [np.where(rows, batch.length, 0) for batch, rows in ready]
    return state, done, np.concatenate(used)


def _apply(
    run: Run,
    state: TrainState,
    batch: TrainBatch,
    rows: np.ndarray,
    coef: float,
    *,
    step: int,
    number: int,
) -> tuple[TrainState, UpdateStats]:
    """One update; dumped if asked for or not finite, when the parameters stay as they were."""
    debug = run.setup.config.debug

    def pieces() -> Iterator[TrainBatch]:
        return (micro for _, micro in micro_batches(batch, rows, run.setup.bounds))

    dump = None
    if number == 0 and step == debug.dump_step:
        dump = begin_dump(run.directory, step, number, state.params)
    state, stats = apply_update(run.setup, state, pieces(), echo_coef=coef)
    done: UpdateStats = jax.device_get(stats)
    if dump is None and not done.finite and room_for_dump(run.directory, debug.max_dumps):
        dump = begin_dump(run.directory, step, number, state.params)
    if dump is not None:
        path = finish_dump(dump, run.setup, pieces(), done, echo_coef=coef)
        run.log.say(f"step {step}: update written to {path} for `echorl replay`")
    return state, done


def _ready(
    run: Run, params: PyTree, batch: TrainBatch, *, echo_active: bool
) -> tuple[TrainBatch, np.ndarray]:
    """Leaves out rows without a gradient and fills in what other forward passes compute."""
    objective = run.objective
    if not echo_active:
        batch = dataclasses.replace(batch, echo_weights=np.zeros_like(batch.echo_weights))
    every_row = (
        objective.kl_coef != 0
        or objective.entropy_coef != 0
        or not objective.zero_without_advantage
    )
    batch, rows = trainable_rows(batch, every_row=every_row)

    def score(weights: PyTree) -> np.ndarray:
        return score_batch(
            run.setup,
            weights,
            micro_batches(batch, rows, run.setup.bounds),
            shape=batch.loss_mask.shape,
        )

    if run.setup.scores_old_policy:
        batch = dataclasses.replace(batch, old_logprobs=score(params))
    if run.reference is not None:
        batch = dataclasses.replace(batch, ref_logprobs=score(run.reference))
    return batch, rows


def _require_healthy(
    run: Run, state: TrainState, done: UpdateStats, step: int, *, updates: int, check_gap: bool
) -> None:
    config = run.setup.config
    check_gap &= not run.objective.supervised and run.gap_check.due(step)
    # An update without a trainable row has compared nothing: the check stays due.
    check_gap &= bool(done.terms[GAP_MEAN].count > 0)
    types = config.model.dtype, config.rollout.kv_dtype or config.model.dtype
    bound = config.rollout.max_logprob_gap or max(LOGPROB_GAP[name] for name in types)
    require_healthy(
        state,
        done,
        step=step,
        max_gap=bound if check_gap else None,
        max_bad_steps=config.optim.max_bad_steps,
        updates_per_step=updates,
    )
    if check_gap:
        run.gap_check.passed()
