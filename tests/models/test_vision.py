"""Qwen2.5-VL gives the results of transformers: features, positions, logits, gradients, tokens."""

import dataclasses
import json
import shutil
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
    Lora,
    ModelError,
    RopeConfig,
    from_hf,
    init_adapters,
    load_adapter,
    load_model,
    merge,
    param_shardings,
    save_adapter,
    save_model,
    split_params,
    with_adapters,
)
from echorl_jax.models.hf_names import tensor_names
from echorl_jax.models.image_features import image_features
from echorl_jax.models.images import image_tokens, window_patches
from echorl_jax.parallel import make_mesh
from echorl_jax.types import Image

GOLDEN = Path(__file__).parent / "golden" / "vision"
ADAPTER = Path(__file__).parent / "golden" / "peft_vision"
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


def adapted_vision(loaded: Any, adapter: Path = ADAPTER) -> tuple[Decoder, Any]:
    return load_adapter(adapter, *loaded)


def mean_loss(model: Decoder, params: Any, name: str) -> Any:
    """The mean next-token loss of a prompt, and its logits."""
    tokens = cases.tokens_of(name)
    logits = run(model, params, name, tokens)[0]
    logprobs = jax.nn.log_softmax(logits[:-1])
    return -jnp.take_along_axis(logprobs, jnp.asarray(tokens)[1:, None], axis=-1).mean(), logits


def test_adapters_of_text_and_tower_equal_peft(loaded, tmp_path):
    """Logits, and gradients of A and B, which are compared in the layout of PEFT's file."""
    model, params = adapted_vision(loaded)
    frozen, trainable = split_params(model, params)

    def loss(trainable: Any) -> Any:
        return mean_loss(model, merge(frozen, trainable), "two")

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    with np.load(ADAPTER / "results.npz") as arrays:
        theirs = dict(arrays)
    np.testing.assert_allclose(logits, theirs.pop("logits"), rtol=0, atol=BOUND)
    without = mean_loss(*loaded, "two")[1]
    assert np.abs(without - logits).max() > 0.1
    save_adapter(tmp_path, model, gradients)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and sum("visual" in name for name in ours) == 44
    for key, value in theirs.items():
        assert np.abs(value).max() > 0, key
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=BOUND, err_msg=key)


def test_adapters_of_the_tower_survive_the_round_trip_and_a_merge(loaded, tmp_path):
    model, params = adapted_vision(loaded)
    save_adapter(tmp_path / "again", model, params)
    tensors = load_file(tmp_path / "again" / "adapter_model.safetensors")
    expected = load_file(ADAPTER / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value)
    # Older versions of PEFT and transformers name modules as published files do.
    for name in ("model.language_model.", "model.visual."):
        older = {"model.visual.": "visual."}.get(name, "model.")
        tensors = {key.replace(f"l.{name}", f"l.{older}"): x for key, x in tensors.items()}
    shutil.copytree(tmp_path / "again", tmp_path / "older")
    save_file(tensors, tmp_path / "older" / "adapter_model.safetensors", {"format": "pt"})
    assert not tensors.keys() & expected.keys()
    for directory in (tmp_path / "again", tmp_path / "older"):
        other, same = adapted_vision(loaded, directory)
        assert other == model
        jax.tree.map(np.testing.assert_array_equal, same, params)
    save_model(tmp_path / "merged", model, params, dtype="float32")
    merged = load_model(tmp_path / "merged", dtype="float32")
    assert merged[0].lora is None
    logits = [
        jax.jit(lambda p, m=m: mean_loss(m, p, "two")[1])(p) for m, p in (merged, (model, params))
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=BOUND)


def test_fresh_adapters_of_the_tower_change_nothing_on_any_mesh(loaded):
    model, params = loaded
    names = ("q", "vision/qkv", "vision/o", "vision/down", "vision/merger/up")
    lora = Lora.uniform(model.config, names, rank=4, alpha=8.0, rslora=False)
    expected = mean_loss(model, params, "two")[1]
    drawn = []
    for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2)):
        placed = params if mesh is None else jax.device_put(params, param_shardings(model, mesh))
        adapters = init_adapters(model, lora, jax.random.key(0), init="kaiming", mesh=mesh)
        whole = with_adapters(model, placed, lora, adapters, mesh)
        np.testing.assert_allclose(
            jax.jit(lambda p, m=whole[0]: mean_loss(m, p, "two")[1])(whole[1]), expected, atol=BOUND
        )
        drawn.append(jax.device_get(adapters))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    a = drawn[0]["vision"]["merger"]["up"]["lora"]["a"]  # [128, 4], drawn from +- 1 / sqrt(128)
    assert a.shape == (128, 4) and 0.08 < np.abs(a).max() < 128**-0.5


@pytest.mark.slow
def test_peft_gives_our_saved_adapter_of_text_and_tower_the_same_logits(
    loaded, torch_python, tmp_path
):
    model, params = adapted_vision(loaded)
    save_model(tmp_path / "base", *loaded, dtype="float32")
    save_adapter(tmp_path / "ours", model, params)
    script, out = Path(__file__).parent / "peft_reference.py", tmp_path / "theirs"
    paths = {"--out": out, "--load": tmp_path / "base", "--adapter": tmp_path / "ours"}
    command = [torch_python, str(script), *(str(x) for pair in paths.items() for x in pair)]
    subprocess.run(command, check=True)
    logits = mean_loss(model, params, "two")[1]
    np.testing.assert_allclose(logits, np.load(out / "logits.npy")[0], rtol=0, atol=BOUND)
    ours, again = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "ours", out))
    assert ours.keys() == again.keys()
    assert all(np.array_equal(value, again[key]) for key, value in ours.items())


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
