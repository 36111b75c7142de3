"""Checksums of arrays that are the same on any mesh, and of JSON."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from echorl_jax.types import Array, PyTree


def digest(content: Any) -> str:
    """SHA-256 of the JSON text of a value.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checksums(tree: PyTree) -> dict[str, int]:
    """One number below 2**32 for each array, by its path in the tree.

    It is the sum of the array's words, each times an odd number that belongs to its place, modulo
    2**32: exact in any order, so that the sharding does not matter, and computed where the array
    lives. A change of any single word changes it.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    values = jax.device_get(_checksums(jax.tree.leaves(tree)))
    return {path: int(value) for path, value in zip(paths, values, strict=True)}


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(array: Array) -> Array:
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    words = words.astype(jnp.uint32)
    place, stride = jnp.ones(array.shape, jnp.uint32), 2
    for axis in reversed(range(array.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place += steps * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(words * place, dtype=jnp.uint32)
