"""Updates of a run: which rows have a gradient, and when a run must not be trusted."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from echorl_jax.core import Objective, active_coef
from echorl_jax.errors import RunStopped
from echorl_jax.parallel import place_whole
from echorl_jax.training.batch import select_tokens
from echorl_jax.training.dumps import begin_dump, finish_dump, room_for_dump
from echorl_jax.training.micro_batches import micro_batches, trainable_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.run import Run
from echorl_jax.training.step import (
    GAP_MEAN,
    LOGPROB_GAP,
    GapBounds,
    UpdateStats,
    apply_update,
    require_healthy,
    score_batch,
)
from echorl_jax.types import Array, PyTree, Rollouts, TrainBatch


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
    scored = [_scored(run, state.params, batch, echo_active=coef != 0) for batch in batches]
    updates = config.objective.epochs * len(scored)
    # Different from the keys of samples and clips, into which a step's key is split.
    key = jax.random.fold_in(run.key(step), 2)
    done: list[UpdateStats] = []
    used: list[np.ndarray] = []
    for epoch in range(config.objective.epochs):
        for number, batch in enumerate(scored):
            batch = _selected(run, state.params, batch, key, number=len(done))
            batch, rows = trainable_rows(batch, every_row=_needs_every_row(run.objective))
            if epoch == 0:
                used.append(np.where(rows, batch.length, 0))
            state, stats = _apply(run, state, batch, rows, coef, step=step, number=len(done))
            done.append(stats)
            first = epoch == 0 and number == 0
            _require_healthy(run, state, stats, step, updates=updates, check_gap=first)
    run.faults.reach("update", step)
    done_steps = place_whole(np.int32(step), run.setup.mesh)
    state = dataclasses.replace(state, step=done_steps)
    return state, done, np.concatenate(used)


def count_dead_rollouts(
    run: Run, state: TrainState, rollouts: Rollouts, step: int, *, bad_before: int
) -> TrainState:
    """Counts a step whose rollouts are not finite as one of bad updates.

    The rewards of a policy whose logits are NaN are all equal, so that no gradient would show it.

    Args:
      rollouts: NumPy arrays.
      bad_before: ``state.bad_updates`` when the step began.

    Raises:
      RunStopped: this is the last of ``optim.max_bad_steps`` such steps in a row.
    """
    written = np.arange(rollouts.completion_ids.shape[1]) < rollouts.completion_length[:, None]
    finite = np.isfinite(rollouts.rollout_logprobs) & np.isfinite(rollouts.token_entropy)
    dead = int(np.any(written & ~finite, axis=1).sum())
    if not dead:
        return state
    config = run.setup.config
    updates = config.objective.epochs * config.objective.mini_batches
    bad, limit = bad_before + updates, config.optim.max_bad_steps
    line = (
        f"step {step}: log-probabilities or entropies of {dead} of {len(finite)} rollouts are not "
        "finite"
    )
    if bad >= limit * updates:
        raise RunStopped(
            f"{line}, at the end of {limit} bad step(s) in a row (optim.max_bad_steps); the policy "
            "may have diverged: go on from an earlier checkpoint (checkpoint.resume)"
        )
    run.log.say(f"warning: {line}")
    return dataclasses.replace(state, bad_updates=place_whole(np.int32(bad), run.setup.mesh))


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


def _needs_every_row(objective: Objective) -> bool:
    """Whether rows with zero advantage have a gradient too."""
    return (
        objective.kl_coef != 0
        or objective.entropy_coef != 0
        or not objective.zero_without_advantage
    )


def _scored(run: Run, params: PyTree, batch: TrainBatch, *, echo_active: bool) -> TrainBatch:
    """The batch with what forward passes before the first update compute."""
    if not echo_active:
        batch = dataclasses.replace(batch, echo_weights=np.zeros_like(batch.echo_weights))
    scored = batch
    if run.setup.scores_old_policy:
        scored = dataclasses.replace(scored, old_logprobs=_score(run, params, batch))
    if run.reference is not None:
        scored = dataclasses.replace(scored, ref_logprobs=_score(run, run.reference, batch))
    return scored


def _score(run: Run, params: PyTree, batch: TrainBatch) -> np.ndarray:
    """Log-probabilities ``[N, T]`` f32 of the rows that need them, zeros elsewhere.

    A selection of tokens compares all rows, so it needs those with zero advantage too.
    """
    every_row = _needs_every_row(run.objective) or run.objective.select_tokens is not None
    batch, rows = trainable_rows(batch, every_row=every_row)
    pieces = micro_batches(batch, rows, run.setup.bounds)
    return score_batch(run.setup, params, pieces, shape=batch.loss_mask.shape)


def _selected(
    run: Run, params: PyTree, batch: TrainBatch, key: Array, *, number: int
) -> TrainBatch:
    """The batch with the tokens that the objective selects for update ``number`` of the step.

    The first update starts from the old policy, whose log-probabilities are there.
    """
    if run.objective.select_tokens is None:
        return batch
    before = batch.old_logprobs if number == 0 else _score(run, params, _unscored(batch))
    return select_tokens(batch, before, jax.random.fold_in(key, number), objective=run.objective)


def _unscored(batch: TrainBatch) -> TrainBatch:
    """The batch as the scoring program takes it: one program for each shape, compiled once."""
    return dataclasses.replace(batch, ref_logprobs=None, selected=None)


def _require_healthy(
    run: Run, state: TrainState, done: UpdateStats, step: int, *, updates: int, check_gap: bool
) -> None:
    config = run.setup.config
    check_gap &= not run.objective.supervised and run.gap_check.due(step)
    # An update without a trainable row has compared nothing: the check stays due.
    check_gap &= bool(done.terms[GAP_MEAN].count > 0)
    types = config.model.dtype, config.rollout.kv_dtype or config.model.dtype
    largest = config.rollout.max_logprob_gap
    bounds = GapBounds(largest) if largest else max(LOGPROB_GAP[name] for name in types)
    require_healthy(
        state,
        done,
        step=step,
        bounds=bounds if check_gap else None,
        max_bad_steps=config.optim.max_bad_steps,
        updates_per_step=updates,
    )
    if check_gap:
        run.gap_check.passed()
