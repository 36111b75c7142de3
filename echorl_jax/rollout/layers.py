"""Weights of layers: one stack to scan over, or layer by layer where a scan would copy them."""

import math
import operator
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from echorl_jax.models import Decoder
from echorl_jax.types import Array, PyTree

_Carry = TypeVar("_Carry")
# Matrices of a layer that multiply the same input, by part.
_TOGETHER = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}


def split_layers(params: PyTree, *, join: bool) -> PyTree:
    """The same weights, with a tuple of layers in place of the stack.

    On GPU a scan copies each layer's weights out of the stack before it multiplies, which makes
    three reads and writes of one. Compilation takes longer instead.

    Args:
      params: the weights.
      join: put matrices that multiply the same input side by side, so that they are one product
        (on a mesh that splits them there is no side by side).
    """
    stack = params["layers"]
    count = jax.tree.leaves(stack)[0].shape[0]
    layers = [jax.tree.map(operator.itemgetter(index), stack) for index in range(count)]
    return {**params, "layers": tuple(map(_join, layers) if join else layers)}


def split_shardings(shardings: PyTree, layers: int) -> PyTree:
    """Shardings of ``split_layers(params, join=False)``, from those of the stacked weights."""

    def of_one(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    return {**shardings, "layers": (jax.tree.map(of_one, shardings["layers"]),) * layers}


def over_layers(
    model: Decoder,
    body: Callable[[_Carry, tuple[PyTree, ...]], tuple[_Carry, PyTree]],
    carry: _Carry,
    params: PyTree,
    *others: PyTree,
) -> tuple[_Carry, PyTree]:
    """``lax.scan`` over a stack of layers and over ``others``; a loop in Python over a tuple.

    Args:
      model: the decoder.
      body: as of ``lax.scan``; it gets a layer's weights as the model knows them.
      carry: what the first layer gets.
      params: the weights, stacked or from :func:`split_layers`.
      others: arrays ``[L, ...]``.

    Returns:
      What the last layer hands on, and the results of all, ``[L, ...]``.
    """
    layers = model.layers(params)
    if not isinstance(layers, tuple):
        return lax.scan(body, carry, (layers, *others))
    results = []
    for index, layer in enumerate(layers):
        at = jax.tree.map(operator.itemgetter(index), others)
        carry, result = body(carry, (_unjoin(model, layer), *at))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def _join(layer: PyTree) -> PyTree:
    """Matrices of one input as one, ``[D, sum of their outputs]``."""
    joined = {name: {**part} for name, part in layer.items()}
    for part, names in _TOGETHER.items():
        matrices = [layer[part][name]["kernel"] for name in names]
        flat = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
        joined[part]["joined"] = jnp.concatenate(flat, axis=1)
        for name in names:
            joined[part][name] = {k: v for k, v in layer[part][name].items() if k != "kernel"}
    return joined


def _unjoin(model: Decoder, layer: PyTree) -> PyTree:
    """A layer as the model knows it. The compiler sees one product of the parts of a matrix."""
    shapes = model.param_shapes()["layers"]
    parted = {name: {**part} for name, part in layer.items()}
    for part, names in _TOGETHER.items():
        joined: Array | None = parted[part].pop("joined", None)
        if joined is None:
            continue
        first = 0
        for name in names:
            shape = shapes[part][name]["kernel"].shape[1:]
            width = math.prod(shape[1:])
            kernel = joined[:, first : first + width].reshape(shape)
            parted[part][name] = {**parted[part][name], "kernel": kernel}
            first += width
    return parted
