"""EchoClips: which prefixes of verified successes to learn again, and the loss that does it."""

from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.choices import Normalise, Select, When
from echorl_jax.core.steps import step_entropy
from echorl_jax.types import Array, EchoClips, LossTerm, pytree


def mine_echo_clips(
    token_entropy: Array,
    step_ids: Array,
    correct: Array,
    group: Array,
    *,
    num_groups: int,
    num_steps: int,
    on_policy: Array | None = None,
    select: Select = "max",
    top_k: int = 1,
    min_step_tokens: int = 1,
    when: When = "any_success",
    key: Array | None = None,
) -> EchoClips:
    """For each prompt, a prefix of a verified success that ends at the chosen reasoning step.

    s* = argmax of step entropy over all steps of the prompt's correct rollouts; the clip is that
    rollout through the last token of s*. Ties go to the lowest rollout, then to the earliest step.
    Source: arXiv 2605.31228, section 3.

    ``select`` says which step wins: ``max`` (the paper) or ``min`` entropy; ``random`` uniformly;
    ``first`` or ``last`` of its rollout, in rollout order, whatever the entropy; ``full`` takes the
    rollout that holds s* to its end. The last three offer one candidate per rollout, so ``top_k``
    clips are then of as many rollouts. Nothing here is differentiated.

    Args:
      token_entropy: ``[N, T]``, in nats.
      step_ids: ``[N, T]`` int32 from :func:`step_ids`, -1 where masked.
      correct: ``[N]`` bool, the verified successes.
      group: ``[N]`` int32 in ``[0, num_groups)``, in any order.
      num_groups: P, static.
      num_steps: static bound on steps; later ones join the last.
      on_policy: ``[N]`` bool; rows the policy did not write never compete. None: all are the
        policy's.
      select: see above.
      top_k: K, clips per prompt.
      min_step_tokens: shorter steps do not compete.
      when: ``any_success``, or ``degenerate_only``: only prompts all of whose rows are correct.
      key: PRNG key, for ``random`` only.

    Returns:
      Clips ``[P, K]``, best first; where not ``valid``, all other fields are 0.

    Raises:
      ValueError: on an unknown ``select`` or ``when``, ``top_k`` below 1, or ``random`` without a
        key.

    >>> entropy = jnp.array([[0.1, 0.9, 0.2], [0.5, 0.5, 0.5], [3.0, 3.0, 3.0]])
    >>> ids = jnp.array([[0, 1, 2], [0, 0, 0], [0, 0, 0]])
    >>> correct, group = jnp.array([True, True, False]), jnp.zeros(3, jnp.int32)
    >>> clips = mine_echo_clips(entropy, ids, correct, group, num_groups=1, num_steps=3)
    >>> clips.row.item(), clips.step.item(), clips.length.item()
    (0, 1, 2)
    """
    if select not in get_args(Select) or when not in get_args(When) or top_k < 1:
        raise ValueError(f"unknown {select=} or {when=}, or {top_k=} below 1")
    if select == "random" and key is None:
        raise ValueError('select="random" needs a key')
    own = jnp.ones_like(correct) if on_policy is None else on_policy
    entropy, count = step_entropy(lax.stop_gradient(token_entropy), step_ids, num_steps)
    eligible = correct & own & _group_allows(correct, group, num_groups, when)[group]
    candidate = eligible[:, None] & (count >= max(1, min_step_tokens))
    score, step = _scores(entropy, candidate, count, select, min(top_k, num_steps), key)
    row, column, valid = _best_of_group(score, group, num_groups, top_k)
    step = jnp.where(valid, step[row, column], 0)
    joined = jnp.minimum(step_ids, num_steps - 1)
    position = lax.broadcasted_iota(jnp.int32, (1, 1, step_ids.shape[1]), 2) + 1
    length = jnp.max(jnp.where(joined[row] == step[..., None], position, 0), axis=2, initial=0)
    return EchoClips(
        row=row,
        length=jnp.where(valid, length, 0),
        step=step,
        entropy=jnp.where(valid, entropy[row, step], 0.0),
        valid=valid,
    )


def _group_allows(correct: Array, group: Array, num_groups: int, when: When) -> Array:
    """``[P]`` bool: the prompts that may give clips."""
    if when == "any_success":
        return jnp.ones(num_groups, jnp.bool_)
    return jax.ops.segment_min(correct.astype(jnp.int32), group, num_groups) > 0


def _scores(
    entropy: Array, candidate: Array, count: Array, select: Select, per_row: int, key: Array | None
) -> tuple[Array, Array]:
    """Each row's candidates as (score, step), ``[N, C]``, best first; -inf is no candidate."""
    if select in ("max", "min", "random"):
        value = {"max": entropy, "min": -entropy}.get(select)
        if value is None:
            assert key is not None
            value = jax.random.uniform(key, entropy.shape)
        return lax.top_k(jnp.where(candidate, value, -jnp.inf), per_row)
    steps = lax.broadcasted_iota(jnp.int32, entropy.shape, 1)
    present = count > 0 if select == "full" else candidate
    if select == "first":
        step = jnp.argmax(present, axis=1)
    else:
        step = jnp.max(jnp.where(present, steps, 0), axis=1)
    value = entropy if select == "full" else jnp.zeros_like(entropy)
    score = jnp.max(jnp.where(candidate, value, -jnp.inf), axis=1)
    return score[:, None], step[:, None].astype(jnp.int32)


def _best_of_group(
    score: Array, group: Array, num_groups: int, top_k: int
) -> tuple[Array, Array, Array]:
    """The ``top_k`` best entries of each group as (row, column, valid), ``[P, K]``."""
    rows, columns = score.shape
    owner = jnp.where(score > -jnp.inf, group[:, None], num_groups).reshape(-1)
    index = jnp.arange(rows * columns, dtype=jnp.int32)
    # One stable sort: equal scores of a group stay in order of row, then of step.
    owner, _, index = lax.sort((owner, -score.reshape(-1), index), num_keys=2, is_stable=True)
    first = jnp.searchsorted(owner, jnp.arange(num_groups, dtype=owner.dtype))
    place = first[:, None] + jnp.arange(top_k, dtype=first.dtype)[None, :]
    inside = place < rows * columns
    place = jnp.where(inside, place, 0)
    valid = inside & (owner[place] == jnp.arange(num_groups, dtype=owner.dtype)[:, None])
    index = jnp.where(valid, index[place], 0)
    return index // columns, index % columns, valid


def clip_weights(
    clips: EchoClips, shape: tuple[int, int], *, normalise: Normalise = "prompts_with_clip"
) -> Array:
    """Per-token weights that turn log-probabilities into the echo loss.

    L_echo(q) = -(1/L) sum_{t <= L} log pi_t, L the clip's length, the mean over a prompt's clips;
    over the batch the mean over the prompts that have a clip (``prompts_with_clip``), over all
    prompts, or over clip tokens. Clips of one rollout add up.

    Args:
      clips: from :func:`mine_echo_clips`.
      shape: ``(N, T)``.
      normalise: see above.

    Returns:
      ``[N, T]`` float32: ``sum(weights * -logprobs)`` is L_echo; all zeros where there is no clip.

    Raises:
      ValueError: on an unknown ``normalise``.

    >>> clips = EchoClips(*(jnp.array([[x]]) for x in (1, 2, 0, 0.5, True)))
    >>> clip_weights(clips, (2, 3)).tolist()
    [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    """
    per_token, count = _unnormalised(clips, normalise)
    inside = lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) < clips.length.reshape(-1, 1)
    share = (per_token / jnp.maximum(count, 1.0)).reshape(-1, 1)
    return (
        jnp.zeros(shape, jnp.float32).at[clips.row.reshape(-1)].add(jnp.where(inside, share, 0.0))
    )


def echo_loss(
    logprobs: Array, clips: EchoClips, *, normalise: Normalise = "prompts_with_clip"
) -> LossTerm:
    """The echo loss as a pair; its ``mean()`` is L_echo, see :func:`clip_weights`.

    Args:
      logprobs: ``[N, T]``, the current policy's, differentiated.
      clips: from :func:`mine_echo_clips`.
      normalise: what the count counts: prompts with a clip, all prompts, or clip tokens.

    Returns:
      The sum over prompts (or tokens) and their number; exactly 0 with zero gradient where there is
      no clip.

    >>> clips = EchoClips(*(jnp.array([[x]]) for x in (1, 2, 0, 0.5, True)))
    >>> logprobs = jnp.array([[-9.0, -9.0, -9.0], [-1.0, -3.0, -9.0]])
    >>> echo_loss(logprobs, clips).mean().item()  # (1 + 3) / 2
    2.0
    """
    _, count = _unnormalised(clips, normalise)
    weights = clip_weights(clips, (logprobs.shape[0], logprobs.shape[1]), normalise=normalise)
    # Masked before the product: what lies outside the clips may be anything.
    nll = -jnp.where(weights > 0, logprobs, 0.0)
    return LossTerm(jnp.sum(weights * nll) * jnp.maximum(count, 1.0), count)


def _unnormalised(clips: EchoClips, normalise: Normalise) -> tuple[Array, Array]:
    """Weight of each clip's tokens ``[P, K]`` before the division by the count ``[]``."""
    valid = clips.valid.astype(jnp.float32)
    if normalise == "tokens":
        return valid, jnp.sum(valid * clips.length.astype(jnp.float32))
    clips_of_prompt = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1.0)
    per_token = valid / (clips_of_prompt * jnp.maximum(clips.length, 1).astype(jnp.float32))
    if normalise == "all_prompts":
        return per_token, jnp.float32(valid.shape[0])
    if normalise == "prompts_with_clip":
        return per_token, jnp.sum(jnp.max(valid, axis=1, initial=0.0))
    raise ValueError(f"normalise must be one of {get_args(Normalise)}, got {normalise!r}")


def active_coef(
    step: Array | int, coef: float, *, start_step: int = 0, end_step: int | None = None
) -> Array:
    """The echo coefficient at a training step: ``coef`` in ``[start_step, end_step)``, 0 outside.

    Args:
      step: training step, counting from 0; a number or an array.
      coef: lambda.
      start_step: first step of the window.
      end_step: first step past it; None is open.

    Returns:
      float32, shaped like ``step``.

    >>> [active_coef(step, 0.5, start_step=1, end_step=3).item() for step in range(4)]
    [0.0, 0.5, 0.5, 0.0]
    """
    step = jnp.asarray(step)
    inside = step >= start_step if end_step is None else (step >= start_step) & (step < end_step)
    return jnp.where(inside, jnp.float32(coef), jnp.float32(0.0))


@pytree
class Echo:
    """The echo term of an update."""

    clips: EchoClips
    weights: Array  # f32 [N, T]: sum(weights * -logprobs) is L_echo; zeros where coef is 0
    coef: Array  # f32 [], lambda at this step


def echo_weights(
    token_entropy: Array,
    step_ids: Array,
    correct: Array,
    group: Array,
    *,
    num_groups: int,
    num_steps: int,
    on_policy: Array | None = None,
    select: Select = "max",
    top_k: int = 1,
    min_step_tokens: int = 1,
    when: When = "any_success",
    normalise: Normalise = "prompts_with_clip",
    enabled: bool = True,
    coef: float = 1e-3,
    step: Array | int = 0,
    start_step: int = 0,
    end_step: int | None = None,
    key: Array | None = None,
) -> Echo:
    """Decides all about the echo of an update: its clips, their token weights and its coefficient.

    Args:
      token_entropy, step_ids, group, num_groups, num_steps, on_policy: see
        :func:`mine_echo_clips`, as ``select``, ``top_k``, ``min_step_tokens``, ``when``, ``key``.
      correct: bool ``[N]``, successes that may give clips.
      normalise: see :func:`clip_weights`.
      enabled: False gives no clips and a coefficient of 0.
      coef, step, start_step, end_step: see :func:`active_coef`. Clips outside the window are
        returned, for the logs, but have no weight.

    Returns:
      The clips, f32 ``[N, T]`` weights, and lambda.

    >>> entropy, steps = jnp.array([[0.9, 0.1]]), jnp.array([[0, 1]])
    >>> solved, group, sizes = jnp.array([True]), jnp.array([0]), {"num_groups": 1, "num_steps": 2}
    >>> echo = echo_weights(entropy, steps, solved, group, **sizes, coef=0.5, step=3, end_step=4)
    >>> echo.weights.tolist(), echo.coef.item()
    ([[1.0, 0.0]], 0.5)
    >>> echo = echo_weights(entropy, steps, solved, group, **sizes, coef=0.5, step=4, end_step=4)
    >>> echo.weights.tolist(), echo.coef.item(), echo.clips.valid.tolist()
    ([[0.0, 0.0]], 0.0, [[True]])
    """
    clips = mine_echo_clips(
        token_entropy,
        step_ids,
        correct & enabled,
        group,
        num_groups=num_groups,
        num_steps=num_steps,
        on_policy=on_policy,
        select=select,
        top_k=top_k,
        min_step_tokens=min_step_tokens,
        when=when,
        key=key,
    )
    rows, width = token_entropy.shape
    now = active_coef(step, coef * enabled, start_step=start_step, end_step=end_step)
    weights = clip_weights(clips, (rows, width), normalise=normalise)
    return Echo(clips, jnp.where(now != 0, weights, 0.0), now)
