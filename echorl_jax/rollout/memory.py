"""The cost of sampling before anything runs: memory of a call, and work of one decode step."""

import dataclasses
import math
import os

import jax
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, local_bytes
from echorl_jax.rollout.cache import KV_BYTES, KVDtype
from echorl_jax.rollout.request import bucket_below

# Share of a device's memory that slots may take by default: in training, weights, optimizer state
# and the activations of the update need room too.
SLOT_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class RolloutMemory:
    """Bytes on the device that holds most."""

    weights: int  # in the layout for sampling and the compute dtype
    prompts: int  # keys and values of all prompts, on every device that rows are split over
    slots: int  # keys and values of completions being written and of copied prompts
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
      slot_bytes: limit for slots on each device; 0.4 of its memory unless given.

    Raises:
      ValueError: not even one slot for each device fits.
    """
    axes = dict(mesh.shape) if mesh is not None else {}
    shards = axes.get("data", 1) * axes.get("fsdp", 1)
    budget = int(SLOT_SHARE * device_bytes()) if slot_bytes is None else slot_bytes
    # With a slot for each row prompts are not copied at first, but when rows move to fewer slots at
    # the end they are.
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
    """The type of the cache: ``kv_dtype``, or that of the model's activations for None."""
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
    """Whether the sampler has key projections of its own, for int8 keys with biases. Norms of keys
    would undo the scaling, and leave no large channel.
    """
    return kv_dtype == "int8" and model.config.qkv_bias and not model.config.qk_norm


def shares_weights(
    model: Decoder, *, devices: int, platform: Platform, kv_dtype: KVDtype | None = None
) -> bool:
    """Whether sampling reads the trainer's weights without a copy: same type, one device, no GPU
    (there the layers lie apart), no projections of its own.
    """
    same = model.dtype == model.param_dtype and not balances_keys(model, kv_dtype)
    return devices == 1 and same and platform != "gpu"


def weight_bytes(model: Decoder, mesh: Mesh | AbstractMesh | None) -> int:
    """Bytes of the weights for sampling on one device."""
    shapes = jax.eval_shape(model.cast, model.param_shapes())
    return local_bytes(model.param_axes(), shapes, mesh, "rollout")


@dataclasses.dataclass(frozen=True)
class DecodeStepCost:
    """Work of writing one token for each of M slots, on all devices together."""

    matrix_flops: int  # products with weights
    attention_flops: int  # scores and weighted values
    weight_bytes: int  # each weight is read once
    cache_bytes: int  # each key and value attended to is read once, new ones are written

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Least time on hardware with these peaks: the slower of the two."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def decode_step_cost(
    model: Decoder,
    *,
    slots: int,
    prompt_tokens: float,
    completion_tokens: float,
    group_size: int = 1,
    kv_dtype: KVDtype | None = None,
) -> DecodeStepCost:
    """Counts one decode step at a mean context length.

    With W weights in matrices, head included, L layers, H query heads of size K and c positions in
    the context: ``2 M W`` and ``4 M L H K c`` operations. Bytes: W weights, and for each
    slot its completion and 1 / ``group_size`` of its prompt.

    Args:
      model: the decoder.
      slots: M.
      prompt_tokens: mean prompt length.
      completion_tokens: mean number of tokens so far.
      group_size: slots that read a prompt together: G with a slot for each row, else 1.
      kv_dtype: type of the cache; the model's unless given.
    """
    config = model.config
    weights = layer_weights(model) + config.hidden_size * config.vocab_size
    context = prompt_tokens + completion_tokens
    heads = config.num_layers * config.num_heads * config.head_dim
    read = prompt_tokens / group_size + completion_tokens
    width = 2 if model.dtype == "bfloat16" else 4
    return DecodeStepCost(
        matrix_flops=2 * slots * weights,
        attention_flops=round(4 * slots * heads * context),
        weight_bytes=weights * width,
        cache_bytes=round(slots * (read + 1) * position_bytes(model, kv_dtype)),
    )


def layer_weights(model: Decoder) -> int:
    """Weights in the matrices of all layers."""
    return sum(
        math.prod(shape.shape)
        for path, shape in jax.tree_util.tree_leaves_with_path(model.layers(model.param_shapes()))
        if path[-1].key == "kernel"
    )
