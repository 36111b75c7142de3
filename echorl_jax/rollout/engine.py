"""Samples completions. The decode loop runs on the device; the host only polls it."""

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
from echorl_jax.rollout.cache import block_sizes
from echorl_jax.rollout.decode import DecodeSpec, Output
from echorl_jax.rollout.host import (
    Finished,
    FinishedRows,
    Progress,
    Worker,
    choose_cpu_workers,
    decode_call,
    mesh_context,
    run_workers,
    worker_slots,
)
from echorl_jax.rollout.memory import cache_dtype, choose_capacity
from echorl_jax.rollout.pages import whole_pages
from echorl_jax.rollout.prefill import PrefillSpec, begin_call
from echorl_jax.rollout.prompt_images import place_images, prompt_images
from echorl_jax.rollout.request import (
    PromptImages,
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
from echorl_jax.types import Array, Image, PyTree, Rollouts


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
    images: Sequence[Sequence[Image]] | None = None,
    slots: int = 0,
    page_tokens: int = 0,
    expected_tokens: int = 0,
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
      images: those of each prompt, for a model with a vision tower; None where no prompt has any.
        A prompt has one image token for each feature.
      slots: rows decoded at once; 0 takes all rows, or as many as memory allows.
      page_tokens: positions that long completions share on each device; 0 takes as many as rows of
        the expected length need or memory allows, and none where T positions for each slot fit
        (unless on CPU) or ``slots`` is given. Where they run out, the youngest rows begin again.
      expected_tokens: mean length of completions, for choosing slots and pages; 0 takes T / 4.
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
    shown = None
    if images is not None:
        shown = prompt_images(model, params, prompts, images, mesh=mesh)
    request = make_request(
        prompts,
        sampling,
        vocab_size=model.config.vocab_size,
        row_limits=row_limits,
        row_ids=row_ids,
        prefixes=prefixes,
        prompt_tokens=prompt_tokens,
        images=shown,
    )
    return sample_request(
        model,
        params,
        request,
        key,
        sampling=sampling,
        resources=Resources(
            slots=slots,
            page_tokens=page_tokens,
            expected_tokens=expected_tokens,
            cpu_workers=cpu_workers,
            kv_dtype=kv_dtype,
            mesh=mesh,
            steps_per_poll=steps_per_poll,
            pad_id=pad_id,
        ),
        progress=progress,
        finished=finished,
    )


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
      model, params, key, progress, finished: see :func:`generate`.
      request: from :func:`make_request`, with the same ``sampling``.
      sampling: from :meth:`Sampling.checked`.
      resources: how the call runs.
    """
    resources.check()
    if model.config.vision is not None:
        model, params = model.text, {k: v for k, v in params.items() if k != "vision"}
    _check_context(model, request, sampling)
    request, resources = _fit(model, request, sampling, resources)
    mesh, count = resources.mesh, resources.cpu_workers
    prefill_spec = _prefill_spec(request, sampling, resources)
    refill = prefill_spec.pages > 0 or request.rows // count > resources.slots
    decode_spec = _decode_spec(sampling, resources, refill=refill)
    key = _key_on_device(key, mesh)
    with mesh_context(mesh):
        weights = rollout_params(model, params, mesh, kv_dtype=resources.kv_dtype)

        def begin(index: int) -> tuple[Queue, Slots, Output]:
            part = _on_device(request.part(count, index), mesh)
            return begin_call(model, weights, part, key, spec=prefill_spec)

        workers = [
            Worker(
                functools.partial(begin, index),
                FinishedRows(finished, request.part_rows(count, index)),
                slots=resources.slots,
                spec=decode_spec,
                alone=count == 1,
            )
            for index in range(count)
        ]
        run_workers(model, weights, workers, mesh=mesh, progress=progress)
        return _rollouts(
            _on_device(request, mesh),
            [worker.output for worker in workers],
            prompts=request.prompts,
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


def _fit(
    model: Decoder, request: Request, sampling: Sampling, resources: Resources
) -> tuple[Request, Resources]:
    """Pads the request, and chooses the workers, slots and pages of each and the cache's type."""
    mesh, shards = resources.mesh, resources.shards
    kv_dtype = cache_dtype(model, resources.kv_dtype)
    workers = min(resources.cpu_workers, request.prompts) or choose_cpu_workers(
        model,
        prompts=request.prompts,
        slots=resources.slots or request.rows,
        max_new_tokens=sampling.max_new_tokens,
        kv_dtype=kv_dtype,
        mesh=mesh,
    )
    request = request.padded(bucket(request.prompts, multiple=shards * workers))
    _, block = _blocks(request, sampling, resources, workers)
    capacity = choose_capacity(
        model,
        rows=request.rows,
        max_new_tokens=sampling.max_new_tokens,
        block=block,
        slots=resources.slots,
        page_tokens=resources.page_tokens,
        expected_tokens=resources.expected_tokens,
        kv_dtype=kv_dtype,
        mesh=mesh,
        reads_longest=platform_of(mesh) == "cpu",
    )
    slots, tokens = capacity.slots, capacity.page_tokens
    if resources.slots and not resources.page_tokens:
        tokens = 0  # slots that were asked for hold T positions each
    elif not resources.slots and mesh is not None and mesh.is_multi_process:
        # Hosts may differ in memory, but run one program.
        slots, tokens = smallest(slots), smallest(tokens)
    if tokens:
        tokens = -(-tokens // workers)
        tokens = whole_pages(tokens, sampling.max_new_tokens, block)
    return request, dataclasses.replace(
        resources,
        cpu_workers=workers,
        slots=worker_slots(request.rows, slots, workers=workers, shards=shards),
        page_tokens=tokens,
        kv_dtype=kv_dtype,
    )


def _blocks(
    request: Request, sampling: Sampling, resources: Resources, workers: int
) -> tuple[int, int]:
    return block_sizes(
        request.tokens.shape[1],
        sampling.max_new_tokens,
        platform=platform_of(resources.mesh),
        cpu_workers=workers,
    )


def _prefill_spec(request: Request, sampling: Sampling, resources: Resources) -> PrefillSpec:
    block, ring_block = _blocks(request, sampling, resources, resources.cpu_workers)
    assert resources.kv_dtype is not None
    return PrefillSpec(
        slots=resources.slots,
        length=sampling.max_new_tokens,
        stop_window=sampling.stop_window,
        block=block,
        ring_block=ring_block,
        pages=resources.page_tokens // ring_block * resources.shards,
        pad_id=resources.pad_id,
        kv_dtype=resources.kv_dtype,
        shards=resources.shards,
    )


def _decode_spec(sampling: Sampling, resources: Resources, *, refill: bool) -> DecodeSpec:
    return DecodeSpec(
        sampling=sampling,
        steps=resources.steps_per_poll,
        refill=refill,
        platform=platform_of(resources.mesh),
        shards=resources.shards,
    )


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
    model: Decoder,
    sampling: Sampling,
    resources: Resources,
    *,
    prompts: int,
    prompt_tokens: int,
    image_tokens: int = 0,
) -> jax.stages.Lowered:
    """Lowers the prefill program from shapes alone.

    Args:
      model: the decoder.
      sampling: static settings.
      resources: with slots, and a mesh of real devices or of those of a topology.
      prompts: P, padded to an allowed shape as :func:`generate` does.
      prompt_tokens: S, padded likewise.
      image_tokens: room for each prompt's, for a model with a vision tower.
    """
    mesh = resources.mesh
    assert mesh is not None
    blank, images = [[0] * prompt_tokens] * prompts, None
    if model.config.vision is not None:
        index, positions, delta = place_images(model, blank, [()] * prompts, width=prompt_tokens)
        size = prompts * image_tokens, model.config.hidden_size
        features: Any = jax.ShapeDtypeStruct(size, model.dtype)
        images = PromptImages(features, index, positions, delta)
    request, resources = _fit(
        model,
        make_request(blank, sampling, vocab_size=model.config.vocab_size, images=images),
        sampling,
        dataclasses.replace(resources, cpu_workers=1),
    )
    model = model.text
    spec = _prefill_spec(request, sampling, resources)
    whole = NamedSharding(mesh, PartitionSpec())
    request, key = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        (request, jax.random.key(0)),
    )
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
    """Lowers the decode program for the results of the prefill program.

    Args:
      model, sampling, resources: those of :func:`lower_prefill`.
      prefill: its result.
      prefilled: its result, compiled.
    """
    mesh, model = resources.mesh, model.text
    assert mesh is not None
    queue, slots, output = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        prefill.out_info,
        prefilled.output_shardings,
    )
    refill = slots.pool is not None or queue.rows > slots.row.shape[0]
    spec = _decode_spec(sampling, resources, refill=refill)
    whole = NamedSharding(mesh, PartitionSpec())
    shrink_at = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    weights = abstract_rollout_params(model, mesh)
    with jax.set_mesh(mesh):
        return decode_call.lower(model, weights, queue, slots, output, shrink_at, spec=spec)
