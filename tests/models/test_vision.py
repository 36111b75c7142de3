"""Qwen2.5-VL gives the results of transformers: features, positions, logits, gradients, tokens."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_cases as cases
from safetensors.numpy import load_file, save_file

from echorl_jax.models import (
    Decoder,
    ModelError,
    RopeConfig,
    from_hf,
    load_model,
    param_shardings,
    save_model,
)
from echorl_jax.models.hf_names import tensor_names
from echorl_jax.models.image_features import image_features
from echorl_jax.models.images import image_tokens, window_patches
from echorl_jax.parallel import make_mesh
from echorl_jax.types import Image

GOLDEN = Path(__file__).parent / "golden" / "vision"
BOUND = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "results.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    directory = tmp_path_factory.mktemp("vl")
    config = json.loads((GOLDEN / "config.json").read_text())
    names = tensor_names(Decoder(from_hf(config)))
    shapes = {stored: name.stored_shape for name in names for stored in name.stored}
    save_file(cases.weights_of(shapes), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return load_model(directory, dtype="float32")


def images_of(name: str) -> list[Image]:
    return [Image(*one) for one in zip(cases.pixels_of(name), cases.PROMPTS[name], strict=True)]


def run(model: Decoder, params: Any, name: str, tokens: np.ndarray, spare: int = 1):
    """Logits f32 ``[T, V]`` and the images' features, which have room for ``spare`` more."""
    grids = cases.PROMPTS[name]
    row = image_tokens(model.config.vision, tokens, grids)
    features, size = None, spare + int((row.index >= 0).sum())
    if grids:
        features = image_features(model, params, images_of(name), size=size)
    hidden = model.hidden(
        params,
        jnp.asarray(tokens)[None],
        positions=jnp.asarray(row.positions)[None],
        features=features,
        feature_index=jnp.asarray(row.index)[None],
    )
    return (hidden @ model.head(params))[0], features, row


@pytest.mark.parametrize("name", cases.PROMPTS)
def test_features_positions_logits_and_greedy_tokens_equal_transformers(name, loaded, golden):
    model, params = loaded
    prompt, greedy = cases.tokens_of(name), golden[f"{name}/greedy"]
    tokens = np.concatenate([prompt, greedy])
    logits, features, row = jax.jit(lambda p: run(model, p, name, tokens))(params)
    last = len(prompt)
    np.testing.assert_array_equal(row.positions[:last], golden[f"{name}/positions"])
    assert row.delta == golden[f"{name}/delta"]
    # After the prompt, the three axes are one position: index + delta.
    after = np.arange(last, len(tokens)) + row.delta
    np.testing.assert_array_equal(row.positions[last:], np.stack([after] * 3, axis=-1))
    if features is not None:
        used = np.asarray(features)[row.index[row.index >= 0]]
        np.testing.assert_allclose(used, golden[f"{name}/features"], rtol=0, atol=BOUND)
    np.testing.assert_allclose(logits[:last], golden[f"{name}/logits"], rtol=0, atol=BOUND)
    written = np.array(logits[last - 1 : -1])
    written[:, list(cases.BANNED)] = -np.inf
    np.testing.assert_array_equal(np.argmax(written, axis=-1), greedy)


@pytest.mark.parametrize("name", cases.PROMPTS)
def test_gradients_of_every_parameter_equal_transformers(name, loaded, golden):
    model, params = loaded
    tokens = cases.tokens_of(name)

    def loss(params):
        logprobs = jax.nn.log_softmax(run(model, params, name, tokens)[0][:-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens)[1:, None], axis=-1).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    for parameter in tensor_names(model):
        ours = gradients
        for key in parameter.path:
            ours = ours[key]
        for layer, stored in enumerate(parameter.stored):
            one = parameter.to_stored(np.asarray(ours[layer] if parameter.stacked else ours))
            expected = golden.get(f"{name}/gradient/{stored}", np.zeros(8))
            got = cases.projections(stored, one)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=BOUND, err_msg=stored)


def test_a_prompt_without_images_is_a_row_of_qwen2(loaded):
    """The same weights as a Qwen2 model without the tower give the same logits."""
    model, params = loaded
    config = dataclasses.replace(
        model.config, model_type="qwen2", vision=None, rope=RopeConfig(theta=1e4)
    )
    plain = dataclasses.replace(model, config=config)
    tokens = cases.tokens_of("none")
    text = {name: part for name, part in params.items() if name != "vision"}
    expected = jax.jit(plain.logits)(text, jnp.asarray(tokens)[None])[0]
    logits = jax.jit(lambda p: run(model, p, "none", tokens)[0])(params)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_image_tokens_that_do_not_fit_the_images_are_refused(loaded):
    vision, grids = loaded[0].config.vision, cases.PROMPTS["two"]
    tokens = cases.tokens_of("two")
    more = np.append(tokens, cases.IMAGE_ID)
    with pytest.raises(ModelError, match="has 18 image tokens, its images have 17"):
        image_tokens(vision, more, grids)
    # The first image's last token changes places with the token behind it.
    last = int(np.flatnonzero(tokens == cases.IMAGE_ID)[grids[0][0] * grids[0][1] // 4 - 1])
    tokens[[last, last + 1]] = tokens[[last + 1, last]]
    with pytest.raises(ModelError, match="text stands inside the tokens of image 1"):
        image_tokens(vision, tokens, grids)


def test_images_that_do_not_fit_are_named(loaded):
    vision, (image, *_) = loaded[0].config.vision, images_of("two")
    with pytest.raises(ModelError, match=r"image 2 has 39 patches, its grid is \(10, 4\)"):
        window_patches(vision, [image, Image(image.pixels[:-1], image.grid)], 8)
    with pytest.raises(ModelError, match="image 1 has 3 windows, more than 2"):
        window_patches(vision, [image], 2)
    text = dataclasses.replace(loaded[0].config, model_type="qwen2", vision=None)
    with pytest.raises(ModelError, match="qwen2 has no vision tower"):
        dataclasses.replace(loaded[0], config=text).encode_images({}, None)


@pytest.mark.parametrize("style", ["newer names", "nested config"])
def test_both_generations_of_files_hold_the_same_model(style, loaded, tmp_path):
    model, params = loaded
    save_model(tmp_path / "ours", model, params)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    if style == "newer names":
        newer = {"visual.": "model.visual.", "model.": "model.language_model."}
        stored = {
            next(
                (new + n.removeprefix(old) for old, new in newer.items() if n.startswith(old)), n
            ): t
            for n, t in stored.items()
        }
    else:
        config = json.loads((GOLDEN / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text(json.dumps(config))
    again, same = load_model(other, dtype="float32")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.slow
def test_transformers_gives_our_saved_model_the_same_results(
    loaded, golden, torch_python, tmp_path
):
    """transformers reads a directory that we wrote from a mesh of eight devices."""
    model, params = loaded
    shardings = param_shardings(model, make_mesh(2, 2, 2))
    save_model(tmp_path / "ours", model, jax.device_put(params, shardings))
    script = Path(__file__).parent / "make_vision_golden.py"
    command = [torch_python, script, f"--out={tmp_path}", f"--load={tmp_path / 'ours'}"]
    subprocess.run(command, check=True)
    with np.load(tmp_path / "results.npz") as results:
        for key in golden:
            np.testing.assert_allclose(results[key], golden[key], rtol=1e-5, atol=1e-5)
