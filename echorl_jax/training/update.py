"""Updates: gradients summed over micro-batches, then one optimizer step."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.core import LOSS_TERMS, Objective, batch_loss
from echorl_jax.models import Decoder, merge, param_shardings, split_params
from echorl_jax.models.image_features import image_features, tower_gradient
from echorl_jax.parallel import place_rows, place_whole
from echorl_jax.rollout import join_rows, score_rows
from echorl_jax.training.batch import select_tokens
from echorl_jax.training.micro_batches import micro_batches, trainable_rows
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.setup import Setup
from echorl_jax.types import (
    Array,
    HostArray,
    Image,
    LossTerm,
    Metrics,
    PyTree,
    Rollouts,
    TrainBatch,
    pytree,
)

if TYPE_CHECKING:
    from echorl_jax.training.diagnose import Dumps

# Mean of |trainer - sampler| over sampled tokens before the update, nats.
GAP_MEAN = "rollout/logprob_gap_mean"
# Share of those tokens that are further apart than WIDE_GAP nats.
GAP_WIDE = "rollout/logprob_gap_wide_fraction"
WIDE_GAP = 0.5
Quantity = Literal["logprobs", "entropy"]


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
    """Running sums over micro-batches; adding a micro-batch donates the sums before it."""

    gradient: PyTree
    of_features: Array | None  # f32 [F, D], gradient of images' features, if the tower is trained
    loss: Array
    terms: Metrics
    logprob_gap: Array


def update(
    setup: Setup,
    state: TrainState,
    batches: Sequence[TrainBatch],
    key: Array,
    *,
    step: int,
    echo_coef: float,
    frozen: PyTree = None,
    reference: PyTree | None = None,
    images: Sequence[Sequence[Image]] | None = None,
    dumps: "Dumps | None" = None,
) -> tuple[TrainState, list[UpdateStats], np.ndarray]:
    """One update for each batch (NumPy), ``objective.epochs`` times over; donates ``state``.

    Args:
      state: before the step.
      batches: mini-batches with final weights.
      key: for objectives that select tokens at random.
      step: from 1, the number of this step.
      echo_coef: lambda, the weight of the echo loss.
      frozen: the parameters that are not trained; None trains all.
      reference: parameters of the reference policy; only with a KL term.
      images: those of the prompts of each batch, in order; None for a model without a tower.
      dumps: writes to disk the update that the config asks for, and those that are not finite.

    Returns:
      The new state, the results of each update (NumPy), and the tokens of each row, prompt
      included, that the gradient was computed for: i32 ``[N]`` over all batches, 0 for a row that
      was left out.
    """
    start = merge(frozen, state.params)
    shown: Sequence[Sequence[Image]] = [()] * len(batches) if images is None else images
    scored = [
        _scored(setup, start, batch, reference, own)
        for batch, own in zip(batches, shown, strict=True)
    ]
    del start  # the state's buffers are donated
    results: list[UpdateStats] = []
    used: list[np.ndarray] = []
    for epoch in range(setup.config.objective.epochs):
        for part, own in enumerate(shown):
            batch, number = scored[part], len(results)
            if setup.trains_tower and number:  # an update has changed the features
                batch = with_features(setup, merge(frozen, state.params), batch, own)
            batch = _selected(setup, frozen, state, batch, key, number=number)
            batch, rows = trainable_rows(batch, every_row=_needs_every_row(setup.objective))
            if epoch == 0:
                used.append(np.where(rows, batch.length, 0))

            def pieces(batch: TrainBatch = batch, rows: HostArray = rows) -> Iterator[TrainBatch]:
                return (micro for _, micro in micro_batches(batch, rows, setup.bounds))

            if dumps is not None:
                dumps.before(step, number, state.params)
            state, stats = apply_update(
                setup, state, pieces(), echo_coef=echo_coef, frozen=frozen, images=own
            )
            results.append(jax.device_get(stats))
            if dumps is not None:
                dumps.after(step, number, state.params, results[-1], pieces(), echo_coef=echo_coef)
    state = dataclasses.replace(state, step=place_whole(np.int32(step), setup.mesh))
    return state, results, np.concatenate(used)


def _needs_every_row(objective: Objective) -> bool:
    """True if rows with zero advantage have a gradient too."""
    return (
        objective.kl_coef != 0
        or objective.entropy_coef != 0
        or not objective.zero_without_advantage
    )


def with_features(
    setup: Setup, params: PyTree, batch: TrainBatch, images: Sequence[Image]
) -> TrainBatch:
    """The batch with the features of its images under ``params``, computed once for each image."""
    if batch.images is None:
        return batch
    features = image_features(
        setup.model, params, images, size=setup.feature_slots, mesh=setup.mesh
    )
    return dataclasses.replace(batch, images=dataclasses.replace(batch.images, features=features))


def _scored(
    setup: Setup,
    params: PyTree,
    batch: TrainBatch,
    reference: PyTree | None,
    images: Sequence[Image],
) -> TrainBatch:
    """The batch with features of its images, and log-probabilities of the old and the reference
    policy, as far as needed.
    """
    scored = batch = with_features(setup, params, batch, images)
    if setup.scores_old_policy:
        scored = dataclasses.replace(scored, old_logprobs=_needed_logprobs(setup, params, batch))
    if reference is not None:
        seen = with_features(setup.of_reference, reference, batch, images)
        scored = dataclasses.replace(
            scored, ref_logprobs=_needed_logprobs(setup.of_reference, reference, seen)
        )
    return scored


def _needed_logprobs(setup: Setup, params: PyTree, batch: TrainBatch) -> np.ndarray:
    """Log-probabilities ``[N, T]`` f32 of the rows that need them, zeros elsewhere.

    A selection of tokens compares all rows, so it needs those with zero advantage too.
    """
    every_row = _needs_every_row(setup.objective) or setup.objective.select_tokens is not None
    batch, rows = trainable_rows(batch, every_row=every_row)
    pieces = micro_batches(batch, rows, setup.bounds)
    return score_batch(setup, params, pieces, shape=batch.loss_mask.shape)


def _selected(
    setup: Setup, frozen: PyTree, state: TrainState, batch: TrainBatch, key: Array, *, number: int
) -> TrainBatch:
    """The batch with the tokens that the objective selects for update ``number`` of the step.

    Update 0 starts from the old policy, so that ``old_logprobs`` serves; later ones score again.
    """
    if setup.objective.select_tokens is None:
        return batch
    logprobs = batch.old_logprobs
    if number:
        # Drops fields that the first scoring does not have, so that the program is compiled once.
        plain = dataclasses.replace(batch, ref_logprobs=None, selected=None)
        logprobs = _needed_logprobs(setup, merge(frozen, state.params), plain)
    key = jax.random.fold_in(key, number)
    return select_tokens(batch, logprobs, key, objective=setup.objective)


def token_entropies(setup: Setup, params: PyTree, rollouts: Rollouts) -> np.ndarray:
    """Entropies (nats) of the rollouts' tokens by the trainer, for engines that return none.

    Args:
      params: the policy that sampled.
      rollouts: NumPy arrays.

    Returns:
      f32 ``[N, T]``.
    """
    tokens, length = map(np.asarray, join_rows(rollouts))
    shape = rollouts.completion_ids.shape
    batch = TrainBatch.plain(
        tokens=tokens,
        prompt_length=np.asarray(rollouts.prompt_length)[rollouts.group],
        length=length,
        loss_mask=np.ones(shape, np.float32),
    )
    pieces = micro_batches(batch, np.ones(shape[0], bool), setup.bounds)
    return score_batch(setup, params, pieces, shape=shape, quantity="entropy")


def micro_gradient(
    setup: Setup,
    params: PyTree,
    micro: TrainBatch,
    *,
    echo_coef: Array | float,
    frozen: PyTree = None,
) -> Accumulated:
    """Gradient and loss of one micro-batch, computed by the program that training runs."""
    with jax.set_mesh(setup.mesh):
        zeros = _zeros_like(setup, params)(params)
        rows = placed(micro, setup.mesh)
        coef = np.float32(echo_coef)
        return _accumulate(zeros, params, frozen, rows, coef, **_loss_arguments(setup))


def apply_update(
    setup: Setup,
    state: TrainState,
    micro_batches: Iterable[TrainBatch],
    *,
    echo_coef: Array | float,
    frozen: PyTree = None,
    images: Sequence[Image] = (),
) -> tuple[TrainState, UpdateStats]:
    """Applies the sum of the micro-batches' gradients; ``state`` is donated.

    Rows of a micro-batch are spread over the mesh axes ``data`` and ``fsdp``. A non-finite gradient
    leaves parameters and optimizer as they were and adds one to ``bad_updates``; a finite one sets
    that to 0. Without any micro-batch everything stays as it is.

    The rows' features of ``images`` are those of the state's parameters.
    """
    total = None
    coef = np.float32(echo_coef)
    with jax.set_mesh(setup.mesh):
        for micro in micro_batches:
            total = _zeros_like(setup, state.params)(state.params) if total is None else total
            rows = placed(micro, setup.mesh)
            total = _accumulate(total, state.params, frozen, rows, coef, **_loss_arguments(setup))
        if total is None:
            return state, _no_stats()
        if total.of_features is not None:
            gradient = tower_gradient(
                setup.model,
                frozen,
                state.params,
                images,
                total.of_features,
                total.gradient,
                mesh=setup.mesh,
            )
            total = dataclasses.replace(total, gradient=gradient, of_features=None)
        return _apply(state, total, optimizer=setup.optimizer, schedule=setup.schedule)


def placed(micro: TrainBatch, mesh: Mesh) -> TrainBatch:
    """The micro-batch on the mesh: rows are spread, features are whole on every device."""
    if micro.images is None:
        return place_rows(micro, mesh)
    features = place_whole(micro.images.features, mesh)
    rows = dataclasses.replace(micro.images, features=None)
    spread = place_rows(dataclasses.replace(micro, images=rows), mesh)
    whole = dataclasses.replace(spread.images, features=features)
    return dataclasses.replace(spread, images=whole)


def _loss_arguments(setup: Setup) -> dict[str, Any]:
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
    quantity: Quantity = "logprobs",
) -> np.ndarray:
    """Log-probabilities (or entropies) of target tokens under ``params``, in nats.

    Args:
      micro_batches: pairs of the rows' places in the batch, and the rows to score.
      shape: ``(N, T)`` of the batch.
      quantity: which of the two.

    Returns:
      f32 ``[N, T]`` on the host; zeros for rows that are not scored.
    """
    scores = np.zeros(shape, np.float32)
    for places, micro in micro_batches:
        rows = placed(micro, setup.mesh)
        with jax.set_mesh(setup.mesh):
            values = _score(params, rows, **_score_arguments(setup), quantity=quantity)
        values = np.asarray(values)[: len(places)]  # the rest is padding
        scores[places, : values.shape[1]] = values
    return scores


def _score_arguments(setup: Setup) -> dict[str, Any]:
    temperature = setup.config.rollout.temperature
    return {"model": setup.model, "temperature": temperature, "mesh": setup.mesh}


def _score_micro_batch(
    params: PyTree, micro: TrainBatch, model: Decoder, temperature: float
) -> tuple[Array, Array]:
    """Log-probabilities and entropies ``[B, T]`` f32 of the target tokens."""
    return score_rows(
        model,
        params,
        micro.tokens,
        micro.prompt_length,
        micro.length,
        max_new_tokens=micro.loss_mask.shape[1],
        temperature=temperature,
        segment_ids=micro.segment_ids,
        images=micro.images,
    )


@functools.partial(jax.jit, static_argnames=("model", "temperature", "mesh", "quantity"))
def _score(
    params: PyTree,
    micro: TrainBatch,
    *,
    model: Decoder,
    temperature: float,
    mesh: Mesh,
    quantity: Quantity,
) -> Array:
    logprobs, entropy = _score_micro_batch(params, micro, model, temperature)
    values = logprobs if quantity == "logprobs" else entropy
    # Replicated, because every process reads all values.
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))


def _loss(
    params: PyTree,
    micro: TrainBatch,
    echo_coef: Array,
    *,
    model: Decoder,
    objective: Objective,
    temperature: float,
):
    logprobs, entropy = _score_micro_batch(params, micro, model, temperature)
    total, terms = batch_loss(logprobs, entropy, micro, objective, echo_coef=echo_coef)
    sampled = micro.loss_mask * micro.on_policy[:, None].astype(jnp.float32)
    # where(), not *: unweighted entries may be NaN.
    gaps = jnp.where(sampled > 0, jnp.abs(logprobs - micro.rollout_logprobs), 0.0)
    count = sampled.sum()
    terms[GAP_MEAN] = LossTerm(gaps.sum(), count)
    terms[GAP_WIDE] = LossTerm((gaps > WIDE_GAP).sum().astype(jnp.float32), count)
    return total, jax.lax.stop_gradient((terms, gaps.max()))


def _zeros_like(setup: Setup, params: PyTree) -> Callable[[PyTree], Accumulated]:
    """A compiled function from parameters to sums of zero, with the parameters' shardings."""
    slots = setup.feature_slots if setup.trains_tower else 0
    return _zeros(setup.model, setup.mesh, jax.tree.structure(params), slots)


@functools.cache
def _zeros(
    model: Decoder, mesh: Mesh, structure: Any, feature_slots: int
) -> Callable[[PyTree], Accumulated]:
    def zeros(params: PyTree) -> Accumulated:
        zero, shape = jnp.zeros(()), (feature_slots, model.config.hidden_size)
        of_features = jnp.zeros(shape) if feature_slots else None
        gradient = jax.tree.map(jnp.zeros_like, params)
        return Accumulated(gradient, of_features, zero, _no_terms(), zero)

    def trained_part(shardings: PyTree, trained: PyTree) -> PyTree:
        """The shardings of the leaves that ``trained`` has too."""
        if not isinstance(trained, dict):
            return shardings
        return {name: trained_part(shardings[name], part) for name, part in trained.items()}

    trained = jax.tree.unflatten(structure, range(structure.num_leaves))  # only keys are used
    gradient = trained_part(param_shardings(model, mesh), trained)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    placed = Accumulated(
        gradient, replicated if feature_slots else None, replicated, replicated, replicated
    )
    return jax.jit(zeros, out_shardings=placed)


@functools.partial(
    jax.jit, static_argnames=("model", "objective", "temperature"), donate_argnames="total"
)
def _accumulate(
    total: Accumulated,
    trainable: PyTree,
    frozen: PyTree,
    micro: TrainBatch,
    echo_coef: Array,
    *,
    model: Decoder,
    objective: Objective,
    temperature: float,
) -> Accumulated:
    def loss_of(trainable: PyTree, features: Array | None):
        params, rows = merge(frozen, trainable), micro
        if micro.images is not None and features is not None:
            images = dataclasses.replace(micro.images, features=features)
            rows = dataclasses.replace(micro, images=images)
        return _loss(
            params, rows, echo_coef, model=model, objective=objective, temperature=temperature
        )

    features = None
    if micro.images is not None and total.of_features is not None:
        features = micro.images.features
    (loss, (terms, gap)), (gradient, of_features) = jax.value_and_grad(
        loss_of, argnums=(0, 1), has_aux=True
    )(trainable, features)
    summed = total.of_features
    if summed is not None and of_features is not None:
        summed += of_features.astype(summed.dtype)
    return Accumulated(
        gradient=jax.tree.map(jnp.add, total.gradient, gradient),
        of_features=summed,
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
    frozen, trainable = split_params(setup.model, params)
    with jax.set_mesh(setup.mesh):
        total = _abstract_total(setup, trainable)
        return _accumulate.lower(
            total, trainable, frozen, micro, np.float32(0), **_loss_arguments(setup)
        )


def lower_apply(setup: Setup, state: TrainState) -> jax.stages.Lowered:
    """The program that ends an update, from shapes with shardings."""
    with jax.set_mesh(setup.mesh):
        return _apply.lower(
            state,
            dataclasses.replace(_abstract_total(setup, state.params), of_features=None),
            optimizer=setup.optimizer,
            schedule=setup.schedule,
        )


def lower_score(
    setup: Setup, params: PyTree, micro: TrainBatch, quantity: Quantity = "logprobs"
) -> jax.stages.Lowered:
    """The program that scores one micro-batch, from shapes with shardings."""
    with jax.set_mesh(setup.mesh):
        return _score.lower(params, micro, **_score_arguments(setup), quantity=quantity)


def _abstract_total(setup: Setup, params: PyTree) -> Accumulated:
    """The sums as shapes with shardings; those of the gradient are ``params``, which are such."""
    replicated = NamedSharding(setup.mesh, PartitionSpec())

    def scalar(leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    shapes = jax.eval_shape(_zeros_like(setup, params), params)
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

    ``loss/total`` is a mean over all updates; each other loss is a mean over the updates in which
    some token has a weight for it. The gap between trainer and sampler is that of the first update,
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
        used = updates[:1] if key in (GAP_MEAN, GAP_WIDE) else updates
        terms = [update.terms[key] for update in used]
        counts = [float(term.count) for term in terms if term.count > 0]
        # Final weights make the sum of a loss a mean over its update, so each update counts once.
        count = len(counts) if key.startswith("loss/") else sum(counts)
        metrics[key] = float(sum(term.sum for term in terms)) / count if count else 0.0
    return metrics
