"""Frozen and trainable parameters: the gradient of a part is that part of the whole gradient."""

from typing import Any

import jax
import numpy as np
import pytest

from echorl_jax.config import Config
from echorl_jax.core import OBJECTIVES
from echorl_jax.models import init_params, merge
from echorl_jax.parallel import make_mesh
from echorl_jax.training.optimizer import init_state
from echorl_jax.training.setup import Setup, static_setup
from echorl_jax.training.update import apply_update, micro_gradient
from echorl_jax.types import TrainBatch
from tests.rollout.conftest import VOCAB, decoder


def batch_of(rows: int, width: int) -> TrainBatch:
    draw = np.random.default_rng(0)
    mask = np.ones((rows, width), np.float32)
    return TrainBatch.plain(
        tokens=draw.integers(0, VOCAB, (rows, 4 + width)).astype(np.int32),
        prompt_length=np.full(rows, 4, np.int32),
        length=np.full(rows, 4 + width, np.int32),
        loss_mask=mask,
        advantages=draw.normal(size=rows).astype(np.float32),
        old_logprobs=-mask,
        token_weights=mask / mask.size,
        on_policy=np.ones(rows, bool),
    )


def parts(params: Any, name: str) -> tuple[Any, Any]:
    """All parameters but those under a name, and those."""
    return {k: v for k, v in params.items() if k != name}, {name: params[name]}


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_only_the_trainable_half_has_gradients_moments_and_changes(axes: dict[str, int]) -> None:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = make_mesh(**axes, devices=devices)
    model = decoder()
    setup: Setup = static_setup(Config(), mesh, model, OBJECTIVES["dr_grpo"], platform="cpu")
    params = init_params(model, jax.random.key(0), mesh=mesh)
    micro = batch_of(8, 6)
    whole = micro_gradient(setup, params, micro, echo_coef=0.0)
    name = next(iter(params))
    frozen, trainable = parts(params, name)
    part = micro_gradient(setup, trainable, micro, echo_coef=0.0, frozen=frozen)
    assert part.loss == whole.loss
    assert jax.tree.structure(part.gradient) == jax.tree.structure(trainable)
    for ours, theirs in zip(
        jax.tree.leaves(part.gradient), jax.tree.leaves(whole.gradient[name]), strict=True
    ):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    before = jax.device_get(trainable)
    state = init_state(trainable, setup.optimizer, mesh)
    state, stats = apply_update(setup, state, [micro], echo_coef=0.0, frozen=frozen)
    assert bool(stats.finite)
    assert jax.tree.structure(state.params) == jax.tree.structure(trainable)
    merged = merge(frozen, state.params)
    assert merged.keys() == params.keys()
    changes = jax.tree.map(lambda new, old: np.abs(new - old).max(), merged[name], before[name])
    assert min(jax.tree.leaves(changes)) > 0


def test_a_parameter_is_frozen_or_trained() -> None:
    with pytest.raises(ValueError, match="both frozen and trainable"):
        merge({"layer": {"kernel": 1}}, {"layer": {"kernel": 2}})
