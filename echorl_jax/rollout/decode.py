"""The device-side loop: every turn each slot writes one token, and a slot whose row ends takes the next row at once.

Nothing here waits for the host. A call decodes up to a number of turns, or until all rows are done, or until so few slots are busy
that a smaller program (:func:`compact`) does the same work faster.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.models import Decoder
from echorl_jax.parallel.layout import constrain
from echorl_jax.rollout import cache as kv
from echorl_jax.rollout.cache import Cache
from echorl_jax.rollout.prefill import windows
from echorl_jax.rollout.sampling import sample, token_uniforms
from echorl_jax.rollout.settings import Sampling
from echorl_jax.types import Array, PyTree, pytree


@pytree
class Queue:
    """The work: what every row starts from. Read only."""

    key: Array  # PRNG key of the call
    count: Array  # i32 [], rows to be written; rows from there on are padding
    group: Array  # i32 [N], prompt of the row
    limit: Array  # i32 [N], longest completion of the row
    cached: Array  # i32 [P], prompt positions in `store`: all but the last token
    last_token: Array  # i32 [P], last token of the prompt
    forced: Array  # i32 [N, F], tokens the completion has to begin with
    forced_length: Array  # i32 [N]
    store: Cache  # P rows


@pytree
class Slots:
    """The rows being written, M at a time, and the memory they attend to."""

    row: Array  # i32 [M], row of the queue; N where idle
    position: Array  # i32 [M], tokens the row has, so also its columns in `ring`
    token: Array  # i32 [M], latest token, the next input
    recent: Array  # i32 [M, R], tokens before that, for stop sequences; -1 where none
    cached: Array  # i32 [M], columns of `prompt` that are filled
    prompt: Cache  # M rows
    ring: Cache  # M rows
    turn: Array  # i32 [], turns so far; modulo the ring's length the column to be written
    next_row: Array  # i32 [], first row that no slot has taken


@pytree
class Output:
    """What has been written; row N collects what idle slots write."""

    token: Array  # i32 [N, T]
    logprob: Array  # f32 [N, T]
    entropy: Array  # f32 [N, T]
    length: Array  # i32 [N]
    stopped: Array  # bool [N], ended by EOS or a stop sequence


@pytree
class Status:
    """The only thing the host reads, once per call."""

    active: Array  # i32 [], busy slots
    next_row: Array  # i32 []
    turns: Array  # i32 [], in this call
    tokens: Array  # i32 [], in this call: busy slots summed over turns


@dataclasses.dataclass(frozen=True)
class Program:
    """What is fixed when the loop is compiled."""

    sampling: Sampling
    turns: int  # most turns in one call
    refill: bool  # rows may be left for slots that become free
    dynamic: bool  # read only filled blocks (False: all, for backends where such loops cost more than they save)


@pytree
class _Log:
    """One call's tokens, time first: they are moved to their rows at the end, all at once."""

    token: Array  # i32 [turns, M]
    logprob: Array  # f32 [turns, M]
    entropy: Array  # f32 [turns, M]
    row: Array  # i32 [turns, M]
    position: Array  # i32 [turns, M]
    stopped: Array  # bool [turns, M]


def first_slots(queue: Queue, *, slots: int, memory: int, ring: Cache) -> Slots:
    """Gives the first M rows to the slots."""
    row = jnp.arange(slots, dtype=jnp.int32)
    group = queue.group[jnp.minimum(row, queue.group.shape[0] - 1)]
    prompt = jax.tree.map(
        lambda x: constrain(
            x[:, :, group], "layers", None, "batch", "kv_heads", *(None,) * (x.ndim - 4)
        ),
        queue.store,
    )
    idle = queue.group.shape[0]
    return Slots(
        row=jnp.where(row < queue.count, row, idle),
        position=jnp.zeros(slots, jnp.int32),
        token=queue.last_token[group],
        recent=jnp.full((slots, memory), -1, jnp.int32),
        cached=queue.cached[group],
        prompt=prompt,
        ring=ring,
        turn=jnp.zeros((), jnp.int32),
        next_row=jnp.minimum(slots, queue.count).astype(jnp.int32),
    )


def first_output(rows: int, length: int, pad_id: int) -> Output:
    """Empty rows."""
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
    """Decodes until nothing is left, ``program.turns`` are over, or, with an empty queue, at most ``shrink_at`` slots are busy."""
    count = slots.row.shape[0]
    idle = queue.group.shape[0]
    zeros = functools.partial(jnp.zeros, (program.turns, count))
    log = _Log(
        token=zeros(jnp.int32),
        logprob=zeros(jnp.float32),
        entropy=zeros(jnp.float32),
        row=jnp.full((program.turns, count), idle, jnp.int32),
        position=zeros(jnp.int32),
        stopped=zeros(bool),
    )

    def go_on(carry: tuple[Slots, _Log, Array, Array]) -> Array:
        slots, _, turns, _ = carry
        active = (slots.row < idle).sum()
        wanted = (slots.next_row < queue.count) | (active > shrink_at)
        return (turns < program.turns) & (active > 0) & wanted

    def turn(carry: tuple[Slots, _Log, Array, Array]) -> tuple[Slots, _Log, Array, Array]:
        slots, log, turns, tokens = carry
        busy = slots.row < idle
        slots, entry = _turn(model, params, queue, slots, program)
        log = jax.tree.map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, turns, 0), log, entry
        )
        return slots, log, turns + 1, tokens + busy.sum(dtype=jnp.int32)

    zero = jnp.zeros((), jnp.int32)
    slots, log, turns, tokens = lax.while_loop(go_on, turn, (slots, log, zero, zero))
    status = Status(
        active=(slots.row < idle).sum(dtype=jnp.int32),
        next_row=slots.next_row,
        turns=turns,
        tokens=tokens,
    )
    return slots, _collect(output, log), status


def _collect(output: Output, log: _Log) -> Output:
    """Moves a call's tokens to their rows. Idle slots logged row N, which is out of bounds and dropped."""
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


def _turn(
    model: Decoder, params: PyTree, queue: Queue, slots: Slots, program: Program
) -> tuple[Slots, _Log]:
    """One token for every slot, and new rows for the slots that are done."""
    logits, new = _forward(model, params, slots, program)
    column = slots.turn % (slots.ring.blocks * slots.ring.block)
    slots = dataclasses.replace(slots, ring=kv.write_column(slots.ring, new, column))
    uniforms = token_uniforms(queue.key, slots.row, slots.position)
    drawn = sample(logits, uniforms, program.sampling, forced=_forced(queue, slots))
    slots, ended, stopped = _advance(queue, slots, drawn.token, program.sampling)
    entry = _Log(
        token=drawn.token,
        logprob=drawn.logprob,
        entropy=drawn.entropy,
        row=slots.row,
        position=slots.position - 1,
        stopped=stopped,
    )
    return _refill(queue, slots, ended) if program.refill else _retire(queue, slots, ended), entry


def _forward(model: Decoder, params: PyTree, slots: Slots, program: Program) -> tuple[Array, Cache]:
    """Logits f32 ``[M, V]`` after each slot's latest token, and that token's keys and values ``[L, M, KV, K]``."""
    ring_blocks, prompt_blocks = _filled(slots, program)
    positions = (slots.cached + slots.position)[:, None]
    tables = model.rotary(positions)
    window = jnp.asarray(windows(model)) if any(model.config.windows) else None

    def layer(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, Cache]:
        weights, index = scanned
        q, k, v = model.qkv(weights, x, positions, tables)
        rows, _, heads, width = q.shape
        q = q.reshape(rows, k.shape[2], heads // k.shape[2], width)
        reach = None if window is None else window[index]
        partial = kv.start(q, k[:, 0], v[:, 0])
        partial = _attend_ring(partial, q, slots, index, reach, ring_blocks)
        partial = _attend_prompt(partial, q, slots, index, reach, prompt_blocks)
        attended = kv.finish(partial).reshape(rows, 1, heads, width).astype(x.dtype)
        return model.finish_layer(weights, x, attended), kv.encode(k[:, 0], v[:, 0], slots.ring)

    x = constrain(model.embed(params, slots.token[:, None]), "batch", "length", "feature")
    x, new = lax.scan(layer, x, (model.layers(params), jnp.arange(model.config.num_layers)), unroll=int(__import__("os").environ.get("UNR","1")))
    hidden = model.final_norm(params, x)[:, 0]
    head = model.head(params).astype(hidden.dtype)
    logits = jnp.einsum("md,dv->mv", hidden, head, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "vocab"), new


def _filled(slots: Slots, program: Program) -> tuple[Array | int, Array | int]:
    """How many blocks of the ring, counted back from the current one, and of the prompts hold anything."""
    ring, prompt = slots.ring, slots.prompt
    if not program.dynamic:
        return ring.blocks, prompt.blocks
    before = jnp.maximum(slots.position.max() - slots.turn % ring.block, 0)
    return jnp.minimum(1 - (-before // ring.block), ring.blocks), -(
        -slots.cached.max() // prompt.block
    )


def _attend_ring(
    partial: kv.Partial,
    q: Array,
    slots: Slots,
    layer: Array,
    window: Array | None,
    blocks: Array | int,
) -> kv.Partial:
    """Attention to the tokens of the completion. A column's age is the distance to the current position."""
    ring = slots.ring
    length = ring.blocks * ring.block
    turn = slots.turn % length
    seen = slots.position if window is None else jnp.minimum(slots.position, window - 1)

    def merge(back: Array, partial: kv.Partial) -> kv.Partial:
        index = (turn // ring.block - back) % ring.blocks
        age = (turn - index * ring.block - jnp.arange(ring.block)) % length
        valid = (age >= 1)[None, :] & (age[None, :] <= seen[:, None])
        return kv.attend_block(partial, q, kv.read_block(ring, layer, index), valid[:, None, None])

    return lax.fori_loop(0, blocks, merge, partial)


def _attend_prompt(
    partial: kv.Partial,
    q: Array,
    slots: Slots,
    layer: Array,
    window: Array | None,
    blocks: Array | int,
) -> kv.Partial:
    """Attention to the prompt."""
    prompt = slots.prompt
    at = slots.cached + slots.position

    def merge(index: Array, partial: kv.Partial) -> kv.Partial:
        column = (index * prompt.block + jnp.arange(prompt.block))[None, :]
        valid = column < slots.cached[:, None]
        if window is not None:
            valid &= at[:, None] - column < window
        return kv.attend_block(
            partial, q, kv.read_block(prompt, layer, index), valid[:, None, None]
        )

    return lax.fori_loop(0, blocks, merge, partial)


def _forced(queue: Queue, slots: Slots) -> Array | None:
    """The token each slot has to write, or -1; None if the call forces nothing."""
    width = queue.forced.shape[1]
    if width == 0:
        return None
    row = jnp.minimum(slots.row, queue.forced.shape[0] - 1)
    token = queue.forced[row, jnp.minimum(slots.position, width - 1)]
    return jnp.where(slots.position < queue.forced_length[row], token, -1)


def _advance(
    queue: Queue, slots: Slots, token: Array, sampling: Sampling
) -> tuple[Slots, Array, Array]:
    """Appends the tokens. -> (slots, rows that are over [M], rows that stopped by themselves [M])."""
    idle = queue.group.shape[0]
    recent = slots.recent
    if sampling.memory:
        recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
    stopped = jnp.zeros(token.shape, bool)
    for end in sampling.eos_ids:
        stopped |= token == end
    for sequence in sampling.stop_sequences:
        stopped |= (recent[:, -len(sequence) :] == jnp.array([sequence], jnp.int32)).all(-1)
    position = slots.position + 1
    full = position >= queue.limit[jnp.minimum(slots.row, idle - 1)]
    slots = dataclasses.replace(
        slots, token=token, position=position, recent=recent, turn=slots.turn + 1
    )
    return slots, (stopped | full) & (slots.row < idle), stopped


def _retire(queue: Queue, slots: Slots, ended: Array) -> Slots:
    """Makes the slots of finished rows idle; an idle slot attends to nothing."""
    ended |= slots.row >= queue.group.shape[0]
    return dataclasses.replace(
        slots,
        row=jnp.where(ended, queue.group.shape[0], slots.row),
        position=jnp.where(ended, 0, slots.position),
        cached=jnp.where(ended, 0, slots.cached),
    )


def _refill(queue: Queue, slots: Slots, ended: Array) -> Slots:
    """Gives the next rows of the queue to the slots whose rows are over, in order of slots."""
    old, slots = slots, _retire(queue, slots, ended)
    candidate = old.next_row + jnp.cumsum(ended) - 1
    takes = ended & (candidate < queue.count)
    group = queue.group[jnp.where(takes, candidate, 0)]
    takers = jnp.nonzero(takes, size=takes.shape[0], fill_value=0)[0]

    def copy_prompt(index: Array, prompt: Cache) -> Cache:
        slot = takers[index]

        def copy(whole: Array, store: Array) -> Array:
            part = lax.dynamic_slice_in_dim(store, group[slot], 1, axis=2)
            return lax.dynamic_update_slice_in_dim(whole, part, slot, axis=2)

        return jax.tree.map(copy, prompt, queue.store)

    taken = takes.sum(dtype=jnp.int32)
    return dataclasses.replace(
        slots,
        row=jnp.where(takes, candidate, slots.row),
        token=jnp.where(takes, queue.last_token[group], slots.token),
        recent=jnp.where(takes[:, None], -1, slots.recent),
        cached=jnp.where(takes, queue.cached[group], slots.cached),
        prompt=lax.fori_loop(0, taken, copy_prompt, slots.prompt),
        next_row=old.next_row + taken,
    )


def compact(slots: Slots, *, size: int, idle: int) -> Slots:
    """The same work in fewer slots: busy ones first, the rest left out. Needs at most ``size`` busy slots and an empty queue."""
    order = jnp.argsort(slots.row >= idle, stable=True)[:size]
    cache = functools.partial(jax.tree.map, lambda x: x[:, :, order])
    return dataclasses.replace(
        slots,
        row=slots.row[order],
        position=slots.position[order],
        token=slots.token[order],
        recent=slots.recent[order],
        cached=slots.cached[order],
        prompt=cache(slots.prompt),
        ring=cache(slots.ring),
    )
