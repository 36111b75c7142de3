"""Schedule and optimizer, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.training.optimizer import learning_rate_schedule, make_optimizer


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
