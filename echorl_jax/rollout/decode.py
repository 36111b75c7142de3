"""The decode loop on the device: in every step each slot writes one token.

The loop never waits for the host. It ends after a number of steps, when all rows are done, or when
so few slots are busy that a program with fewer slots is faster.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from echorl_jax.core.entropy import without
from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, constrain
from echorl_jax.precision import wide_einsum
from echorl_jax.rollout import kernel
from echorl_jax.rollout.attention import attend, seen_by
from echorl_jax.rollout.cache import Cache, encode, write_column
from echorl_jax.rollout.request import Sampling
from echorl_jax.rollout.sampling import sample, token_uniforms
from echorl_jax.rollout.slots import (
    Queue,
    Slots,
    append,
    flush,
    needed,
    prefix_tokens,
    refill,
    retire,
)
from echorl_jax.rollout.weights import over_layers, windows
from echorl_jax.types import Array, PyTree, pytree


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Static settings of the decode program."""

    sampling: Sampling
    steps: int  # most decode steps in one call
    refill: bool  # whether rows may wait for a free slot
    platform: Platform  # see forward
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
    """The numbers that the host reads after a call."""

    active: Array  # i32 [], busy slots
    needed: Array  # i32 [], fewest slots that hold the busy ones
    waiting: Array  # i32 [], rows that need a slot
    steps: Array  # i32 [], in this call
    tokens: Array  # i32 [], in this call: busy slots summed over steps, less those of dropped rows
    restarted: Array  # i32 [], rows that have had to begin again


@pytree
class _Step:
    """The results of one decode step; with a leading axis of steps, the log of a call."""

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
      model, params: the decoder and its weights in the layout for sampling.
      queue: the rows to write.
      slots: the rows being written.
      output: the tokens written so far.
      shrink_at: i32 scalar; the call ends when the queue is empty and this many slots suffice.
      spec: static.
    """

    def go_on(carry: tuple[Slots, _Step, Array, Array]) -> Array:
        slots, _, steps, _ = carry
        size = needed(slots.row < queue.rows, shards=spec.shards)
        work_left = (slots.waiting(queue) > 0) | (size > shrink_at)
        return (steps < spec.steps) & work_left

    ahead = None if spec.refill else _uniforms_ahead(queue, slots, spec.steps)

    def body(carry: tuple[Slots, _Step, Array, Array]) -> tuple[Slots, _Step, Array, Array]:
        slots, log, steps, tokens = carry
        # Pages are written before they are read: with no EOS, nothing would tell XLA that a later
        # write comes after the reads, and it would copy the pool in every step.
        if slots.pool is not None:
            slots = flush(queue, slots)
        if spec.refill:
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

    zero, dropped = jnp.zeros((), jnp.int32), slots.dropped
    size = spec.steps, slots.row.shape[0]
    integers, numbers = jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32)
    idle, running = jnp.full(size, queue.rows, jnp.int32), jnp.zeros(size, bool)
    log = _Step(integers, numbers, numbers, row=idle, position=integers, stopped=running)
    slots, log, steps, tokens = lax.while_loop(go_on, body, (slots, log, zero, zero))
    busy = slots.row < queue.rows
    status = Status(
        active=busy.sum(dtype=jnp.int32),
        needed=needed(busy, shards=spec.shards),
        waiting=slots.waiting(queue),
        steps=steps,
        tokens=tokens - (slots.dropped - dropped),
        restarted=slots.restarted,
    )
    return slots, _collect(output, log), status


def _uniforms(queue: Queue, row: Array, position: Array) -> Array:
    """Uniform numbers for a token of each slot, f32 ``[M, 2]``; idle slots do not use theirs."""
    return token_uniforms(queue.key[jnp.minimum(row, queue.rows - 1)], position)


def _uniforms_ahead(queue: Queue, slots: Slots, steps: int) -> Array:
    """The uniform numbers of all steps, f32 ``[steps, M, 2]``, where no slot changes its row.

    A row fits into the ring, so there are at most as many steps as the ring has columns.
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
    """Writes one token in every slot; slots whose rows have ended become idle."""
    longest = spec.sampling.max_new_tokens
    logits, new = forward(model, params, queue, slots, platform=spec.platform, longest=longest)
    drawn = sample(logits, uniforms, spec.sampling, prefix=prefix_tokens(queue, slots))
    drawn = jax.tree.map(lambda x: constrain(x, None), drawn)  # replicated from here on
    row, position = slots.row, slots.position
    ring = write_column(slots.ring, new, slots.step % slots.ring.length)
    slots = dataclasses.replace(slots, ring=ring)
    slots, ended, stopped = append(queue, slots, drawn.token, spec.sampling)
    slots = retire(queue, slots, ended)
    return slots, _Step(drawn.token, drawn.logprob, drawn.entropy, row, position, stopped)


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


def forward(
    model: Decoder,
    params: PyTree,
    queue: Queue,
    slots: Slots,
    *,
    platform: Platform,
    longest: int = 0,
) -> tuple[Array, Cache]:
    """Logits after each slot's latest token, and the keys and values to add to the ring.

    It only reads the caches: a token attends to itself directly, and its keys and values are
    written afterwards, for all layers at once. Otherwise every layer would copy a cache.

    Args:
      model, params: the decoder and its weights.
      queue: the rows to write.
      slots: M.
      platform: the target of the compilation; on ``gpu`` a kernel reads the caches where it fits.
      longest: T, which only the kernel needs.

    Returns:
      Logits f32 ``[M, V]``; keys and values ``[L, M, KV, K]``.
    """
    by_kernel = platform == "gpu" and kernel.fits(model.config.head_dim)
    seen = seen_by(queue, slots, longest=longest if by_kernel else 0)
    position = seen.cached + seen.written
    if queue.request.images is not None:
        # After an image all three axes go on as one, from the larger of its sides.
        position += queue.request.images.delta[seen.group]
    tables = model.rotary(position[:, None])
    window = jnp.asarray(windows(model)) if any(model.config.windows) else None

    def layer(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, Cache]:
        weights, index = scanned
        q, k, v = model.qkv(weights, x, tables)
        rows, _, heads, width = q.shape
        q, k, v = q.reshape(rows, k.shape[2], -1, width), k[:, 0], v[:, 0]
        out = attend(
            *(q, k, v, queue, slots, seen),
            layer=index,
            window=None if window is None else window[index],
            by_kernel=by_kernel,
        )
        out = out.reshape(rows, 1, heads, width).astype(x.dtype)
        return model.finish_layer(weights, x, out), encode(k, v, like=slots.ring)

    x = constrain(model.embed(params, slots.token[:, None]), "batch", "length", "feature")
    x, new = over_layers(model, layer, x, params, np.arange(model.config.num_layers))
    hidden = model.final_norm(params, x)[:, 0]
    logits = wide_einsum("md,dv->mv", hidden, model.head(params))
    logits = without(logits, model.config.never)
    if platform == "cpu" and not model.config.tied_embeddings:
        # Sampling transposes the logits. XLA would fold that into the product, which then reads a
        # head [D, V] across its rows: 2 to 5 times slower, and not implemented for bf16 operands.
        logits = lax.optimization_barrier(logits)
    return constrain(logits, "batch", "vocab"), new
