"""Weights that were really trained, SmolLM2-135M-Instruct: the same numbers as transformers."""

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_reference as reference

from echorl_jax.config import Config
from echorl_jax.data import encode_prompt, load_tokenizer
from echorl_jax.files import read_steps
from echorl_jax.models import Decoder, load_model
from echorl_jax.rollout import generate
from echorl_jax.training import loop
from echorl_jax.training.sft import train_supervised
from echorl_jax.types import PyTree
from tests.integration.conftest import small_config
from tests.rollout.conftest import completions

pytestmark = pytest.mark.slow

# Largest difference of logits in float32, which reach 31; measured 1.3e-4.
LOGITS = 1e-3


@pytest.fixture(scope="module")
def directory(torch_python, smollm2_packages, tmp_path_factory) -> Iterator[Path]:
    """The model in float32, and the results of transformers."""
    out = tmp_path_factory.mktemp("smollm2_model")
    script = Path(reference.__file__)
    command = [torch_python, str(script), "--packages", smollm2_packages, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": smollm2_packages})
    yield out
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def expected(directory) -> dict[str, Any]:
    results = json.loads((directory / "reference.json").read_text())
    with np.load(directory / "logits.npz") as arrays:
        return results | dict(arrays)


@pytest.fixture(scope="module")
def loaded(directory) -> tuple[Decoder, PyTree]:
    return load_model(directory, dtype="float32")


def logits_of(model: Decoder, params: PyTree, ids: list[int]) -> np.ndarray:
    return np.asarray(jax.jit(model.logits)(params, jnp.asarray([ids]))[0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_logits_perplexity_and_entropy_of_a_text(directory, loaded, expected) -> None:
    ids = load_tokenizer(str(directory)).encode(reference.TEXT)
    assert ids == expected["ids"]
    logits = logits_of(*loaded, ids)
    np.testing.assert_allclose(logits, expected["text"], rtol=0, atol=LOGITS)
    table = log_softmax(logits)
    perplexity = np.exp(-table[np.arange(len(ids) - 1), ids[1:]].mean())
    assert perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert perplexity == pytest.approx(39.768, rel=1e-4)  # reported by a user of these weights
    entropy = -(np.exp(table) * table).sum(-1).mean()
    assert entropy == pytest.approx(expected["entropy"], rel=1e-4)


def test_a_wrong_constant_is_beyond_the_tolerance(loaded, expected) -> None:
    """theta of 1e4 for 1e5 moves a logit by 3.4, an epsilon of 1e-6 for 1e-5 by 0.021."""
    model, params = loaded
    config = model.config
    theta = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=1e4))
    eps = dataclasses.replace(config, norm_eps=1e-6)
    for wrong in (theta, eps):
        logits = logits_of(dataclasses.replace(model, config=wrong), params, expected["ids"])
        assert abs(logits - expected["text"]).max() > 10 * LOGITS


def test_first_token_is_drawn_from_the_distribution(directory, loaded, expected) -> None:
    """1,024 draws: the reported log-probability of each, and how often each token comes."""
    prompt = load_tokenizer(str(directory)).encode(reference.START)
    draws = generate(
        *loaded, [prompt], jax.random.key(0), group_size=1024, max_new_tokens=1, eos_ids=()
    )
    table = log_softmax(expected["first"])
    tokens = np.asarray(draws.completion_ids)[:, 0]
    np.testing.assert_allclose(draws.rollout_logprobs[:, 0], table[tokens], rtol=0, atol=LOGITS)
    probability = np.exp(table)
    entropy = -(probability * table).sum()
    np.testing.assert_allclose(draws.token_entropy[:, 0], entropy, rtol=0, atol=LOGITS)
    likely = np.flatnonzero(probability > 0.01)
    share = np.array([(tokens == token).mean() for token in likely])
    deviation = np.sqrt(probability[likely] * (1 - probability[likely]) / 1024)
    assert (abs(share - probability[likely]) < 5 * deviation).all()


def test_greedy_continuation_and_chat_answer(directory, loaded, expected) -> None:
    model, params = loaded
    tokenizer = load_tokenizer(str(directory))
    row = {"prompt": [{"role": "user", "content": reference.QUESTION}]}
    chat = encode_prompt(tokenizer, row)
    assert chat == expected["chat_prompt"]
    written = generate(
        model,
        params,
        [tokenizer.encode(reference.START), chat],
        jax.random.key(0),
        group_size=1,
        max_new_tokens=reference.GREEDY_TOKENS,
        temperature=0.0,
        eos_ids=model.config.eos_ids,
    )
    rows = completions(written)
    assert rows == [expected["continuation"], expected["answer"]]
    assert "Paris" in tokenizer.decode(rows[1], skip_special_tokens=True)


def training_config(directory: Path, rows: Path, steps: int, **sections: Any) -> Config:
    """Small steps on the demonstrations, which are written to ``rows``."""
    rows.write_text("".join(json.dumps(row) + "\n" for row in reference.DEMONSTRATIONS))
    defaults = {
        "model": {"path": str(directory), "dtype": "float32", "remat": "layer"},
        "data": {"train": str(rows), "eval": "", "max_prompt_tokens": 64},
        "optim": {
            "warmup_steps": 0,
            "compile_ahead": False,
            "sft_rows_per_step": 2,
            "micro_batch_tokens": 1024,
        },
        "checkpoint": {"every": 0, "export": False},
    }
    for section, values in sections.items():
        defaults[section] = defaults.get(section, {}) | values
    return small_config(steps=steps, **defaults)


def test_supervised_step(directory, expected, tmp_path) -> None:
    """Loss and gradient norm are those of torch; the step lowers the loss."""
    config = training_config(
        directory,
        tmp_path / "rows.jsonl",
        2,
        objective={"name": "sft", "kl_coef": None},
        rollout={"max_new_tokens": 32},
    )
    train_supervised(config, tmp_path / "run", devices=jax.devices()[:1])
    first, second = read_steps(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # 1.6 GB
    assert first["loss/nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert first["optim/grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert second["loss/nll"] < 0.9 * first["loss/nll"]


def test_grpo_step(directory, loaded, tmp_path) -> None:
    """In bfloat16: samples within the bounds of the gap check, and a step that moves weights."""
    config = training_config(
        directory,
        tmp_path / "rows.jsonl",
        1,
        model={"dtype": "bfloat16"},
        data={"grader": "tests.models.trained_reference:vowel_share", "grader_workers": 1},
        rollout={"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 32},
        echo={"enabled": False},
    )
    state = loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    (line,) = read_steps(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert 0.2 < line["reward/mean"] < 0.5  # English has 38% vowels among letters
    assert 0.5 < line["entropy/token_mean"] < 4
    assert 0 < line["rollout/logprob_gap_mean"] < 0.1
    assert line["optim/skipped"] == 0 and line["optim/grad_norm"] > 0
    moved = jax.tree.map(lambda new, old: abs(new - old).max(), state.params, loaded[1])
    # Adam's first step moves a weight by the learning rate, or not at all.
    assert max(jax.tree.leaves(moved)) == pytest.approx(config.optim.learning_rate, rel=1e-2)
