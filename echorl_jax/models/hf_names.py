"""Maps parameters to Hugging Face tensors, by name and by layout."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from echorl_jax.models.config import VisionConfig
from echorl_jax.models.decoder import Decoder

T = TypeVar("T")
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
    ("vision", "patch", "kernel"): "visual.patch_embed.proj.weight",
    ("vision", "merger", "norm", "scale"): "visual.merger.ln_q.weight",
    ("vision", "merger", "up", "kernel"): "visual.merger.mlp.0.weight",
    ("vision", "merger", "up", "bias"): "visual.merger.mlp.0.bias",
    ("vision", "merger", "down", "kernel"): "visual.merger.mlp.2.weight",
    ("vision", "merger", "down", "bias"): "visual.merger.mlp.2.bias",
}
# Of a layer of the vision tower: linears and norms.
_VISION_PARTS: dict[tuple[str, ...], str] = {
    ("attention_norm",): "norm1",
    ("qkv",): "attn.qkv",
    ("o",): "attn.proj",
    ("mlp_norm",): "norm2",
    **{("mlp", name): f"mlp.{name}_proj" for name in ("gate", "up", "down")},
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
    # The stored shape, where it is not the one that follows from these.
    dims: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.dims:
            return self.dims
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


def published_names(stored: Mapping[str, T]) -> dict[str, T]:
    """Tensors by the names of published files, which newer versions of transformers change.

    Those write ``model.language_model.*`` and ``model.visual.*`` for Qwen2.5-VL.
    """
    newer = {"model.language_model.": "model.", "model.visual.": "visual."}
    named = {}
    for name, tensor in stored.items():
        prefix = next((prefix for prefix in newer if name.startswith(prefix)), "")
        named[newer.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return named


def tensor_names(model: Decoder) -> Iterator[TensorName]:
    """Every parameter of ``model`` without adapters, in the order of the tree.

    An int8 kernel and its factors are one tensor.
    """
    vision = model.config.vision
    depths = {"layers": model.config.num_layers, "vision": vision.num_layers if vision else 0}
    plain = dataclasses.replace(model.base, param_dtype="float32")
    for path, shape in _leaves(plain.param_shapes()):
        inputs = 0 if path[-1] != "kernel" else 2 if path[-2] == "o" else 1
        if "layers" not in path:
            dims = _patch_dims(vision) if vision and path[:2] == ("vision", "patch") else ()
            yield TensorName(path, (_OUTER[path],), shape, inputs, stacked=False, dims=dims)
            continue
        part = _vision_part(path[2:]) if path[0] == "vision" else _layer_part(path[1:])
        block = "visual.blocks" if path[0] == "vision" else "model.layers"
        stored = tuple(f"{block}.{layer}.{part}" for layer in range(depths[path[0]]))
        yield TensorName(path, stored, shape[1:], inputs, stacked=True)


def _layer_part(path: tuple[str, ...]) -> str:
    if path in _LAYER_PARTS:
        return _LAYER_PARTS[path]
    block, projection, kind = path
    block = {"attention": "self_attn", "mlp": "mlp"}[block]
    return f"{block}.{projection}_proj.{'weight' if kind == 'kernel' else 'bias'}"


def _patch_dims(vision: VisionConfig) -> tuple[int, ...]:
    """Patches are embedded by a convolution that never overlaps, a matrix product."""
    square = (vision.patch_size, vision.patch_size)
    return vision.hidden_size, vision.channels, vision.frames, *square


def _vision_part(path: tuple[str, ...]) -> str:
    return f"{_VISION_PARTS[path[:-1]]}.{'bias' if path[-1] == 'bias' else 'weight'}"


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple]]:
    for key, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, key))
        else:
            yield (*path, key), node.shape
