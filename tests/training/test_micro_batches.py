"""Micro-batches: nothing is lost, nothing is added, and shapes are few."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax.training.micro_batches import (
    Bounds,
    length_buckets,
    micro_batch_shapes,
    micro_batches,
    trainable_rows,
)
from echorl_jax.types import TrainBatch

S, T = 12, 20


def make_batch(seed: int, rows: int) -> TrainBatch:
    rng = np.random.default_rng(seed)
    prompt_length = rng.integers(1, S + 1, rows).astype(np.int32)
    completion = rng.integers(1, T + 1, rows).astype(np.int32)
    mask = (np.arange(T)[None, :] < completion[:, None]).astype(np.float32)
    advantages = rng.choice([0.0, 0.0, 1.0, -0.5], rows).astype(np.float32)
    clip = np.where(rng.random(rows) < 0.3, rng.integers(1, T + 1, rows), 0)
    clip = np.minimum(clip, completion)
    echo = (np.arange(T)[None, :] < clip[:, None]) / np.maximum(clip, 1)[:, None]
    arrays = {
        "tokens": rng.integers(2, 50, (rows, S + T)).astype(np.int32),
        "prompt_length": prompt_length,
        "length": prompt_length + completion,
        "loss_mask": mask,
        "advantages": advantages,
        "old_logprobs": rng.normal(size=(rows, T)).astype(np.float32),
        "rollout_logprobs": np.zeros((rows, T), np.float32),
        "token_weights": mask / mask.sum(),
        "echo_weights": echo.astype(np.float32),
        "on_policy": np.ones(rows, bool),
    }
    return TrainBatch(**arrays)  # type: ignore[arg-type]


def test_buckets_are_few_and_end_with_the_bound() -> None:
    buckets = length_buckets(9216)
    assert buckets[-1] == 9216 and len(buckets) < 20
    assert all(b <= 2 * a for a, b in zip(buckets, buckets[1:], strict=False))
    assert length_buckets(40) == (32, 40) and length_buckets(32) == (32,)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    budget=st.integers(1, 2000),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_each_chosen_row_comes_once(seed: int, rows: int, budget: int, multiple: int) -> None:
    batch, chosen = trainable_rows(make_batch(seed, rows), every_row=False)
    seen: list[int] = []
    bounds = Bounds(longest=S + T, token_budget=budget, row_multiple=multiple)
    closed = micro_batch_shapes(rows, bounds)
    for places, micro in micro_batches(batch, chosen, bounds):
        count, width = micro.tokens.shape
        assert (count, width) in closed
        assert count % multiple == 0 and width in length_buckets(S + T)
        assert count == multiple or count * width <= budget
        assert micro.loss_mask.shape == (count, min(width, T))
        for row, place in enumerate(places):
            length, start = int(batch.length[place]), int(batch.prompt_length[place])
            assert micro.length[row] == length <= width
            assert np.array_equal(micro.tokens[row, :length], batch.tokens[place, :length])
            used = length - start
            for name in ("token_weights", "echo_weights", "old_logprobs"):
                kept, original = vars(micro)[name][row], vars(batch)[name][place]
                assert np.array_equal(kept[:used], original[:used])
            # What was cut off weighed nothing.
            assert not batch.echo_weights[place, used:].any()
            assert not batch.token_weights[place, used:].any()
        padding = slice(len(places), None)
        assert not micro.token_weights[padding].any() and not micro.echo_weights[padding].any()
        assert (micro.length[padding] >= 1).all()
        seen += places.tolist()
    assert sorted(seen) == np.flatnonzero(chosen).tolist()


def test_rows_without_a_gradient_are_left_out() -> None:
    batch = make_batch(0, 200)
    advantage = batch.advantages != 0
    echo = batch.echo_weights.any(axis=1)
    cut, chosen = trainable_rows(batch, every_row=False)
    assert np.array_equal(chosen, advantage | echo)
    only_echo = echo & ~advantage
    clip = batch.echo_weights.astype(bool).sum(axis=1)
    assert only_echo.any()
    assert np.array_equal((cut.length - cut.prompt_length)[only_echo], clip[only_echo])
    assert np.array_equal(cut.length[advantage], batch.length[advantage])
    _, everything = trainable_rows(batch, every_row=True)
    assert everything.all()


@pytest.mark.parametrize("field", ["selected", "nll_weights"])
def test_other_terms_keep_their_rows(field: str) -> None:
    quiet = dataclasses.replace(
        make_batch(1, 3),
        advantages=np.zeros(3, np.float32),
        echo_weights=np.zeros((3, T), np.float32),
    )
    assert not trainable_rows(quiet, every_row=False)[1].any()
    extra = np.zeros((3, T), bool if field == "selected" else np.float32)
    extra[1, 0] = 1
    _, chosen = trainable_rows(dataclasses.replace(quiet, **{field: extra}), every_row=False)
    assert chosen.tolist() == [False, True, False]
