"""Maps parameters to Hugging Face tensors, by name and by layout."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from echorl_jax.models.decoder import Decoder

_LAYER_PARTS: dict[tuple[str, ...], str] = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("attention", "q_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "k_norm", "scale"): "self_attn.k_norm.weight",
}
_OUTER: dict[tuple[str, ...], str] = {
    ("embed", "table"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """The tensors of a checkpoint that hold one parameter.

    A kernel ``[in..., out...]`` is stored as the matrix ``[out, in]``, where heads and head_dim are
    one axis.
    """

    path: tuple[str, ...]
    # The stored tensor for each layer, or the only one.
    stored: tuple[str, ...]
    # One layer's shape.
    shape: tuple[int, ...]
    # Leading axes that a kernel contracts; 0 for a parameter that is stored unchanged.
    inputs: int
    stacked: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.inputs == 0:
            return (math.prod(self.shape),) if self.path[-1] == "bias" else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def from_stored(self, stored: Any) -> Any:
        """One layer's parameter as a view of the stored tensor."""
        if self.inputs == 0:
            return stored.reshape(self.shape)
        unfolded = stored.reshape(self.shape[self.inputs :] + self.shape[: self.inputs])
        outputs = len(self.shape) - self.inputs
        return np.moveaxis(unfolded, range(outputs), range(-outputs, 0))

    def to_stored(self, values: Any, numpy: Any = np) -> Any:
        """The inverse; ``numpy`` may be ``jax.numpy``."""
        outputs = len(self.shape) - self.inputs
        if self.inputs:
            values = numpy.moveaxis(values, range(-outputs, 0), range(outputs))
        return values.reshape(self.stored_shape)


def tensor_names(model: Decoder) -> Iterator[TensorName]:
    """Every parameter of ``model`` without adapters, in the order of the tree.

    An int8 kernel and its factors are one tensor.
    """
    layers = range(model.config.num_layers)
    plain = dataclasses.replace(model.base, param_dtype="float32")
    for path, shape in _leaves(plain.param_shapes()):
        if path[0] != "layers":
            inputs = 1 if path == ("head", "kernel") else 0
            yield TensorName(path, (_OUTER[path],), shape, inputs, stacked=False)
            continue
        part = _layer_part(path[1:])
        stored = tuple(f"model.layers.{layer}.{part}" for layer in layers)
        inputs = 0 if path[-1] != "kernel" else 2 if path[-2] == "o" else 1
        yield TensorName(path, stored, shape[1:], inputs, stacked=True)


def _layer_part(path: tuple[str, ...]) -> str:
    if path in _LAYER_PARTS:
        return _LAYER_PARTS[path]
    block, projection, kind = path
    block = {"attention": "self_attn", "mlp": "mlp"}[block]
    return f"{block}.{projection}_proj.{'weight' if kind == 'kernel' else 'bias'}"


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple]]:
    for key, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, key))
        else:
            yield (*path, key), node.shape
