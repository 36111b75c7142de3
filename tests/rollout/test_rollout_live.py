"""Samples and reported numbers equal those of transformers, which runs in the test."""

import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from echorl_jax.models import init_params, save_model
from echorl_jax.rollout import generate
from tests.rollout.conftest import completions, decoder

PROMPTS = [[7, 8, 9, 10, 11], [5, 40, 41, 17, 3], [30, 31, 32, 33, 34], [12, 50, 9, 9, 21]]
EOS, NEW, GROUP = 2, 40, 4
SCRIPT = Path(__file__).parents[1] / "models" / "make_golden.py"
MODELS = {
    "qwen2": {"model_type": "qwen2", "eos_ids": (EOS,)},
    "llama": {
        "model_type": "llama",
        "qkv_bias": False,
        "tied_embeddings": False,
        "eos_ids": (EOS,),
    },
    "qwen3": {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True, "eos_ids": (EOS,)},
}


def _transformers(python: str, directory: Path, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """Logits ``[rows, L, V]`` of the tokens, and NEW greedy tokens after each prompt."""
    np.save(directory / "tokens.npy", tokens)
    np.save(directory / "prompt.npy", np.array(PROMPTS))
    out = ["--out", str(directory), "--load", str(directory), "--new", str(NEW)]
    subprocess.run([python, str(SCRIPT), *out], check=True)
    return np.load(directory / "logits.npy"), np.load(directory / "greedy.npy")


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_sampled_and_greedy_tokens(family, torch_python, tmp_path):
    """Compares log-probability and entropy of each token at two temperatures, and greedy tokens."""
    model = decoder(**MODELS[family])
    params = init_params(model, jax.random.key(0))
    save_model(tmp_path, model, params, dtype="float32")
    settings = {"group_size": GROUP, "max_new_tokens": NEW, "eos_ids": EOS, "slots": 8}
    sampled = {
        temperature: generate(
            model, params, PROMPTS, jax.random.key(1), temperature=temperature, **settings
        )
        for temperature in (0.6, 1.0)
    }
    tokens = np.zeros((2, len(PROMPTS) * GROUP, len(PROMPTS[0]) + NEW), np.int64)
    for part, rollouts in zip(tokens, sampled.values(), strict=True):
        for row, completion in enumerate(completions(rollouts)):
            both = PROMPTS[row // GROUP] + completion
            part[row, : len(both)] = both
    logits, expected = _transformers(torch_python, tmp_path, tokens.reshape(-1, tokens.shape[2]))
    logits = logits.reshape(2, -1, *logits.shape[1:]).astype(np.float64)
    ended = 0
    for of_rows, (temperature, rollouts) in zip(logits, sampled.items(), strict=True):
        for row, completion in enumerate(completions(rollouts)):
            count, start = len(completion), len(PROMPTS[0]) - 1
            scaled = of_rows[row, start : start + count] / temperature
            table = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
            logprobs = table[np.arange(count), completion]
            entropy = -(np.exp(table) * table).sum(-1)
            reported = rollouts.rollout_logprobs[row, :count], rollouts.token_entropy[row, :count]
            np.testing.assert_allclose(reported, (logprobs, entropy), rtol=0, atol=1e-3)
            # EOS is kept, counted once and the last; a row without one is flagged.
            assert EOS not in completion[:-1]
            assert bool(rollouts.truncated[row]) == (completion[-1] != EOS)
            ended += completion[-1] == EOS
    assert 0 < ended < 2 * len(PROMPTS) * GROUP

    greedy = generate(
        model,
        params,
        PROMPTS,
        jax.random.key(2),
        temperature=0.0,
        **{**settings, "group_size": 1, "slots": 2},
    )
    for row, completion in enumerate(completions(greedy)):
        theirs = expected[row].tolist()
        stop = theirs.index(EOS) + 1 if EOS in theirs else len(theirs)
        assert completion == theirs[:stop]
