"""Model directories survive round trips, and every damage gives a one-line error."""

import dataclasses
import json
import struct
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from echorl_jax.models import (
    Decoder,
    DecoderConfig,
    ModelError,
    RopeConfig,
    init_params,
    load_decoder,
    load_model,
    save_model,
)
from echorl_jax.models.tensor_files import stored_tensors
from echorl_jax.parallel import make_mesh

CONFIG = DecoderConfig(
    "qwen2",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
    rope=RopeConfig(theta=1e6),
    stored_dtype="bfloat16",
    eos_ids=(2, 7),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory of bfloat16 weights in several shards."""
    directory = tmp_path_factory.mktemp("saved")
    model = Decoder(CONFIG, dtype="float32")
    params = init_params(model, jax.random.key(0))
    save_model(directory, model, params, shard_bytes=6000)
    return directory


@pytest.fixture(scope="module")
def one_file(saved, tmp_path_factory) -> Path:
    model, params = load_model(saved)
    directory = tmp_path_factory.mktemp("one_file")
    save_model(directory, model, params)
    return directory


def _all_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: np.array(t.view()) for name, t in stored_tensors(directory).items()}


def _equal_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    same = [a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a]
    return a.keys() == b.keys() and all(same)


@pytest.mark.parametrize("sizes", [None, (1, 4, 2)])
def test_round_trip_is_bit_identical(saved, tmp_path, sizes):
    mesh = None if sizes is None else make_mesh(*sizes)
    model, params = load_model(saved, mesh=mesh)
    save_model(tmp_path, model, params)
    assert _equal_bits(_all_tensors(saved), _all_tensors(tmp_path))
    assert load_decoder(tmp_path) == model


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_stored_type_is_read_exactly(saved, tmp_path, dtype):
    tensors = {n: t.astype(np.float32).astype(dtype) for n, t in _all_tensors(saved).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    _, params = load_model(tmp_path)
    up = params["layers"]["mlp"]["up"]["kernel"]
    expected = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up[1], expected)


@pytest.mark.parametrize("sizes", [None, (1, 4, 2)])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, sizes):
    tensors = {n: t.astype(np.float32) for n, t in _all_tensors(saved).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    mesh = None if sizes is None else make_mesh(*sizes)
    with pytest.raises(ModelError, match="not finite: ") as caught:
        load_model(tmp_path, mesh=mesh)
    named = str(caught.value).partition("finite: ")[2].split(", ")
    assert sorted(named) == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def test_safetensors_reads_shards_and_index(saved):
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all((saved / file).stat().st_size < 9000 for file in files)
    total = 0
    for file in files:
        for name, tensor in load_file(saved / file).items():
            assert index["weight_map"][name] == file
            total += tensor.nbytes
    assert total == index["metadata"]["total_size"]


def test_config_is_read_by_transformers(saved):
    config = AutoConfig.from_pretrained(saved)
    assert config.model_type == "qwen2" and config.num_hidden_layers == 3
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.eos_token_id == [2, 7]


def test_a_second_save_leaves_no_old_shards(saved, tmp_path):
    model, params = load_model(saved)
    save_model(tmp_path, model, params, shard_bytes=3000)
    save_model(tmp_path, model, params)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    load_model(tmp_path)


def test_tokenizer_is_saved_with_the_weights(saved, tmp_path):
    class Tokenizer:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text("{}")

    model, params = load_model(saved)
    save_model(tmp_path, model, params, Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


QWEN_TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "qwen2_5"


@pytest.mark.skipif(not QWEN_TOKENIZER.exists(), reason="the Qwen2.5 tokenizer is not here")
def test_a_published_tokenizer_survives_a_round_trip(saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    model, params = load_model(saved)
    save_model(tmp_path, model, params, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "First, 3 * 7 = 21.\n\nThen 21 + 12 = 33."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_end_of_sequence_ids_of_generation_config_are_added(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_decoder(tmp_path).config.eos_ids == (2, 7, 9)


def test_generation_stops_at_the_same_tokens_after_a_save(saved, tmp_path):
    model, params = load_model(saved)
    config = dataclasses.replace(model.config, eos_ids=(2, 7, 9))
    save_model(tmp_path, dataclasses.replace(model, config=config), params)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 7, 9]
    assert load_decoder(tmp_path).config.eos_ids == (2, 7, 9)


def _copy(saved: Path, target: Path, change) -> Path:
    """The same directory as one file, with ``change`` applied to its tensors."""
    tensors = _all_tensors(saved)
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((saved / "config.json").read_text())
    return target


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"missing tensor\(s\): model.norm.weight \[16\]$",
        ),
        (
            lambda t: t.update(extra=np.zeros((2, 3), np.float32)),
            r"surplus tensor\(s\): extra \[2, 3\]$",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:49].copy()}),
            r"misshapen tensor\(s\): lm_head.weight is \[49, 16\], expected \[50, 16\]$",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if "mlp" in n],
            r"missing tensor\(s\): model.layers.0.mlp.down_proj.weight \[16, 24\], .* and 6 more$",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)}),
            "tensor model.norm.weight has unsupported type I32",
        ),
    ],
)
def test_wrong_tensors_are_refused_in_one_line(saved, tmp_path, change, message):
    with pytest.raises(ModelError, match=message) as error:
        load_model(_copy(saved, tmp_path, change))
    assert "\n" not in str(error.value)


def test_redundant_tensors_are_accepted(saved, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    _copy(saved, tmp_path, tie)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, params = load_model(tmp_path)
    assert model.config.tied_embeddings and "head" not in params


def test_a_tied_model_with_another_head_is_refused(saved, tmp_path):
    _copy(saved, tmp_path, lambda tensors: None)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"surplus tensor\(s\): lm_head.weight"):
        load_model(tmp_path)


def _damage(directory: Path, data: bytes) -> None:
    (directory / "model.safetensors").write_bytes(data)


def _header(entry: dict) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda d: None, "holds no model.safetensors and no"),
        (lambda d: (d / "pytorch_model.bin").touch(), "pytorch_model.bin is a pickle"),
        (lambda d: _damage(d, b""), "is not a readable safetensors file"),
        (lambda d: _damage(d, b"\xff" * 20), "header too large"),
        (lambda d: _damage(d, struct.pack("<Q", 3) + b"{x}"), "is not a readable safetensors file"),
        (
            lambda d: _damage(d, _header({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]})),
            "incomplete metadata",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
            "names missing file",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../b"}}'
            ),
            "names a file outside its directory",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text("{}"),
            "is not an index of safetensors shards",
        ),
    ],
)
def test_damaged_directories_are_refused_in_one_line(saved, tmp_path, make, message):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    make(tmp_path)
    with pytest.raises(ModelError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_path_that_is_neither_directory_nor_repository(monkeypatch):
    with pytest.raises(ModelError, match="nowhere/at-all is not a directory, and no repository"):
        load_model("nowhere/at-all")


def test_two_sets_of_weights_are_refused_by_name(saved, tmp_path):
    """A single file saved over an older directory of shards."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    single = tmp_path / "model.safetensors"
    save_file({n: t + 1 for n, t in _all_tensors(saved).items()}, single)
    with pytest.raises(ModelError, match=r"model.safetensors and .*index.json.*out of date"):
        load_model(tmp_path)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    # With the old shards gone, the single file is meant, as in transformers.
    _, params = load_model(tmp_path)
    old = _all_tensors(saved)["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["final_norm"]["scale"], old + 1)


def test_a_single_file_with_its_index_is_read(saved, tmp_path):
    _copy(saved, tmp_path, lambda tensors: None)
    index = {"weight_map": dict.fromkeys(_all_tensors(saved), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(saved, tmp_path):
    for name in ("a", "b"):
        save_file({"model.norm.weight": np.ones(16, np.float32)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="a.safetensors and .*b.safetensors both hold"):
        stored_tensors(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["config.json", "model.safetensors", "generation_config.json"]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=3),
)
def test_damaged_bytes_give_a_model_or_a_one_line_error(one_file, at, damage):
    """Replaces bytes of one file, as often in the header as in the values."""
    with tempfile.TemporaryDirectory() as name:
        for file in one_file.iterdir():
            (Path(name) / file.name).write_bytes(file.read_bytes())
        data = bytearray((one_file / at).read_bytes())
        for place, new in damage:
            start = int(place * min(len(data), 4000))
            data[start : start + len(new)] = new
        (Path(name) / at).write_bytes(data)
        try:
            load_decoder(name)
            stored_tensors(Path(name))
        except ModelError as error:
            assert "\n" not in str(error)


def test_host_memory_stays_near_the_largest_tensor(tmp_path):
    """Besides the parameters, reading holds about one tensor and not the file."""
    rss = _AnonymousMemory()
    config = DecoderConfig("llama", 4096, 512, 2048, 12, 8, 8, 64, tied_embeddings=True)
    model = Decoder(config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.param_shapes())
    save_model(tmp_path, model, zeros)
    file = (tmp_path / "model.safetensors").stat().st_size
    del zeros
    _, params = load_model(tmp_path)  # compiles what the measured load runs
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    del params
    with rss:
        _, params = load_model(tmp_path)
        jax.block_until_ready(params)
    largest = 4096 * 512 * 4
    assert file > 10 * largest / 2
    assert rss.peak - rss.start < held + 4 * largest


class _AnonymousMemory:
    """Peak memory of this process without file pages, sampled by a thread."""

    def __enter__(self):
        import threading

        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        pytest.skip("this system does not report anonymous memory")
