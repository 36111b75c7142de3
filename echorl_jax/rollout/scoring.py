"""Scores given completions: log-probabilities and entropies by the functions of the trainer."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from echorl_jax.core import logprobs_and_entropy
from echorl_jax.models import Decoder
from echorl_jax.parallel import mesh_in_force
from echorl_jax.rollout.request import (
    PROMPT_MULTIPLE,
    bucket,
    check_lists,
    greatest_divisor,
    pad_lists,
)
from echorl_jax.types import Array, PyTree, Rollouts, RowImages


def join_rows(rollouts: Rollouts) -> tuple[Array, Array]:
    """Joins each rollout's prompt and completion into one right-padded row.

    Returns:
      tokens i32 ``[N, S + T]`` (0 where padded) and their number i32 ``[N]``.
    """
    prompt = rollouts.prompt_ids[rollouts.group]
    before = rollouts.prompt_length[rollouts.group]
    both = jnp.concatenate([prompt, rollouts.completion_ids], axis=1)
    column = jnp.arange(both.shape[1])[None, :]
    length = before + rollouts.completion_length
    # The completion moves left over the prompt's padding.
    skipped = prompt.shape[1] - before[:, None]
    source = jnp.where(column < before[:, None], column, column + skipped)
    tokens = jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1)
    return jnp.where(column < length[:, None], tokens, 0), length


def score_rows(
    model: Decoder,
    params: PyTree,
    tokens: Array,
    prompt_length: Array,
    length: Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    segment_ids: Array | None = None,
    images: RowImages | None = None,
) -> tuple[Array, Array]:
    """Scores the tokens after each row's prompt; pure, differentiable.

    Args:
      model, params: the decoder and its weights.
      tokens: i32 ``[B, L]``, prompt then completion, padded on the right.
      prompt_length: i32 ``[B]``, at least 1.
      length: i32 ``[B]``, prompt and completion.
      max_new_tokens: T.
      temperature: divides the logits; above 0.
      chunk_size: tokens whose logits exist at once.
      segment_ids: i32 ``[B, L]``, for several sequences in a row, which do not see each other. The
        first token of each is scored from the sequence before it; ignore that score.
      images: those of the prompts, for a model with a vision tower.

    Returns:
      (logprobs, entropy), f32 ``[B, T]``, 0 past the completion. Entry t belongs to
      ``tokens[b, prompt_length[b] + t]``.
    """
    positions = None if segment_ids is None else segment_positions(segment_ids)
    hidden = model.hidden(
        params,
        tokens,
        lengths=length,
        segment_ids=segment_ids,
        positions=positions if images is None else images.positions,
        features=None if images is None else images.features,
        feature_index=None if images is None else images.index,
    )
    position = prompt_length[:, None] + jnp.arange(max_new_tokens)[None, :]
    inside = position < length[:, None]
    position = jnp.minimum(position, tokens.shape[1] - 1)
    predicting = jnp.take_along_axis(hidden, position[:, :, None] - 1, axis=1)
    targets = jnp.take_along_axis(tokens, position, axis=1)
    scores = logprobs_and_entropy(
        predicting,
        model.head(params),
        targets,
        temperature=temperature,
        chunk_size=chunk_size,
        data_shards=_data_shards(tokens.shape[0]),
        never=model.config.never,
    )
    logprobs, entropy = (jnp.where(inside, score, 0.0) for score in scores)
    return logprobs, entropy


def _data_shards(rows: int) -> int:
    """Parts that the current mesh splits the rows into; 1 if it cannot split them evenly."""
    mesh = mesh_in_force()
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % shards else shards


def segment_positions(segment_ids: Array) -> Array:
    """Positions within each run of equal ids, i32 ``[B, L]``.

    >>> segment_positions(jnp.array([[0, 0, 1, 1, 1]])).tolist()
    [[0, 1, 0, 1, 2]]
    """
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return place - lax.cummax(jnp.where(begins, place, 0), axis=1)


@functools.partial(jax.jit, static_argnames=("model", "temperature", "rows", "chunk_size"))
def score_rollouts(
    model: Decoder,
    params: PyTree,
    rollouts: Rollouts,
    *,
    temperature: float = 1.0,
    rows: int = 32,
    chunk_size: int = 1024,
) -> tuple[Array, Array]:
    """Scores rollouts as the trainer does, to be compared with the numbers of the sampler.

    Args:
      model, params: the decoder and its weights.
      rollouts: N completions.
      temperature: the one they were sampled at (1 for greedy ones).
      rows: most rows computed at once.
      chunk_size: tokens whose logits exist at once.

    Returns:
      (logprobs, entropy), f32 ``[N, T]``, 0 past each completion's end.
    """
    tokens, length = join_rows(rollouts)
    whole = tokens, rollouts.prompt_length[rollouts.group], length
    count, longest = rollouts.completion_ids.shape
    score = functools.partial(
        score_rows,
        model,
        params,
        max_new_tokens=longest,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    pieces = count // greatest_divisor(count, most=rows)
    if pieces == 1:
        return score(*whole)
    cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), whole)
    logprobs, entropy = lax.map(lambda piece: score(*piece), cut)
    return logprobs.reshape(count, longest), entropy.reshape(count, longest)


def score(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    rows: int = 32,
    chunk_size: int = 1024,
) -> tuple[Array, Array]:
    """Scores given completions, such as expert trajectories.

    Args:
      model, params, temperature, rows, chunk_size: as in :func:`score_rollouts`.
      prompts, completions: N token lists each.

    Returns:
      (logprobs, entropy), f32 ``[N, T]`` with T the longest completion; 0 past each one's end.

    Raises:
      ValueError: the lists differ in number, one is empty, or a token is outside the vocabulary.
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    check_lists("prompts", prompts, model.config.vocab_size)
    check_lists("completions", completions, model.config.vocab_size)
    count, most = len(prompts), max(map(len, completions))
    padding = [(0,)] * (bucket(count) - count)
    (prompt_ids, prompt_length), (completion_ids, completion_length) = (
        pad_lists([*lists, *padding], bucket(max(map(len, lists)), multiple=PROMPT_MULTIPLE))
        for lists in (prompts, completions)
    )
    unused = jnp.zeros(0)
    given = Rollouts(
        prompt_ids=prompt_ids,
        prompt_length=prompt_length,
        group=jnp.arange(len(prompt_ids), dtype=jnp.int32),
        completion_ids=completion_ids,
        completion_length=completion_length,
        rollout_logprobs=unused,
        token_entropy=unused,
        truncated=unused,
    )
    logprobs, entropy = score_rollouts(
        model, params, given, temperature=temperature, rows=rows, chunk_size=chunk_size
    )
    return logprobs[:count, :most], entropy[:count, :most]
