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
from echorl_jax.parallel.mesh import AXES, Platform, ShardingError, make_mesh, platform_of
from echorl_jax.parallel.processes import (
    any_process,
    from_first,
    from_shares,
    is_first,
    join_processes,
    on_first,
    own_share,
    place_rows,
    place_whole,
    smallest,
    texts_from_shares,
    wait_for_all,
)

__all__ = [
    "AXES",
    "TABLE",
    "Layout",
    "Platform",
    "ShardingError",
    "any_process",
    "constrain",
    "from_first",
    "from_shares",
    "is_first",
    "join_processes",
    "make_mesh",
    "mesh_in_force",
    "on_first",
    "own_share",
    "partition_spec",
    "place_rows",
    "place_whole",
    "platform_of",
    "sharding_of",
    "smallest",
    "texts_from_shares",
    "tree_shardings",
    "wait_for_all",
]
