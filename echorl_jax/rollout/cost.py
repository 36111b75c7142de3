"""Arithmetic and memory traffic of one turn of the decode loop: what no sampler can do without."""

import dataclasses
import math

import jax

from echorl_jax.models import Decoder
from echorl_jax.rollout.cache import KVDtype
from echorl_jax.rollout.memory import position_bytes


@dataclasses.dataclass(frozen=True)
class TurnCost:
    """What one token for each of M slots costs, on all devices together."""

    matrix_flops: int  # products with weights
    attention_flops: int  # scores and weighted values
    weight_bytes: int  # each weight read once
    cache_bytes: int  # each key and value that is attended to read once, the new ones written

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Least time on hardware with these peaks: the slower of the two."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def turn_cost(
    model: Decoder,
    *,
    slots: int,
    prompt_tokens: float,
    completion_tokens: float,
    group_size: int = 1,
    kv_dtype: KVDtype | None = None,
) -> TurnCost:
    """Counts one turn at a mean context.

    With W weights in matrices, head included, L layers, H query heads of size K and c positions in
    the context: ``2 M W`` and ``4 M L H K c`` operations. Bytes: W weights, and for each
    slot its completion and 1 / ``group_size`` of its prompt.

    Args:
      model: the decoder.
      slots: M.
      prompt_tokens: mean prompt length.
      completion_tokens: mean number of tokens written so far.
      group_size: slots that read a prompt together: G with a slot for each row, else 1.
      kv_dtype: type of the cache; the model's unless given.
    """
    config = model.config
    weights = layer_weights(model) + config.hidden_size * config.vocab_size
    context = prompt_tokens + completion_tokens
    heads = config.num_layers * config.num_heads * config.head_dim
    read = prompt_tokens / group_size + completion_tokens
    width = 2 if model.dtype == "bfloat16" else 4
    return TurnCost(
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
