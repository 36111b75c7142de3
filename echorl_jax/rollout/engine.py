"""Samples completions. The decode loop runs on the device; the host only polls it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.choices import KVDtype
from echorl_jax.models import Decoder, ModelError
from echorl_jax.parallel import constrain, place_whole, platform_of, smallest
from echorl_jax.rollout.decode import DecodeSpec, Output
from echorl_jax.rollout.host import (
    Finished,
    FinishedRows,
    Progress,
    Worker,
    choose_cpu_workers,
    decode_call,
    run_workers,
    worker_slots,
)
from echorl_jax.rollout.memory import cache_dtype, choose_slots
from echorl_jax.rollout.prefill import PrefillSpec, begin_call, block_sizes
from echorl_jax.rollout.request import (
    PROMPT_MULTIPLE,
    Request,
    Resources,
    Sampling,
    bucket,
    make_request,
    sorted_ids,
)
from echorl_jax.rollout.sampling import sampling_key
from echorl_jax.rollout.slots import Queue, Slots
from echorl_jax.rollout.weights import abstract_rollout_params, rollout_params
from echorl_jax.types import Array, PyTree, Rollouts


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
    cpu_workers: int = 0,
    kv_dtype: KVDtype | None = None,
    pad_id: int = 0,
    prompt_tokens: int = 0,
    mesh: Mesh | None = None,
    steps_per_poll: int = 128,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Rollouts:
    """Samples ``group_size`` completions for each prompt.

    Token t of row i depends only on its logits and on the key ``fold_in(fold_in(key, i), t)``: not
    on slots, order or mesh. ``row_ids`` give other numbers for i. Log-probabilities and entropies
    are those of the whole distribution at ``temperature`` (at 1 when greedy), from the same logits
    as the draw.

    Args:
      model: the decoder.
      params: the trainer's weights; one compiled program casts them and lays them out for sampling.
      prompts: P lists of token ids, any lengths. Row i answers prompt ``i // group_size``.
      key: PRNG key, of any generator; rows draw by Threefry.
      group_size: G.
      max_new_tokens: T; rows that reach it without EOS are flagged as truncated.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: draw from the k most probable tokens; 0 from all.
      top_p: draw from the most probable tokens that hold this much probability.
      min_p: draw from tokens at least this many times as probable as the most probable one.
      eos_ids: tokens that end a completion and belong to it; may be none.
      stop_sequences: token sequences that end a completion and belong to it.
      banned_ids: tokens that are never drawn.
      row_limits: N limits up to T, one for each row.
      row_ids: N numbers that replace i in the keys, so that rows may be split into any calls.
      prefixes: N token lists that the completions begin with. They count as completion, with
        log-probabilities and entropies; a completion ends at an EOS or stop sequence in its prefix.
      slots: rows decoded at once; 0 takes all rows, or as many as memory allows.
      cpu_workers: decode loops that run side by side on CPU, each with its share of rows and slots;
        0 takes one for each core if the model is small or T large, otherwise one. A mesh of several
        devices has one. Several are started from threads, where JAX's context managers other than
        the mesh do not apply.
      kv_dtype: type of the cache; the model's unless given. "int8" has a scale for each head.
      pad_id: fills ``completion_ids`` past the end.
      prompt_tokens: pads prompts to at least this, so that calls whose longest prompts differ share
        one compiled program. It costs memory, not computation.
      mesh: rows are split over ``data`` and ``fsdp``, heads and vocabulary over ``tensor``. All
        processes of the mesh make the same call.
      steps_per_poll: decode steps between two polls of the host.
      progress: called at each poll.
      finished: called with rows and their tokens (EOS included), once for each row, at the poll
        after its end; the device continues meanwhile. With several processes, all of them pass one,
        and each is called with every row.

    Returns:
      The rollouts, replicated on the mesh; rows in groups.

    Raises:
      ValueError: a setting, a length or a token that is out of range, in one line.
    """
    sampling = Sampling(
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_ids=sorted_ids([eos_ids] if isinstance(eos_ids, int | np.integer) else eos_ids),
        stop_sequences=tuple(tuple(map(int, sequence)) for sequence in stop_sequences),
        banned_ids=sorted_ids(banned_ids),
    ).checked(model.config.vocab_size)
    request = make_request(
        prompts,
        sampling,
        vocab_size=model.config.vocab_size,
        row_limits=row_limits,
        row_ids=row_ids,
        prefixes=prefixes,
        prompt_tokens=prompt_tokens,
    )
    resources = Resources(slots, cpu_workers, kv_dtype, mesh, steps_per_poll, pad_id)
    return sample_request(
        model,
        params,
        request,
        key,
        sampling=sampling,
        resources=resources,
        progress=progress,
        finished=finished,
    )


def generate_with_progress(*args: Any, **settings: Any) -> tuple[Rollouts, Progress]:
    """:func:`generate`, and the progress at its end: tokens, seconds, slot occupancy."""
    last: list[Progress] = []
    watch = settings.pop("progress", None)

    def note(now: Progress) -> None:
        last[:] = [now]
        if watch is not None:
            watch(now)

    rollouts = generate(*args, **settings, progress=note)
    return rollouts, last[0]


def sample_request(
    model: Decoder,
    params: PyTree,
    request: Request,
    key: Array,
    *,
    sampling: Sampling,
    resources: Resources,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Rollouts:
    """:func:`generate` for settings and rows that were checked before.

    Args:
      model: the decoder.
      params: the trainer's weights.
      request: from :func:`make_request`, with the same ``sampling``.
      key: PRNG key.
      sampling: from :meth:`Sampling.checked`.
      resources: how the call runs.
      progress, finished: see :func:`generate`.
    """
    resources.check()
    _check_context(model, request, sampling)
    mesh, prompts = resources.mesh, request.prompts
    resources = _with_workers(model, request, sampling, resources)
    workers = resources.cpu_workers
    request = request.padded(bucket(prompts, multiple=resources.shards * workers))
    resources = _with_slots(model, request, sampling, resources)
    prefill_spec, decode_spec = _specs(
        model,
        sampling,
        resources,
        rows=request.rows // workers,
        prompt_tokens=request.tokens.shape[1],
    )

    def make_worker(index: int, weights: PyTree) -> Worker:
        part = request.part(workers, index)
        rows = int(part.count)

        def begin() -> tuple[Queue, Slots, Output]:
            placed, placed_key = _on_device(part, mesh), _key_on_device(key, mesh)
            return begin_call(model, weights, placed, placed_key, spec=prefill_spec)

        return Worker(
            begin,
            rows=rows,
            slots=resources.slots,
            spec=decode_spec,
            finished=FinishedRows(finished, request.part_rows(workers, index)[:rows]),
            alone=workers == 1,
        )

    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        weights = rollout_params(model, params, mesh, kv_dtype=resources.kv_dtype)
        running = [make_worker(index, weights) for index in range(workers)]
        run_workers(model, weights, running, mesh=mesh, progress=progress)
        return _rollouts(
            _on_device(request, mesh),
            [worker.output for worker in running],
            prompts=prompts,
            group_size=sampling.group_size,
        )


def _check_context(model: Decoder, request: Request, sampling: Sampling) -> None:
    config = model.config
    longest = int(request.length.max()) + sampling.max_new_tokens
    if config.rope.kind == "dynamic" and longest > config.max_position_embeddings:
        # Keys change with the length of the row, so cached keys would differ from the trainer's.
        raise ModelError(
            f"prompt and completion may reach {longest} tokens, but with dynamic rope scaling "
            f"only {config.max_position_embeddings} can be sampled"
        )


def _with_workers(
    model: Decoder, request: Request, sampling: Sampling, resources: Resources
) -> Resources:
    """Fills in the number of CPU workers."""
    workers = min(resources.cpu_workers, request.prompts) or choose_cpu_workers(
        model,
        prompts=request.prompts,
        slots=resources.slots or request.rows,
        max_new_tokens=sampling.max_new_tokens,
        kv_dtype=resources.kv_dtype,
        mesh=resources.mesh,
    )
    return dataclasses.replace(resources, cpu_workers=workers)


def _with_slots(
    model: Decoder, request: Request, sampling: Sampling, resources: Resources
) -> Resources:
    """Fills in the slots of each worker and the type of the cache."""
    mesh, kv_dtype = resources.mesh, cache_dtype(model, resources.kv_dtype)
    slots = resources.slots
    if not slots:
        slots = choose_slots(
            model,
            rows=request.rows,
            prompt_tokens=request.tokens.shape[1],
            max_new_tokens=sampling.max_new_tokens,
            kv_dtype=kv_dtype,
            mesh=mesh,
        )
        if mesh is not None and mesh.is_multi_process:
            slots = smallest(slots)  # hosts may differ in memory, but run one program
    workers, shards = resources.cpu_workers, resources.shards
    slots = worker_slots(request.rows, slots, workers=workers, shards=shards)
    return dataclasses.replace(resources, slots=slots, kv_dtype=kv_dtype)


def _specs(
    model: Decoder, sampling: Sampling, resources: Resources, *, rows: int, prompt_tokens: int
) -> tuple[PrefillSpec, DecodeSpec]:
    """The static parts of the two programs of a worker.

    Args:
      resources: with the slots and the number of workers filled in.
      rows: of one worker, padding included.
      prompt_tokens: S, padded.
    """
    platform = platform_of(resources.mesh)
    block, ring_block = block_sizes(
        prompt_tokens,
        sampling.max_new_tokens,
        platform=platform,
        cpu_workers=resources.cpu_workers,
    )
    prefill_spec = PrefillSpec(
        slots=resources.slots,
        length=sampling.max_new_tokens,
        stop_window=sampling.stop_window,
        block=block,
        ring_block=ring_block,
        pad_id=resources.pad_id,
        kv_dtype=cache_dtype(model, resources.kv_dtype),
        shards=resources.shards,
    )
    decode_spec = DecodeSpec(
        sampling=sampling,
        steps=resources.steps_per_poll,
        refill=rows > resources.slots,
        platform=platform,
        shards=resources.shards,
    )
    return prefill_spec, decode_spec


def _on_device(request: Request, mesh: Mesh | None) -> Request:
    """The request, replicated, so that all devices take the same decisions."""
    return jax.tree.map(jnp.asarray, request) if mesh is None else place_whole(request, mesh)


def _key_on_device(key: Array, mesh: Mesh | None) -> Array:
    key = sampling_key(key)
    if mesh is None:
        return key
    data = place_whole(np.asarray(jax.random.key_data(key)), mesh)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


@functools.partial(jax.jit, static_argnames=("prompts", "group_size"))
def _rollouts(
    request: Request, outputs: Sequence[Output], *, prompts: int, group_size: int
) -> Rollouts:
    """The rows of all workers in the caller's order, without padding, replicated."""
    rows = prompts * group_size

    def interleave(*parts: Array) -> Array:
        groups = [part.reshape(-1, group_size, *part.shape[1:]) for part in parts]
        return jnp.stack(groups, axis=1).reshape(-1, *parts[0].shape[1:])[:rows]

    output = jax.tree.map(interleave, *outputs)
    rollouts = Rollouts(
        prompt_ids=request.tokens[:prompts],
        prompt_length=request.length[:prompts],
        group=request.group[:rows],
        completion_ids=output.token,
        completion_length=output.length,
        rollout_logprobs=output.logprob,
        token_entropy=output.entropy,
        truncated=~output.stopped,
    )
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), rollouts)


def lower_prefill(
    model: Decoder, sampling: Sampling, resources: Resources, *, prompts: int, prompt_tokens: int
) -> jax.stages.Lowered:
    """The prefill program, lowered from shapes alone.

    Args:
      model: the decoder.
      sampling: static settings.
      resources: with a mesh of real devices or of those of a topology, and slots that are a
        multiple of the devices that rows are split over.
      prompts: P, padded to an allowed shape as :func:`generate` does.
      prompt_tokens: S, padded likewise.
    """
    mesh = resources.mesh
    assert mesh is not None
    prompts = bucket(prompts, multiple=resources.shards)
    rows, width = prompts * sampling.group_size, bucket(prompt_tokens, multiple=PROMPT_MULTIPLE)
    resources = dataclasses.replace(resources, cpu_workers=1, slots=min(resources.slots, rows))
    spec, _ = _specs(model, sampling, resources, rows=rows, prompt_tokens=width)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*size: int, dtype: object = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=whole)

    per_row = array(rows)
    request = Request(
        tokens=array(prompts, width),
        length=array(prompts),
        group=per_row,
        row_id=per_row,
        limit=per_row,
        prefix=array(rows, 0),
        prefix_length=per_row,
        count=array(),
    )
    key = array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    weights = abstract_rollout_params(model, mesh)
    with jax.set_mesh(mesh):
        return begin_call.lower(model, weights, request, key, spec=spec)


def lower_decode(
    model: Decoder,
    sampling: Sampling,
    resources: Resources,
    prefill: jax.stages.Lowered,
    prefilled: jax.stages.Compiled,
) -> jax.stages.Lowered:
    """The decode program, lowered for what :func:`lower_prefill`'s program returns.

    Args:
      model, sampling, resources: those of the prefill program.
      prefill: that program, lowered.
      prefilled: that program, compiled.
    """
    mesh = resources.mesh
    assert mesh is not None
    queue, slots, output = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        prefill.out_info,
        prefilled.output_shardings,
    )
    prompt_tokens = queue.request.tokens.shape[1]
    resources = dataclasses.replace(resources, cpu_workers=1, slots=slots.row.shape[0])
    _, spec = _specs(model, sampling, resources, rows=queue.rows, prompt_tokens=prompt_tokens)
    whole = NamedSharding(mesh, PartitionSpec())
    shrink_at = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    weights = abstract_rollout_params(model, mesh)
    with jax.set_mesh(mesh):
        return decode_call.lower(model, weights, queue, slots, output, shrink_at, spec=spec)
