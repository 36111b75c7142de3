"""What ``import echorl_jax as echo`` offers."""

import jax.numpy as jnp
import pytest

import echorl_jax as echo


def test_dir_lists_the_method_and_no_tables_of_the_mesh() -> None:
    names = dir(echo)
    method = {"mine_echo_clips", "echo_loss", "step_ids", "group_advantages", "OBJECTIVES"}
    assert method | {"EchoClips", "load_model", "generate", "newline_delimiters"} <= set(names)
    assert not {"AXES", "TABLE", "partition_spec", "from_shares", "PoolError"} & set(names)
    assert all(hasattr(echo, name) for name in names)
    assert echo.TABLE and echo.newline_delimiters  # still there by name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="mine_clips"):
        echo.mine_clips  # noqa: B018


def test_the_builtin_model_loads_by_its_name() -> None:
    model, params = echo.load_model("builtin:countdown", dtype="float32")
    logits = model.logits(params, jnp.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, model.config.vocab_size) and bool(jnp.isfinite(logits).all())
