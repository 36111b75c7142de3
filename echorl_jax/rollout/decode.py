"""The decode loop on the device: in every step each slot writes one token.

The loop never waits for the host. A call ends after a number of steps, when all rows are done, or
when so few slots are busy that a program with fewer slots does the same work faster.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, constrain
from echorl_jax.rollout.cache import write_column
from echorl_jax.rollout.request import Sampling
from echorl_jax.rollout.sampling import sample, token_uniforms
from echorl_jax.rollout.slots import (
    Queue,
    Slots,
    append,
    needed,
    prefix_tokens,
    refill,
    retire,
)
from echorl_jax.rollout.step import forward
from echorl_jax.types import Array, PyTree, pytree


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static part of the decode program."""

    sampling: Sampling
    steps: int  # most decode steps in one call
    refill: bool  # whether rows may wait for a free slot
    platform: Platform  # see step.forward
    shards: int  # parts that the slots are split into on a mesh


@pytree
class Output:
    """The tokens written so far."""

    token: Array  # i32 [N, T]
    logprob: Array  # f32 [N, T]
    entropy: Array  # f32 [N, T]
    length: Array  # i32 [N]
    stopped: Array  # bool [N], ended by EOS or a stop sequence


@pytree
class Status:
    """All that the host reads after a call."""

    active: Array  # i32 [], busy slots
    needed: Array  # i32 [], fewest slots that hold the busy ones
    next_row: Array  # i32 [], first row that no slot has taken
    steps: Array  # i32 [], in this call
    tokens: Array  # i32 [], in this call: busy slots summed over steps


@pytree
class _Step:
    """What one decode step wrote; with a leading axis of steps, the log of a call."""

    token: Array  # i32 [M]
    logprob: Array  # f32 [M]
    entropy: Array  # f32 [M]
    row: Array  # i32 [M]; N where idle
    position: Array  # i32 [M]
    stopped: Array  # bool [M]


def empty_output(rows: int, length: int, pad_id: int) -> Output:
    """N rows of T padding tokens."""
    return Output(
        token=jnp.full((rows, length), pad_id, jnp.int32),
        logprob=jnp.zeros((rows, length), jnp.float32),
        entropy=jnp.zeros((rows, length), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
    )


def decode(
    model: Decoder,
    params: PyTree,
    queue: Queue,
    slots: Slots,
    output: Output,
    shrink_at: Array,
    *,
    spec: DecodeSpec,
) -> tuple[Slots, Output, Status]:
    """Writes tokens until the call ends.

    Args:
      model: the decoder.
      params: the weights, in the layout for sampling.
      queue: the rows to write.
      slots: the rows being written.
      output: the tokens written so far.
      shrink_at: i32 scalar; the call ends when the queue is empty and this many slots suffice.
      spec: static.
    """

    def go_on(carry: tuple[Slots, _Step, Array, Array]) -> Array:
        slots, _, steps, _ = carry
        size = needed(slots.row < queue.rows, shards=spec.shards)
        work_left = (slots.next_row < queue.request.count) | (size > shrink_at)
        return (steps < spec.steps) & work_left

    ahead = None if spec.refill else _uniforms_ahead(queue, slots, spec.steps)

    def body(carry: tuple[Slots, _Step, Array, Array]) -> tuple[Slots, _Step, Array, Array]:
        slots, log, steps, tokens = carry
        if spec.refill:
            # Refill before reading: without EOS, XLA cannot order this write after the reads of
            # the prompts, and copies all prompts in every step.
            slots = refill(queue, slots)
        busy = (slots.row < queue.rows).sum(dtype=jnp.int32)
        if ahead is None:
            uniforms = _uniforms(queue, slots.row, slots.position)
        else:
            uniforms = lax.dynamic_index_in_dim(ahead, steps, keepdims=False)
        slots, entry = _decode_step(model, params, queue, slots, uniforms, spec)
        log = jax.tree.map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, steps, 0), log, entry
        )
        return slots, log, steps + 1, tokens + busy

    zero = jnp.zeros((), jnp.int32)
    log = _empty_log(spec.steps, slots.row.shape[0], queue.rows)
    slots, log, steps, tokens = lax.while_loop(go_on, body, (slots, log, zero, zero))
    busy = slots.row < queue.rows
    status = Status(
        active=busy.sum(dtype=jnp.int32),
        needed=needed(busy, shards=spec.shards),
        next_row=slots.next_row,
        steps=steps,
        tokens=tokens,
    )
    return slots, _collect(output, log), status


def _uniforms(queue: Queue, row: Array, position: Array) -> Array:
    """f32 ``[M, 2]``, for tokens of the rows; those of idle slots are unused."""
    return token_uniforms(queue.key[jnp.minimum(row, queue.rows - 1)], position)


def _uniforms_ahead(queue: Queue, slots: Slots, steps: int) -> Array:
    """The uniforms of all steps, f32 ``[steps, M, 2]``, where every slot keeps its row to the end.

    A row fits the ring, so there are no more steps than the ring has columns.
    """
    step = jnp.arange(min(steps, slots.ring.length), dtype=jnp.int32)
    return jax.vmap(lambda later: _uniforms(queue, slots.row, slots.position + later))(step)


def _decode_step(
    model: Decoder,
    params: PyTree,
    queue: Queue,
    slots: Slots,
    uniforms: Array,
    spec: DecodeSpec,
) -> tuple[Slots, _Step]:
    """One token for every slot; slots whose rows have ended become idle."""
    logits, new = forward(model, params, queue, slots, platform=spec.platform)
    drawn = sample(logits, uniforms, spec.sampling, prefix=prefix_tokens(queue, slots))
    drawn = jax.tree.map(lambda x: constrain(x, None), drawn)  # whole on every device from here on
    ring = write_column(slots.ring, new, slots.step % slots.ring.length)
    row, position = slots.row, slots.position
    slots = dataclasses.replace(slots, ring=ring)
    slots, ended, stopped = append(queue, slots, drawn.token, spec.sampling)
    return retire(queue, slots, ended), _Step(
        drawn.token, drawn.logprob, drawn.entropy, row, position, stopped
    )


def _empty_log(steps: int, slots: int, idle: int) -> _Step:
    integers = jnp.zeros((steps, slots), jnp.int32)
    numbers = jnp.zeros((steps, slots), jnp.float32)
    return _Step(
        token=integers,
        logprob=numbers,
        entropy=numbers,
        row=jnp.full((steps, slots), idle, jnp.int32),
        position=integers,
        stopped=jnp.zeros((steps, slots), bool),
    )


def _collect(output: Output, log: _Step) -> Output:
    """Scatters the tokens of a call to their rows; writes of idle slots are out of bounds."""
    row, position = log.row.reshape(-1), log.position.reshape(-1)

    def put(rows: Array, logged: Array) -> Array:
        return rows.at[row, position].set(logged.reshape(-1), mode="drop")

    return Output(
        token=put(output.token, log.token),
        logprob=put(output.logprob, log.logprob),
        entropy=put(output.entropy, log.entropy),
        length=output.length.at[row].max(position + 1, mode="drop"),
        stopped=output.stopped.at[row].max(log.stopped.reshape(-1), mode="drop"),
    )
