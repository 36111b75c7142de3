"""Compares a model directory's results with those of transformers for the same case."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf_reference import GREEDY_PROMPT, fill_weights, tokens_of
from safetensors.numpy import save_file

from echorl_jax.models import Decoder, from_hf, load_model
from echorl_jax.models.hf_names import tensor_names


def write_case(directory: Path, case: dict[str, Any], config: dict[str, Any]) -> Path:
    """A model directory with the case's weights, written by the safetensors library."""
    names = tensor_names(Decoder(from_hf(config)))
    shapes = {stored: name.stored_shape for name in names for stored in name.stored}
    save_file(fill_weights(case, shapes), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def real_rows(values: jax.Array, case: dict[str, Any]) -> np.ndarray:
    """The real positions of all rows, concatenated."""
    return np.concatenate([np.asarray(values[i, :n]) for i, n in enumerate(case["rows"])])


def check_logits(
    directory: Path, case: dict[str, Any], expected: np.ndarray, dtype: str, bound: float
) -> None:
    """Logits of every real position, from one padded batch."""
    model, params = load_model(directory, dtype=dtype)
    logits = jax.jit(model.logits)(
        params, jnp.asarray(tokens_of(case)), lengths=jnp.asarray(case["rows"])
    )
    np.testing.assert_allclose(real_rows(logits, case), expected, rtol=0, atol=bound)


def check_gradients(directory: Path, case: dict[str, Any], golden: dict[str, np.ndarray]) -> None:
    """Gradients of the mean next-token loss, tensor by tensor in the stored layout."""
    model, params = load_model(directory, dtype="float32")
    tokens, rows = jnp.asarray(tokens_of(case)), jnp.asarray(case["rows"])

    def loss(params):
        logprobs = jax.nn.log_softmax(model.logits(params, tokens, lengths=rows)[:, :-1])
        picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        inside = jnp.arange(tokens.shape[1] - 1)[None, :] < rows[:, None] - 1
        return -jnp.where(inside, picked, 0.0).sum() / inside.sum().astype(jnp.float32)

    gradients = jax.jit(jax.grad(loss))(params)
    compared = 0
    for name in tensor_names(model):
        ours = gradients
        for key in name.path:
            ours = ours[key]
        for layer, stored in enumerate(name.stored):
            one = name.to_stored(np.asarray(ours[layer] if name.stacked else ours))
            np.testing.assert_allclose(one, golden[f"gradient/{stored}"], rtol=1e-3, atol=2e-5)
            compared += 1
    assert compared == sum(key.startswith("gradient/") for key in golden)


def check_greedy(directory: Path, case: dict[str, Any], expected: np.ndarray) -> None:
    """Appends the likeliest next token repeatedly, by full forward passes."""
    model, params = load_model(directory, dtype="float32")
    tokens = np.zeros((expected.shape[0], GREEDY_PROMPT + expected.shape[1]), np.int32)
    tokens[:, :GREEDY_PROMPT] = tokens_of(case)[:, :GREEDY_PROMPT]
    step = jax.jit(lambda tokens: jnp.argmax(model.logits(params, tokens), axis=-1))
    for t in range(GREEDY_PROMPT, tokens.shape[1]):
        tokens[:, t] = np.asarray(step(jnp.asarray(tokens)))[:, t - 1]
    np.testing.assert_array_equal(tokens[:, GREEDY_PROMPT:], expected)
