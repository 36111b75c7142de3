"""The public entry: host prompts in, rollouts out, and a host that only watches."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.models import Decoder, param_shardings
from echorl_jax.rollout import buckets
from echorl_jax.rollout import decode as loop
from echorl_jax.rollout.cache import KVDtype, empty_cache
from echorl_jax.rollout.prefill import prefill
from echorl_jax.rollout.request import Request, make_request
from echorl_jax.rollout.settings import make_sampling
from echorl_jax.types import Array, PyTree, Rollouts

# Positions in a cache block; see docs/performance.md for how speed depends on it.
BLOCK = 64
# Positions, and prompts times positions, of one prefill piece.
PREFILL_CHUNK = 512
PREFILL_TOKENS = 8192
# Fewest slots that get a program of their own when a batch drains.
SMALLEST_LEVEL = 8


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a call is, after a visit of the host."""

    rows: int
    rows_done: int
    tokens: int
    seconds: float
    slots: int  # of the program that ran last
    occupancy: float  # tokens / (turns * slots) so far: the part of all computed tokens that somebody wanted

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What is fixed when the first program is compiled."""

    slots: int
    length: int
    memory: int
    pad_id: int
    kv_dtype: KVDtype


def generate(
    model: Decoder, params: PyTree, prompts: Sequence[Sequence[int]], key: Array, **settings
) -> Rollouts:
    """:func:`generate_with_progress` without the second result."""
    return generate_with_progress(model, params, prompts, key, **settings)[0]


def generate_with_progress(
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
    eos_ids: int | Iterable[int] = (),
    stop_sequences: Iterable[Sequence[int]] = (),
    banned_ids: Iterable[int] = (),
    row_limits: Sequence[int] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    slots: int = 0,
    kv_dtype: KVDtype | None = None,
    pad_id: int = 0,
    mesh: Mesh | None = None,
    turns_per_visit: int = 128,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Rollouts, Progress]:
    """Samples ``group_size`` completions for each prompt."""
    sampling = make_sampling(
        vocab_size=model.config.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_ids=eos_ids,
        stop_sequences=stop_sequences,
        banned_ids=banned_ids,
    )
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    request = make_request(
        prompts,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        row_limits=row_limits,
        prefixes=prefixes,
        vocab_size=model.config.vocab_size,
        multiple=shards,
    )
    if slots < 0:
        raise ValueError(f"slots={slots}: must be 0 (chosen) or positive")
    rows = len(request.group)
    slots = min(rows, -(-slots // shards) * shards) if slots else rows
    shape = _Shape(
        slots=slots,
        length=max_new_tokens,
        memory=sampling.memory,
        pad_id=pad_id,
        kv_dtype=kv_dtype or ("bfloat16" if model.dtype == "bfloat16" else "float32"),
    )
    program = loop.Program(
        sampling=sampling,
        turns=turns_per_visit,
        refill=rows > slots,
        dynamic=jax.default_backend() != "gpu",
    )
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        weights = rollout_params(model, params, mesh)
        arrays = _on_device(request, key, mesh)
        queue, state, output = _begin(model, weights, *arrays, shape=shape)
        levels = buckets.levels(slots, smallest=max(SMALLEST_LEVEL, shards))
        output, last = _run(
            model, weights, queue, state, output, program, levels, request, progress
        )
        rollouts = _finish(
            arrays[0], arrays[1], queue.group, output, request.prompts, request.count
        )
    return rollouts, last


def rollout_params(model: Decoder, params: PyTree, mesh: Mesh | None) -> PyTree:
    """The weights as the sampler wants them: in the compute dtype and, on a mesh, in the rollout layout, by one program."""
    if mesh is None and model.dtype == model.param_dtype:
        return params
    return _placer(model, mesh)(params)


@functools.cache
def _placer(model: Decoder, mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    shardings = None if mesh is None else param_shardings(model, mesh, layout="rollout")
    return jax.jit(model.cast, out_shardings=shardings)


def _on_device(request: Request, key: Array, mesh: Mesh | None) -> tuple[Array, ...]:
    """The request as arrays, whole on every device: every process takes the same decisions from them."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    host = (
        request.tokens,
        request.length,
        request.group,
        request.limit,
        request.forced,
        request.forced_length,
        np.int32(request.count),
    )
    if mesh is None:
        return (*map(jnp.asarray, host), key)
    whole = NamedSharding(mesh, PartitionSpec())
    data = jax.device_put(np.asarray(jax.random.key_data(key)), whole)
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return (*jax.device_put(host, (whole,) * len(host)), key)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def _begin(
    model: Decoder,
    params: PyTree,
    tokens: Array,
    length: Array,
    group: Array,
    limit: Array,
    forced: Array,
    forced_length: Array,
    count: Array,
    key: Array,
    *,
    shape: _Shape,
) -> tuple[loop.Queue, loop.Slots, loop.Output]:
    """Prefills every prompt once and fills the slots."""
    config = model.config
    prompts, width = tokens.shape
    cache = functools.partial(
        empty_cache,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=shape.kv_dtype,
    )
    block = buckets.greatest_divisor(width, most=BLOCK)
    chunk = block * buckets.greatest_divisor(width // block, most=PREFILL_CHUNK // block)
    store = prefill(
        model,
        params,
        tokens,
        length - 1,
        cache(blocks=width // block, rows=prompts, block=block),
        rows=buckets.piece_rows(prompts, chunk, tokens=PREFILL_TOKENS),
        chunk=chunk,
    )
    queue = loop.Queue(
        key=key,
        count=count,
        group=group,
        limit=limit,
        cached=length - 1,
        last_token=jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0],
        forced=forced,
        forced_length=forced_length,
        store=store,
    )
    block = min(BLOCK, shape.length)
    ring = cache(blocks=-(-shape.length // block), rows=shape.slots, block=block)
    state = loop.first_slots(queue, slots=shape.slots, memory=shape.memory, ring=ring)
    return queue, state, loop.first_output(group.shape[0], shape.length, shape.pad_id)


_decode = jax.jit(
    loop.decode, static_argnames=("model", "program"), donate_argnames=("slots", "output")
)
_compact = jax.jit(loop.compact, static_argnames=("size", "idle"), donate_argnames=("slots",))


def _run(
    model: Decoder,
    params: PyTree,
    queue: loop.Queue,
    slots: loop.Slots,
    output: loop.Output,
    program: loop.Program,
    levels: tuple[int, ...],
    request: Request,
    progress: Callable[[Progress], None] | None,
) -> tuple[loop.Output, Progress]:
    """Calls the decode loop until every row is done; between calls moves to a smaller program where that suffices."""
    begin = time.perf_counter()
    tokens, places, level = 0, 0, 0
    while True:
        shrink_at = levels[level + 1] if level + 1 < len(levels) else 0
        slots, output, status = _decode(
            model, params, queue, slots, output, np.int32(shrink_at), program=program
        )
        status = jax.device_get(status)
        tokens += int(status.tokens)
        places += int(status.turns) * levels[level]
        now = Progress(
            rows=request.count,
            rows_done=int(status.next_row) - int(status.active),
            tokens=tokens,
            seconds=time.perf_counter() - begin,
            slots=levels[level],
            occupancy=tokens / places,
        )
        if progress is not None:
            progress(now)
        if not status.active:
            return output, now
        if status.next_row >= request.count and status.active <= shrink_at:
            level = max(i for i, size in enumerate(levels) if size >= status.active)
            program = dataclasses.replace(program, refill=False)
            slots = _compact(slots, size=levels[level], idle=len(request.group))


@functools.partial(jax.jit, static_argnames=("prompts", "count"))
def _finish(
    tokens: Array, length: Array, group: Array, output: loop.Output, prompts: int, count: int
) -> Rollouts:
    """The written rows without padding."""
    return Rollouts(
        prompt_ids=tokens[:prompts],
        prompt_length=length[:prompts],
        group=group[:count],
        completion_ids=output.token[:count],
        completion_length=output.length[:count],
        rollout_logprobs=output.logprob[:count],
        token_entropy=output.entropy[:count],
        truncated=~output.stopped[:count],
    )
