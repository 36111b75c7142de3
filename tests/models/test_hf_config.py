"""Fields of ``config.json`` are read correctly or refused by name."""

import json
import re
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_jax.models import DecoderConfig, ModelError, RopeConfig, from_hf, read_config, to_hf
from echorl_jax.models.rope import rotary

SHARED = Path(__file__).parents[3] / "shared" / "bugs" / "configs.py"
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_a_published_qwen_config():
    config = from_hf(QWEN)
    assert config == DecoderConfig(
        "qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        norm_eps=1e-6,
        tied_embeddings=True,
        qkv_bias=True,
        rope=RopeConfig(theta=1e6),
        stored_dtype="bfloat16",
        bos_id=151643,
        eos_ids=(151645,),
    )
    assert config.windows == (None,) * 28


def test_both_spellings_of_rope_are_the_same():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    old = from_hf(QWEN | {"rope_scaling": scaling})
    new = {name: value for name, value in QWEN.items() if name != "rope_theta"}
    new["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 1e6}
    assert old == from_hf(new)
    assert old.rope == RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32768)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_yarn_added_beside_default_rope_parameters_is_used():
    # What Qwen's model card tells people to add, in a directory that save_model wrote.
    written = to_hf(from_hf(QWEN))
    assert written["rope_parameters"]["rope_type"] == "default"
    assert from_hf(written | {"rope_scaling": YARN}) == from_hf(QWEN | {"rope_scaling": YARN})
    del written["rope_theta"]
    assert from_hf(written | {"rope_scaling": YARN}).rope.theta == 1e6


def test_theta_outside_rope_parameters_is_used():
    assert from_hf(QWEN | {"rope_parameters": {"rope_type": "default"}}).rope.theta == 1e6


def test_llama_without_theta_has_10000():
    raw = {name: value for name, value in LLAMA_3_2_1B.items() if name != "rope_theta"}
    assert from_hf(raw).rope.theta == 10_000.0


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"rope_theta": 5e5}, "rope_theta=500000 but rope_parameters.rope_theta=1e.06; make them"),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0, "rope_theta": 1e6}},
            "rope_parameters and rope_scaling disagree: .*2.0.* and .*4.0",
        ),
        (
            {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "rope_theta must be a number .*, not None",
        ),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type 'linear', but type 'yarn'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, not 'yarn'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor must be a number .* '4'"),
        ({"rope_scaling": YARN | {"beta_slow": 64}}, "beta_slow must be below beta_fast"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope type \['yarn'\] is not supported"),
    ],
)
def test_rope_settings_that_disagree_are_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=message) as error:
        from_hf(to_hf(from_hf(QWEN)) | changes)
    assert "\n" not in str(error.value)


LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING | {"factor": 32.0},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_a_published_llama_config():
    config = from_hf(LLAMA_3_2_1B)
    assert config.eos_ids == (128001, 128008, 128009)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert not config.qkv_bias
    assert config.rope.factor == 32.0 and config.rope.theta == 500000.0


def test_a_first_llama_has_as_many_kv_heads_as_heads():
    raw = {k: v for k, v in LLAMA_3_2_1B.items() if k not in ("num_key_value_heads", "head_dim")}
    config = from_hf(raw)
    assert (config.num_kv_heads, config.head_dim) == (32, 64)


def test_llama3_scaling_is_kept():
    rope = from_hf(QWEN | {"rope_scaling": LLAMA3_SCALING}).rope
    assert (rope.kind, rope.factor, rope.high_freq_factor) == ("llama3", 8.0, 4.0)
    assert rope.original_max_position_embeddings == 8192


def test_sliding_window_from_a_layer_on():
    config = from_hf(QWEN | {"use_sliding_window": True, "sliding_window": 99})
    assert config.windows == (None,) * 21 + (99,) * 7


@pytest.mark.parametrize("name", CASES)
def test_write_and_read_is_the_identity(name):
    config = from_hf(CASES[name]["config"])
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported: llama"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (
            {"num_experts": 8, "moe_top_k": 2},
            "unsupported field.* qwen2: {'moe_top_k': 2, 'num_experts': 8}",
        ),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_mrope": True}, "'use_mrope': True"),
        ({"attention_bias": True}, "unsupported field.*'attention_bias'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, r"missing field\(s\) \['factor'\]"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
            r"unsupported field\(s\) \['beta_fast'\]",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 28},
            "layer_types .*chunked_attention",
        ),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
            "3 layer_types for 28 layers",
        ),
        ({"hidden_size": None}, "hidden_size must be an integer from 1 to .*, not None"),
        (
            {"num_attention_heads": 0},
            "num_attention_heads must be an integer from 1 to 65536, not 0",
        ),
        ({"num_key_value_heads": 5}, "config.json: num_attention_heads=12 is not a multiple"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be an integer from 1"),
        ({"head_dim": 7}, "config.json: head_dim=7 is odd"),
    ],
)
def test_unsupported_fields_are_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=message) as error:
        from_hf(QWEN | changes, "here/config.json")
    assert str(error.value).startswith("here/config.json: ") and "\n" not in str(error.value)


def test_fields_that_are_null_or_change_nothing_are_accepted():
    from_hf(QWEN | {"some_future_feature": None, "use_cache": False, "id2label": {"0": "A"}})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"rope_theta": None}, "rope_theta must be a number from 1.001 to 1e.12, not None"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number .* not '1e6'"),
        ({"eos_token_id": -1}, "eos_token_id must be an integer from 0 to .*, not -1"),
        ({"eos_token_id": "2"}, "eos_token_id must be an integer .* not '2'"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be an integer .* not None"),
        ({"pad_token_id": 2**40}, "pad_token_id must be an integer"),
        ({"head_dim": 16.0}, "head_dim must be an integer from 2 to .*, not 16.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4096, not"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer .* not True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number .* not nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number .* not None"),
        ({"max_position_embeddings": "32768"}, "max_position_embeddings must be an integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not"),
        ({"torch_dtype": "int4"}, "dtype 'int4': must be one of bfloat16, float16"),
        ({"layer_types": 5}, "layer_types 5 are not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures 'Qwen2ForCausalLM' is not"),
        ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\] is not supported"),
        ({"num_attention_heads": 2**16}, "head_dim=0 is odd or 0"),
        ({"rope_interleaved": True}, "unsupported field.*{'rope_interleaved': True}"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1 is not supported"),
        ({"is_causal": False}, "is_causal=False is not supported; only True"),
        ({"a\nb": 1}, r"{'a\\nb': 1}"),
    ],
)
def test_a_field_of_a_wrong_type_or_value_is_refused_in_one_line(changes, message):
    with pytest.raises(ModelError, match=message) as error:
        from_hf(QWEN | changes, "here/config.json")
    assert str(error.value).startswith("here/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spelling,stored",
    [
        ("bfloat16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("torch.float16", "float16"),
        ("half", "float16"),
        ("torch.float", "float32"),
        ("auto", "float32"),
        (None, "float32"),
    ],
)
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_spellings_of_the_stored_type(spelling, stored, field):
    raw = {name: value for name, value in QWEN.items() if name != "torch_dtype"}
    assert from_hf(raw | {field: spelling}).stored_dtype == stored


# Fields seen in published configurations of these families, by the program that writes them.
PUBLISHED = {
    "nanotron": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 2},
    "transformers.js": {"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {}}},
    "Unsloth": {"unsloth_fixed": True, "unsloth_version": "2026.4.2", "model_name": "a/b"},
    "TRL": {"neftune_noise_alpha": 5.0, "use_liger_kernel": True, "_liger": {"rope": True}},
    "custom code": {"auto_map": {"AutoModelForCausalLM": "modeling_a.A"}, "custom_pipelines": {}},
    "FastChat": {"max_sequence_length": 2048, "tokenizer_padding_side": "right"},
    "MiniCPM, InternLM": {"attn_implementation": "flash_attention_2", "bias": False},
    "transformers 4": {
        "_attn_implementation_autoset": True,
        "_flash_attn_2_enabled": True,
        "hidden_dropout_prob": 0.0,
        "resid_pdrop": 0.0,
        "use_mrope": False,
        "output_router_logits": False,
        "is_decoder": True,
        "tie_encoder_decoder": False,
        "tf_legacy_loss": False,
        "keys_to_ignore_at_inference": ["past_key_values"],
        "use_labels": True,
    },
    "verl": {"architectures": ["FSDPQwen2ForCausalLM"], "pad_token_id": -1},
}


@pytest.mark.parametrize("program", PUBLISHED)
def test_fields_of_published_configurations_change_nothing(program):
    assert from_hf(QWEN | PUBLISHED[program]) == from_hf(QWEN)


@pytest.mark.skipif(not SHARED.exists(), reason="the collected configurations are not here")
def test_collected_configurations_are_read_or_refused(capsys):
    runpy.run_path(str(SHARED))
    lines = dict(re.findall(r"^(.*?): (read.*|\w+Error.*)$", capsys.readouterr().out, re.M))
    refused = {name: line for name, line in lines.items() if not line.startswith("read")}
    assert len(lines) >= 18 and all(line.startswith("ModelError") for line in refused.values())
    interleaved, thetas = sorted(refused)
    assert "interleaved" in interleaved and "both thetas" in thetas
    scalings = {name: line for name, line in lines.items() if "llama3" in name or "yarn" in name}
    assert len(scalings) == 3
    assert all(re.search("llama3|yarn", line) for line in scalings.values())


_NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.sampled_from([2**31, 2**63, 10**30, 1, 4.0, 16.0]),
)
_WORDS = st.sampled_from(["", "2", "yarn", "llama3", "dynamic", "llama", "qwen3", "torch.float"])
_ROPE = st.dictionaries(
    st.sampled_from(
        "type rope_type rope_theta factor original_max_position_embeddings low_freq_factor "
        "high_freq_factor beta_fast beta_slow mscale mscale_all_dim attention_factor truncate "
        "partial_rotary_factor".split()
    ),
    _NUMBERS | _WORDS,
    max_size=6,
)
_VALUES = st.recursive(_NUMBERS | _WORDS | _ROPE, lambda inner: st.lists(inner, max_size=3))


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(sorted({*QWEN, *LLAMA_3_2_1B})), _VALUES, max_size=3),
    scaling=st.none() | _ROPE,
    parameters=st.none() | _ROPE,
)
def test_any_values_give_a_model_or_a_one_line_error(changes, scaling, parameters):
    raw = QWEN | {"rope_scaling": scaling, "rope_parameters": parameters} | changes
    try:
        config = from_hf(raw)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert np.isfinite(rotary(config, jnp.arange(3)[None]).cos).all()


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 5000, b"\xff{}", b""])
def test_unreadable_json_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match="config.json is not JSON") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text,message", [("{", "is not JSON"), ("[]", "does not hold")])
def test_a_config_without_a_json_object_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match="config.json does not exist"):
        read_config(tmp_path)
