"""The optimizer and the state it moves."""

import functools

import jax
import jax.numpy as jnp
import optax

from echorl_jax.types import Array, PyTree, pytree


@pytree
class TrainState:
    """All that changes from step to step on the device."""

    params: PyTree  # f32 master weights
    opt_state: PyTree
    step: Array  # i32 [], training steps done
    bad_updates: Array  # i32 [], updates in a row skipped for a non-finite gradient


@functools.cache
def learning_rate_schedule(
    *, peak: float, warmup_steps: int, total_steps: int, kind: str
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then constant or a cosine to 0 at ``total_steps``.

    The first update of a warm-up of n steps uses ``peak / n``, so that it does something.
    """
    rest = max(total_steps - warmup_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, rest)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


@functools.cache
def make_optimizer(
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW after global-norm clipping; decay touches matrices only, not biases and norm scales.

    Its learning rate is 1: the update multiplies by the schedule's value at the training step, so
    that several updates in a step share one rate.

    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(1.0, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=_is_matrix),
    )


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; the optimizer's moments take the shardings of the parameters."""
    opt_state = jax.jit(optimizer.init)(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _is_matrix(params: PyTree) -> PyTree:
    def decays(path: tuple, leaf: Array) -> bool:
        del leaf
        return path[-1].key in ("kernel", "table")

    return jax.tree_util.tree_map_with_path(decays, params)
