"""Reads and writes the Hugging Face ``config.json``.

Every field of the file is either used, known to change nothing, or required to hold the one value
that we implement. Anything else is refused by name: a setting that is silently ignored gives a
model that is silently wrong.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echorl_jax.models.config import DecoderConfig, ModelError, RopeConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_USED = frozenset(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps
    tie_word_embeddings initializer_range rope_theta rope_scaling rope_parameters torch_dtype dtype
    bos_token_id eos_token_id pad_token_id
    """.split()
)
_WINDOW_FIELDS = frozenset(
    "use_sliding_window sliding_window max_window_layers layer_types".split()
)
_USED_BY_FAMILY = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "qwen2": _WINDOW_FIELDS,
    "qwen3": _WINDOW_FIELDS | {"attention_bias"},
}
# No effect on the values that a causal language model computes: names, versions, caching, labels,
# defaults of generation.
_INERT = frozenset(
    """
    _name_or_path _commit_hash transformers_version use_cache output_hidden_states output_attentions
    return_dict
    use_return_dict chunk_size_feed_forward problem_type id2label label2id num_labels
    finetuning_task task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    torchscript use_bfloat16 attn_implementation _attn_implementation _attn_implementation_autoset
    max_length min_length do_sample early_stopping num_beams num_beam_groups temperature top_k top_p
    typical_p repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()
)
# Fields that change the model, with the values under which it is the one that we implement.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_YARN = "beta_fast beta_slow mscale mscale_all_dim attention_factor truncate"
# Fields of each rope scaling: those it needs, then those it may have.
_ROPE_FIELDS: Mapping[str, tuple[str, str]] = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", f"original_max_position_embeddings {_YARN}"),
}


def read_config(directory: str | Path) -> DecoderConfig:
    """The architecture in ``directory/config.json``.

    End-of-sequence ids of ``generation_config.json`` are added to its own: chat models stop at more
    than one token.

    Raises:
      ModelError: no such file, no JSON, or an architecture or field that we do not implement.
    """
    raw = _read_json(Path(directory) / "config.json")
    config = from_hf(raw)
    generation = Path(directory) / "generation_config.json"
    if not generation.exists():
        return config
    eos_ids = config.eos_ids + _ids(_read_json(generation).get("eos_token_id"))
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(eos_ids)))


def from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """:class:`DecoderConfig` from the fields of a Hugging Face configuration.

    Raises:
      ModelError: an architecture or field that we do not implement, or one that is missing.
    """
    family = _family(raw)
    _refuse_unsupported(raw, family)
    heads = _integer(raw, "num_attention_heads")
    layers = _integer(raw, "num_hidden_layers")
    hidden = _integer(raw, "hidden_size")
    attention_bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        model_type=family,  # pyright: ignore[reportArgumentType]
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(raw, family, heads),
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
        max_position_embeddings=raw.get(
            "max_position_embeddings", 2048 if family == "llama" else 32768
        ),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope=_rope(raw),
        windows=_windows(raw, layers),
        initializer_range=raw.get("initializer_range", 0.02),
        stored_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        bos_id=raw.get("bos_token_id"),
        eos_ids=_ids(raw.get("eos_token_id")),
        pad_id=raw.get("pad_token_id"),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` that transformers (4 and 5) reads back as the same
    architecture.
    """
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "torch_dtype": config.stored_dtype,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0]
        if len(config.eos_ids) == 1
        else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        **_rope_to_hf(config.rope),
    }
    if config.model_type == "llama":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    else:
        raw |= _windows_to_hf(config)
    if config.model_type == "qwen3":
        raw["attention_bias"] = config.qkv_bias
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds no JSON object")
    return raw


def _family(raw: Mapping[str, Any]) -> str:
    """The model type, if it and the named architecture are ours."""
    family = raw.get("model_type")
    known = ", ".join(_ARCHITECTURES)
    if family not in _ARCHITECTURES:
        raise ModelError(f"model_type {family!r} is not supported; supported: {known}")
    named = raw.get("architectures") or [_ARCHITECTURES[family]]
    if named != [_ARCHITECTURES[family]]:
        raise ModelError(
            f"architectures {named} is not supported; for {family}: {_ARCHITECTURES[family]}"
        )
    return family


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Raises for each field that would change the model in a way we do not implement."""
    for name, allowed in _REQUIRED.items():
        if name in raw and raw[name] not in allowed:
            raise ModelError(
                f"config.json: {name}={raw[name]!r} is not supported; only {allowed[0]!r}"
            )
    known = _USED | _USED_BY_FAMILY[family] | _INERT | _REQUIRED.keys()
    # A null says that the feature is off, whatever it is.
    unknown = sorted(name for name, value in raw.items() if name not in known and value is not None)
    if unknown:
        raise ModelError(f"config.json: unsupported field(s) for {family}: {', '.join(unknown)}")


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _kv_heads(raw: Mapping[str, Any], family: str, heads: int) -> int:
    """Llama 1 and 2 leave the field out; for Qwen the reference then assumes 32, which no
    published model means.
    """
    if family == "llama" and raw.get("num_key_value_heads") is None:
        return heads
    return _integer(raw, "num_key_value_heads")


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Rope settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and
    ``rope_scaling`` (4).
    """
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    legacy_kind = given.pop("type", "default")
    kind = given.pop("rope_type", legacy_kind)
    theta = given.pop("rope_theta", raw.get("rope_theta", 10_000.0))
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ModelError("rope_parameters: partial_rotary_factor other than 1 is not supported")
    if kind not in _ROPE_FIELDS:
        raise ModelError(
            f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}"
        )
    needed, optional = (fields.split() for fields in _ROPE_FIELDS[kind])
    given = {name: value for name, value in given.items() if value is not None}
    missing = sorted(set(needed) - given.keys())
    unknown = sorted(given.keys() - set(needed) - set(optional))
    if missing or unknown:
        raise ModelError(
            f"rope type {kind!r}: missing field(s) {missing}, unsupported field(s) {unknown}"
        )
    if "original_max_position_embeddings" in optional:
        given.setdefault(
            "original_max_position_embeddings", raw.get("max_position_embeddings", 2048)
        )
    return RopeConfig(theta=float(theta), kind=kind, **given)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, so that either major version of transformers reads the same rope."""
    needed, optional = (fields.split() for fields in _ROPE_FIELDS[rope.kind])
    values = dataclasses.asdict(rope)
    scaling = {name: values[name] for name in needed + optional if values[name] is not None}
    scaling = {"rope_type": rope.kind, **scaling} if rope.kind != "default" else {}
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {**scaling} or None,
        "rope_parameters": parameters,
    }


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window: ``layer_types`` where given, else all layers from
    ``max_window_layers`` on.
    """
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    if window is None:
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        start = raw.get("max_window_layers", 28)
        return tuple(window if layer >= start else None for layer in range(layers))
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(f"config.json: layer_types {unknown} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    window = next((window for window in config.windows if window is not None), None)
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    full_first = sum(w is None for w in config.windows)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": full_first,
        "layer_types": kinds,
    }
