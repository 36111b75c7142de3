"""Draws initial weights directly into their shards."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from echorl_jax.models.decoder import Decoder
from echorl_jax.parallel import Layout, tree_shardings
from echorl_jax.types import Array, PyTree

_MATRICES = ("kernel", "table")
_CONSTANTS = {"bias": 0.0, "scale": 1.0}


def param_shardings(model: Decoder, mesh: Mesh, *, layout: Layout = "train") -> PyTree:
    """The sharding of each parameter on ``mesh``, in the training or the rollout layout."""
    return tree_shardings(model.param_axes(), model.param_shapes(), mesh, layout)


def merge(frozen: PyTree, trainable: PyTree) -> PyTree:
    """All parameters of a model, from those that stay as they are and those in training.

    Args:
      frozen: nested dicts; None where everything is trained.
      trainable: nested dicts with the other leaves.

    Raises:
      ValueError: a leaf is in both.

    >>> merge({"layer": {"kernel": 1}}, {"layer": {"bias": 2}, "head": 3})
    {'layer': {'kernel': 1, 'bias': 2}, 'head': 3}
    """
    if frozen is None:
        return trainable
    if not (isinstance(frozen, dict) and isinstance(trainable, dict)):
        raise ValueError("merge: a parameter is both frozen and trainable")
    merged = {**frozen, **trainable}
    for name in frozen.keys() & trainable.keys():
        merged[name] = merge(frozen[name], trainable[name])
    return merged


def abstract_params(model: Decoder, mesh: Mesh) -> PyTree:
    """Shapes, types and shardings of the training weights, without arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.param_shapes(),
        param_shardings(model, mesh),
    )


def init_params(model: Decoder, key: Array, mesh: Mesh | None = None) -> PyTree:
    """Draws weights: normal with the config's ``initializer_range``, biases 0, norms 1.

    The values depend on the key alone, not on the mesh.

    Args:
      mesh: where the weights go; one device unless given.

    Returns:
      The params pytree in ``model.param_dtype``, without adapters.
    """
    model = model.base
    shardings = None if mesh is None else param_shardings(model, mesh)
    return jax.jit(functools.partial(_draw, model), out_shardings=shardings)(key)


def _draw(model: Decoder, key: Array) -> PyTree:
    shapes = dataclasses.replace(model, param_dtype="float32").param_shapes()
    layers = shapes.pop("layers")
    one_layer = jax.tree.map(lambda leaf: leaf.shape[1:], layers)
    outer_key, layers_key = jax.random.split(key)
    scale = model.config.initializer_range
    params = {
        name: _fill(jax.tree.map(lambda leaf: leaf.shape, shapes[name]), part_key, scale)
        for name, part_key in zip(shapes, jax.random.split(outer_key, len(shapes)), strict=True)
    }
    layer_keys = jax.random.split(layers_key, model.config.num_layers)
    params["layers"] = jax.lax.map(lambda layer_key: _fill(one_layer, layer_key, scale), layer_keys)
    if model.param_dtype == "int8":
        params["layers"] = _int8_layers(params["layers"])
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, model.param_shapes())


def _int8_layers(layers: PyTree) -> PyTree:
    """The stacked layers with int8 kernels."""
    stored = {part: {**linears} for part, linears in layers.items()}
    for part in ("attention", "mlp"):
        for name, linear in layers[part].items():
            if "kernel" in linear:
                quantise = jax.vmap(functools.partial(quantised, inputs=2 if name == "o" else 1))
                kernel, scale = quantise(linear["kernel"])
                stored[part][name] = {**linear, "kernel": kernel, "kernel_scale": scale}
    return stored


def quantised(kernel: Array, *, inputs: int) -> tuple[Array, Array]:
    """A kernel ``[in..., out...]`` as int8 and a factor for each output, f32 ``[out...]``.

    The factor is the largest size of the output's weights / 127: rounding costs half of it at most.
    A kernel with NaN or infinity has such a factor.
    """
    wide = kernel.astype(jnp.float32)
    axes = tuple(range(inputs))
    scale = jnp.abs(wide).max(axis=axes) / 127
    steps = wide / jnp.where(scale == 0, 1, scale)[(None,) * inputs]
    return jnp.round(steps).astype(jnp.int8), scale


def _fill(shapes: PyTree, key: Array, scale: float) -> PyTree:
    """Arrays for a tree of shapes. All matrices come from one draw, which compiles once."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
    kinds = [path[-1].key for path, _ in leaves]
    sizes = [
        math.prod(shape) if kind in _MATRICES else 0
        for kind, (_, shape) in zip(kinds, leaves, strict=True)
    ]
    draws = scale * jax.random.normal(key, (sum(sizes),))
    ends = itertools.accumulate(sizes)
    values = [
        draws[end - size : end].reshape(shape) if size else jnp.full(shape, _CONSTANTS[kind])
        for kind, (_, shape), size, end in zip(kinds, leaves, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
