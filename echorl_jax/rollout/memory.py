"""The memory of a call by formula, and the number of slots that fits."""

import dataclasses
import math
import os

import jax
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.models import Decoder, base_params
from echorl_jax.parallel import Platform, local_bytes
from echorl_jax.rollout.cache import KV_BYTES, KVDtype
from echorl_jax.rollout.pages import RESERVE, is_paged, whole_pages
from echorl_jax.rollout.request import slots_below

# Share of a device's memory that slots may take by default. Training needs the rest for weights,
# optimizer state and the activations of the update.
SLOT_SHARE = 0.4
# Tokens that the rows in the slots have written on average, as a multiple of the mean length: long
# rows stay longer. It is 1 for exponential lengths, 1.36 for log-normal ones with sigma 1.
LIVE = 1.25
# Share of these for which there have to be pages where memory decides: at first all rows are young,
# and later slots stay idle (benchmarks/paging.py).
COVERED = 0.6


@dataclasses.dataclass(frozen=True)
class RolloutMemory:
    """Bytes on the device with the largest share."""

    weights: int  # in the layout for sampling and the compute dtype
    prompts: int  # keys and values of all prompts, on every device that rows are split over
    slots: int  # keys and values of completions being written
    outputs: int  # tokens, log-probabilities and entropies of all rows
    logits: int  # logits of one decode step, and the arrays that sampling makes of them

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
    page_tokens: int = 0,
    block: int = 0,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> RolloutMemory:
    """Memory of one :func:`generate` call.

    Cache bytes per position and layer are ``2 * kv_heads * head_dim * bytes`` (int8: 1 byte, and 4
    for the scale of each head). A prompt holds ``prompt_tokens`` positions, a slot
    ``max_new_tokens``, or one block where completions are paged.

    Args:
      model: the decoder.
      slots: M.
      prompts: P.
      group_size: G.
      prompt_tokens: S, as padded.
      max_new_tokens: T.
      page_tokens: positions of the pages on each device; 0 without pages.
      block: positions in a page.
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
    of_slots = local_slots * (block if page_tokens else max_new_tokens)
    return RolloutMemory(
        weights=weight_bytes(model, mesh),
        prompts=prompts * prompt_tokens * per_position,
        slots=(of_slots + page_tokens) * per_position,
        outputs=prompts * group_size * max_new_tokens * 12,
        logits=3 * local_slots * vocab * 4,
    )


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The number of rows written at once, and the pages they are written into."""

    slots: int  # M
    page_tokens: int  # positions of the pages on each device; 0: each slot holds T positions


def choose_capacity(
    model: Decoder,
    *,
    rows: int,
    max_new_tokens: int,
    block: int,
    slots: int = 0,
    page_tokens: int = 0,
    expected_tokens: int = 0,
    kv_dtype: KVDtype | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    slot_bytes: int | None = None,
    reads_longest: bool = False,
) -> Capacity:
    """A slot for each row if they fit into memory, else as many as do, a multiple of 8 per device.

    Long completions are paged where they do not all fit, or where the ring would be read up to the
    longest row: then a slot takes a block and pages by the expected length, and there are pages for
    one row of T.

    Args:
      model: the decoder.
      rows: N.
      max_new_tokens: T.
      block: positions in a page.
      slots: M if it is given.
      page_tokens: positions of the pages if they are given.
      expected_tokens: mean length of completions; slots are for a quarter of T unless given.
      kv_dtype: type of the cache; the model's unless given.
      mesh: where it runs; one device unless given.
      slot_bytes: limit for slots and pages on each device; 0.4 of its memory unless given.
      reads_longest: whether a step reads all slots of the ring up to the longest row, as on CPU.

    Raises:
      ValueError: not even one slot for each device fits.
    """
    axes = dict(mesh.shape) if mesh is not None else {}
    shards = axes.get("data", 1) * axes.get("fsdp", 1)
    budget = int(SLOT_SHARE * device_bytes()) if slot_bytes is None else slot_bytes
    per_position = position_bytes(model, kv_dtype, axes.get("tensor", 1))
    in_ring = budget // per_position // max_new_tokens * shards
    wanted = page_tokens > 0 or reads_longest or in_ring < min(slots or rows, rows)
    paged = wanted and is_paged(max_new_tokens, block)
    expected = math.ceil(LIVE * (expected_tokens or max_new_tokens / 4))
    live = min(max(expected, block), max_new_tokens)
    once = max_new_tokens + block if paged else 0  # the pages of one row of T
    each = block + math.ceil(COVERED * live) if paged else max_new_tokens
    fit = max(0, budget // per_position - once) // each * shards
    if not slots:
        if fit < shards:
            least = (once + each) * per_position
            raise ValueError(
                f"one slot of {max_new_tokens} tokens takes {least / 1e9:.2f} GB, more than the "
                f"{budget / 1e9:.2f} GB that slots may take on each device"
            )
        slots = rows if fit >= rows else slots_below(fit, multiple=shards)
    slots = min(slots, rows)
    if not paged:
        return Capacity(slots, 0)
    # Pages for the rows of all slots, of any length where none is expected; with slots that were
    # asked for at least one row's.
    local = -(-slots // shards)
    free = budget // per_position - local * block
    of_slot = live if expected_tokens else max_new_tokens
    needed = min(once + math.ceil(local * of_slot / (1 - RESERVE)), max(once, free))
    return Capacity(slots, whole_pages(page_tokens or needed, max_new_tokens, block))


def device_bytes() -> int:
    """Memory of one device; on CPU the machine's, shared by its (virtual) devices."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def cache_dtype(model: Decoder, kv_dtype: KVDtype | None) -> KVDtype:
    """The type of the cache: ``kv_dtype``, or for None the type of the model's activations."""
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


def balances_keys(model: Decoder, kv_dtype: KVDtype | None) -> bool:
    """True if the sampler scales the key projections: int8 keys with biases and without norms.

    Norms of keys would undo the scaling, and leave no large channel.
    """
    return kv_dtype == "int8" and model.config.qkv_bias and not model.config.qk_norm


def shares_weights(
    model: Decoder, *, devices: int, platform: Platform, kv_dtype: KVDtype | None = None
) -> bool:
    """True if sampling reads the trainer's weights without a copy.

    That needs weights no wider than the compute type, one device and unscaled keys, but not a GPU,
    where layers are stored separately.
    """
    # Adapters stay in f32: they are small, and cast where they are used.
    shapes = base_params(model.param_shapes())
    same = jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype, shapes, jax.eval_shape(model.cast, shapes))
    )
    return devices == 1 and same and platform != "gpu" and not balances_keys(model, kv_dtype)


def weight_bytes(model: Decoder, mesh: Mesh | AbstractMesh | None) -> int:
    """Bytes of the weights for sampling on one device."""
    shapes = jax.eval_shape(model.cast, model.param_shapes())
    return local_bytes(model.param_axes(), shapes, mesh, "rollout")
