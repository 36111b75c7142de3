"""The sampler's programs without weights or prompts: lowered from shapes alone."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.models import Decoder
from echorl_jax.parallel import platform_of
from echorl_jax.rollout.buckets import bucket
from echorl_jax.rollout.cache import KVDtype
from echorl_jax.rollout.generate import CallShape, begin_call, block_sizes, rollout_layout
from echorl_jax.rollout.lanes import decode_call
from echorl_jax.rollout.loop import Program
from echorl_jax.rollout.memory import cache_dtype
from echorl_jax.rollout.request import PROMPT_MULTIPLE
from echorl_jax.rollout.settings import make_sampling
from echorl_jax.types import PyTree


def lower_prefill(
    model: Decoder,
    mesh: Mesh,
    *,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    slots: int,
    kv_dtype: KVDtype | None = None,
) -> jax.stages.Lowered:
    """The program that fills the caches and the slots, on ``mesh``.

    Args:
      model: the decoder; its attention kernel is not used here.
      mesh: real devices or those of a topology.
      prompts: P, padded to an allowed shape as :func:`generate` does.
      group_size: G.
      prompt_tokens: S.
      max_new_tokens: T.
      slots: M, a multiple of the devices that rows are split over.
      kv_dtype: type of the cache; the model's unless given.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    padded = bucket(prompts, multiple=shards)
    rows, width = padded * group_size, bucket(prompt_tokens, multiple=PROMPT_MULTIPLE)
    block, ring_block = block_sizes(width, max_new_tokens, platform=platform_of(mesh))
    shape = CallShape(
        slots=min(slots, rows),
        length=max_new_tokens,
        memory=0,
        block=block,
        ring_block=ring_block,
        pad_id=0,
        kv_dtype=cache_dtype(model, kv_dtype),
        shards=shards,
    )
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*size: int, dtype: object = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=whole)

    key = array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    per_row = array(rows)
    request = (array(padded, width), array(padded), per_row, per_row, per_row, array(rows, 0))
    with jax.set_mesh(mesh):
        return begin_call.lower(
            model, sampling_weights(model, mesh), *request, per_row, array(), key, shape=shape
        )


def lower_decode(
    model: Decoder,
    mesh: Mesh,
    prefilled: jax.stages.Compiled,
    prefill: jax.stages.Lowered,
    *,
    turns: int = 128,
    eos_ids: tuple[int, ...],
    temperature: float,
) -> jax.stages.Lowered:
    """The decode loop that goes on from what :func:`lower_prefill`'s program returns."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    queue, slots, output = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        prefill.out_info,
        prefilled.output_shardings,
    )
    sampling = make_sampling(
        vocab_size=model.config.vocab_size, temperature=temperature, eos_ids=eos_ids
    )
    program = Program(
        sampling=sampling,
        turns=turns,
        refill=queue.rows > slots.row.shape[0],
        platform=platform_of(mesh),
        shards=shards,
    )
    shrink_at = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return decode_call.lower(
            model,
            sampling_weights(model, mesh),
            queue,
            slots,
            output,
            shrink_at,
            program=program,
        )


def sampling_weights(model: Decoder, mesh: Mesh) -> PyTree:
    """Shapes, types and places of the weights that sampling reads."""
    make, shardings = rollout_layout(model, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(make, model.param_shapes()),
        shardings,
    )
