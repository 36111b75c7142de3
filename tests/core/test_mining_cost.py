"""The time of mining, compared with the update that it prepares."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax import core

ROWS, LENGTH, PROMPTS, STEPS = 1024, 8192, 128, 512
PARAMETERS = 1.54e9  # Qwen2.5-1.5B


def median_seconds(function, *args) -> float:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    run()
    return statistics.median(run() for _ in range(5))


@pytest.mark.slow
def test_mining_is_under_one_percent_of_an_update():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(LENGTH) < rng.integers(100, LENGTH + 1, ROWS)[:, None])
    tokens = jnp.asarray(rng.integers(0, 40, (ROWS, LENGTH)), jnp.int32)
    entropy = jnp.asarray(rng.gamma(0.3, 1.0, (ROWS, LENGTH)), jnp.float32)
    correct = jnp.asarray(rng.random(ROWS) < 0.6)
    group = jnp.repeat(jnp.arange(PROMPTS), ROWS // PROMPTS)

    @jax.jit
    def mine(entropy, tokens, mask, correct):
        ids = core.step_ids(tokens, mask, jnp.arange(40) == 0)
        clips = core.mine_echo_clips(
            entropy, ids, correct, group, num_groups=PROMPTS, num_steps=STEPS
        )
        return core.clip_weights(clips, (ROWS, LENGTH))

    left, right = jnp.ones((1024, 1536)), jnp.ones((1536, 8960))
    product = median_seconds(jax.jit(jnp.matmul), left, right)
    flops_per_second = 2 * 1024 * 1536 * 8960 / product
    # Forward and backward: 6 operations per parameter and token, at the rate of a product alone.
    update = 6 * PARAMETERS * float(mask.sum()) / flops_per_second
    mining = median_seconds(mine, entropy, tokens, mask, correct)
    print(f"mining {mining:.2f} s, update at least {update:.0f} s, share {mining / update:.1e}")
    assert mining < 0.01 * update
