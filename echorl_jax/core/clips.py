"""EchoClips: the choice of prefixes of verified successes, and the loss that learns them again."""

import inspect
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from echorl_jax.choices import Normalise, Select, When
from echorl_jax.core.steps import step_entropy
from echorl_jax.custom import accepted, load_custom
from echorl_jax.types import AnyArray as Array
from echorl_jax.types import Echo, EchoClips, LossTerm, named_shapes

# A custom choice of the step that ends a clip: (step_entropy, step_ids, ...) -> score.
ClipRule = Callable[..., Float[Array, "N num_steps"]]


def load_clip_rule(select: str) -> Select | ClipRule:
    """Reads ``echo.select``: a built-in word as it is, or ``package.module:function``.

    Raises:
      UserError: there is no such function.

    >>> load_clip_rule("max")
    'max'
    """
    return load_custom(select, "the clip rule") if ":" in select else select  # type: ignore


@named_shapes
def mine_echo_clips(
    token_entropy: Float[Array, "N T"],
    step_ids: Int[Array, "N T"],
    correct: Bool[Array, " N"],
    group: Int[Array, " N"],
    *,
    num_groups: int,
    num_steps: int,
    on_policy: Bool[Array, " N"] | None = None,
    select: Select | ClipRule = "max",
    top_k: int = 1,
    min_step_tokens: int = 1,
    when: When = "any_success",
    key: Array | None = None,
) -> EchoClips:
    """Chooses for each prompt a prefix of a verified success that ends at a reasoning step.

    s* = argmax of step entropy over all steps of the prompt's correct rollouts; the clip is that
    rollout through the last token of s*. Ties go to the lowest rollout, then to the earliest step.
    Source: arXiv 2605.31228, section 3.

    ``select`` says which step wins: ``max`` (the paper) or ``min`` entropy; ``random`` uniformly;
    ``first`` or ``last`` of its rollout, in rollout order, whatever the entropy; ``full`` takes the
    rollout that holds s* to its end, ``longest`` and ``shortest`` the success with the most or the
    fewest tokens. These five offer one candidate per rollout, so ``top_k`` clips are then of as
    many rollouts. ``random_length`` gives as many clips as ``max``, of about the same lengths, at
    steps that ignore the entropy: the lengths of the clips that ``max`` finds are permuted over
    all prompts; each is cut from a success of the prompt drawn uniformly (with replacement), at
    the step end nearest to that length, of two equally near ones the earlier. Random numbers
    depend on the prompt and on a row's place among the rows of its prompt. Nothing here is
    differentiated.

    A function as ``select`` is a custom rule: ``rule(step_entropy, step_ids)`` gives a score
    ``[N, num_steps]``, float, and the candidate steps of highest score win as those of highest
    entropy do. A score of -inf or NaN takes a step out. Of ``step_tokens`` (``[N, num_steps]``
    int32, 0 where there is no step), ``token_entropy``, ``correct``, ``group`` and ``key`` the rule
    gets those that its parameters name; ``step_entropy`` is ``[N, num_steps]``, ``step_ids`` is
    ``[N, T]`` and below ``num_steps``.

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
      key: PRNG key, for ``random`` and ``random_length`` only.

    Returns:
      Clips ``[P, K]``, best first; where not ``valid``, all other fields are 0.

    Raises:
      ValueError: on an argument of another shape or kind, an unknown ``select`` or ``when``,
        ``top_k`` below 1, a random ``select`` without a key, or a rule's score of another shape.

    >>> entropy = jnp.array([[0.1, 0.9, 0.2], [0.5, 0.5, 0.5], [3.0, 3.0, 3.0]])
    >>> ids = jnp.array([[0, 1, 2], [0, 0, 0], [0, 0, 0]])
    >>> correct, group = jnp.array([True, True, False]), jnp.zeros(3, jnp.int32)
    >>> clips = mine_echo_clips(entropy, ids, correct, group, num_groups=1, num_steps=3)
    >>> clips.row.item(), clips.step.item(), clips.length.item()
    (0, 1, 2)
    """
    known = callable(select) or select in get_args(Select)
    if not known or when not in get_args(When) or top_k < 1:
        raise ValueError(f"unknown {select=} or {when=}, or {top_k=} below 1")
    if select in ("random", "random_length") and key is None:
        raise ValueError(f"{select=} needs a key")
    own = jnp.ones_like(correct) if on_policy is None else on_policy
    entropy, count = step_entropy(lax.stop_gradient(token_entropy), step_ids, num_steps)
    eligible = correct & own & _group_allows(correct, group, num_groups, when)[group]
    candidate = eligible[:, None] & (count >= max(1, min_step_tokens))
    steps = jnp.minimum(step_ids, num_steps - 1)
    given = None
    if callable(select):
        given = _custom_score(
            select,
            (entropy, steps),
            step_tokens=count,
            token_entropy=token_entropy,
            correct=correct,
            group=group,
            key=key,
        )
    elif select == "random":
        given = _row_draws(key, group, num_groups, num_steps)
    score, column = _scores(
        entropy,
        candidate,
        count,
        "max" if select == "random_length" or callable(select) else select,
        min(top_k, num_steps),
        given,
    )
    row, place, valid = _best_of_group(score, group, num_groups, top_k)
    step = jnp.where(valid, column[row, place], 0)
    if select == "random_length":
        assert key is not None
        length_key, row_key = jax.random.split(key)
        target = _permuted(_lengths(steps, row, step), valid, length_key)
        row = _random_rows(candidate, group, num_groups, top_k, row_key)
        step = jnp.where(valid, _nearest_step(steps, candidate, row, target), 0)
    clips = EchoClips(row, _lengths(steps, row, step), step, entropy[row, step], valid)
    return _kept(clips, valid)


def _custom_score(
    rule: ClipRule, arrays: tuple[Array, Array], **offered: Array | None
) -> Float[Array, "N num_steps"]:
    """The rule's score of every step; -inf where it is NaN."""
    entropy, _ = arrays
    score = rule(*arrays, **accepted(inspect.signature(rule).parameters, offered))
    if jnp.shape(score) != entropy.shape:
        raise ValueError(
            f"the clip rule {getattr(rule, '__name__', rule)} must give a score "
            f"{list(entropy.shape)}, [N, num_steps], got {list(jnp.shape(score))}"
        )
    score = lax.stop_gradient(jnp.asarray(score).astype(jnp.float32))
    return jnp.where(jnp.isnan(score), -jnp.inf, score)


def clips_above(clips: EchoClips, min_entropy: Array | float) -> EchoClips:
    """Refuses the clips whose step has an entropy of at most ``min_entropy`` (nats).

    >>> clips = EchoClips(*(jnp.array([[x]]) for x in (1, 2, 0, 0.5, True)))
    >>> clips_above(clips, 0.4).valid.item(), clips_above(clips, 0.5).valid.item()
    (True, False)
    """
    return _kept(clips, clips.valid & ~(clips.entropy <= min_entropy))


def _kept(clips: EchoClips, valid: Array) -> EchoClips:
    """The clips where ``valid``; all fields are 0 elsewhere."""
    return jax.tree.map(lambda field: jnp.where(valid, field, jnp.zeros_like(field)), clips)


def _lengths(
    steps: Int[Array, "N T"], row: Int[Array, "P K"], step: Int[Array, "P K"]
) -> Int[Array, "P K"]:
    """``[P, K]``, tokens of each row through the last token of its step; ``steps`` is [N, T]."""
    position = lax.broadcasted_iota(jnp.int32, (1, 1, steps.shape[1]), 2) + 1
    return jnp.max(jnp.where(steps[row] == step[..., None], position, 0), axis=2, initial=0)


def _row_draws(key: Array | None, group: Array, num_groups: int, count: int) -> Array:
    """Uniform numbers ``[N, count]``, keyed by prompt and by place among the prompt's rows."""
    assert key is not None
    order = jnp.argsort(group, stable=True)
    first = jnp.searchsorted(group[order], jnp.arange(num_groups, dtype=group.dtype))
    rank = jnp.arange(len(group), dtype=first.dtype) - first[group[order]]
    rank = jnp.zeros_like(rank).at[order].set(rank)

    def draw(prompt: Array, rank: Array) -> Array:
        row_key = jax.random.fold_in(jax.random.fold_in(key, prompt), rank)
        return jax.random.uniform(row_key, (count,))

    return jax.vmap(draw)(group, rank)


def _permuted(
    length: Int[Array, "P K"], valid: Bool[Array, "P K"], key: Array
) -> Int[Array, "P K"]:
    """The lengths ``[P, K]`` of valid clips, in a random order over all of them."""
    drawn = jnp.where(valid, jax.random.uniform(key, valid.shape), jnp.inf).reshape(-1)
    order = jnp.argsort(drawn)  # the valid clips come first
    place = jnp.maximum(jnp.cumsum(valid.reshape(-1), dtype=jnp.int32) - 1, 0)
    return length.reshape(-1)[order[place]].reshape(valid.shape)


def _random_rows(candidate: Array, group: Array, num_groups: int, count: int, key: Array) -> Array:
    """``[P, count]`` rows that hold a candidate, drawn uniformly for each prompt."""
    drawn = _row_draws(key, group, num_groups, count)
    score = jnp.where(candidate.any(axis=1)[:, None], drawn, -jnp.inf)  # [N, K]
    best = jax.vmap(lambda column: _best_of_group(column[:, None], group, num_groups, 1)[0][:, 0])
    return best(score.T).T


def _nearest_step(
    steps: Int[Array, "N T"],
    candidate: Bool[Array, "N steps"],
    row: Int[Array, "P K"],
    target: Int[Array, "P K"],
) -> Int[Array, "P K"]:
    """``[P, K]``, the candidate step of each row whose end is nearest to the target (tokens)."""
    count = candidate.shape[1]

    def ends(ids: Array) -> Array:
        place = jnp.arange(1, len(ids) + 1, dtype=jnp.int32)
        return jax.ops.segment_max(place, jnp.where(ids < 0, count, ids), count + 1)[:count]

    distance = jnp.abs(jax.vmap(jax.vmap(ends))(steps[row]) - target[..., None])
    far = jnp.iinfo(jnp.int32).max
    return jnp.argmin(jnp.where(candidate[row], distance, far), axis=2).astype(jnp.int32)


def _group_allows(
    correct: Bool[Array, " N"], group: Int[Array, " N"], num_groups: int, when: When
) -> Bool[Array, " num_groups"]:
    """``[P]`` bool: the prompts that may give clips."""
    if when == "any_success":
        return jnp.ones(num_groups, jnp.bool_)
    return jax.ops.segment_min(correct.astype(jnp.int32), group, num_groups) > 0


def _scores(
    entropy: Float[Array, "N num_steps"],
    candidate: Bool[Array, "N num_steps"],
    count: Int[Array, "N num_steps"],
    select: Select,
    per_row: int,
    given: Float[Array, "N num_steps"] | None,
) -> tuple[Float[Array, "N C"], Int[Array, "N C"]]:
    """Each row's candidates as (score, step), ``[N, C]``, best first; -inf is no candidate.

    ``given`` scores, where there are some, take the place of the entropy.
    """
    if given is not None or select in ("max", "min"):
        value = given if given is not None else entropy if select == "max" else -entropy
        score, step = lax.top_k(jnp.where(candidate, value, -jnp.inf), per_row)
        return score, step
    steps = lax.broadcasted_iota(jnp.int32, entropy.shape, 1)
    present = candidate if select in ("first", "last") else count > 0
    if select == "first":
        step = jnp.argmax(present, axis=1)
    else:
        step = jnp.max(jnp.where(present, steps, 0), axis=1)
    tokens = jnp.sum(count, axis=1, keepdims=True).astype(jnp.float32)
    of_row = {"full": entropy, "longest": tokens, "shortest": -tokens}
    value = of_row.get(select, jnp.zeros_like(entropy))
    score = jnp.max(jnp.where(candidate, value, -jnp.inf), axis=1)
    return score[:, None], step[:, None].astype(jnp.int32)


def _best_of_group(
    score: Float[Array, "N C"], group: Int[Array, " N"], num_groups: int, top_k: int
) -> tuple[Int[Array, "P K"], Int[Array, "P K"], Bool[Array, "P K"]]:
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


@named_shapes
def clip_weights(
    clips: EchoClips, shape: tuple[int, int], *, normalise: Normalise = "prompts_with_clip"
) -> Float[Array, "N T"]:
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


@named_shapes
def echo_loss(
    logprobs: Float[Array, "N T"], clips: EchoClips, *, normalise: Normalise = "prompts_with_clip"
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


@named_shapes
def echo_weights(
    token_entropy: Float[Array, "N T"],
    step_ids: Int[Array, "N T"],
    correct: Bool[Array, " N"],
    group: Int[Array, " N"],
    *,
    num_groups: int,
    num_steps: int,
    on_policy: Bool[Array, " N"] | None = None,
    select: Select | ClipRule = "max",
    top_k: int = 1,
    min_step_tokens: int = 1,
    when: When = "any_success",
    normalise: Normalise = "prompts_with_clip",
    enabled: bool = True,
    coef: float = 1e-3,
    step: Array | int = 0,
    start_step: int = 0,
    end_step: int | None = None,
    min_entropy: Array | float = -jnp.inf,
    key: Array | None = None,
) -> Echo:
    """Chooses the clips of an update, their token weights and the coefficient of the echo.

    Args:
      token_entropy, step_ids, group, num_groups, num_steps, on_policy: see
        :func:`mine_echo_clips`, as ``select``, ``top_k``, ``min_step_tokens``, ``when``, ``key``.
      correct: bool ``[N]``, successes that may give clips.
      normalise: see :func:`clip_weights`.
      enabled: False gives no clips and a coefficient of 0.
      coef, step, start_step, end_step: see :func:`active_coef`. Clips outside the window are
        returned, for the logs, but have no weight.
      min_entropy: see :func:`clips_above`; the default refuses no clip.

    Returns:
      The clips, f32 ``[N, T]`` weights, lambda, and the number of refused clips by prompt.

    >>> entropy, steps = jnp.array([[0.9, 0.1]]), jnp.array([[0, 1]])
    >>> solved, group, sizes = jnp.array([True]), jnp.array([0]), {"num_groups": 1, "num_steps": 2}
    >>> echo = echo_weights(entropy, steps, solved, group, **sizes, coef=0.5, step=3, end_step=4)
    >>> echo.weights.tolist(), echo.coef.item()
    ([[1.0, 0.0]], 0.5)
    >>> echo = echo_weights(entropy, steps, solved, group, **sizes, coef=0.5, step=4, end_step=4)
    >>> echo.weights.tolist(), echo.coef.item(), echo.clips.valid.tolist()
    ([[0.0, 0.0]], 0.0, [[True]])
    """
    mined = mine_echo_clips(
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
    clips = clips_above(mined, min_entropy)
    rows, width = token_entropy.shape
    now = active_coef(step, coef * enabled, start_step=start_step, end_step=end_step)
    weights = clip_weights(clips, (rows, width), normalise=normalise)
    refused = jnp.sum(mined.valid & ~clips.valid, axis=1, dtype=jnp.int32)
    return Echo(clips, jnp.where(now != 0, weights, 0.0), now, refused)
