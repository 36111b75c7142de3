"""Adapters equal PEFT's (``peft_reference.py``): results, gradients and files."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import ADAPTERS, CASES, tokens_of
from reference_check import real_rows, write_case
from safetensors.numpy import load_file, save_file

from echorl_jax.models import (
    Decoder,
    Lora,
    ModelError,
    base_params,
    init_adapters,
    load_adapter,
    load_model,
    merge,
    save_adapter,
    save_model,
    split_params,
    with_adapters,
)
from echorl_jax.models.lora import linears
from echorl_jax.parallel import make_mesh
from echorl_jax.types import PyTree

GOLDEN = Path(__file__).parent / "golden"
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def base(tmp_path: Path, name: str) -> Path:
    """The base model of an adapter."""
    case, _ = ADAPTERS[name]
    tmp_path.mkdir(exist_ok=True)
    return write_case(tmp_path, CASES[case], json.loads((GOLDEN / f"{case}.json").read_text()))


def adapted(tmp_path: Path, name: str, **options: Any) -> tuple[Decoder, PyTree]:
    directory = base(tmp_path / "base", name)
    return load_model(directory, dtype="float32", adapter=GOLDEN / name, **options)


def logits_of(model: Decoder, params: PyTree, case: dict[str, Any]) -> np.ndarray:
    tokens, rows = jnp.asarray(tokens_of(case)), jnp.asarray(case["rows"])
    return real_rows(jax.jit(model.logits)(params, tokens, lengths=rows), case)


def test_a_model_without_adapters_has_none_to_save(tmp_path: Path) -> None:
    case = next(iter(CASES))
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    plain = load_model(write_case(tmp_path, CASES[case], golden), dtype="float32")
    with pytest.raises(ModelError, match="the model has no adapters"):
        save_adapter(tmp_path / "adapter", *plain)


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_and_logprobs_equal_peft(name: str, tmp_path: Path) -> None:
    case = CASES[ADAPTERS[name][0]]
    model, params = adapted(tmp_path, name)
    ours = logits_of(model, params, case)
    with np.load(GOLDEN / name / "results.npz") as golden:
        theirs = golden["logits"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    logprobs = [jax.nn.log_softmax(jnp.asarray(values)) for values in (ours, theirs)]
    np.testing.assert_allclose(*logprobs, rtol=1e-5, atol=1e-5)
    without = logits_of(model.base, base_params(params), case)
    assert np.abs(without - theirs).max() > 0.1


def gradient(model: Decoder, frozen: PyTree, trainable: PyTree, case: dict[str, Any]) -> PyTree:
    """Of the mean next-token loss over all real tokens."""
    tokens, rows = jnp.asarray(tokens_of(case)), jnp.asarray(case["rows"])

    def loss(trainable: PyTree) -> jax.Array:
        logits = model.logits(merge(frozen, trainable), tokens, lengths=rows)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        inside = jnp.arange(tokens.shape[1] - 1)[None, :] < rows[:, None] - 1
        return -jnp.where(inside, picked, 0.0).sum() / inside.sum().astype(jnp.float32)

    return jax.jit(jax.grad(loss))(trainable)


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_a_and_b_equal_peft(name: str, tmp_path: Path) -> None:
    case = CASES[ADAPTERS[name][0]]
    model, params = adapted(tmp_path, name)
    frozen, trainable = split_params(model, params)
    gradients = gradient(model, frozen, trainable, case)
    # In the layout of PEFT's file; save_adapter is tested by itself below.
    save_adapter(tmp_path / "gradients", model, gradients)
    ours = load_file(tmp_path / "gradients" / TENSORS)
    with np.load(GOLDEN / name / "results.npz") as golden:
        theirs = {key: golden[key] for key in golden.files if key != "logits"}
    assert {key.replace(".weight", "") for key in theirs} == {
        k.replace(".weight", "") for k in ours
    }
    for key, value in theirs.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5)  # measured 5e-6


@pytest.mark.parametrize("start", ["first step", "trained"])
def test_full_rank_gradients_are_those_of_full_training_projected(
    start: str, tmp_path: Path
) -> None:
    """With G = dL/dW of full training at W + s A B: dL/dA = s G B^T and dL/dB = s A^T G.

    At the first step B is zero, so only B has a gradient, and as A has full rank its s A^T G
    gives G back: G = A^-T (dL/dB) / s.
    """
    case = CASES["qwen2_plain"]
    plain, weights = load_model(base(tmp_path / "base", "peft_qwen2"), dtype="float32")
    names = ("q", "k", "v", "gate", "up")  # whose input is the hidden size of 32
    lora = Lora.uniform(
        plain.config, names, rank=plain.config.hidden_size, alpha=24.0, rslora=False
    )
    adapters = init_adapters(plain, lora, jax.random.key(0), init="kaiming")
    if start == "trained":
        adapters = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapters
        )
    model, params = with_adapters(plain, weights, lora, adapters)
    ours = gradient(model, *split_params(model, params), case)
    save_model(tmp_path / "whole", model, params, dtype="float32")
    whole = gradient(plain, {}, load_model(tmp_path / "whole", dtype="float32")[1], case)
    for (one, mine), (_, full), (_, values) in zip(
        *(linears(lora, tree) for tree in (ours, whole, params)), strict=True
    ):
        for layer in range(plain.config.num_layers):
            a, b = (np.asarray(values["lora"][part][layer], np.float64) for part in "ab")
            da, db = (np.asarray(mine["lora"][part][layer]) for part in "ab")
            g, b, db = (x.reshape(32, -1) for x in (np.float64(full["kernel"][layer]), b, db))
            assert np.abs(g).max() > 1e-3, one.linear
            scale = 24.0 / 32
            np.testing.assert_allclose(da, scale * g @ b.T, atol=1e-6)
            np.testing.assert_allclose(db, scale * a.T @ g, atol=1e-6)
            if start == "first step":
                assert not da.any()
                recovered = np.linalg.solve(a.T, np.float64(db)) / scale
                np.testing.assert_allclose(recovered, g, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_directory_of_peft_survives_the_round_trip_to_the_bit(name: str, tmp_path: Path) -> None:
    model, params = adapted(tmp_path, name)
    save_adapter(tmp_path / "again", model, params, base="some/base")
    before, after = (load_file(d / TENSORS) for d in (GOLDEN / name, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    plain = load_model(tmp_path / "base", dtype="float32")
    model_again, params_again = load_adapter(tmp_path / "again", *plain)
    assert model_again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    raw = json.loads((tmp_path / "again" / SETTINGS).read_text())
    assert raw["base_model_name_or_path"] == "some/base"


def test_an_adapter_on_a_mesh_and_merged_gives_the_same_logits(tmp_path: Path) -> None:
    case = CASES[ADAPTERS["peft_qwen2"][0]]
    model, params = adapted(tmp_path, "peft_qwen2")
    expected = logits_of(model, params, case)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = load_model(
        tmp_path / "base", dtype="float32", mesh=mesh, adapter=GOLDEN / "peft_qwen2"
    )
    a = sharded[1]["layers"]["attention"]["q"]["lora"]["a"]
    assert "fsdp" in str(a.sharding.spec)
    np.testing.assert_allclose(logits_of(*sharded, case), expected, atol=2e-5)
    for place, each in (("one", (model, params)), ("eight", sharded)):
        save_model(tmp_path / place, *each, dtype="float32")
        merged, weights = load_model(tmp_path / place, dtype="float32")
        assert merged.lora is None
        np.testing.assert_allclose(logits_of(merged, weights, case), expected, atol=2e-5)
        save_adapter(tmp_path / f"{place}_adapter", *each)
        kept = load_file(tmp_path / f"{place}_adapter" / TENSORS)
        original = load_file(GOLDEN / "peft_qwen2" / TENSORS)
        assert all(np.array_equal(kept[key], value) for key, value in original.items())


def changed_settings(**changes: Any):
    return lambda raw, tensors: raw.update(changes)


def renamed_tensor(old: str, new: str):
    def change(raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def broken_tensor(part: str, make: Any):
    def change(raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        key = next(key for key in sorted(tensors) if part in key)
        value = make(tensors.pop(key))
        if value is not None:
            tensors[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_settings(use_dora=True), "use_dora = True is not supported"),
        (changed_settings(modules_to_save=["lm_head"]), "modules_to_save"),
        (changed_settings(bias="lora_only"), "bias 'lora_only'"),
        (changed_settings(lora_bias=True), "lora_bias"),
        (changed_settings(trainable_token_indices=[3]), "trainable_token_indices"),
        (changed_settings(layer_replication=[[0, 2]]), "layer_replication"),
        (changed_settings(peft_type="IA3"), "peft_type 'IA3'"),
        (changed_settings(fan_in_fan_out=True), "fan_in_fan_out"),
        (changed_settings(r=3), "has rank 4, but adapter_config.json says 3"),
        (changed_settings(r="four"), "must be numbers"),
        (changed_settings(lora_alpha=-1), "must be above 0"),
        (changed_settings(rank_pattern={"q_proj(": 4}), "rank_pattern has 'q_proj('"),
        (
            changed_settings(rank_pattern={r"((.|\w|[a-z])+)+[0-9]": 4}),
            "rank_pattern has '((.|\\\\w|[a-z])+)+[0-9]': regex timed out",
        ),
        (changed_settings(init_lora_weights="pissa_niter_4"), "changes the base model"),
        (changed_settings(use_rslora="false"), "use_rslora must be true or false"),
        (renamed_tensor("layers.0.mlp.up_proj", "embed_tokens"), "embed_tokens"),
        (renamed_tensor("layers.1.", "layers.7."), "layers.7."),
        (renamed_tensor("lora_A", "lora_magnitude_vector"), "shapes"),
        (broken_tensor("lora_B", lambda x: None), "expected [r, "),
        (broken_tensor("lora_B", lambda x: x[:-1]), "expected [r, "),
        (broken_tensor("lora_A", lambda x: x * np.nan), "not finite"),
        (lambda raw, tensors: tensors.clear(), "holds no adapter"),
    ],
)
def test_other_adapters_are_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    raw = json.loads((GOLDEN / "peft_llama" / SETTINGS).read_text())
    tensors = load_file(GOLDEN / "peft_llama" / TENSORS)
    change(raw, tensors)
    other = tmp_path / "other"
    other.mkdir()
    (other / SETTINGS).write_text(json.dumps(raw))
    save_file(tensors, other / TENSORS, {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_model(base(tmp_path / "base", "peft_llama"), dtype="float32", adapter=other)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_directory_and_a_pickle_are_named(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", "peft_llama")
    with pytest.raises(ModelError, match="adapter_config.json does not exist"):
        load_model(directory, adapter=tmp_path / "none")
    shutil.copytree(GOLDEN / "peft_llama", tmp_path / "old")
    (tmp_path / "old" / TENSORS).rename(tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter_model.bin is a pickle"):
        load_model(directory, adapter=tmp_path / "old")


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_what_we_save(name: str, torch_python: str, tmp_path: Path) -> None:
    case = CASES[ADAPTERS[name][0]]
    model, params = adapted(tmp_path, name)
    save_adapter(tmp_path / "ours", model, params)
    tokens = tokens_of(case)[:, : min(case["rows"])]
    np.save(tmp_path / "base" / "tokens.npy", tokens)
    script, out = Path(__file__).parent / "peft_reference.py", tmp_path / "theirs"
    paths = {"--out": out, "--load": tmp_path / "base", "--adapter": tmp_path / "ours"}
    command = [torch_python, str(script), *(str(x) for pair in paths.items() for x in pair)]
    subprocess.run(command, check=True)
    ours = jax.jit(model.logits)(params, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, np.load(out / "logits.npy"), rtol=1e-5, atol=1e-5)
    saved, again = load_file(tmp_path / "ours" / TENSORS), load_file(out / TENSORS)
    assert saved.keys() == again.keys()
    assert all(np.array_equal(value, again[key]) for key, value in saved.items())
