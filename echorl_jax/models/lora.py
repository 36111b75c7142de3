"""Low-rank adapters beside frozen weights, which may be int8.

A linear with an adapter has ``lora`` beside ``kernel``, and in it ``a`` ``[L, in..., r]``, ``b``
``[L, r, out...]`` and ``scale`` ``[L, 1]``, without L outside layers. Only a and b are trained. A
layer of a lower rank has zeros in the rest of a and b, whose gradients are zero.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from echorl_jax.choices import LoraInit
from echorl_jax.models.config import LINEAR_PATHS, Adapted, Lora
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.initialise import merge, param_shardings
from echorl_jax.parallel import Layout
from echorl_jax.types import Array, PyTree


def split_params(model: Decoder, params: PyTree) -> tuple[PyTree, PyTree]:
    """The frozen and the trainable parameters, for :func:`merge`; None is frozen if all train."""
    if model.lora is None and not model.frozen:
        return None, params

    def trained(path: tuple[str, ...]) -> bool:
        adapter = "lora" in path and path[-1] in ("a", "b")
        return path[0] not in model.frozen and (model.lora is None or adapter)

    return _where(params, lambda path: not trained(path)), _where(params, trained)


def base_params(params: PyTree) -> PyTree:
    """The parameters of ``model.base``: the same arrays, without adapters."""
    return _where(params, lambda path: "lora" not in path)


def _where(
    tree: PyTree, keep: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> PyTree:
    """The leaves of nested dicts whose path is kept; dicts that become empty go."""
    kept = {}
    for name, node in tree.items():
        place = (*path, name)
        if not isinstance(node, dict):
            if keep(place):
                kept[name] = node
        elif part := _where(node, keep, place):
            kept[name] = part
    return kept


def with_adapters(
    model: Decoder,
    params: PyTree,
    lora: Lora,
    adapters: PyTree,
    mesh: Mesh | None = None,
    *,
    layout: Layout = "train",
) -> tuple[Decoder, PyTree]:
    """The model and its parameters with adapters.

    Args:
      model, params: the model without adapters.
      lora: their ranks and factors.
      adapters: a and b, from :func:`init_adapters`, or of NumPy from a file.
      mesh: where the parameters are; one device unless given.
      layout: column of the sharding table.
    """
    model = dataclasses.replace(model, lora=lora)
    scales = {
        one.linear: of_layers(one.linear, np.array(lora.scales(one), np.float32)[:, None])
        for one in lora.adapted
    }
    scales = {linear: {"lora": {"scale": scale}} for linear, scale in scales.items()}
    placed = _placed(model, merge(by_linear(scales), adapters), mesh, layout)
    return model, merge(params, placed)


def _placed(model: Decoder, tree: PyTree, mesh: Mesh | None, layout: Layout) -> PyTree:
    """Arrays of the host where those parameters of the model lie; others as they are."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def place(shardings: PyTree, node: PyTree) -> PyTree:
        if isinstance(node, dict):
            return {name: place(shardings[name], part) for name, part in node.items()}
        if not isinstance(node, np.ndarray):
            return node
        return jax.make_array_from_callback(node.shape, shardings, lambda index: node[index])

    return place(param_shardings(model, mesh, layout=layout), tree)


def by_linear(parts: dict[str, Any]) -> PyTree:
    """A parameter tree from what belongs to each linear."""
    tree: dict[str, Any] = {}
    for name, part in parts.items():
        *above, last = LINEAR_PATHS[name]
        functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)[last] = part
    return tree


def of_layers(linear: str, values: Any) -> Any:
    """Values ``[L, ...]`` of a linear as its parameters are: without L outside layers."""
    return values if "layers" in LINEAR_PATHS[linear] else values[0]


def init_adapters(
    model: Decoder, lora: Lora, key: Array, *, init: LoraInit, mesh: Mesh | None = None
) -> PyTree:
    """Fresh adapters, which change nothing yet: b is zero, and a is drawn as PEFT does.

    "kaiming" draws a from U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming's with a slope of sqrt(5);
    "gaussian" from N(0, 1/r^2). The values depend on the key alone, not on the mesh.
    """
    model = dataclasses.replace(model, lora=lora)
    shapes = split_params(model, model.param_shapes())[1]
    draw = functools.partial(_draw, shapes, lora, init)
    if mesh is None:
        return jax.jit(draw)(key)
    return jax.jit(draw, out_shardings=split_params(model, param_shardings(model, mesh))[1])(key)


def _draw(shapes: PyTree, lora: Lora, init: LoraInit, key: Array) -> PyTree:
    drawn = {}
    for number, (one, linear) in enumerate(linears(lora, shapes)):
        a, b = (linear["lora"][name] for name in "ab")
        inputs = a.shape[1 if "layers" in LINEAR_PATHS[one.linear] else 0 : -1]
        bound = 1 / math.sqrt(math.prod(inputs))
        own = jax.random.fold_in(key, number)
        if init == "kaiming":
            values = jax.random.uniform(own, a.shape, minval=-bound, maxval=bound)
        else:
            values = jax.random.normal(own, a.shape) / a.shape[-1]
        used = np.arange(a.shape[-1]) < np.array(one.ranks)[:, None]  # [L, r]
        used = of_layers(one.linear, used.reshape(len(one.ranks), *(1,) * len(inputs), -1))
        drawn[one.linear] = {"lora": {"a": jnp.where(used, values, 0), "b": jnp.zeros(b.shape)}}
    return by_linear(drawn)


def linears(lora: Lora, params: PyTree) -> Iterator[tuple[Adapted, PyTree]]:
    """Each adapted linear with its parameters."""
    for one in lora.adapted:
        yield one, functools.reduce(operator.getitem, LINEAR_PATHS[one.linear], params)


def plain_kernel(linear: PyTree) -> Array:
    """One layer's kernel in f32, with int8 read and the adapter added: W + s A B."""
    kernel = linear["kernel"].astype(jnp.float32)
    if "kernel_scale" in linear:
        kernel = kernel * jnp.broadcast_to(linear["kernel_scale"], kernel.shape)
    if "lora" in linear:
        lora = linear["lora"]
        product = jnp.tensordot(lora["a"], lora["b"], axes=1, precision="highest")
        kernel = kernel + lora["scale"][0] * product
    return kernel
