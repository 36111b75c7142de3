"""What sampling needs of a device's memory, known before anything runs."""

import dataclasses
import os

import jax
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, local_bytes
from echorl_jax.rollout.buckets import bucket_below
from echorl_jax.rollout.cache import KV_BYTES, KVDtype

# Part of a device's memory that slots may take unless told otherwise: in training, weights,
# optimizer state and the update's activations live there too.
SLOT_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class RolloutMemory:
    """Bytes on the fullest device."""

    weights: int  # in the rollout layout and compute dtype
    prompts: int  # keys and values of all prompts, on every device that rows are split over
    slots: int  # keys and values of completions being written, and of their prompts' copies
    outputs: int  # tokens, log-probabilities and entropies of all rows
    logits: int  # of one turn, with what sampling makes of them

    @property
    def cache(self) -> int:
        return self.prompts + self.slots

    @property
    def total(self) -> int:
        return self.weights + self.prompts + self.slots + self.outputs + self.logits


def rollout_memory(
    model: Decoder,
    *,
    slots: int,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> RolloutMemory:
    """Memory of one :func:`generate` call.

    Cache bytes per position and layer are ``2 * kv_heads * head_dim * bytes`` (int8: 1 byte, and 4
    for the scale of each head). A prompt holds ``prompt_tokens`` positions, a slot
    ``max_new_tokens``, and a copy of its row's prompt where there are fewer slots than rows.

    Args:
      model: the decoder.
      slots: M.
      prompts: P.
      group_size: G.
      prompt_tokens: S, as padded.
      max_new_tokens: T.
      kv_dtype: type of the cache; the model's unless given.
      mesh: where it runs; one device unless given.
    """
    axes = dict(mesh.shape) if mesh is not None else {}
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    tensor = axes.get("tensor", 1)
    config = model.config
    per_position = position_bytes(model, kv_dtype, tensor)
    vocab = config.vocab_size // tensor if config.vocab_size % tensor == 0 else config.vocab_size
    local_slots = -(-slots // rows)
    copied = prompt_tokens if slots < prompts * group_size else 0
    return RolloutMemory(
        weights=weight_bytes(model, mesh),
        prompts=prompts * prompt_tokens * per_position,
        slots=local_slots * (copied + max_new_tokens) * per_position,
        outputs=prompts * group_size * max_new_tokens * 12,
        logits=3 * local_slots * vocab * 4,
    )


def choose_slots(
    model: Decoder,
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    slot_bytes: int | None = None,
) -> int:
    """All rows at once if their keys and values fit, else the largest allowed number that does.

    Args:
      model: the decoder.
      rows: N.
      prompt_tokens: S, as padded.
      max_new_tokens: T.
      kv_dtype: type of the cache; the model's unless given.
      mesh: where it runs; one device unless given.
      slot_bytes: what slots may take on each device; 0.4 of its memory unless given.

    Raises:
      ValueError: not even one slot for each device fits.
    """
    axes = dict(mesh.shape) if mesh is not None else {}
    shards = axes.get("data", 1) * axes.get("fsdp", 1)
    budget = int(SLOT_SHARE * device_bytes()) if slot_bytes is None else slot_bytes
    # With a slot for each row prompts are not copied at first, but are when work runs out and rows
    # move to fewer slots.
    each = position_bytes(model, kv_dtype, axes.get("tensor", 1)) * (prompt_tokens + max_new_tokens)
    fit = budget // each * shards
    if fit < shards:
        raise ValueError(
            f"one slot of {prompt_tokens} + {max_new_tokens} tokens takes {each / 1e9:.2f} GB, "
            f"more than the {budget / 1e9:.2f} GB of each device that slots may take"
        )
    return rows if fit >= rows else bucket_below(fit, multiple=shards)


def device_bytes() -> int:
    """Memory of one device; on CPU the machine's, shared by its (virtual) devices."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def cache_dtype(model: Decoder, kv_dtype: KVDtype | None) -> KVDtype:
    """The type of the cache: as asked for, else that of the model's activations."""
    if kv_dtype is None:
        return "bfloat16" if model.dtype == "bfloat16" else "float32"
    if kv_dtype not in KV_BYTES:
        raise ValueError(f"kv_dtype={kv_dtype!r}: must be one of {', '.join(KV_BYTES)}")
    return kv_dtype


def position_bytes(model: Decoder, kv_dtype: KVDtype | None, tensor: int = 1) -> int:
    """Keys and values of one position in all layers, on one device."""
    dtype = cache_dtype(model, kv_dtype)
    config = model.config
    heads = config.num_kv_heads
    heads = heads // tensor if heads % tensor == 0 else heads
    vector = config.head_dim * KV_BYTES[dtype] + (4 if dtype == "int8" else 0)
    return 2 * config.num_layers * heads * vector


def shares_weights(model: Decoder, *, devices: int, platform: Platform) -> bool:
    """Whether sampling reads the trainer's weights themselves: they have its type, are on one
    device, and that is no GPU, where layers are taken apart.
    """
    return devices == 1 and model.dtype == model.param_dtype and platform != "gpu"


def weight_bytes(model: Decoder, mesh: Mesh | AbstractMesh | None) -> int:
    """Weights as sampling holds them, on one device."""
    shapes = jax.eval_shape(model.cast, model.param_shapes())
    return local_bytes(model.param_axes(), shapes, mesh, "rollout")
