"""The device mesh, and the table that says which mesh axes a logical axis is split over."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from echorl_jax.errors import UserError
from echorl_jax.types import Array, PyTree

AXES = ("data", "fsdp", "tensor")
Platform = Literal["cpu", "gpu", "tpu"]


class ShardingError(UserError):
    """A mesh or a layout that the devices or the shapes do not allow: one line for the user."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges the devices along the axes ``data``, ``fsdp`` and ``tensor``.

    The axes are of type Auto: the compiler chooses the collectives, and the few places where a
    choice matters are constrained by hand.

    Args:
      data: copies of the model, each with its own rows.
      fsdp: devices that share one copy of the weights, and also split the rows.
      tensor: devices that split heads, the MLP and the vocabulary.
      devices: all devices of all processes unless given.

    One size may be -1: it takes the devices that are left.

    Returns:
      The mesh, to be entered with ``jax.set_mesh``.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    count = len(devices) if devices is not None else jax.device_count()
    shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ShardingError(f"mesh {shape}: sizes are positive, and at most one is -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = count // known
    if math.prod(sizes.values()) != count:
        raise ShardingError(f"mesh {shape} does not fit {count} device(s)")
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def platform_of(mesh: Mesh | None) -> Platform:
    """The platform of the mesh; without a mesh, the default of this machine."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return name if name in ("cpu", "gpu") else "tpu"


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
    "rank": (),
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
    """The sharding on ``mesh`` of an array with these logical axes.

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
    """:func:`partition_spec` as a sharding, without whole dimensions at its end.

    So compilers return it, and JAX takes the two for different arguments of a program: parameters
    of an update would ask for other programs than the first ones.
    """
    entries = list(partition_spec(axes, shape, mesh, layout))
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def tree_shardings(axes: PyTree, shapes: PyTree, mesh: Mesh, layout: Layout = "train") -> PyTree:
    """Shardings for a tree of arrays.

    Args:
      axes: tree of tuples of logical names.
      shapes: the same tree, of anything with a ``shape``.
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

    A program with another mesh, or a ``shard_map`` around this code, keeps its layout.
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
