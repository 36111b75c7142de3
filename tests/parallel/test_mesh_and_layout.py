"""The mesh and the table from logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from echorl_jax.parallel import (
    AXES,
    TABLE,
    ShardingError,
    constrain,
    make_mesh,
    partition_spec,
    sharding_of,
    tree_shardings,
)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 1, devices=jax.devices()[:3]).shape)["fsdp"] == 3


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3, -1, 1), (-1, -1, 1), (0, 8, 1), (16, -1, 1)])
def test_sizes_that_do_not_fit_are_one_line(sizes):
    with pytest.raises(ShardingError) as error:
        make_mesh(*sizes)
    assert "\n" not in str(error.value) and f"data={sizes[0]}" in str(error.value)


def test_every_entry_of_the_table_names_a_mesh_axis():
    for table in TABLE.values():
        assert set(sum(table.values(), ())) <= set(AXES)
    assert TABLE["train"].keys() == TABLE["rollout"].keys()


def test_specs_follow_the_table():
    mesh = make_mesh(2, 2, 2)
    assert partition_spec(("embed", "mlp"), (8, 8), mesh) == P("fsdp", "tensor")
    assert partition_spec(("embed", "mlp"), (8, 8), mesh, "rollout") == P(None, "tensor")
    assert partition_spec(("batch", "length", None), (8, 5, 3), mesh) == P(
        ("data", "fsdp"), None, None
    )


def test_mesh_axes_of_size_one_are_left_out():
    assert partition_spec(("embed", "mlp"), (7, 5), make_mesh(8, 1, 1)) == P(None, None)


def test_two_dimensions_on_one_mesh_axis_collide():
    with pytest.raises(ShardingError, match="'heads' and 'mlp' of one array both map to 'tensor'"):
        partition_spec(("heads", "mlp"), (8, 8), make_mesh(2, 2, 2))


def test_what_does_not_divide():
    mesh = make_mesh(1, 1, 8)
    assert partition_spec(("embed", "kv_heads"), (8, 4), mesh) == P(None, None)
    with pytest.raises(ShardingError, match="mlp of size 12 does not divide over tensor=8"):
        partition_spec(("embed", "mlp"), (8, 12), mesh)


def test_unknown_names_and_wrong_ranks_are_errors():
    with pytest.raises(ShardingError, match="unknown logical axis 'haeds'; known: batch, embed"):
        partition_spec(("haeds",), (8,), make_mesh())
    with pytest.raises(ShardingError, match="2 logical axes"):
        partition_spec(("embed", "mlp"), (8,), make_mesh())


def test_constrain_places_an_activation_only_under_a_mesh():
    x = jnp.zeros((8, 4, 16))
    assert constrain(x, "batch", "length", "feature") is x
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
    assert y.sharding.is_equivalent_to(sharding_of(("batch", "length", "mlp"), x.shape, mesh), 3)
    np.testing.assert_array_equal(x, y)


def test_trees_of_axes_become_trees_of_shardings():
    mesh = make_mesh(1, 4, 2)
    shapes = {"a": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    assert tree_shardings({"a": ("embed", "mlp")}, shapes, mesh)["a"].spec == P("fsdp", "tensor")
    # Whole dimensions at the end are left out, as in the results of programs.
    assert tree_shardings({"a": ("embed", "length")}, shapes, mesh)["a"].spec == P("fsdp")
    whole = tree_shardings({"a": ("length", None)}, shapes, mesh)["a"]
    doubled = jax.jit(lambda x: 2 * x)(jax.device_put(jnp.ones((8, 6)), whole))
    assert whole.spec == P() == doubled.sharding.spec
