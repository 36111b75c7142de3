"""The update: gradients summed over micro-batches, then one optimizer step. Pure and jitted."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.core import LossTerms, Objective, batch_loss
from echorl_jax.errors import RunStopped
from echorl_jax.models import Decoder, param_shardings
from echorl_jax.parallel import place_rows
from echorl_jax.rollout import score_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.types import Array, LossTerm, PyTree, TrainBatch, pytree


@pytree
class UpdateStats:
    """What an update did, summed over its micro-batches."""

    loss: Array  # f32 [], the total
    terms: LossTerms
    logprob_gap: Array  # f32 [], largest |trainer - sampler| before the update, nats
    mean_gap: LossTerm  # nats, over sampled tokens
    grad_norm: Array  # f32 [], before clipping
    finite: Array  # bool []


@pytree
class Accumulated:
    """Running sums over micro-batches; donated from one to the next."""

    gradient: PyTree
    loss: Array
    terms: LossTerms
    logprob_gap: Array
    mean_gap: LossTerm


@dataclasses.dataclass(frozen=True)
class Update:
    """The compiled update of one run: everything static in it.

    Attributes:
      model: the decoder.
      objective: how token losses are made.
      optimizer: AdamW at learning rate 1, see :func:`make_optimizer`.
      schedule: learning rate at a training step, counted from 0.
      mesh: rows of a micro-batch are spread over its ``data`` and ``fsdp`` axes.
      temperature: the sampling temperature, which divides the trainer's logits too.
    """

    model: Decoder
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    temperature: float = 1.0

    def gradient(
        self, params: PyTree, micro: TrainBatch, *, echo_coef: Array | float
    ) -> "Accumulated":
        """The gradient of one micro-batch, from the program that a run adds them up with."""
        with jax.set_mesh(self.mesh):
            nothing = _nothing(self.model, self.mesh)(params)
            placed = place_rows(micro, self.mesh)
            return _accumulate(self, nothing, params, placed, np.float32(echo_coef))

    def __call__(
        self, state: TrainState, micro_batches: Iterable[TrainBatch], *, echo_coef: Array | float
    ) -> tuple[TrainState, UpdateStats]:
        """Applies the sum of the micro-batches' gradients; ``state`` is donated.

        A non-finite gradient leaves parameters and optimizer as they were and counts one up in
        ``bad_updates``. Without any micro-batch everything stays as it is.
        """
        total = None
        coef = np.float32(echo_coef)
        with jax.set_mesh(self.mesh):
            for micro in micro_batches:
                total = _nothing(self.model, self.mesh)(state.params) if total is None else total
                placed = place_rows(micro, self.mesh)
                total = _accumulate(self, total, state.params, placed, coef)
            return (state, _no_stats()) if total is None else _apply(self, state, total)


def score_batch(
    model: Decoder,
    params: PyTree,
    micro_batches: Iterable[tuple[np.ndarray, TrainBatch]],
    *,
    shape: tuple[int, ...],
    temperature: float,
    mesh: Mesh,
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
        placed = place_rows(micro, mesh)
        with jax.set_mesh(mesh):
            found = _score(model, params, placed, temperature=temperature, mesh=mesh)
        found = np.asarray(found)[: len(places)]
        scores[places, : found.shape[1]] = found
    return scores


@functools.partial(jax.jit, static_argnames=("model", "temperature", "mesh"))
def _score(
    model: Decoder, params: PyTree, micro: TrainBatch, *, temperature: float, mesh: Mesh
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


def _loss(params: PyTree, update: Update, micro: TrainBatch, echo_coef: Array):
    logprobs, entropy = score_rows(
        update.model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=update.temperature,
        segment_ids=micro.segment_ids,
    )
    total, terms = batch_loss(logprobs, entropy, micro, update.objective, echo_coef=echo_coef)
    sampled = micro.loss_mask * micro.on_policy[:, None].astype(jnp.float32)
    # Chosen, not multiplied: what has no weight may be no number.
    gaps = jnp.where(sampled > 0, jnp.abs(logprobs - micro.rollout_logprobs), 0.0)
    mean_gap = LossTerm(gaps.sum(), sampled.sum())
    return total, (terms, *jax.lax.stop_gradient((gaps.max(), mean_gap)))


@functools.cache
def _nothing(model: Decoder, mesh: Mesh) -> Callable[[PyTree], Accumulated]:
    """Makes a gradient sum of zeros, placed as the parameters are."""

    def zeros(params: PyTree) -> Accumulated:
        zero = jnp.zeros(())
        return Accumulated(
            jax.tree.map(jnp.zeros_like, params), zero, _no_terms(), zero, LossTerm(zero, zero)
        )

    whole: Any = NamedSharding(mesh, PartitionSpec())
    shardings = Accumulated(param_shardings(model, mesh), whole, whole, whole, whole)
    return jax.jit(zeros, out_shardings=shardings)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _accumulate(
    update: Update, total: Accumulated, params: PyTree, micro: TrainBatch, echo_coef: Array
) -> Accumulated:
    grads = jax.value_and_grad(_loss, has_aux=True)
    (loss, (terms, gap, mean_gap)), gradient = grads(params, update, micro, echo_coef)
    return Accumulated(
        gradient=jax.tree.map(jnp.add, total.gradient, gradient),
        loss=total.loss + loss,
        terms=total.terms + terms,
        logprob_gap=jnp.maximum(total.logprob_gap, gap),
        mean_gap=total.mean_gap + mean_gap,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _apply(update: Update, state: TrainState, total: Accumulated) -> tuple[TrainState, UpdateStats]:
    grad_norm = optax.tree.norm(total.gradient)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(total.loss)
    # optax mixes Python numbers and integers with float32.
    with jax.numpy_dtype_promotion("standard"):
        changes, opt_state = update.optimizer.update(total.gradient, state.opt_state, state.params)
    rate = update.schedule(state.step)
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
        mean_gap=total.mean_gap,
        grad_norm=grad_norm,
        finite=finite,
    )


def lower_accumulate(update: Update, params: PyTree, micro: TrainBatch) -> jax.stages.Lowered:
    """The program of one micro-batch, from shapes with shardings: nothing is computed."""
    with jax.set_mesh(update.mesh):
        return _accumulate.lower(
            update, _abstract_total(update, params), params, micro, np.float32(0)
        )


def lower_apply(update: Update, state: TrainState) -> jax.stages.Lowered:
    """The program that ends an update, from shapes with shardings."""
    with jax.set_mesh(update.mesh):
        return _apply.lower(update, state, _abstract_total(update, state.params))


def lower_score(update: Update, params: PyTree, micro: TrainBatch) -> jax.stages.Lowered:
    """The program that scores one micro-batch, from shapes with shardings."""
    with jax.set_mesh(update.mesh):
        return _score.lower(
            update.model, params, micro, temperature=update.temperature, mesh=update.mesh
        )


def _abstract_total(update: Update, params: PyTree) -> Accumulated:
    whole = NamedSharding(update.mesh, PartitionSpec())

    def scalar(leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    shapes = jax.eval_shape(_nothing(update.model, update.mesh), params)
    rest = dataclasses.replace(shapes, gradient=None)
    return dataclasses.replace(jax.tree.map(scalar, rest), gradient=params)


def _no_terms() -> LossTerms:
    zero = jnp.zeros(())
    return LossTerms(*[LossTerm(zero, zero)] * len(dataclasses.fields(LossTerms)))


def _no_stats() -> UpdateStats:
    """Statistics of an update with no trainable rows: zeros."""
    zero = jnp.zeros(())
    return UpdateStats(zero, _no_terms(), zero, LossTerm(zero, zero), zero, jnp.array(True))


def add_stats(parts: Sequence[UpdateStats]) -> UpdateStats:
    """Joins the updates of a step: mean loss and terms, gap of the first, worst norm.

    The echo term's mean is over the updates that had a clip.
    """
    mean = jax.tree.map(lambda *values: sum(values) / len(values), *parts)
    with_clips = sum(bool(part.terms.echo.count > 0) for part in parts)
    echo = jax.tree.map(lambda value: value * len(parts) / max(with_clips, 1), mean.terms.echo)
    return dataclasses.replace(
        mean,
        terms=dataclasses.replace(mean.terms, echo=echo),
        logprob_gap=parts[0].logprob_gap,
        mean_gap=parts[0].mean_gap,
        grad_norm=max(part.grad_norm for part in parts),
        finite=all(part.finite for part in parts),
    )


def require_healthy(
    state: TrainState,
    done: UpdateStats,
    *,
    step: int,
    max_gap: float | None,
    max_bad_steps: int,
    updates_per_step: int = 1,
) -> None:
    """Stops a run that cannot be trusted any more.

    Args:
      max_gap: largest accepted ``logprob_gap``; None accepts any.
      max_bad_steps: with so many steps' updates in a row skipped, the run stops.

    Raises:
      RunStopped: sampler and trainer disagree, or gradients stay non-finite.
    """
    # A gap that is no number is not accepted either.
    if max_gap is not None and not done.logprob_gap <= max_gap:
        raise RunStopped(
            f"step {step}: sampler and trainer give the same token log-probabilities "
            f"{done.logprob_gap:.3g} nats apart, more than rollout.max_logprob_gap = {max_gap:g}"
        )
    if not done.finite and int(state.bad_updates) >= max_bad_steps * updates_per_step:
        raise RunStopped(
            f"step {step}: the gradient was not finite for {int(state.bad_updates)} updates in a "
            f"row (optim.max_bad_steps = {max_bad_steps}); parameters are as before the first of "
            "them"
        )
