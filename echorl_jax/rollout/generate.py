"""The public entry: host prompts in, rollouts out, and a host that only watches."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.models import Decoder, ModelError, param_shardings
from echorl_jax.parallel import Platform, constrain, place_whole, platform_of, smallest
from echorl_jax.rollout.buckets import greatest_divisor
from echorl_jax.rollout.cache import KVDtype, empty_cache, place
from echorl_jax.rollout.lanes import Lane, Progress, choose_lanes, lane_slots, run
from echorl_jax.rollout.layers import split_layers, split_shardings
from echorl_jax.rollout.loop import Output, Program, empty_output
from echorl_jax.rollout.memory import cache_dtype, choose_slots, shares_weights
from echorl_jax.rollout.prefill import prefill
from echorl_jax.rollout.request import Request, make_request
from echorl_jax.rollout.sampling import row_keys, sampling_key
from echorl_jax.rollout.settings import make_sampling
from echorl_jax.rollout.slots import Queue, Slots, first_slots
from echorl_jax.rollout.watch import Finished, Watch
from echorl_jax.types import Array, PyTree, Rollouts

# Positions in a block of the cache. A TPU computes with 128 lanes, filled or not, and a block has a
# price of its own there; on CPU it has to stay in the caches (docs/performance.md), on GPU three of
# them in a multiprocessor's fast memory.
BLOCK = {"cpu": 64, "gpu": 64, "tpu": 128}
# Of completions in lanes: where no thread has to be woken for each block, short ones waste less.
LANE_BLOCK = 32
# Most positions, and most prompts times positions, of one prefill piece.
PREFILL_CHUNK = 512
PREFILL_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class CallShape:
    """What of a call is fixed when its first program is compiled."""

    slots: int
    length: int  # T
    memory: int  # W
    block: int  # positions in a block of the prompts' cache
    ring_block: int  # positions in a block of the completions' cache
    pad_id: int
    kv_dtype: KVDtype
    shards: int


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_ids: int | Iterable[int],
    stop_sequences: Iterable[Sequence[int]] = (),
    banned_ids: Iterable[int] = (),
    row_limits: Sequence[int] | None = None,
    row_ids: Sequence[int] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    slots: int = 0,
    lanes: int = 0,
    kv_dtype: KVDtype | None = None,
    pad_id: int = 0,
    prompt_tokens: int = 0,
    mesh: Mesh | None = None,
    turns_per_visit: int = 128,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Rollouts:
    """Samples ``group_size`` completions for each prompt.

    Token t of row i depends on its logits and on the key ``fold_in(fold_in(key, i), t)`` alone: not
    on slots, order or mesh; ``row_ids`` give other numbers for i. Log-probabilities and entropies
    are those of the whole distribution at ``temperature`` (of temperature 1 when greedy), from the
    logits that the token was drawn from.

    Args:
      model: the decoder.
      params: its weights as the trainer holds them; they are cast and laid out for sampling by one
        compiled program.
      prompts: P lists of token ids, any lengths. Row i answers prompt ``i // group_size``.
      key: PRNG key, of any generator; rows draw by Threefry.
      group_size: G.
      max_new_tokens: T; rows that reach it without EOS are flagged as truncated.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from the k likeliest tokens; 0 from all.
      top_p: draw from the likeliest tokens that hold this much probability.
      min_p: draw from tokens at least this many times as likely as the likeliest.
      eos_ids: tokens that end a completion and belong to it; may be none.
      stop_sequences: token sequences that end a completion and belong to it.
      banned_ids: tokens that are never drawn.
      row_limits: N limits up to T, one for each row.
      row_ids: N numbers that stand for i in the keys, so that work may be cut into any calls.
      prefixes: N token lists that the completions have to begin with. They count as completion,
        with log-probabilities and entropies; one that holds an EOS or a stop sequence ends there.
      slots: rows decoded at once; 0 takes all rows, or as many as memory allows.
      lanes: parts of the rows that are decoded side by side, each by a loop with its share of the
        slots; 0 takes one for each core on CPU if the model is small or T large, else one. On a
        mesh of several devices there is one. Several are started from threads, where JAX's context
        managers do not hold, but for the mesh.
      kv_dtype: type of the cache; the model's unless given. "int8" has a scale for each head.
      pad_id: fills ``completion_ids`` past the end.
      prompt_tokens: pads prompts to at least this, so that calls whose longest prompts differ share
        one compiled program. It costs memory, not computation.
      mesh: rows are split over ``data`` and ``fsdp``, heads and vocabulary over ``tensor``. All
        processes of the mesh make the same call.
      turns_per_visit: tokens per slot between two looks of the host.
      progress: called at each look.
      finished: called with rows and their tokens (EOS included), each row once, at the look after
        it has ended; the device goes on meanwhile. On several processes all of them pass one, and
        all are told every row.

    Returns:
      The rollouts, whole on every device of the mesh; rows in groups.

    Raises:
      ValueError: a setting, a length or a token that is out of range, in one line.
    """
    vocab_size = model.config.vocab_size
    sampling = make_sampling(
        vocab_size=vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_ids=eos_ids,
        stop_sequences=stop_sequences,
        banned_ids=banned_ids,
    )
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    _check(slots=slots, lanes=lanes, turns_per_visit=turns_per_visit, mesh=mesh)
    lanes = min(lanes, len(prompts)) or choose_lanes(
        model,
        prompts=len(prompts),
        slots=slots or len(prompts) * group_size,
        max_new_tokens=max_new_tokens,
        kv_dtype=kv_dtype,
        mesh=mesh,
    )
    request = make_request(
        prompts,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        row_limits=row_limits,
        row_ids=row_ids,
        prefixes=prefixes,
        prompt_tokens=prompt_tokens,
        vocab_size=vocab_size,
        multiple=shards * lanes,
    )
    _check_context(model, request, length=max_new_tokens)
    rows, kv_dtype = len(request.group), cache_dtype(model, kv_dtype)
    if not slots:
        slots = choose_slots(
            model,
            rows=rows,
            prompt_tokens=request.tokens.shape[1],
            max_new_tokens=max_new_tokens,
            kv_dtype=kv_dtype,
            mesh=mesh,
        )
        if mesh is not None and mesh.is_multi_process:
            slots = smallest(slots)  # hosts may have different memory, but run one program
    slots = lane_slots(rows, slots, lanes=lanes, shards=shards)
    platform = platform_of(mesh)
    block, ring_block = block_sizes(
        request.tokens.shape[1], max_new_tokens, platform=platform, lanes=lanes
    )
    shape = CallShape(
        slots=slots,
        length=max_new_tokens,
        memory=sampling.memory,
        block=block,
        ring_block=ring_block,
        pad_id=pad_id,
        kv_dtype=kv_dtype,
        shards=shards,
    )
    program = Program(
        sampling=sampling,
        turns=turns_per_visit,
        refill=rows > slots * lanes,
        platform=platform,
        shards=shards,
    )

    def lane(number: int, weights: PyTree) -> Lane:
        own = request.deal(lanes, number)
        watch = Watch(finished, names=request.places(lanes, number)[: own.count])
        return Lane(
            lambda: begin_call(model, weights, *_on_device(own, key, mesh), shape=shape),
            rows=own.count,
            slots=slots,
            program=program,
            watch=watch,
            alone=lanes == 1,
        )

    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        weights = rollout_params(model, params, mesh)
        work = [lane(number, weights) for number in range(lanes)]
        run(model, weights, work, mesh=mesh, progress=progress)
        return _finish(
            *_placed((request.tokens, request.length, request.group), mesh),
            [lane.output for lane in work],
            prompts=len(prompts),
            group_size=group_size,
        )


def generate_with_progress(*args: Any, **settings: Any) -> tuple[Rollouts, Progress]:
    """:func:`generate`, and where it stood at the end: tokens, seconds, slot occupancy."""
    last: list[Progress] = []
    watch = settings.pop("progress", None)

    def note(now: Progress) -> None:
        last[:] = [now]
        if watch is not None:
            watch(now)

    rollouts = generate(*args, **settings, progress=note)
    return rollouts, last[0]


def block_sizes(
    prompt_tokens: int, length: int, *, platform: Platform, lanes: int = 1
) -> tuple[int, int]:
    """Positions in a block of the prompts' cache and of the completions'.

    >>> block_sizes(192, 96, platform="tpu"), block_sizes(192, 96, platform="gpu")
    ((96, 96), (64, 64))
    """
    most = BLOCK[platform]
    if platform == "gpu":  # powers of two, as its kernel wants them
        no_shorter = 1 << (length - 1).bit_length()
        return min(most, prompt_tokens & -prompt_tokens), min(most, max(16, no_shorter))
    most_of_ring = most if lanes == 1 else LANE_BLOCK
    return greatest_divisor(prompt_tokens, most=most), min(length, most_of_ring)


def _check(*, slots: int, lanes: int, turns_per_visit: int, mesh: Mesh | None) -> None:
    if jax.config.values["jax_enable_x64"]:
        raise ValueError("jax_enable_x64 is on: the sampler counts and computes in 32 bits")
    if slots < 0:
        raise ValueError(f"slots={slots}: must be 0 (chosen) or positive")
    if lanes < 0:
        raise ValueError(f"lanes={lanes}: must be 0 (chosen) or positive")
    if lanes > 1 and mesh is not None and mesh.size > 1:
        raise ValueError(f"lanes={lanes}: a mesh of {mesh.size} devices has one")
    if turns_per_visit < 1:
        raise ValueError(f"turns_per_visit={turns_per_visit}: must be at least 1")


def _check_context(model: Decoder, request: Request, *, length: int) -> None:
    config = model.config
    longest = int(request.length.max()) + length
    if config.rope.kind == "dynamic" and longest > config.max_position_embeddings:
        # Its keys change with the row's length, so cached ones would not be the trainer's.
        raise ModelError(
            f"prompt and completion may reach {longest} tokens, but with dynamic rope scaling "
            f"only {config.max_position_embeddings} can be sampled"
        )


def rollout_params(model: Decoder, params: PyTree, mesh: Mesh | None) -> PyTree:
    """The weights as sampling wants them: in the compute dtype, and on a mesh in its layout; on GPU
    layer by layer.
    """
    devices = 1 if mesh is None else mesh.size
    if shares_weights(model, devices=devices, platform=platform_of(mesh)):
        return params
    return _placer(model, mesh)(params)


def rollout_layout(model: Decoder, mesh: Mesh | None) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """The function, not jitted, that prepares weights for sampling, and its output shardings."""
    shardings = None if mesh is None else param_shardings(model, mesh, layout="rollout")
    if platform_of(mesh) != "gpu":
        return model.cast, shardings
    alone = mesh is None or mesh.size == 1

    def make(params: PyTree) -> PyTree:
        return split_layers(model.cast(params), join=alone)

    if mesh is None:
        return make, None
    if alone:
        whole = NamedSharding(mesh, PartitionSpec())
        shapes = jax.eval_shape(make, model.param_shapes())
        return make, jax.tree.map(lambda _: whole, shapes)
    return make, split_shardings(shardings, model.config.num_layers)


@functools.cache
def _placer(model: Decoder, mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    make, shardings = rollout_layout(model, mesh)
    return jax.jit(make, out_shardings=shardings)


def _on_device(request: Request, key: Array, mesh: Mesh | None) -> tuple[Array, ...]:
    """The request as arrays, whole on every device, so that all take the same decisions."""
    key = sampling_key(key)
    host = (
        request.tokens,
        request.length,
        request.group,
        request.number,
        request.limit,
        request.forced,
        request.forced_length,
        np.int32(request.count),
    )
    if mesh is None:
        return (*_placed(host, mesh), key)
    (data,) = _placed((np.asarray(jax.random.key_data(key)),), mesh)
    return (*_placed(host, mesh), jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)))


def _placed(host: tuple[Any, ...], mesh: Mesh | None) -> tuple[Array, ...]:
    return tuple(map(jnp.asarray, host)) if mesh is None else place_whole(host, mesh)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def begin_call(
    model: Decoder,
    params: PyTree,
    tokens: Array,
    length: Array,
    group: Array,
    number: Array,
    limit: Array,
    forced: Array,
    forced_length: Array,
    count: Array,
    key: Array,
    *,
    shape: CallShape,
) -> tuple[Queue, Slots, Output]:
    """The first program of a call: prefills every prompt once and fills the slots."""
    config = model.config
    cache = functools.partial(
        empty_cache,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=shape.kv_dtype,
    )
    prompts, width = tokens.shape
    block = shape.block
    chunk = block * greatest_divisor(width // block, most=PREFILL_CHUNK // block)
    most = max(1, PREFILL_TOKENS // (chunk * shape.shards))
    store = prefill(
        model,
        params,
        tokens,
        length - 1,
        cache(blocks=width // block, rows=prompts, block=block, whole=True),
        rows=shape.shards * greatest_divisor(prompts // shape.shards, most=most),
        chunk=chunk,
    )
    queue = Queue(
        key=row_keys(key, number),
        count=count,
        group=group,
        limit=limit,
        cached=length - 1,
        last_token=jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0],
        forced=forced,
        forced_length=forced_length,
        store=place(store, None),
    )
    ring_blocks = -(-shape.length // shape.ring_block)
    ring = cache(blocks=ring_blocks, rows=shape.slots, block=shape.ring_block)
    slots = first_slots(queue, slots=shape.slots, memory=shape.memory, ring=ring)
    return queue, slots, empty_output(group.shape[0], shape.length, shape.pad_id)


@functools.partial(jax.jit, static_argnames=("prompts", "group_size"))
def _finish(
    tokens: Array,
    length: Array,
    group: Array,
    outputs: Sequence[Output],
    *,
    prompts: int,
    group_size: int,
) -> Rollouts:
    """The rows as they came, without the padding of the shape bucket, whole on every device."""
    rows = prompts * group_size

    def undeal(*parts: Array) -> Array:
        groups = [part.reshape(-1, group_size, *part.shape[1:]) for part in parts]
        return jnp.stack(groups, axis=1).reshape(-1, *parts[0].shape[1:])[:rows]

    output = jax.tree.map(undeal, *outputs)
    rollouts = Rollouts(
        prompt_ids=tokens[:prompts],
        prompt_length=length[:prompts],
        group=group[:rows],
        completion_ids=output.token,
        completion_length=output.length,
        rollout_logprobs=output.logprob,
        token_entropy=output.entropy,
        truncated=~output.stopped,
    )
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), rollouts)
