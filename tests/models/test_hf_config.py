"""``config.json``: what is understood, and what is refused by name."""

import json

import pytest
from hf_reference import CASES

from echorl_jax.models import DecoderConfig, ModelError, RopeConfig, from_hf, read_config, to_hf

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
        ({"num_experts": 8, "moe_top_k": 2}, "unsupported field.* qwen2: moe_top_k, num_experts"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"attention_bias": True}, "unsupported field.* attention_bias"),
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
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, not 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads=12 is no multiple"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be a positive integer"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=message) as error:
        from_hf(QWEN | changes)
    assert "\n" not in str(error.value)


def test_fields_that_are_null_or_change_nothing_are_accepted():
    from_hf(QWEN | {"some_future_feature": None, "use_cache": False, "id2label": {"0": "A"}})


@pytest.mark.parametrize("text,message", [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_a_config_that_is_no_json_object(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match="config.json does not exist"):
        read_config(tmp_path)
