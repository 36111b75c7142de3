"""Loads and saves Hugging Face model directories.

A checkpoint is read one tensor at a time, and of each tensor only the slices for the devices of
this process. Layers are written into their stacked array in place, so host memory stays near the
size of the largest tensor.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from echorl_jax.choices import Kernel, Remat
from echorl_jax.files import replace_json
from echorl_jax.models.config import ModelError
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.hf_config import read_config, to_hf
from echorl_jax.models.hf_names import TensorName, published_names, tensor_names
from echorl_jax.models.initialise import param_shardings, quantised
from echorl_jax.models.lora import plain_kernel
from echorl_jax.models.peft import load_adapter
from echorl_jax.models.repositories import local_directory
from echorl_jax.models.tensor_files import (
    StoredTensor,
    TensorSource,
    stored_tensors,
    write_tensors,
)
from echorl_jax.parallel import Layout
from echorl_jax.types import Array, PyTree

# Most tensors of each kind that an error names.
NAMED = 3


class Tokenizer(Protocol):
    """An object that can write itself into a directory, such as a transformers tokenizer."""

    def save_pretrained(self, save_directory: str) -> Any: ...


def load_decoder(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    remat: Remat = "layer",
    attention: Kernel = "auto",
) -> Decoder:
    """The model of a directory or repository id, without its weights."""
    config = read_config(local_directory(path))
    types = jnp.dtype(dtype).name, jnp.dtype(param_dtype).name
    return Decoder(config, *types, remat, attention)


def load_model(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    remat: Remat = "layer",
    attention: Kernel = "auto",
    layout: Layout = "train",
    adapter: str | Path = "",
) -> tuple[Decoder, PyTree]:
    """Reads a Hugging Face directory.

    Args:
      path: directory with ``config.json`` and safetensors, ``builtin:countdown``, or a repository
        id (needs the extra ``[hf]`` and a network).
      dtype: of activations and matrix products.
      mesh: where the weights go; the first device unless given.
      param_dtype: of the weights, which may be stored in another type; "int8" for kernels of
        layers, with all else in bfloat16.
      remat: what the backward pass recomputes.
      attention: attention kernel.
      layout: column of the sharding table.
      adapter: PEFT directory of LoRA weights, which stay apart; "" is none.

    Returns:
      The static model and its params pytree.

    Raises:
      ModelError: unsupported architecture, field or adapter; tensors that are missing, surplus,
        misshapen or not finite; no safetensors.
    """
    directory = local_directory(path)
    model = load_decoder(
        directory, dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention
    )
    stored = published_names(stored_tensors(directory))
    names = list(tensor_names(model))
    _check(directory, names, stored, tied=model.config.tied_embeddings)
    first = SingleDeviceSharding(jax.local_devices()[0])
    shapes = model.param_shapes()
    shardings = jax.tree.map(lambda _: first, shapes)
    if mesh is not None:
        shardings = param_shardings(model, mesh, layout=layout)
    params: dict[str, Any] = {}
    loaded = []
    for name in names:
        *parents, leaf = name.path
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)
        arrays = _load(name, stored, _at(shardings, parents), _at(shapes, parents))
        node |= arrays
        # int8 has no NaN, but its factors have.
        loaded.append((name, arrays.get(f"{leaf}_scale", arrays[leaf])))
    _require_finite(directory, loaded)
    if adapter:
        return load_adapter(adapter, model, params, mesh=mesh, layout=layout)
    return model, params


def save_model(
    path: str | Path,
    model: Decoder,
    params: PyTree,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str | None = None,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes a directory that transformers loads; adapters are added to their kernels.

    Every process of a multi-process run calls this; the first one writes.

    Args:
      path: the directory, created if missing.
      tokenizer: written to the same directory if given.
      dtype: of the stored tensors; unless given the type the model was loaded from, so that a round
        trip is bit-identical.
      shard_bytes: size of the largest file; one file is held in host memory while it is written.
    """
    directory = Path(path)
    stored_dtype = np.dtype(dtype or model.config.stored_dtype)
    sources = {
        stored: TensorSource(
            name.stored_shape,
            functools.partial(_fetch, name, params, layer, stored_dtype.name),
        )
        for name in tensor_names(model)
        for layer, stored in enumerate(name.stored)
    }
    if jax.process_index() != 0:
        for source in sources.values():
            source.fetch()
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, sources, stored_dtype, shard_bytes=shard_bytes)
    config = to_hf(model.config) | {"torch_dtype": stored_dtype.name}
    replace_json(directory / "config.json", config)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    replace_json(directory / "generation_config.json", ends)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _check(
    directory: Path, names: list[TensorName], stored: dict[str, StoredTensor], *, tied: bool
) -> None:
    """Raises ModelError for tensors that are missing, surplus or of another shape."""
    shapes = {tensor: name.stored_shape for name in names for tensor in name.stored}
    missing = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in stored]
    surplus = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in stored.items()
        if name not in shapes and not _redundant(name, stored, tied=tied)
    ]
    wrong = [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "misshapen": wrong}
    problems = [f"{kind} tensor(s): {_some(items)}" for kind, items in kinds.items() if items]
    if problems:
        raise ModelError(f"{directory}: {'; '.join(problems)}")


def _require_finite(directory: Path, loaded: list[tuple[TensorName, Array]]) -> None:
    """Raises ModelError for NaN and infinity: a run that diverged, or a type that is too narrow."""
    values = [array for _, array in loaded]
    stacked = tuple(name.stacked for name, _ in loaded)
    not_finite = _not_finite(stacked, tuple(array.sharding for array in values))
    wrong = [
        tensor
        for (name, _), layers in zip(loaded, jax.device_get(not_finite(values)), strict=True)
        for tensor, bad in zip(name.stored, layers.flat, strict=True)
        if bad
    ]
    if wrong:
        raise ModelError(f"{directory}: values that are not finite: {_some(wrong)}")


@functools.cache
def _not_finite(
    stacked: tuple[bool, ...], shardings: tuple[Any, ...]
) -> Callable[[list[Array]], list[Array]]:
    """A function that flags parameters with NaN or infinity, for each layer of stacked ones."""
    mesh = shardings[0].mesh if isinstance(shardings[0], NamedSharding) else None

    def flags(values: list[Array]) -> list[Array]:
        # max() propagates NaN within a shard, and psum shares the flag; a boolean array would cost
        # as much memory as the weights.
        largest = [
            jnp.abs(v).max(axis=tuple(range(int(layers), v.ndim)))
            for layers, v in zip(stacked, values, strict=True)
        ]
        bad = [jnp.where(jnp.isfinite(m), 0.0, 1.0) for m in largest]
        return bad if mesh is None else jax.lax.psum(bad, mesh.axis_names)

    if mesh is None:
        return jax.jit(flags)
    specs = [sharding.spec for sharding in shardings]
    return jax.jit(
        jax.shard_map(
            flags, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
        )
    )


def _redundant(name: str, stored: dict[str, StoredTensor], *, tied: bool) -> bool:
    """True for rope tables of old files, and for an output projection equal to a tied embedding."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    embedding = stored.get("model.embed_tokens.weight")
    if not (tied and name == "lm_head.weight" and embedding):
        return False
    head = stored[name]
    return head.shape == embedding.shape and bool(np.array_equal(head.view(), embedding.view()))


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + rest


def _load(
    name: TensorName, stored: dict[str, StoredTensor], shardings: PyTree, shapes: PyTree
) -> dict[str, Array]:
    """Loads one parameter into its shards; an int8 kernel with its factors.

    Args:
      name: of the parameter.
      stored: all tensors.
      shardings, shapes: of the parameters beside this one, by their last names.
    """
    leaf = name.path[-1]
    if not name.stacked:
        whole = _device_array(name, stored[name.stored[0]], shardings[leaf])
        return {leaf: whole.astype(shapes[leaf].dtype)}
    kept = [key for key in (leaf, f"{leaf}_scale") if key in shapes]
    places, like = {k: shardings[k] for k in kept}, {k: shapes[k] for k in kept}
    one = places[leaf]
    if isinstance(one, NamedSharding):
        one = NamedSharding(one.mesh, PartitionSpec(*one.spec[1:]))
    stack = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), out_shardings=places
    )()
    write = jax.jit(_write_layer, static_argnames="inputs", donate_argnums=0, out_shardings=places)
    for layer, tensor in enumerate(name.stored):
        values = _device_array(name, stored[tensor], one)
        stack = write(stack, values, layer, inputs=name.inputs)
        # Wait, or the host copies of all layers exist at once.
        jax.block_until_ready(stack)
    return stack


def _write_layer(
    stack: dict[str, Array], values: Array, layer: Array, *, inputs: int
) -> dict[str, Array]:
    parts = (values,) if len(stack) == 1 else quantised(values, inputs=inputs)
    return {
        name: jax.lax.dynamic_update_index_in_dim(array, part.astype(array.dtype), layer, 0)
        for (name, array), part in zip(stack.items(), parts, strict=True)
    }


def _device_array(name: TensorName, tensor: StoredTensor, sharding: Any) -> Array:
    """A stored tensor as a sharded array of the same dtype; each device reads only its slice."""
    view = name.from_stored(tensor.view())
    if view.dtype == np.float64:
        view = view.astype(np.float32)
    return jax.make_array_from_callback(
        name.shape, sharding, lambda index: np.ascontiguousarray(view[index])
    )


def _fetch(name: TensorName, params: PyTree, layer: int, dtype: str) -> np.ndarray:
    """One layer's values on the host, gathered from all devices and laid out as stored.

    An adapter is added to its kernel.
    """
    values, beside = _at(params, name.path), _at(params, name.path[:-1])
    replicated = None
    if isinstance(values.sharding, NamedSharding):
        replicated = NamedSharding(values.sharding.mesh, PartitionSpec())
    plain = not {"lora", "kernel_scale"} & beside.keys() or name.path[-1] != "kernel"

    def gather(values: PyTree, layer: Array) -> Array:
        one = jax.tree.map(lambda x: x[layer], values) if name.stacked else values
        one = one if plain else plain_kernel(one)
        return name.to_stored(one.astype(dtype), jnp)

    given = values if plain else beside
    return np.asarray(jax.jit(gather, out_shardings=replicated)(given, layer))


def _at(tree: PyTree, path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, tree)
