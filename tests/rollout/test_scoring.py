"""Scores of given completions equal those of full forward passes; rows are joined correctly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.rollout import generate, join_rows, score, score_rollouts, score_rows
from echorl_jax.types import Rollouts
from tests.rollout.conftest import EOS, PROMPTS, full_forward


def test_joined_rows_have_no_padding_after_the_prompt():
    rollouts = Rollouts(
        prompt_ids=jnp.array([[5, 6, 0, 0], [7, 8, 9, 1]]),
        prompt_length=jnp.array([2, 4]),
        group=jnp.array([0, 1, 1]),
        completion_ids=jnp.array([[11, 12, 13], [14, 99, 99], [15, 16, 99]]),
        completion_length=jnp.array([3, 1, 2]),
        rollout_logprobs=jnp.zeros((3, 3)),
        token_entropy=jnp.zeros((3, 3)),
        truncated=jnp.zeros(3, bool),
    )
    tokens, length = join_rows(rollouts)
    assert length.tolist() == [5, 5, 6]
    assert tokens.tolist() == [
        [5, 6, 11, 12, 13, 0, 0],
        [7, 8, 9, 1, 14, 0, 0],
        [7, 8, 9, 1, 15, 16, 0],
    ]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_scores_equal_a_full_forward_pass(model, params, temperature):
    completions = [[1, 2, 3], [9], list(range(20)), [40, 41]]
    logprobs, entropy = score(model, params, PROMPTS, completions, temperature=temperature)
    assert logprobs.shape == entropy.shape == (4, 20)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, completions, strict=True)):
        table = full_forward(model, params, prompt, ids, temperature)
        expected = table[np.arange(len(ids)), ids]
        np.testing.assert_allclose(logprobs[row, : len(ids)], expected, atol=1e-4)
        expected = -(np.exp(table) * table).sum(-1)
        np.testing.assert_allclose(entropy[row, : len(ids)], expected, atol=1e-4)
        assert not np.asarray(logprobs[row, len(ids) :]).any()


def test_scores_do_not_depend_on_the_number_of_rows_at_once(model, params):
    rollouts = generate(
        model, params, PROMPTS, jax.random.key(1), group_size=3, max_new_tokens=20, eos_ids=EOS
    )
    whole = score_rollouts(model, params, rollouts)
    pieces = score_rollouts(model, params, rollouts, rows=5)  # by fours: 12 rows do not split by 5
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scores_are_differentiable(model, params):
    tokens = jnp.array([[5, 6, 7, 8, 0], [9, 10, 11, 0, 0]])
    lengths = jnp.array([2, 1]), jnp.array([4, 3])

    def loss(params):
        logprobs, entropy = score_rows(model, params, tokens, *lengths, max_new_tokens=3)
        return -logprobs.sum() + entropy.sum()

    gradients = jax.grad(loss)(params)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)]
    assert all(np.isfinite(sizes)) and min(sizes) > 0


@pytest.mark.parametrize(
    "prompts, completions", [([], []), ([[1]], []), ([[1]], [[]]), ([[]], [[1]]), ([[1]], [[999]])]
)
def test_hostile_lists_are_refused(model, params, prompts, completions):
    with pytest.raises(ValueError, match="prompts|completions"):
        score(model, params, prompts, completions)
