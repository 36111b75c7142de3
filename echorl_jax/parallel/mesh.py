"""The device mesh: three axes whose names are words, whatever the number of hosts."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh

from echorl_jax.errors import UserError

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
    """What programs for the mesh are compiled for; without one, for this machine's default."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return name if name in ("cpu", "gpu") else "tpu"
