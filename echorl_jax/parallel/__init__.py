"""The device mesh and the one table that says where arrays live on it."""

from echorl_jax.parallel.layout import (
    TABLE,
    Layout,
    constrain,
    mesh_in_force,
    partition_spec,
    sharding_of,
    tree_shardings,
)
from echorl_jax.parallel.mesh import AXES, ShardingError, make_mesh

__all__ = [
    "AXES",
    "TABLE",
    "Layout",
    "ShardingError",
    "constrain",
    "make_mesh",
    "mesh_in_force",
    "partition_spec",
    "sharding_of",
    "tree_shardings",
]
