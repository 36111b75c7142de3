"""The optimizer and the state it moves."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.parallel import place_whole
from echorl_jax.types import Array, PyTree, pytree


@pytree
class TrainState:
    """All that changes from step to step on the device."""

    params: PyTree  # f32 master weights, or with LoRA the adapters alone
    opt_state: PyTree
    step: Array  # i32 [], training steps done
    bad_updates: Array  # i32 [], updates in a row skipped for a non-finite gradient


@functools.cache
def learning_rate_schedule(
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    kind: str,
    min_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then a course that reaches its floor at ``total_steps``.

    The first update of a warm-up of n steps uses ``peak / n``, so that it does something.

    Args:
      kind: constant; linear or cosine down to the floor; wsd: constant, then linear to the floor
        over the last part (arXiv 2404.06395).
      min_ratio: the floor over ``peak``.
      decay_ratio: the last part of wsd over ``total_steps``.
    """
    rest = max(total_steps - warmup_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=min_ratio)
    else:
        fall = rest if kind == "linear" else min(max(round(decay_ratio * total_steps), 1), rest)
        after = optax.linear_schedule(peak, min_ratio * peak, fall, rest - fall)
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
    moment_dtype: str = "float32",
    kind: str = "adamw",
) -> optax.GradientTransformation:
    """AdamW or Muon after global-norm clipping; decay touches matrices only, not biases and scales.

    Muon makes the momentum of each layer's matrices orthogonal, with one moment in place of two;
    the rest is AdamW's. Its updates have AdamW's size (a mean square of 0.2 squared), so that
    learning rates carry over. A matrix has one input side and one output side, heads merged.

    ``moment_dtype`` is the type that the first moment is kept in; the second stays float32, since
    its small values would be lost.

    Its learning rate is 1: the update multiplies by the schedule's value at the training step, so
    that several updates in a step share one rate.

    Sources: Loshchilov and Hutter, arXiv 1711.05101; Muon as in Moonlight, arXiv 2502.16982.
    """
    rule = optax.adamw(
        1.0,
        b1=beta1,
        b2=beta2,
        mu_dtype=moment_dtype,
        weight_decay=weight_decay,
        mask=_is_matrix,
    )
    if kind == "muon":
        muon = optax.contrib.muon(
            1.0,
            mu_dtype=moment_dtype,
            weight_decay=weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrix_axes,
        )
        # The Adam inside optax's Muon is Nesterov's, which AdamW's is not.
        rule = optax.partition({"muon": muon, "adamw": rule}, _labels)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)


def init_state(params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state at step 0; the optimizer's moments take the shardings of the parameters."""
    init = jax.jit(optimizer.init, out_shardings=_moment_shardings(params, optimizer, mesh))
    zero = np.zeros((), np.int32)
    return TrainState(params, init(params), place_whole(zero, mesh), place_whole(zero, mesh))


def abstract_state(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """:func:`init_state` of ``jax.ShapeDtypeStruct`` with shardings: no array is made."""

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shardings = _moment_shardings(params, optimizer, mesh)
    opt_state = jax.tree.map(placed, jax.eval_shape(optimizer.init, params), shardings)
    count = placed(jax.ShapeDtypeStruct((), np.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(params, opt_state, count, count)  # pyright: ignore[reportArgumentType]


def _moment_shardings(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> PyTree:
    """A moment lies as the parameter that its path ends with; counters are whole everywhere."""
    whole = NamedSharding(mesh, PartitionSpec())
    known = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path: tuple, _: jax.ShapeDtypeStruct) -> NamedSharding:
        ends = (path[start:] for start in range(len(path)))
        return next((known[end] for end in ends if end in known), whole)

    state = jax.eval_shape(optimizer.init, params)
    return jax.tree_util.tree_map_with_path(sharding, state)


def orthogonalised(path: tuple) -> bool:
    """True for the layers' matrices, the parameters that Muon has one moment for."""
    names = [getattr(entry, "key", "") for entry in path]
    return names[:1] == ["layers"] and names[-1] == "kernel"


def _labels(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if orthogonalised(path) else "adamw", params
    )


def _matrix_axes(params: PyTree) -> PyTree:
    """The sides of the layers' matrices, which are stacked along axis 0; None for the rest."""

    def sides(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not orthogonalised(path):
            return None
        # [L, in, out]; queries, keys and values [L, in, heads, size]; their output [L, heads, size,
        # out].
        split = leaf.ndim - 1 if path[-2].key == "o" else 2
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, split)), tuple(range(split, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(sides, params)


def _is_matrix(params: PyTree) -> PyTree:
    def decays(path: tuple, leaf: Array) -> bool:
        del leaf
        return path[-1].key in ("kernel", "table", "a", "b")

    return jax.tree_util.tree_map_with_path(decays, params)
