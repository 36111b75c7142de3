"""Reads and writes the Hugging Face ``config.json``.

Every field is either read, known to change nothing, or required to hold the value that we
implement. Any other field is refused by name unless it is null or false: ignoring it silently would
give a wrong model. A published file may hold anything, so one table gives type, bounds and default
of each field that is read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echorl_jax.models.config import DecoderConfig, ModelError, RopeConfig
from echorl_jax.models.tensor_files import read_json

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_KINDS = {int: "an integer", float: "a number", bool: "true or false"}
# Token ids and positions are int32 on the device.
_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _Field:
    """Type, bounds and default of a field; a default of ``...`` makes it required."""

    kind: type
    low: float = 0
    high: float = 1
    default: Any = ...

    def read(self, raw: Mapping[str, Any], name: str, file: str) -> Any:
        """The checked value. Null counts as absent where the default is None or False."""
        value: Any = raw.get(name)
        absent = name not in raw or (value is None and self.default in (None, False))
        if absent and self.default is not ...:
            return self.default
        accepted = (int, float) if self.kind is float else self.kind
        right = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
        # NaN is within no bounds.
        if value is None or not right or not self.low <= value <= self.high:
            bounds = "" if self.kind is bool else f" from {self.low:g} to {self.high:g}"
            raise ModelError(
                f"{file}: {name} must be {_KINDS[self.kind]}{bounds}, not {value!r:.80}"
            )
        return self.kind(value)


_FLAG = _Field(bool, default=False)
_SIZE = _Field(int, 1, 2**24)
_THETA = _Field(float, 1.001, 1e12)
_FIELDS: Mapping[str, _Field] = {
    "vocab_size": _Field(int, 1, _INT32),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _Field(int, 1, 4096),
    "num_attention_heads": _Field(int, 1, 2**16),
    "num_key_value_heads": _Field(int, 1, 2**16),
    "head_dim": _Field(int, 2, 2**16, default=None),
    "max_position_embeddings": _Field(int, 1, _INT32, default=32768),
    "rms_norm_eps": _Field(float, 1e-12, 1, default=1e-6),
    "initializer_range": _Field(float, default=0.02),
    "tie_word_embeddings": _FLAG,
}
_WINDOW_FIELDS = {
    "use_sliding_window": _FLAG,
    "sliding_window": _Field(int, 1, _INT32, default=None),
    "max_window_layers": _Field(int, 0, _INT32, default=28),
}
_FAMILY_FIELDS: Mapping[str, Mapping[str, _Field]] = {
    "llama": _FIELDS
    | {
        # Llama 1 and 2 leave this out. Qwen's reference then assumes 32, which no published model
        # means.
        "num_key_value_heads": _Field(int, 1, 2**16, default=None),
        "max_position_embeddings": _Field(int, 1, _INT32, default=2048),
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
    },
    "qwen2": _FIELDS | _WINDOW_FIELDS,
    "qwen3": _FIELDS | _WINDOW_FIELDS | {"attention_bias": _FLAG},
}
# Fields that other functions of this module read.
_USED = frozenset(
    """
    model_type architectures rope_theta rope_scaling rope_parameters torch_dtype dtype
    bos_token_id eos_token_id pad_token_id layer_types
    """.split()
)
# No effect on the values that a causal language model computes: names, versions, caching, labels,
# kernels, defaults of generation, settings of other programs.
_INERT = frozenset(
    """
    transformers_version use_cache output_hidden_states output_attentions return_dict
    use_return_dict chunk_size_feed_forward problem_type id2label label2id num_labels use_labels
    finetuning_task task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    cls_token_id mask_token_id unk_token_id eod_token_id bos_token eos_token pad_token unk_token
    torchscript use_bfloat16 attn_implementation attention_implementation
    max_length min_length do_sample early_stopping num_beams num_beam_groups temperature top_k top_p
    typical_p repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pretraining_tp
    auto_map custom_pipelines is_llama_config is_decoder transformers.js_config model_name
    base_model base_model_name_or_path license language tags loss_type
    use_liger_kernel liger_kernel_config gradient_checkpointing use_flash_attn use_flash_attention
    use_flash_attention_2 flash_attn flash_attention use_sdpa use_fused_rms_norm use_fused_rope
    num_logits_to_keep logits_to_keep cache_implementation keys_to_ignore_at_inference
    model_max_length max_sequence_length max_seq_length max_seq_len seq_length
    tokenizer_model_max_length tokenizer_padding_side padding_side tensor_parallel_degree tp_plan
    sequence_parallel router_aux_loss_coef""".split()
)
# Private fields of transformers, and what fine-tuning tools leave behind.
_INERT_PREFIXES = ("_", "unsloth_", "neftune_")
# Fields that change the model, with the values under which it is the one that we implement.
_OFF = (0, None)
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_dropout": _OFF,
    "hidden_dropout": _OFF,
    "hidden_dropout_prob": _OFF,
    "attention_probs_dropout_prob": _OFF,
    "resid_pdrop": _OFF,
    "embd_pdrop": _OFF,
    "attn_pdrop": _OFF,
    "mlp_dropout": _OFF,
    "partial_rotary_factor": (1, None),
    "is_causal": (True, None),
    "use_rope": (True, None),
    "rms_norm": (True, None),
    "pruned_heads": ({}, None),
}
_DTYPES = {
    "bfloat16": "bfloat16 bf16",
    "float16": "float16 fp16 f16 half",
    # No type named: float32 holds the values of every narrower one.
    "float32": "float32 fp32 f32 float auto none",
    "float64": "float64 fp64 f64 double",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}
_SPELLINGS = {spelling: name for name, words in _DTYPES.items() for spelling in words.split()}
_NUMBER = _Field(float, 1e-6, 1e9)
_OPTIONAL = _Field(float, 0, 1e9, default=None)
_CONTEXT = {"original_max_position_embeddings": _Field(int, 1, _INT32, default=None)}
# Fields of each rope scaling.
_ROPE_FIELDS: Mapping[str, Mapping[str, _Field]] = {
    "default": {},
    "linear": {"factor": _NUMBER},
    "dynamic": {"factor": _NUMBER},
    "llama3": {"factor": _NUMBER, "low_freq_factor": _NUMBER, "high_freq_factor": _NUMBER}
    | _CONTEXT,
    "yarn": {
        "factor": _NUMBER,
        **_CONTEXT,
        "beta_fast": _Field(float, 1e-6, 1e9, default=32.0),
        "beta_slow": _Field(float, 1e-6, 1e9, default=1.0),
        "mscale": _OPTIONAL,
        "mscale_all_dim": _OPTIONAL,
        "attention_factor": _OPTIONAL,
        "truncate": _Field(bool, default=True),
    },
}


def read_config(directory: str | Path) -> DecoderConfig:
    """The architecture in ``directory/config.json``.

    End-of-sequence ids of ``generation_config.json`` are added to its own: chat models stop at more
    than one token.

    Raises:
      ModelError: no such file, no JSON, or an architecture or field that we do not implement.
    """
    path = Path(directory) / "config.json"
    config = from_hf(read_json(path), str(path))
    generation = Path(directory) / "generation_config.json"
    if not generation.exists():
        return config
    eos_ids = config.eos_ids + _ids(read_json(generation), "eos_token_id", str(generation))
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(eos_ids)))


def from_hf(raw: Mapping[str, Any], file: str = "config.json") -> DecoderConfig:
    """:class:`DecoderConfig` from the fields of a Hugging Face configuration.

    Args:
      raw: what the file holds.
      file: named in errors.

    Raises:
      ModelError: an architecture or field that we do not implement, or one that is missing, of
        another type or out of bounds.
    """
    family = _family(raw, file)
    fields = _FAMILY_FIELDS[family]
    _refuse_unsupported(raw, family, file)
    read = {name: field.read(raw, name, file) for name, field in fields.items()}
    heads, hidden = read["num_attention_heads"], read["hidden_size"]
    attention_bias = read.get("attention_bias", False)
    settings: dict[str, Any] = dict(
        model_type=family,
        vocab_size=read["vocab_size"],
        hidden_size=hidden,
        intermediate_size=read["intermediate_size"],
        num_layers=read["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=read["num_key_value_heads"] or heads,
        head_dim=read["head_dim"] or (128 if family == "qwen3" else hidden // heads),
        max_position_embeddings=read["max_position_embeddings"],
        norm_eps=read["rms_norm_eps"],
        tied_embeddings=read["tie_word_embeddings"],
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=read.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        rope=_rope(raw, read["max_position_embeddings"], file),
        windows=_windows(raw, read, file),
        initializer_range=read["initializer_range"],
        stored_dtype=_dtype(raw, file),
        bos_id=_optional_id(raw, "bos_token_id", file),
        eos_ids=_ids(raw, "eos_token_id", file),
        pad_id=_optional_id(raw, "pad_token_id", file),
    )
    try:
        return DecoderConfig(**settings)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


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


def _family(raw: Mapping[str, Any], file: str) -> str:
    """The model type, if it and the named architecture are supported."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise ModelError(
            f"{file}: model_type {family!r:.80} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    named = raw.get("architectures") or [_ARCHITECTURES[family]]
    # FSDP2 renames the class of a model, and its trainers save that name.
    if named not in ([_ARCHITECTURES[family]], [f"FSDP{_ARCHITECTURES[family]}"]):
        raise ModelError(
            f"{file}: architectures {named!r:.80} is not supported; "
            f"for {family}: {_ARCHITECTURES[family]}"
        )
    return family


def _refuse_unsupported(raw: Mapping[str, Any], family: str, file: str) -> None:
    """Raises for each field that would change the model in a way we do not implement."""
    for name, allowed in _REQUIRED.items():
        if name in raw and raw[name] not in allowed:
            raise ModelError(
                f"{file}: {name}={raw[name]!r:.80} is not supported; only {allowed[0]!r}"
            )
    known = _FAMILY_FIELDS[family].keys() | _USED | _INERT | _REQUIRED.keys()
    unknown = {
        name: value
        for name, value in sorted(raw.items())
        # A feature that is null or false is off, whatever it is.
        if name not in known and not name.startswith(_INERT_PREFIXES) and value not in (None, False)
    }
    if unknown:
        raise ModelError(f"{file}: unsupported field(s) for {family}: {unknown!r:.200}")


def _dtype(raw: Mapping[str, Any], file: str) -> str:
    """The type of the stored tensors: ``bfloat16``, ``torch.bfloat16`` or ``bf16``."""
    given = raw.get("dtype") or raw.get("torch_dtype")
    spelling = str(given).lower().removeprefix("torch.")
    if spelling not in _SPELLINGS:
        raise ModelError(f"{file}: dtype {given!r:.80}: must be one of {', '.join(_DTYPES)}")
    return _SPELLINGS[spelling]


def _ids(raw: Mapping[str, Any], name: str, file: str) -> tuple[int, ...]:
    """A token id or a list of them."""
    value = raw.get(name)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    field = _Field(int, 0, _INT32)
    return tuple(field.read({name: one}, name, file) for one in values)


def _optional_id(raw: Mapping[str, Any], name: str, file: str) -> int | None:
    """Some published files say -1 for no token."""
    value = _Field(int, -1, _INT32, default=None).read(raw, name, file)
    return None if value == -1 else value


def _rope(raw: Mapping[str, Any], positions: int, file: str) -> RopeConfig:
    """Rope settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and
    ``rope_scaling`` (4). Many files hold both; people then edit one of them.
    """
    blocks = {
        name: _rope_block(raw, name, positions, file)
        for name in ("rope_parameters", "rope_scaling")
        if raw.get(name)
    }
    scaled = [block for block in blocks.values() if block["kind"] != "default"]
    if len(scaled) == 2 and scaled[0] != scaled[1]:
        raise ModelError(
            f"{file}: rope_parameters and rope_scaling disagree: {scaled[0]} and {scaled[1]}; "
            "keep one"
        )
    chosen: dict[str, Any] = scaled[0] if scaled else {"kind": "default"}
    return RopeConfig(theta=_rope_theta(raw, list(blocks), file), **chosen)


def _rope_block(raw: Mapping[str, Any], name: str, positions: int, file: str) -> dict[str, Any]:
    """The scaling of ``rope_parameters`` or ``rope_scaling`` as fields of RopeConfig."""
    block = raw[name]
    if not isinstance(block, dict):
        raise ModelError(f"{file}: {name} must be an object, not {block!r:.80}")
    given = {key: value for key, value in block.items() if value is not None}
    given.pop("rope_theta", None)
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise ModelError(
            f"{file}: rope type {kind!r:.80} is not supported; supported: {', '.join(_ROPE_FIELDS)}"
        )
    if kinds[-1] != kind:
        raise ModelError(f"{file}: {name}: rope_type {kind!r}, but type {kinds[-1]!r}")
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ModelError(f"{file}: {name}: partial_rotary_factor other than 1 is not supported")
    fields = _ROPE_FIELDS[kind]
    missing = [key for key in fields if fields[key].default is ... and key not in given]
    unknown = sorted(given.keys() - fields.keys())
    if missing or unknown:
        raise ModelError(
            f"{file}: rope type {kind!r}: missing field(s) {missing}, "
            f"unsupported field(s) {unknown!r:.200}"
        )
    read = {key: field.read(given, key, f"{file}: {name}") for key, field in fields.items()}
    if "original_max_position_embeddings" in fields:
        read["original_max_position_embeddings"] = (
            read["original_max_position_embeddings"] or positions
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in fields and read[low] >= read[high]:
            raise ModelError(f"{file}: {name}: {low} must be below {high}")
    return {"kind": kind, **read}


def _rope_theta(raw: Mapping[str, Any], blocks: list[str], file: str) -> float:
    """The base frequency, which up to three places of the file may name."""
    places = {"rope_theta": raw} | {f"{name}.rope_theta": raw[name] for name in blocks}
    given = {
        place: _THETA.read({place: held["rope_theta"]}, place, file)
        for place, held in places.items()
        if held.get("rope_theta") is not None
    }
    if len(set(given.values())) > 1:
        named = " but ".join(f"{place}={value:g}" for place, value in given.items())
        raise ModelError(f"{file}: {named}; make them equal")
    if given:
        return next(iter(given.values()))
    # Llama 1 and 2 leave theta out and mean 10,000. Two blocks without a theta lost theirs.
    if len(blocks) == 2 or "rope_theta" in raw:
        return _THETA.read({}, "rope_theta", file)
    return 10_000.0


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, so that either major version of transformers reads the same rope."""
    values = dataclasses.asdict(rope)
    scaling = {name: values[name] for name in _ROPE_FIELDS[rope.kind] if values[name] is not None}
    scaling = {"rope_type": rope.kind, **scaling} if rope.kind != "default" else {}
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {**scaling} or None,
        "rope_parameters": parameters,
    }


def _windows(raw: Mapping[str, Any], read: Mapping[str, Any], file: str) -> tuple[int | None, ...]:
    """Each layer's sliding window: ``layer_types`` where given, else all layers from
    ``max_window_layers`` on.
    """
    layers, kinds = read["num_hidden_layers"], raw.get("layer_types")
    window = None
    if read.get("use_sliding_window"):
        window = read["sliding_window"] if "sliding_window" in raw else 4096
    if kinds is None:
        start = read.get("max_window_layers", layers)
        return tuple(window if layer >= start else None for layer in range(layers))
    known = ["full_attention", "sliding_attention"]
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ModelError(f"{file}: layer_types {kinds!r:.80} are not supported")
    if len(kinds) != layers:
        raise ModelError(f"{file}: {len(kinds)} layer_types for {layers} layers")
    if "use_sliding_window" not in read and "sliding_attention" in kinds:
        raise ModelError(f"{file}: layer_types: {raw['model_type']} has no sliding windows")
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
