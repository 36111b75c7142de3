"""Makes batches of experience: advantages, reasoning steps, EchoClips, final token weights."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.config import EchoConfig
from echorl_jax.core import (
    Objective,
    aggregation_weights,
    compute_advantages,
    echo_weights,
    group_means,
    judged_groups,
    load_clip_rule,
    mean_scale,
    step_entropy,
    step_ids,
)
from echorl_jax.data import DataError, Prompt
from echorl_jax.rollout import join_rows
from echorl_jax.rollout.prompt_images import place_images
from echorl_jax.training.experience import Experience, reward_weights
from echorl_jax.training.setup import Setup
from echorl_jax.types import (
    Array,
    EchoClips,
    Graded,
    HostArray,
    Rollouts,
    RowImages,
    StepData,
    TrainBatch,
    pytree,
)


@pytree
class Assembled:
    """A batch, and the clips and steps behind its echo weights, which the logs show."""

    batch: TrainBatch
    clips: EchoClips
    step_ids: Array  # i32 [N, T]
    step_entropy: Array  # f32 [N, num_steps]
    step_tokens: Array  # i32 [N, num_steps]
    refused: Array  # i32 [P], clips below the threshold of entropy


def make_batches(
    setup: Setup,
    experience: Experience,
    key: Array,
    *,
    step: int,
    min_entropy: float = -np.inf,
    past_rates: HostArray | None = None,
) -> tuple[list[Assembled], float]:
    """The step's mini-batches (NumPy): advantages over the whole step, then clips and weights.

    Args:
      experience: of the step.
      step: from 1; the echo may have a window of steps.
      min_entropy: a clip's last step must have more (nats); the default refuses none.
      past_rates: f32 ``[W]``, for an objective that weighs prompts by them, see ``StepData``.

    Returns:
      The mini-batches, and the echo's coefficient at this step.
    """
    config, objective = setup.config, setup.objective
    advantages = np.asarray(
        step_advantages(
            experience.rollouts,
            experience.graded,
            experience.groups.in_policy.reshape(-1),
            past_rates,
            _flat_parts(setup, experience) if objective.normalise_each else None,
            objective=objective,
        )
    )
    parts = experience.split(config.objective.mini_batches)
    made, coef = [], 0.0
    for number, part in enumerate(parts):
        assembled, coef = jax.device_get(
            assemble(
                part.rollouts,
                part.graded,
                np.split(advantages, len(parts))[number],
                part.groups.in_policy.reshape(-1),
                part.groups.in_echo.reshape(-1),
                setup.is_delimiter,
                jax.random.fold_in(key, number),
                np.int32(step - 1),
                np.float32(min_entropy),
                objective=objective,
                echo=config.echo,
                max_tokens=config.rollout.max_new_tokens,
            )
        )
        batch = show_images(setup, assembled.batch, part.prompts, part.rollouts.group)
        assembled = dataclasses.replace(assembled, batch=batch)
        if objective.hints:
            hint_tokens = np.array([prompt.hint_tokens for prompt in part.prompts], np.int32)
            batch = learn_hints(assembled.batch, part.rollouts.group, hint_tokens)
            assembled = dataclasses.replace(assembled, batch=batch)
        made.append(assembled)
    return made, float(coef)


def _flat_parts(setup: Setup, experience: Experience) -> tuple[HostArray, HostArray]:
    weights = reward_weights(setup)
    return experience.groups.reward_parts.reshape(-1, len(weights)), weights


def show_images(
    setup: Setup, batch: TrainBatch, prompts: Sequence[Prompt], group: HostArray
) -> TrainBatch:
    """The batch (NumPy) with the places of its images, for a model with a vision tower.

    Args:
      batch: N rows.
      prompts: P, with their images; features are computed later.
      group: i32 ``[N]``, the prompt of each row.

    Raises:
      DataError: a completion, say an expert's, with a token that stands for pictures.
    """
    if setup.model.config.vision is None:
        return batch
    _require_writable(setup, batch, prompts, group)
    index, positions, _ = place_images(
        setup.model,
        [prompt.ids for prompt in prompts],
        [prompt.images for prompt in prompts],
        width=batch.tokens.shape[1],
    )
    images = RowImages(features=None, index=index[group], positions=positions[group])
    return dataclasses.replace(batch, images=images)


def _require_writable(
    setup: Setup, batch: TrainBatch, prompts: Sequence[Prompt], group: HostArray
) -> None:
    """Refuses completions with tokens that have no logits: their loss would be infinite."""
    position = np.arange(batch.tokens.shape[1])
    written = (position >= batch.prompt_length[:, None]) & (position < batch.length[:, None])
    bad = np.argwhere(written & np.isin(batch.tokens, setup.model.config.never))
    if bad.size:
        row, column = bad[0]
        token = setup.tokenizer.convert_ids_to_tokens(int(batch.tokens[row, column]))
        raise DataError(
            f"row {prompts[group[row]].index} of the training rows: its completion holds the token "
            f"{token!r}, which stands for pictures and is never written"
        )


def step_advantages(
    rollouts: Rollouts,
    graded: Graded,
    in_policy: HostArray,
    past_rates: HostArray | None = None,
    reward_parts: tuple[HostArray, HostArray] | None = None,
    *,
    objective: Objective,
) -> Array:
    """Advantages ``[N]`` or ``[N, T]`` f32 over the whole batch of a step; not under jit.

    A row without a verdict has advantage 0 and does not change the advantages of other rows. The
    same holds for the rest of its group if fewer than two rows are left in the group's baseline.

    Args:
      rollouts: as sampled, N rows.
      in_policy: bool ``[N]``, rows of the policy loss.
      past_rates: f32 ``[W]``, see ``StepData``.
      reward_parts: f32 ``[N, R]`` and their weights ``[R]``, see ``StepData``.
    """
    group, groups = jnp.asarray(rollouts.group), rollouts.prompt_ids.shape[0]
    kept = judged = jnp.asarray(graded.with_verdict)
    if not judged.all():
        own = graded.on_policy if objective.baseline == "on_policy" else None
        group = judged_groups(group, judged, num_groups=groups, baseline=own)
        kept, groups = group < groups, groups + 1
    step = StepData(
        rewards=graded.rewards,
        correct=graded.correct,
        group=group,
        on_policy=graded.on_policy,
        in_policy=in_policy,
        lengths=jnp.where(kept, rollouts.completion_length, 0),
        mask=_completion_mask(rollouts) & kept[:, None],
        token_ids=rollouts.completion_ids,
        token_entropy=rollouts.token_entropy,
        num_groups=groups,
        group_size=len(graded.correct) // rollouts.prompt_ids.shape[0],
        past_rates=past_rates,
        reward_parts=None if reward_parts is None else reward_parts[0],
        reward_weights=None if reward_parts is None else reward_parts[1],
    )
    found = _advantages(step, objective=objective)
    return jnp.where(kept if found.ndim == 1 else kept[:, None], found, 0.0)


@functools.partial(jax.jit, static_argnames="objective")
def _advantages(step: StepData, *, objective: Objective) -> Array:
    return compute_advantages(step, objective)


@functools.partial(jax.jit, static_argnames=("objective", "echo", "max_tokens"))
def assemble(
    rollouts: Rollouts,
    graded: Graded,
    advantages: Array,
    in_policy: Array,
    in_echo: Array,
    is_delimiter: Array,
    key: Array,
    step: Array | int,
    min_entropy: Array | float = -np.inf,
    *,
    objective: Objective,
    echo: EchoConfig,
    max_tokens: int,
) -> tuple[Assembled, Array]:
    """Steps, clips and final weights of the rows of one update, and the echo's coefficient.

    Args:
      rollouts: as sampled, with P prompts and N rows.
      advantages: f32 ``[N]`` or ``[N, T]``, from :func:`step_advantages`.
      in_policy: bool ``[N]``, rows of the policy loss; a row without a verdict is in neither.
      in_echo: bool ``[N]``, rows that may give clips.
      is_delimiter: bool ``[V]``, tokens that end a reasoning step.
      step: training step, counted from 0.
      min_entropy: see :func:`~echorl_jax.core.clips_above`.
      echo: static.
      max_tokens: the constant length of the norms.
    """
    width = rollouts.completion_ids.shape[1]
    num_groups = rollouts.prompt_ids.shape[0]
    mask = _completion_mask(rollouts)
    if not objective.count_zero_advantage:
        in_policy &= advantages != 0 if advantages.ndim == 1 else jnp.any(advantages != 0, axis=1)
    loss_mask = mask & in_policy[:, None]
    num_steps = min(echo.max_steps, width)
    steps = step_ids(rollouts.completion_ids, mask, is_delimiter)
    judged = graded.with_verdict
    mean_entropy, step_tokens = step_entropy(rollouts.token_entropy, steps, num_steps)
    term = echo_weights(
        rollouts.token_entropy,
        steps,
        # A group whose judged rows are all correct is degenerate, whatever its other rows are.
        (graded.correct & in_echo) | ~judged,
        rollouts.group,
        num_groups=num_groups,
        num_steps=num_steps,
        on_policy=graded.on_policy & judged,
        select=load_clip_rule(echo.select),
        top_k=echo.top_k,
        min_step_tokens=echo.min_step_tokens,
        when=echo.when,
        normalise=echo.normalise,
        enabled=echo.enabled,
        coef=echo.coef,
        step=step,
        start_step=echo.start_step,
        end_step=echo.end_step,
        min_entropy=min_entropy,
        key=key,
    )
    tokens, length = join_rows(rollouts)
    weights = aggregation_weights(
        loss_mask,
        mode=objective.aggregation,
        max_tokens=max_tokens,
        group=rollouts.group,
        num_groups=num_groups,
    )
    batch = TrainBatch(
        tokens=tokens,
        prompt_length=rollouts.prompt_length[rollouts.group],
        length=length,
        loss_mask=loss_mask.astype(jnp.float32),
        advantages=advantages,
        old_logprobs=rollouts.rollout_logprobs,
        rollout_logprobs=rollouts.rollout_logprobs,
        token_weights=weights,
        echo_weights=term.weights,
        on_policy=graded.on_policy,
    )
    if objective.entropy_coef:
        batch = dataclasses.replace(batch, entropy_scale=mean_scale(weights))
    if objective.acts_on_solved:
        # Of the rows with a verdict; a prompt that has none is not solved.
        rate = group_means(graded.correct | ~judged, rollouts.group, num_groups=num_groups)
        solved = (rate == 1)[rollouts.group] & judged
        batch = dataclasses.replace(batch, solved=solved)
    made = Assembled(batch, term.clips, steps, mean_entropy, step_tokens, term.refused)
    return made, term.coef


def select_tokens(
    batch: TrainBatch, logprobs: HostArray, key: Array, *, objective: Objective
) -> TrainBatch:
    """Fills ``batch.selected`` (NumPy) where the objective selects tokens.

    Args:
      batch: all rows of an update, before it is cut into micro-batches.
      logprobs: f32 ``[N, T]``, of the policy that the update starts from.
      key: for random choices, different from those of the clips.
    """
    if objective.select_tokens is None:
        return batch
    # Without what only some updates have: one program serves all of them.
    plain = dataclasses.replace(batch, ref_logprobs=None, images=None)
    selected = _selected(plain, logprobs, key, objective=objective)
    return dataclasses.replace(batch, selected=np.asarray(selected))


@functools.partial(jax.jit, static_argnames=("objective",))
def _selected(batch: TrainBatch, logprobs: Array, key: Array, *, objective: Objective) -> Array:
    assert objective.select_tokens is not None
    return objective.select_tokens(batch, logprobs, key, objective)


def join_assembled(parts: Sequence[Assembled]) -> Assembled:
    """Concatenates mini-batches (NumPy); the clips' row numbers count over all of them."""
    starts = np.cumsum([0] + [len(part.batch.advantages) for part in parts[:-1]])
    moved = [
        dataclasses.replace(part, clips=dataclasses.replace(part.clips, row=part.clips.row + start))
        for part, start in zip(parts, starts, strict=True)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *moved)


def learn_hints(batch: TrainBatch, group: HostArray, hint_tokens: HostArray) -> TrainBatch:
    """Moves the target region back over each row's hint and weighs the hint's likelihood.

    The hint is part of the prompt for the policy. Its tokens get ``nll_weights`` that add up to 1
    over the batch, so that the term is their mean negative log-likelihood; the rows of a group
    share a hint, and the first of them carries it.

    Args:
      batch: NumPy arrays.
      group: i32 ``[N]``, group-major.
      hint_tokens: i32 ``[P]``.
    """
    first = np.diff(group, prepend=-1) != 0
    hint_tokens = hint_tokens[group]
    width, wider = batch.loss_mask.shape[1], batch.tokens.shape[1]
    place = np.arange(wider)[None, :] - hint_tokens[:, None]

    def shift(values: HostArray) -> HostArray:
        inside = (place >= 0) & (place < width)
        moved = np.take_along_axis(values, np.clip(place, 0, width - 1), axis=1)
        return np.where(inside, moved, np.zeros((), values.dtype))

    moved = {
        name: shift(np.asarray(value))
        for name, value in vars(batch).items()
        if value is not None and name != "tokens" and np.ndim(value) == 2
    }
    in_hint = np.arange(wider)[None, :] < hint_tokens[:, None]
    weights = (in_hint & first[:, None]).astype(np.float32)
    return dataclasses.replace(
        batch,
        **moved,
        prompt_length=batch.prompt_length - hint_tokens,
        nll_weights=weights / max(float(weights.sum()), 1.0),
    )


def _completion_mask(rollouts: Rollouts) -> Array:
    width = rollouts.completion_ids.shape[1]
    return jnp.arange(width)[None, :] < rollouts.completion_length[:, None]
