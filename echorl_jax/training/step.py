"""The update: gradients summed over micro-batches, then one optimizer step. Pure and jitted."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.core import LossTerms, Objective, batch_loss
from echorl_jax.errors import RunStopped
from echorl_jax.models import Decoder
from echorl_jax.rollout import score_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.types import Array, LossTerm, PyTree, TrainBatch, pytree


@pytree
class UpdateStats:
    """What an update did, summed over its micro-batches."""

    loss: Array  # f32 [], the total
    terms: LossTerms
    logprob_gap: Array  # f32 [], largest |trainer - sampler| before the update, nats
    grad_norm: Array  # f32 [], before clipping
    finite: Array  # bool []


@pytree
class Accumulated:
    """Running sums over micro-batches; donated from one to the next."""

    gradient: PyTree
    loss: Array
    terms: LossTerms
    logprob_gap: Array


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

    def __call__(
        self, state: TrainState, micro_batches: Iterable[TrainBatch], *, echo_coef: Array | float
    ) -> tuple[TrainState, UpdateStats]:
        """Applies the sum of the micro-batches' gradients; ``state`` is donated.

        A non-finite gradient leaves parameters and optimizer as they were and counts one up in
        ``bad_updates``. Without any micro-batch everything stays as it is.
        """
        total = None
        coef = jnp.float32(echo_coef)
        for micro in micro_batches:
            total = _nothing(state.params) if total is None else total
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
        found = _score(model, params, place_rows(micro, mesh), temperature=temperature)
        found = np.asarray(found)[: len(places)]
        scores[places, : found.shape[1]] = found
    return scores


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _score(model: Decoder, params: PyTree, micro: TrainBatch, *, temperature: float) -> Array:
    return score_rows(
        model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=temperature,
    )[0]


def place_rows(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Puts rows on the devices, spread over the axes that hold data."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


def _loss(params: PyTree, update: Update, micro: TrainBatch, echo_coef: Array):
    logprobs, entropy = score_rows(
        update.model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=update.temperature,
    )
    total, terms = batch_loss(logprobs, entropy, micro, update.objective, echo_coef=echo_coef)
    sampled = micro.loss_mask * micro.on_policy[:, None].astype(jnp.float32)
    gap = jnp.max(jnp.abs(logprobs - micro.rollout_logprobs) * sampled)
    return total, (terms, jax.lax.stop_gradient(gap))


@jax.jit
def _nothing(params: PyTree) -> Accumulated:
    zero = jnp.zeros(())
    return Accumulated(jax.tree.map(jnp.zeros_like, params), zero, _no_terms(), zero)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _accumulate(
    update: Update, total: Accumulated, params: PyTree, micro: TrainBatch, echo_coef: Array
) -> Accumulated:
    grads = jax.value_and_grad(_loss, has_aux=True)
    (loss, (terms, gap)), gradient = grads(params, update, micro, echo_coef)
    return Accumulated(
        gradient=jax.tree.map(jnp.add, total.gradient, gradient),
        loss=total.loss + loss,
        terms=total.terms + terms,
        logprob_gap=jnp.maximum(total.logprob_gap, gap),
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
    return state, UpdateStats(total.loss, total.terms, total.logprob_gap, grad_norm, finite)


def _no_terms() -> LossTerms:
    zero = jnp.zeros(())
    return LossTerms(*[LossTerm(zero, zero)] * len(dataclasses.fields(LossTerms)))


def _no_stats() -> UpdateStats:
    """Of an update without any row to learn from."""
    zero = jnp.zeros(())
    return UpdateStats(zero, _no_terms(), zero, zero, jnp.array(True))


def add_stats(parts: Sequence[UpdateStats]) -> UpdateStats:
    """Over the updates of a step: losses and terms summed; the gap of the first; the worst norm."""
    total = jax.tree.map(lambda *values: sum(values), *parts)
    return dataclasses.replace(
        total,
        logprob_gap=parts[0].logprob_gap,
        grad_norm=max(part.grad_norm for part in parts),
        finite=all(part.finite for part in parts),
    )


def require_healthy(
    state: TrainState, done: UpdateStats, *, step: int, max_gap: float, max_bad_updates: int
) -> None:
    """Stops a run that cannot be trusted any more.

    Args:
      max_gap: largest accepted ``logprob_gap``; infinite to accept any.

    Raises:
      RunStopped: sampler and trainer disagree, or gradients stay non-finite.
    """
    if done.logprob_gap > max_gap:
        raise RunStopped(
            f"step {step}: sampler and trainer give the same token log-probabilities "
            f"{done.logprob_gap:.3g} nats apart, more than rollout.max_logprob_gap = {max_gap:g}"
        )
    if not done.finite and int(state.bad_updates) >= max_bad_updates:
        raise RunStopped(
            f"step {step}: the gradient was not finite for {max_bad_updates} updates in a row "
            "(optim.max_bad_updates); parameters are as before the first of them"
        )
