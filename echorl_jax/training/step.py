"""The update: gradients summed over micro-batches, then one optimizer step. Pure and jitted."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.core import LOSS_TERMS, Objective, batch_loss
from echorl_jax.errors import RunStopped
from echorl_jax.models import Decoder, param_shardings
from echorl_jax.parallel import place_rows
from echorl_jax.rollout import score_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.setup import Setup
from echorl_jax.types import Array, LossTerm, Metrics, PyTree, TrainBatch, pytree

# Mean of |trainer - sampler| over sampled tokens before the update, nats.
GAP_MEAN = "rollout/logprob_gap_mean"
# Share of those tokens that are further apart than WIDE_GAP nats.
GAP_WIDE = "rollout/logprob_gap_wide_fraction"
WIDE_GAP = 0.5


class GapBounds(NamedTuple):
    """Largest accepted gaps between sampler and trainer."""

    largest: float  # nats
    mean: float = math.inf  # nats
    wide: float = 1.0  # share of tokens past WIDE_GAP


# By the narrowest type in use, computation's or cache's. Measured gaps: docs/performance.md.
LOGPROB_GAP = {
    "float32": GapBounds(largest=1e-2, mean=1e-3, wide=0.0),
    "bfloat16": GapBounds(largest=2.0, mean=0.1, wide=0.01),
    "int8": GapBounds(largest=4.0, mean=0.2, wide=0.05),
}


@pytree
class UpdateStats:
    """The results of an update."""

    loss: Array  # f32 [], the total
    terms: Metrics  # summed over micro-batches
    logprob_gap: Array  # f32 [], largest |trainer - sampler| before the update, nats
    grad_norm: Array  # f32 [], before clipping
    finite: Array  # bool []


@pytree
class Accumulated:
    """Running sums over micro-batches; donated from one to the next."""

    gradient: PyTree
    loss: Array
    terms: Metrics
    logprob_gap: Array


def micro_gradient(
    setup: Setup, params: PyTree, micro: TrainBatch, *, echo_coef: Array | float
) -> Accumulated:
    """The gradient of one micro-batch, by the program that a run sums gradients with."""
    with jax.set_mesh(setup.mesh):
        zeros = _zeros(setup.model, setup.mesh)(params)
        return _accumulate(
            zeros, params, place_rows(micro, setup.mesh), np.float32(echo_coef), **_loss_of(setup)
        )


def apply_update(
    setup: Setup,
    state: TrainState,
    micro_batches: Iterable[TrainBatch],
    *,
    echo_coef: Array | float,
) -> tuple[TrainState, UpdateStats]:
    """Applies the sum of the micro-batches' gradients; ``state`` is donated.

    Rows of a micro-batch are spread over the mesh axes ``data`` and ``fsdp``. A non-finite gradient
    leaves parameters and optimizer as they were and counts one up in ``bad_updates``. Without any
    micro-batch everything stays as it is.
    """
    total = None
    coef = np.float32(echo_coef)
    with jax.set_mesh(setup.mesh):
        for micro in micro_batches:
            total = _zeros(setup.model, setup.mesh)(state.params) if total is None else total
            placed = place_rows(micro, setup.mesh)
            total = _accumulate(total, state.params, placed, coef, **_loss_of(setup))
        if total is None:
            return state, _no_stats()
        return _apply(state, total, optimizer=setup.optimizer, schedule=setup.schedule)


def _loss_of(setup: Setup) -> dict[str, Any]:
    """The static arguments of the loss; runs that share them share compiled programs."""
    return {
        "model": setup.model,
        "objective": setup.objective,
        "temperature": setup.config.rollout.temperature,
    }


def score_batch(
    setup: Setup,
    params: PyTree,
    micro_batches: Iterable[tuple[np.ndarray, TrainBatch]],
    *,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Log-probabilities of target tokens under other parameters, such as the reference policy's.

    Args:
      micro_batches: rows to score and their places in the batch.
      shape: ``(N, T)`` of the batch.

    Returns:
      f32 ``[N, T]`` on the host; zeros for rows that are not scored.
    """
    scores = np.zeros(shape, np.float32)
    for places, micro in micro_batches:
        placed = place_rows(micro, setup.mesh)
        with jax.set_mesh(setup.mesh):
            logprobs = _score(params, placed, **_score_of(setup))
        logprobs = np.asarray(logprobs)[: len(places)]
        scores[places, : logprobs.shape[1]] = logprobs
    return scores


def _score_of(setup: Setup) -> dict[str, Any]:
    temperature = setup.config.rollout.temperature
    return {"model": setup.model, "temperature": temperature, "mesh": setup.mesh}


@functools.partial(jax.jit, static_argnames=("model", "temperature", "mesh"))
def _score(
    params: PyTree, micro: TrainBatch, *, model: Decoder, temperature: float, mesh: Mesh
) -> Array:
    logprobs, _ = score_rows(
        model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=temperature,
        segment_ids=micro.segment_ids,
    )
    # Whole everywhere: each process reads it.
    return jax.lax.with_sharding_constraint(logprobs, NamedSharding(mesh, PartitionSpec()))


def _loss(
    params: PyTree,
    micro: TrainBatch,
    echo_coef: Array,
    *,
    model: Decoder,
    objective: Objective,
    temperature: float,
):
    logprobs, entropy = score_rows(
        model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=temperature,
        segment_ids=micro.segment_ids,
    )
    total, terms = batch_loss(logprobs, entropy, micro, objective, echo_coef=echo_coef)
    sampled = micro.loss_mask * micro.on_policy[:, None].astype(jnp.float32)
    # where(), not *: unweighted entries may be NaN.
    gaps = jnp.where(sampled > 0, jnp.abs(logprobs - micro.rollout_logprobs), 0.0)
    count = sampled.sum()
    terms[GAP_MEAN] = LossTerm(gaps.sum(), count)
    terms[GAP_WIDE] = LossTerm((gaps > WIDE_GAP).sum().astype(jnp.float32), count)
    return total, jax.lax.stop_gradient((terms, gaps.max()))


@functools.cache
def _zeros(model: Decoder, mesh: Mesh) -> Callable[[PyTree], Accumulated]:
    """Makes a gradient sum of zeros, placed as the parameters are."""

    def zeros(params: PyTree) -> Accumulated:
        zero = jnp.zeros(())
        return Accumulated(jax.tree.map(jnp.zeros_like, params), zero, _no_terms(), zero)

    whole: Any = NamedSharding(mesh, PartitionSpec())
    shardings = Accumulated(param_shardings(model, mesh), whole, whole, whole)
    return jax.jit(zeros, out_shardings=shardings)


@functools.partial(
    jax.jit, static_argnames=("model", "objective", "temperature"), donate_argnames="total"
)
def _accumulate(
    total: Accumulated,
    params: PyTree,
    micro: TrainBatch,
    echo_coef: Array,
    *,
    model: Decoder,
    objective: Objective,
    temperature: float,
) -> Accumulated:
    loss_of = functools.partial(_loss, model=model, objective=objective, temperature=temperature)
    grads = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (terms, gap)), gradient = grads(params, micro, echo_coef)
    return Accumulated(
        gradient=jax.tree.map(jnp.add, total.gradient, gradient),
        loss=total.loss + loss,
        terms={key: total.terms[key] + term for key, term in terms.items()},
        logprob_gap=jnp.maximum(total.logprob_gap, gap),
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "schedule"), donate_argnames="state")
def _apply(
    state: TrainState,
    total: Accumulated,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, UpdateStats]:
    grad_norm = optax.tree.norm(total.gradient)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(total.loss)
    # optax mixes Python numbers and integers with float32.
    with jax.numpy_dtype_promotion("standard"):
        changes, opt_state = optimizer.update(total.gradient, state.opt_state, state.params)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, change: p + rate * change, state.params, changes)

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step,
        bad_updates=jnp.where(finite, 0, state.bad_updates + 1),
    )
    return state, UpdateStats(
        loss=total.loss,
        terms=total.terms,
        logprob_gap=total.logprob_gap,
        grad_norm=grad_norm,
        finite=finite,
    )


def lower_accumulate(setup: Setup, params: PyTree, micro: TrainBatch) -> jax.stages.Lowered:
    """The program of one micro-batch, from shapes with shardings: nothing is computed."""
    with jax.set_mesh(setup.mesh):
        total = _abstract_total(setup, params)
        return _accumulate.lower(total, params, micro, np.float32(0), **_loss_of(setup))


def lower_apply(setup: Setup, state: TrainState) -> jax.stages.Lowered:
    """The program that ends an update, from shapes with shardings."""
    with jax.set_mesh(setup.mesh):
        return _apply.lower(
            state,
            _abstract_total(setup, state.params),
            optimizer=setup.optimizer,
            schedule=setup.schedule,
        )


def lower_score(setup: Setup, params: PyTree, micro: TrainBatch) -> jax.stages.Lowered:
    """The program that scores one micro-batch, from shapes with shardings."""
    with jax.set_mesh(setup.mesh):
        return _score.lower(params, micro, **_score_of(setup))


def _abstract_total(setup: Setup, params: PyTree) -> Accumulated:
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def scalar(leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    shapes = jax.eval_shape(_zeros(setup.model, setup.mesh), params)
    rest = dataclasses.replace(shapes, gradient=None)
    return dataclasses.replace(jax.tree.map(scalar, rest), gradient=params)


def _no_terms() -> Metrics:
    return {key: LossTerm.of(0.0, 0.0) for key in (*LOSS_TERMS, GAP_MEAN, GAP_WIDE)}


def _no_stats() -> UpdateStats:
    """Statistics of an update without trainable rows: zeros."""
    zero = jnp.zeros(())
    return UpdateStats(zero, _no_terms(), zero, zero, jnp.array(True))


def update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Metrics of a step's updates (NumPy leaves).

    ``loss/total`` is the mean over all updates, another loss that over the updates in which any
    token has a weight in it. The gap between trainer and sampler is that of the first update,
    before the policy moved. The gradient norm is the largest; ``optim/skipped`` is 1 if any update
    was skipped.
    """
    metrics = {
        "loss/total": float(np.mean([update.loss for update in updates])),
        "rollout/logprob_gap_max": float(updates[0].logprob_gap),
        "optim/grad_norm": float(max(update.grad_norm for update in updates)),
        "optim/skipped": float(not all(update.finite for update in updates)),
    }
    for key in updates[0].terms:
        terms = [
            update.terms[key] for update in updates[: 1 if key in (GAP_MEAN, GAP_WIDE) else None]
        ]
        counts = [float(term.count) for term in terms if term.count > 0]
        # A loss is a sum under final weights, a mean over its update already.
        count = len(counts) if key.startswith("loss/") else sum(counts)
        metrics[key] = float(sum(term.sum for term in terms)) / count if count else 0.0
    return metrics


def require_healthy(
    state: TrainState,
    done: UpdateStats,
    *,
    step: int,
    bounds: GapBounds | None,
    max_bad_steps: int,
    updates_per_step: int = 1,
) -> None:
    """Stops a run that cannot be trusted any more.

    Args:
      bounds: largest accepted gaps; None accepts any.
      max_bad_steps: with so many steps' updates in a row skipped, the run stops.

    Raises:
      RunStopped: sampler and trainer disagree, or gradients stay non-finite.
    """
    if bounds is not None:
        _require_agreement(done, step, bounds)
    if not done.finite and int(state.bad_updates) >= max_bad_steps * updates_per_step:
        raise RunStopped(
            f"step {step}: the gradient was not finite for {int(state.bad_updates)} updates in a "
            f"row (optim.max_bad_steps = {max_bad_steps}); parameters are as before the first of "
            "them"
        )


def _require_agreement(done: UpdateStats, step: int, bounds: GapBounds) -> None:
    """Raises RunStopped for a gap past a bound, or NaN."""
    mean, wide = (
        float(term.sum) / max(float(term.count), 1.0)
        for term in (done.terms[GAP_MEAN], done.terms[GAP_WIDE])
    )
    for name, value, bound in (
        ("the largest difference is", float(done.logprob_gap), bounds.largest),
        ("the mean difference is", mean, bounds.mean),
        (f"the share of tokens past {WIDE_GAP:g} nats is", wide, bounds.wide),
    ):
        if not value <= bound:  # NaN included
            raise RunStopped(
                f"step {step}: sampler and trainer disagree on the log-probabilities of the same "
                f"tokens: {name} {value:.3g}, more than {bound:g} (rollout.max_logprob_gap sets "
                "another bound on the largest and drops the others)"
            )
