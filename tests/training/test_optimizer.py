"""Schedule and optimizer, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.data.tokens import BUILTIN
from echorl_jax.models import init_params, load_decoder
from echorl_jax.parallel import make_mesh
from echorl_jax.training.optimizer import init_state, learning_rate_schedule, make_optimizer


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        # Of eight steps the last two fall from 1 to the floor of a quarter at step 8.
        ("wsd", 2, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.625]),
        ("linear", 0, [1 - 0.75 * step / 8 for step in range(8)]),
        ("constant", 0, [1.0] * 8),
        ("constant", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # After two steps of warm-up a cosine over the six that are left.
        ("cosine", 2, [0.5, 1.0, *(0.25 + 0.375 * (1 + np.cos(np.pi * np.arange(6) / 6)))]),
    ],
)
def test_schedule(kind: str, warmup: int, expected: list[float]) -> None:
    schedule = learning_rate_schedule(
        peak=1.0, warmup_steps=warmup, total_steps=8, kind=kind, min_ratio=0.25, decay_ratio=0.25
    )
    assert np.allclose([float(schedule(step)) for step in range(8)], expected, atol=1e-6)


def test_first_adamw_step_by_hand() -> None:
    # One step of Adam moves each entry by 1 against its sign; the matrix also shrinks by its decay.
    optimizer = make_optimizer(beta1=0.9, beta2=0.999, weight_decay=0.1, max_grad_norm=10.0)
    params = {"layer": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}}
    gradient = {"layer": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full((2,), -0.5)}}
    with jax.numpy_dtype_promotion("standard"):  # as the update step does
        changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert np.allclose(changes["layer"]["kernel"], -1.0 - 0.1 * 3.0, atol=1e-5)
    assert np.allclose(changes["layer"]["bias"], 1.0, atol=1e-5)


def test_first_muon_step_is_orthogonal_for_each_layer_and_adams_elsewhere() -> None:
    """Singular values about 1 times 0.2 sqrt(the longer side); along U V of the gradient."""
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(
        beta1=0.9, beta2=0.999, weight_decay=0.1, max_grad_norm=1e9, kind="muon"
    )
    shapes = {"up": (2, 6, 12), "q": (2, 8, 2, 3), "o": (2, 2, 3, 8)}
    draws = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    tree = {
        "layers": {name: {"kernel": jnp.array(draw, jnp.float32)} for name, draw in draws.items()},
        "embed": {"table": jnp.full((3, 2), 0.5)},
    }
    params = jax.tree.map(jnp.ones_like, tree)
    with jax.numpy_dtype_promotion("standard"):
        changes, _ = jax.jit(optimizer.update)(tree, optimizer.init(params), params)
    matrices = {"up": (6, 12), "q": (8, 6), "o": (6, 8)}
    for name, (rows, columns) in matrices.items():
        for layer in range(2):
            given = draws[name][layer].reshape(rows, columns)
            change = np.array(changes["layers"][name]["kernel"][layer]).reshape(rows, columns)
            step = -(change + 0.1) / (0.2 * max(rows, columns) ** 0.5)  # without the decay
            u, _, v = np.linalg.svd(given, full_matrices=False)
            along = u.T @ step @ v.T
            assert np.all((np.diag(along) > 0.6) & (np.diag(along) < 1.3))
            np.testing.assert_allclose(along - np.diag(np.diag(along)), 0, atol=1e-3)
    np.testing.assert_allclose(changes["embed"]["table"], -1.0 - 0.1, atol=1e-4)


def test_muons_state_lies_as_the_parameters_and_its_step_is_the_same_on_a_mesh() -> None:
    model = load_decoder(str(BUILTIN["builtin:countdown"]), dtype="float32")
    optimizer = make_optimizer(
        beta1=0.9, beta2=0.99, weight_decay=0.1, max_grad_norm=1.0, kind="muon"
    )
    found = []
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        params = init_params(model, jax.random.key(0), mesh=mesh)
        state = init_state(params, optimizer, mesh)
        shardings = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
        assert all(leaf.sharding == shardings[leaf.shape] for leaf in moments)
        with jax.numpy_dtype_promotion("standard"):
            gradient = jax.tree.map(jnp.sin, params)
            changes, _ = jax.jit(optimizer.update)(gradient, state.opt_state, params)
        found.append(jax.device_get(changes))
    for one, several in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, several, atol=1e-3)
