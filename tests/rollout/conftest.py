"""Tiny decoders whose large weights give distributions far from uniform, and shared checks."""

import functools

import jax
import numpy as np
import pytest

from echorl_jax.models import Decoder, DecoderConfig, init_params

VOCAB = 60
EOS = (3, 4)
PROMPTS = [[7, 8, 9, 10, 11], [5], list(range(10, 27)), [30, 31, 32, 33, 34, 35, 36, 37, 38]]


def decoder(dtype: str = "float32", **changes) -> Decoder:
    settings = {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "qkv_bias": True,
        "tied_embeddings": True,
        "initializer_range": 0.3,
        **changes,
    }
    return Decoder(DecoderConfig(**settings), dtype=dtype)


@pytest.fixture(scope="session")
def model() -> Decoder:
    return decoder()


@pytest.fixture(scope="session")
def params(model):
    return init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, tokens):
    return model.logits(params, tokens)


def full_forward(model, params, prompt, completion, temperature=1.0):
    """Log-probabilities [t, V] after each prefix of the completion, by one forward pass, in f64."""
    count = len(prompt) + len(completion)
    tokens = np.zeros((1, -(-count // 64) * 64), np.int32)  # few shapes, few compilations
    tokens[0, :count] = [*prompt, *completion]
    logits = np.asarray(_logits(model, params, tokens), np.float64)[0] / temperature
    logits = logits[len(prompt) - 1 : count - 1]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def completions(rollouts) -> list[list[int]]:
    """The written tokens of each row."""
    lengths = np.asarray(rollouts.completion_length)
    return [
        np.asarray(ids)[:n].tolist()
        for ids, n in zip(rollouts.completion_ids, lengths, strict=True)
    ]


def check_equal(ours, others, tolerance=2e-5):
    """Checks that tokens, lengths and flags are equal, and numbers within the tolerance."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, atol=tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def check_scores(model, params, prompts, rollouts, temperature=1.0, tolerance=1e-4):
    """Compares every reported number with a forward pass over the finished sequence."""
    for row, completion in enumerate(completions(rollouts)):
        prompt = prompts[int(rollouts.group[row])]
        table = full_forward(model, params, prompt, completion, temperature)
        count = len(completion)
        logprobs = table[np.arange(count), completion]
        entropy = -(np.exp(table) * table).sum(-1)
        np.testing.assert_allclose(rollouts.rollout_logprobs[row, :count], logprobs, atol=tolerance)
        np.testing.assert_allclose(rollouts.token_entropy[row, :count], entropy, atol=tolerance)
        assert not np.asarray(rollouts.rollout_logprobs[row, count:]).any()
        assert not np.asarray(rollouts.token_entropy[row, count:]).any()
