"""Weights in the layout for sampling: cast, resharded, and on GPU layer by layer.

On GPU a scan copies the weights of each layer out of the stack before it multiplies: three reads
and writes instead of one. There the layers lie apart, at the price of a longer compilation.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.choices import KVDtype
from echorl_jax.models import Decoder, param_shardings
from echorl_jax.models.lora import plain_kernel
from echorl_jax.parallel import platform_of
from echorl_jax.rollout.memory import balances_keys, shares_weights
from echorl_jax.types import Array, PyTree

_Carry = TypeVar("_Carry")
# Matrices of a layer that multiply the same input, by part of the layer.
_SAME_INPUT = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
# The window of a layer without one: longer than any sequence.
UNBOUNDED = 2**30


def windows(model: Decoder) -> np.ndarray:
    """i32 ``[L]``: how many latest positions each layer attends to, the current one included."""
    return np.array([UNBOUNDED if w is None else w for w in model.config.windows], np.int32)


def rollout_params(
    model: Decoder, params: PyTree, mesh: Mesh | None, *, kv_dtype: KVDtype | None = None
) -> PyTree:
    """The weights for sampling, made by one compiled program: in the compute dtype, on a mesh in
    its layout, on GPU layer by layer, for int8 keys with :func:`balance_keys`. Weights that
    sampling can share are returned as they are.
    """
    devices = 1 if mesh is None else mesh.size
    if shares_weights(model, devices=devices, platform=platform_of(mesh), kv_dtype=kv_dtype):
        return params
    return _compiled_layout(model, mesh, balances_keys(model, kv_dtype))(params)


def rollout_layout(
    model: Decoder, mesh: Mesh | None, *, balance: bool = False
) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """The function, not jitted, that makes the weights for sampling, and its output shardings.

    ``balance`` adds :func:`balance_keys`, which changes no shape.
    """
    shardings = None if mesh is None else param_shardings(model, mesh, layout="rollout")

    def cast(params: PyTree) -> PyTree:
        return model.cast(balance_keys(params) if balance else params)

    if platform_of(mesh) != "gpu":
        return cast, shardings
    single = mesh is None or mesh.size == 1

    def make(params: PyTree) -> PyTree:
        return split_layers(cast(params), join=single)

    if mesh is None:
        return make, None
    if single:
        whole = NamedSharding(mesh, PartitionSpec())
        shapes = jax.eval_shape(make, model.param_shapes())
        return make, jax.tree.map(lambda _: whole, shapes)
    return make, split_shardings(shardings, model.config.num_layers)


def abstract_rollout_params(model: Decoder, mesh: Mesh) -> PyTree:
    """Shapes, types and shardings of the weights for sampling."""
    make, shardings = rollout_layout(model, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(make, model.param_shapes()),
        shardings,
    )


@functools.cache
def _compiled_layout(
    model: Decoder, mesh: Mesh | None, balance: bool
) -> Callable[[PyTree], PyTree]:
    make, shardings = rollout_layout(model, mesh, balance=balance)
    return jax.jit(make, out_shardings=shardings)


def balance_keys(params: PyTree) -> PyTree:
    """The same attention with keys whose channels are of similar size, for one int8 scale.

    A few key biases of Qwen2.5 reach 211, and the largest channel of a key sets the step of all.
    Rotary embedding mixes channel i with i + K/2 only: both are divided by a factor in the key
    projection and multiplied by it in that of the queries, which leaves every score as it is. The
    factor is a power of two, so that it rounds nothing, and 1 for pairs up to the head's median
    size: length of the bias plus one deviation of the rest, as the norm's scale and the kernel
    make it of inputs of variance 1. Source: SmoothAttention of QServe, arXiv 2405.04532.
    """
    layers = params["layers"]
    attention, query, key = layers["attention"], layers["attention"]["q"], layers["attention"]["k"]
    kernel = jax.vmap(plain_kernel)({k: v for k, v in key.items() if k != "lora"})
    norm = layers["attention_norm"]["scale"].astype(jnp.float32)
    scaled = kernel * norm[:, :, None, None]  # [L, D, KV, K]
    size = _pair_length(key["bias"].astype(jnp.float32)) + _pair_length(
        jnp.sqrt(jnp.square(scaled).sum(axis=1))
    )
    median = jnp.maximum(jnp.median(size, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    exponent = jnp.round(jnp.log2(jnp.clip(size / median, 1, 2**16))).astype(jnp.int32)
    factor = jnp.tile(jnp.ldexp(jnp.ones_like(size), exponent), 2)  # [L, KV, K]
    of_query = jnp.repeat(factor, query["kernel"].shape[2] // factor.shape[1], axis=1)
    balanced = {**attention, "q": _times(query, of_query), "k": _times(key, 1 / factor)}
    return {**params, "layers": {**layers, "attention": balanced}}


def _pair_length(x: Array) -> Array:
    """``[L, KV, K]`` to ``[L, KV, K/2]``: the length of each pair of channels that is rotated."""
    pairs = jnp.square(x).reshape(*x.shape[:2], 2, -1)
    return jnp.sqrt(pairs.sum(axis=2))


def _times(projection: PyTree, factor: Array) -> PyTree:
    """A projection with its outputs ``[L, heads, K]`` multiplied by powers of two."""
    # An int8 kernel is multiplied through its factors.
    kernel = "kernel_scale" if "kernel_scale" in projection else "kernel"
    times = {kernel: projection[kernel], "bias": projection["bias"]}
    times = {
        name: values * jnp.expand_dims(factor, range(1, values.ndim - 2)).astype(values.dtype)
        for name, values in times.items()
    }
    if lora := projection.get("lora"):
        times["lora"] = {**lora, "b": lora["b"] * factor[:, None]}
    return {**projection, **times}


def split_layers(params: PyTree, *, join: bool) -> PyTree:
    """The same weights, with a tuple of layers in place of the stack.

    Args:
      params: the weights.
      join: concatenate matrices that multiply the same input, so that they are one product; not
        possible on a mesh that splits them.
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
      body: as for ``lax.scan``; it gets a layer's weights in the model's own structure.
      carry: the input of the first layer.
      params: the weights, stacked or from :func:`split_layers`.
      others: arrays ``[L, ...]``.

    Returns:
      The carry after the last layer, and the results of all layers, ``[L, ...]``.
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
    """Concatenates matrices that multiply the same input: ``[D, sum of their outputs]``."""
    joined = {name: {**part} for name, part in layer.items()}
    for part, names in _SAME_INPUT.items():
        matrices = [layer[part][name]["kernel"] for name in names]
        flat = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
        joined[part]["joined"] = jnp.concatenate(flat, axis=1)
        for name in names:
            joined[part][name] = {k: v for k, v in layer[part][name].items() if k != "kernel"}
    return joined


def _unjoin(model: Decoder, layer: PyTree) -> PyTree:
    """The layer in the model's own structure; XLA turns the parts of a matrix into one product."""
    shapes = model.param_shapes()["layers"]
    parted = {name: {**part} for name, part in layer.items()}
    for part, names in _SAME_INPUT.items():
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
