"""One table from logical to mesh axes, for weights and activations, training and sampling.

Code names what an axis *is* (``heads``, ``mlp``, ``batch``); only this table says where it lives.
The rollout layout is the training layout without the split over ``fsdp``: weights are whole along
``embed``, so that no token waits for a gather.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from echorl_jax.parallel.mesh import AXES, ShardingError
from echorl_jax.types import Array, PyTree

Layout = Literal["train", "rollout"]
Axes = tuple[str | None, ...]

_TRAIN: Mapping[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "norm": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "feature": (),
    # rows at the embedding table, whose features are split over fsdp
    "table_batch": ("data",),
}
TABLE: Mapping[Layout, Mapping[str, tuple[str, ...]]] = {
    "train": _TRAIN,
    "rollout": {**_TRAIN, "embed": ()},
}
# Axes that are kept whole on every device when they do not divide: few KV heads cost little, a
# ragged last batch is small, and an odd vocabulary is that of a tiny model. Any other axis that
# does not divide is an error.
_WHOLE_IF_INDIVISIBLE = frozenset({"kv_heads", "batch", "table_batch", "vocab"})


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh, layout: Layout = "train"
) -> PartitionSpec:
    """Where an array with these logical axes lives on ``mesh``.

    Args:
      axes: one logical name, or None, for each dimension.
      shape: the array's shape.
      mesh: its axis names are those of :func:`make_mesh`.
      layout: column of the table.

    Raises:
      ShardingError: an unknown name, two dimensions on one mesh axis, or a size that does not
        divide.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{len(axes)} logical axes {axes} for shape {tuple(shape)}")
    taken: dict[str, str] = {}
    entries = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = () if name is None else _mesh_axes(name, size, mesh, layout)
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise ShardingError(
                    f"axes {taken[mesh_axis]!r} and {name!r} of one array both map to {mesh_axis!r}"
                )
            taken[mesh_axis] = str(name)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def _mesh_axes(name: str, size: int, mesh: Mesh | AbstractMesh, layout: Layout) -> tuple[str, ...]:
    """The mesh axes of one dimension, or () where it stays whole."""
    table = TABLE[layout]
    if name not in table:
        raise ShardingError(f"unknown logical axis {name!r}; known: {', '.join(sorted(table))}")
    mesh_axes = tuple(axis for axis in table[name] if mesh.shape.get(axis, 1) > 1)
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
    if size % parts == 0:
        return mesh_axes
    if name in _WHOLE_IF_INDIVISIBLE:
        return ()
    split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
    allowed = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 256)
    raise ShardingError(
        f"{name} of size {size} does not divide over {split}; it can be split {allowed} ways"
    )


def sharding_of(
    axes: Axes, shape: Sequence[int], mesh: Mesh, layout: Layout = "train"
) -> NamedSharding:
    """:func:`partition_spec` as a sharding."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, layout))


def tree_shardings(axes: PyTree, shapes: PyTree, mesh: Mesh, layout: Layout = "train") -> PyTree:
    """Shardings for a tree of arrays.

    Args:
      axes: tree of tuples of logical names.
      shapes: the same tree, of anything with a ``shape``.
      mesh: the mesh.
      layout: column of the table.
    """
    return jax.tree.map(
        lambda names, leaf: sharding_of(names, leaf.shape, mesh, layout),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def local_bytes(
    axes: PyTree, shapes: PyTree, mesh: Mesh | AbstractMesh | None, layout: Layout = "train"
) -> int:
    """Bytes that a tree of arrays takes on one device.

    Args:
      axes: tree of tuples of logical names.
      shapes: the same tree, of anything with a ``shape`` and a ``dtype``.
      mesh: the mesh; one device unless given.
      layout: column of the table.
    """

    def size(names: Axes, leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape
        if mesh is not None:
            spec = partition_spec(names, shape, mesh, layout)
            shape = NamedSharding(mesh, spec).shard_shape(shape)
        return math.prod(shape) * leaf.dtype.itemsize

    sizes = jax.tree.map(size, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return sum(jax.tree.leaves(sizes))


def mesh_in_force() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh``, if it is one of :func:`make_mesh` and not taken by hand.

    A program with a mesh of its own, or a ``shard_map`` around this code, keeps its own layout.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours else None


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation to its place in the table under :func:`mesh_in_force`; else returns it."""
    mesh = mesh_in_force()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
