"""Compiles every shape that a run can meet, before its first step: a step with nothing learnt.

A program enters JAX's cache when it runs, so each one runs once, on the prompts to come (which stay
to come) and with weights of zero. What does not fit on the devices fails here, the largest first.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

from echorl_jax.config import ConfigError
from echorl_jax.rollout.host import FEWEST_SLOTS, choose_cpu_workers, worker_slots
from echorl_jax.rollout.request import slot_counts
from echorl_jax.training.batch import Assembled, select_tokens
from echorl_jax.training.collect import Experience, join_rounds, sample
from echorl_jax.training.micro_batches import micro_batch_shapes, take_rows
from echorl_jax.training.run import Run
from echorl_jax.training.step import micro_gradient, score_batch
from echorl_jax.types import Array, Graded, HostArray, PyTree, TrainBatch

MakeBatches = Callable[[Run, Experience, Array], list[Assembled]]


def rehearse(run: Run, params: PyTree, make_batches: MakeBatches) -> None:
    """Goes through sampling, assembly and the gradient of every shape of micro-batch.

    Args:
      run: as opened; neither its data nor its state moves.
      params: the weights, which stay.
      make_batches: see :func:`echorl_jax.training.loop.make_batches`.

    Raises:
      ConfigError: a program needs more memory than there is.
    """
    with _timed(run):
        run.log.say("compiling ahead: sampler")
        key = jax.random.key(0)
        found = _experience(run, params, key)
        objective = run.setup.config.objective
        most = objective.max_rounds if run.objective.dynamic_sampling else 1
        rounds = [make_batches(run, join_rounds([found] * n), key) for n in range(1, most + 1)]
        batches = [_as_trained(run, part.batch, key) for parts in rounds for part in parts]
        _every_shape(run, params, batches[0], max(len(batch.length) for batch in batches))


def rehearse_updates(run: Run, params: PyTree, batch: TrainBatch, *, rows: int) -> None:
    """Goes through the gradient of every shape of micro-batch, where nothing is sampled.

    Args:
      run: as opened.
      params: the weights, which stay.
      batch: rows (NumPy) as wide as any of the run.
      rows: of a batch, at most.

    Raises:
      ConfigError: a program needs more memory than there is.
    """
    with _timed(run):
        _every_shape(run, params, batch, rows)


@contextmanager
def _timed(run: Run) -> Iterator[None]:
    start = time.monotonic()
    yield
    run.log.say(f"compiled {run.compiles.count} programs in {time.monotonic() - start:.0f} s")


def _every_shape(run: Run, params: PyTree, batch: TrainBatch, rows: int) -> None:
    shapes = micro_batch_shapes(rows, run.setup.bounds)
    for number, (count, width) in enumerate(shapes, 1):
        shape = f"{count} x {width} tokens"
        run.log.say(f"compiling ahead: micro-batch {number}/{len(shapes)}, {shape}")
        try:
            _learn_nothing(run, params, batch, count, width)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            budget = run.setup.config.optim.micro_batch_tokens
            raise ConfigError(
                f"config.optim.micro_batch_tokens = {budget}: the gradient of {count} rows x "
                f"{width} tokens does not fit in memory; `echorl plan` says what to change"
            ) from error


def slot_limits(rows: int, slots: int, *, shards: int, longest: int) -> list[int]:
    """Limits for N rows, so that the sampler goes through each number of slots it has programs for.

    Slot i first holds row i. At each level the slots that stay are the first of every shard, so
    their rows are the longest; by then the rows that wait have passed through the others.
    """
    slots = worker_slots(rows, slots, workers=1, shards=shards)
    sizes = slot_counts(slots, smallest=max(FEWEST_SLOTS, shards))
    waiting = 1 + -(-2 * (rows - slots) // slots) if rows > slots else 0
    limits = np.ones(rows, np.int64)
    place = np.arange(slots) % (slots // shards)
    for level, count in enumerate(sizes[1:], 1):
        limits[:slots][place < count // shards] = 1 + waiting + level
    return np.minimum(limits, longest).tolist()


def _experience(run: Run, params: PyTree, key: Array) -> Experience:
    """Sampled groups, all wrong."""
    position = run.stream.get_state()
    prompts = next(run.stream)
    run.stream.set_state(position)
    config = run.setup.config
    limits = np.empty((len(prompts), run.setup.sampled_group_size), np.int64)
    workers = choose_cpu_workers(
        run.setup.model,
        prompts=len(prompts),
        slots=run.setup.slots,
        max_new_tokens=config.rollout.max_new_tokens,
        kv_dtype=config.rollout.kv_dtype,
        mesh=run.setup.mesh,
    )
    for worker in range(workers):
        own = limits[worker::workers]
        own[:] = np.reshape(
            slot_limits(
                own.size,
                -(-run.setup.slots // workers),
                shards=run.setup.bounds.row_multiple,
                longest=config.rollout.max_new_tokens,
            ),
            own.shape,
        )
    rollouts, on_policy, _ = sample(
        run,
        params,
        prompts,
        key,
        finished=lambda rows, completions: None,
        row_limits=limits.reshape(-1).tolist(),
    )
    rows = len(on_policy)
    zero: HostArray = np.zeros(rows, np.float32)
    wrong: HostArray = np.zeros(rows, bool)
    nothing = Graded(rewards=zero, correct=wrong, on_policy=on_policy, judged=~wrong)
    return Experience(
        prompts=tuple(prompts),
        rollouts=rollouts,
        graded=nothing,
        in_policy=np.ones(rows, bool),
        in_echo=np.ones(rows, bool),
        reasons=("",) * rows,
        seconds={},
    )


def _as_trained(run: Run, batch: TrainBatch, key: Array) -> TrainBatch:
    """The batch, with the fields that are filled in before an update."""
    batch = select_tokens(batch, batch.old_logprobs, key, objective=run.objective)
    if run.reference is None:
        return batch
    return dataclasses.replace(batch, ref_logprobs=np.zeros(batch.loss_mask.shape, np.float32))


def _learn_nothing(run: Run, params: PyTree, batch: TrainBatch, rows: int, width: int) -> None:
    """The forward and backward pass of one shape, and the forward pass where the run has one."""
    chosen = np.arange(min(rows, len(batch.length)))
    micro = take_rows(batch, chosen, count=rows, width=width)
    # Rows that are longer in the batch are cut, padding keeps a token.
    length = np.minimum(micro.length, width).astype(np.int32)
    before = np.minimum(micro.prompt_length, width).astype(np.int32)
    micro = dataclasses.replace(micro, length=length, prompt_length=before)
    jax.block_until_ready(micro_gradient(run.setup, params, micro, echo_coef=0.0).loss)
    scored = [run.reference] if run.reference is not None else []
    if run.setup.scores_policy:
        scored.append(params)
    for weights in scored:
        before_scores = dataclasses.replace(micro, ref_logprobs=None, selected=None)
        score_batch(
            run.setup,
            weights,
            [(chosen, before_scores)],
            shape=batch.loss_mask.shape,
        )
