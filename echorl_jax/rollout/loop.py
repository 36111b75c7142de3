"""The device-side loop: at every turn each slot writes one token.

Nothing here waits for the host. A call runs for a number of turns, or until all rows are done, or
until so few slots are busy that a program with fewer slots does the same work faster.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, constrain
from echorl_jax.rollout.cache import write_column
from echorl_jax.rollout.sampling import sample, token_uniforms
from echorl_jax.rollout.settings import Sampling
from echorl_jax.rollout.slots import (
    Queue,
    Slots,
    append,
    forced_tokens,
    needed,
    refill,
    retire,
)
from echorl_jax.rollout.step import forward
from echorl_jax.types import Array, PyTree, pytree


@dataclasses.dataclass(frozen=True)
class Program:
    """What is fixed when the loop is compiled."""

    sampling: Sampling
    turns: int  # most turns in one call
    refill: bool  # rows may wait for slots that become free
    platform: Platform  # see step.forward
    shards: int  # parts that the slots are split into on a mesh


@pytree
class Output:
    """What has been written."""

    token: Array  # i32 [N, T]
    logprob: Array  # f32 [N, T]
    entropy: Array  # f32 [N, T]
    length: Array  # i32 [N]
    stopped: Array  # bool [N], ended by EOS or a stop sequence


@pytree
class Status:
    """All that the host reads, once per call."""

    active: Array  # i32 [], busy slots
    needed: Array  # i32 [], fewest slots to go on with
    next_row: Array  # i32 [], first row that no slot has taken
    turns: Array  # i32 [], in this call
    tokens: Array  # i32 [], in this call: busy slots summed over turns


@pytree
class _Turn:
    """What one turn wrote; with a leading axis of turns, the log of a call."""

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
    program: Program,
) -> tuple[Slots, Output, Status]:
    """Writes tokens until one of the reasons to stop holds.

    Args:
      model: the decoder.
      params: its weights, in the rollout layout.
      queue: the work.
      slots: who is being written.
      output: what has been written.
      shrink_at: i32 scalar; stop when the queue is empty and this many slots would do.
      program: what is fixed.
    """

    def go_on(carry: tuple[Slots, _Turn, Array, Array]) -> Array:
        slots, _, turns, _ = carry
        size = needed(slots.row < queue.rows, shards=program.shards)
        wanted = (slots.next_row < queue.count) | (size > shrink_at)
        return (turns < program.turns) & wanted

    ahead = None if program.refill else _uniforms_ahead(queue, slots, program.turns)

    def body(carry: tuple[Slots, _Turn, Array, Array]) -> tuple[Slots, _Turn, Array, Array]:
        slots, log, turns, tokens = carry
        if program.refill:
            # Before the prompts are read, or a call without EOS copies all of them at every turn:
            # nothing there tells the compiler that reading comes first.
            slots = refill(queue, slots)
        busy = (slots.row < queue.rows).sum(dtype=jnp.int32)
        if ahead is None:
            uniforms = _uniforms(queue, slots.row, slots.position)
        else:
            uniforms = lax.dynamic_index_in_dim(ahead, turns, keepdims=False)
        slots, entry = _turn(model, params, queue, slots, uniforms, program)
        log = jax.tree.map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, turns, 0), log, entry
        )
        return slots, log, turns + 1, tokens + busy

    zero = jnp.zeros((), jnp.int32)
    log = _empty_log(program.turns, slots.row.shape[0], queue.rows)
    slots, log, turns, tokens = lax.while_loop(go_on, body, (slots, log, zero, zero))
    busy = slots.row < queue.rows
    status = Status(
        active=busy.sum(dtype=jnp.int32),
        needed=needed(busy, shards=program.shards),
        next_row=slots.next_row,
        turns=turns,
        tokens=tokens,
    )
    return slots, _collect(output, log), status


def _uniforms(queue: Queue, row: Array, position: Array) -> Array:
    """f32 ``[M, 2]``, for tokens of the rows; idle slots get numbers that nobody uses."""
    return token_uniforms(queue.key[jnp.minimum(row, queue.rows - 1)], position)


def _uniforms_ahead(queue: Queue, slots: Slots, turns: int) -> Array:
    """The uniforms of all turns, f32 ``[turns, M, 2]``, if every slot keeps its row until the end.
    A row fits the ring, so there are no more turns than that.
    """
    turn = jnp.arange(min(turns, slots.ring.length), dtype=jnp.int32)
    return jax.vmap(lambda later: _uniforms(queue, slots.row, slots.position + later))(turn)


def _turn(
    model: Decoder,
    params: PyTree,
    queue: Queue,
    slots: Slots,
    uniforms: Array,
    program: Program,
) -> tuple[Slots, _Turn]:
    """One token for every slot; those whose rows are over become idle."""
    logits, new = forward(model, params, queue, slots, platform=program.platform)
    drawn = sample(logits, uniforms, program.sampling, forced=forced_tokens(queue, slots))
    drawn = jax.tree.map(lambda x: constrain(x, None), drawn)  # whole on every device from here on
    ring = write_column(slots.ring, new, slots.turn % slots.ring.length)
    row, position = slots.row, slots.position
    slots = dataclasses.replace(slots, ring=ring)
    slots, over, stopped = append(queue, slots, drawn.token, program.sampling)
    return retire(queue, slots, over), _Turn(
        drawn.token, drawn.logprob, drawn.entropy, row, position, stopped
    )


def _empty_log(turns: int, slots: int, idle: int) -> _Turn:
    integers = jnp.zeros((turns, slots), jnp.int32)
    numbers = jnp.zeros((turns, slots), jnp.float32)
    return _Turn(
        token=integers,
        logprob=numbers,
        entropy=numbers,
        row=jnp.full((turns, slots), idle, jnp.int32),
        position=integers,
        stopped=jnp.zeros((turns, slots), bool),
    )


def _collect(output: Output, log: _Turn) -> Output:
    """Moves a call's tokens to their rows, all at once; what idle slots wrote is out of bounds."""
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
