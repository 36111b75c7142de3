"""Reads and writes the Hugging Face ``config.json``.

Every field is either read, known to have no effect, or required to hold the value that we
implement. Any other field is refused by name unless it is null or false: if it were ignored, the
model could be wrong. A published file may hold any value, so one table gives type, bounds and
default of each field that is read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echorl_jax.models.config import DecoderConfig, ModelError, RopeConfig, VisionConfig
from echorl_jax.models.tensor_files import read_json

_ARCHITECTURES = {name.lower(): f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")}
_VL = "qwen2_5_vl"
_ARCHITECTURES[_VL] = "Qwen2_5_VLForConditionalGeneration"
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

    def read(self, raw: Mapping[str, Any], name: str, block: str = "") -> Any:
        """The checked value of ``raw[name]``; null means absent if the default is None or False."""
        value: Any = raw.get(name)
        absent = name not in raw or (value is None and self.default in (None, False))
        if absent and self.default is not ...:
            return self.default
        accepted = (int, float) if self.kind is float else self.kind
        right = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
        # NaN is within no bounds.
        if value is None or not right or not self.low <= value <= self.high:
            kind = _KINDS[self.kind]
            bounds = "" if self.kind is bool else f" from {self.low:g} to {self.high:g}"
            raise ModelError(f"{block}{name} must be {kind}{bounds}, not {value!r:.80}")
        return self.kind(value)


_FLAG = _Field(bool, default=False)
_SIZE = _Field(int, 1, 2**24)
_HEADS = _Field(int, 1, 2**16)
_THETA = _Field(float, 1.001, 1e12)
_TOKEN = _Field(int, 0, _INT32)
# Fields of DecoderConfig in all families.
_FIELDS: Mapping[str, _Field] = {
    "vocab_size": _Field(int, 1, _INT32),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _Field(int, 1, 4096),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _Field(int, 2, 2**16, default=None),
    "max_position_embeddings": _Field(int, 1, _INT32, default=32768),
    "rms_norm_eps": _Field(float, 1e-12, 1, default=1e-6),
    "tie_word_embeddings": _FLAG,
    "initializer_range": _Field(float, default=0.02),
}
# Their names in DecoderConfig, where these differ.
_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
_WINDOW_FIELDS = {
    "use_sliding_window": _FLAG,
    "sliding_window": _Field(int, 1, _INT32, default=None),
    "max_window_layers": _Field(int, 0, _INT32, default=28),
}
_FAMILY_FIELDS: Mapping[str, Mapping[str, _Field]] = {
    "llama": _FIELDS
    | {
        # Llama 1 and 2 omit this. Where Qwen omits it, transformers assumes 32, which no published
        # model means.
        "num_key_value_heads": _Field(int, 1, 2**16, default=None),
        "max_position_embeddings": _Field(int, 1, _INT32, default=2048),
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
    },
    "qwen2": _FIELDS | _WINDOW_FIELDS,
    "qwen3": _FIELDS | _WINDOW_FIELDS | {"attention_bias": _FLAG},
    _VL: _FIELDS
    | _WINDOW_FIELDS
    | {
        "rms_norm_eps": _Field(float, 1e-12, 1, default=1e-5),
        "max_window_layers": _Field(int, 0, _INT32, default=80),
    },
}
# Fields of VisionConfig, with their names in ``vision_config`` where these differ.
_VISION_FIELDS: Mapping[str, _Field] = {
    "depth": _Field(int, 1, 4096, default=32),
    "hidden_size": _Field(int, 1, 2**24, default=3584),
    "intermediate_size": _Field(int, 1, 2**24, default=3420),
    "num_heads": _Field(int, 1, 2**16, default=16),
    "patch_size": _Field(int, 1, 2**12, default=14),
    "temporal_patch_size": _Field(int, 1, 64, default=2),
    "in_channels": _Field(int, 1, 64, default=3),
    "spatial_merge_size": _Field(int, 1, 64, default=2),
    "window_size": _Field(int, 1, 2**16, default=112),
    "initializer_range": _Field(float, default=0.02),
}
_VISION_NAMES = {
    "depth": "num_layers",
    "temporal_patch_size": "frames",
    "in_channels": "channels",
    "spatial_merge_size": "merge",
    "window_size": "window",
}
# Token ids that stand for images, by their names in VisionConfig.
_IMAGE_IDS = {
    "image_id": ("image_token_id", 151655),
    "video_id": ("video_token_id", 151656),
    "start_id": ("vision_start_token_id", 151652),
    "end_id": ("vision_end_token_id", 151653),
}
# Old spellings, and settings of videos and of the image processor.
_VISION_INERT = frozenset(
    """model_type hidden_act out_hidden_size fullatt_block_indexes tokens_per_second in_chans
    spatial_patch_size rope_parameters dtype torch_dtype transformers_version""".split()
)
# Fields that other functions of this module read.
_USED = frozenset(
    """model_type architectures rope_theta rope_scaling rope_parameters torch_dtype dtype
    bos_token_id eos_token_id pad_token_id layer_types""".split()
)
# No effect on the values that a causal language model computes: names, versions, caching, labels,
# kernels, defaults of generation, settings of other programs.
_INERT = frozenset(
    """transformers_version use_cache output_hidden_states output_attentions return_dict
    use_return_dict chunk_size_feed_forward problem_type id2label label2id num_labels use_labels
    finetuning_task task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    cls_token_id mask_token_id unk_token_id eod_token_id bos_token eos_token pad_token unk_token
    torchscript use_bfloat16 attn_implementation attention_implementation max_length min_length
    do_sample early_stopping num_beams num_beam_groups temperature top_k top_p typical_p
    repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pretraining_tp auto_map
    custom_pipelines is_llama_config is_decoder transformers.js_config model_name base_model
    base_model_name_or_path license language tags loss_type use_liger_kernel liger_kernel_config
    gradient_checkpointing use_flash_attn use_flash_attention use_flash_attention_2 flash_attn
    flash_attention use_sdpa use_fused_rms_norm use_fused_rope num_logits_to_keep logits_to_keep
    cache_implementation keys_to_ignore_at_inference model_max_length max_sequence_length
    max_seq_length max_seq_len seq_length tokenizer_model_max_length tokenizer_padding_side
    padding_side tensor_parallel_degree tp_plan sequence_parallel router_aux_loss_coef""".split()
)
# Private fields of transformers and fields of fine-tuning tools.
_INERT_PREFIXES = ("_", "unsloth_", "neftune_")
# Fields that change the model, with the values under which it is the one that we implement.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "is_causal": (True, None),
    "use_rope": (True, None),
    "rms_norm": (True, None),
    "pruned_heads": ({}, None),
    **dict.fromkeys(
        "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob "
        "resid_pdrop embd_pdrop attn_pdrop mlp_dropout".split(),
        (0, None),
    ),
}
_DTYPES = {
    "bfloat16": "bfloat16 bf16",
    "float16": "float16 fp16 f16 half",
    "float32": "float32 fp32 f32 float auto none",  # holds the values of every narrower type
    "float64": "float64 fp64 f64 double",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}
_SPELLINGS = {spelling: name for name, words in _DTYPES.items() for spelling in words.split()}
_NUMBER = _Field(float, 1e-6, 1e9)
_OPTIONAL = _Field(float, 0, 1e9, default=None)
_LAYER_TYPES = ["full_attention", "sliding_attention"]
_FACTOR = {"factor": _NUMBER}
_CONTEXT = {"original_max_position_embeddings": _Field(int, 1, _INT32, default=None)}
_ROPE_FIELDS: Mapping[str, Mapping[str, _Field]] = {
    "default": {},
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "llama3": _FACTOR | {"low_freq_factor": _NUMBER, "high_freq_factor": _NUMBER} | _CONTEXT,
    "yarn": _FACTOR
    | _CONTEXT
    | {
        "beta_fast": _Field(float, 1e-6, 1e9, default=32.0),
        "beta_slow": _Field(float, 1e-6, 1e9, default=1.0),
        "truncate": _Field(bool, default=True),
    }
    | dict.fromkeys(("mscale", "mscale_all_dim", "attention_factor"), _OPTIONAL),
}


def read_config(directory: str | Path) -> DecoderConfig:
    """The architecture in ``directory/config.json``.

    Adds the end-of-sequence ids of ``generation_config.json``; chat models have several.

    Raises:
      ModelError: no such file, no JSON, or an architecture or field that we do not implement.
    """
    path, generation = Path(directory, "config.json"), Path(directory, "generation_config.json")
    config = from_hf(read_json(path), str(path))
    if not generation.exists():
        return config
    try:
        eos_ids = config.eos_ids + _ids(read_json(generation), "eos_token_id")
    except ModelError as error:
        raise ModelError(f"{generation}: {error}") from None
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(eos_ids)))


def from_hf(raw: Mapping[str, Any], file: str = "config.json") -> DecoderConfig:
    """The architecture of a Hugging Face configuration; errors name ``file``.

    Raises:
      ModelError: an architecture or field that we do not implement, or a field that is missing, of
        another type or out of bounds.
    """
    try:
        return _decoder_config(_flat(raw))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _flat(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Newer files of Qwen2.5-VL hold the decoder's fields in ``text_config``; the outer ones win
    where both name a token id or a type.
    """
    text = raw.get("text_config")
    if raw.get("model_type") != _VL or not text:
        return raw
    if not isinstance(text, dict):
        raise ModelError(f"text_config must be an object, not {text!r:.80}")
    outer = {name: value for name, value in raw.items() if name != "text_config"}
    return {**text, **{name: value for name, value in outer.items() if value is not None}}


def _vision(raw: Mapping[str, Any], hidden_size: int) -> VisionConfig:
    block = raw.get("vision_config")
    if not isinstance(block, dict):
        raise ModelError(f"vision_config must be an object, not {block!r:.80}")
    unknown = {
        name: value
        for name, value in block.items()
        if name not in _VISION_FIELDS.keys() | _VISION_INERT | _INERT
        and not name.startswith(_INERT_PREFIXES)
        and value not in (None, False)
    }
    if unknown:
        raise ModelError(f"unsupported field(s) of vision_config: {unknown!r:.200}")
    if block.get("hidden_act", "silu") not in _REQUIRED["hidden_act"]:
        raise ModelError(f"vision_config: hidden_act={block['hidden_act']!r:.80}; only 'silu'")
    if (width := block.get("out_hidden_size", 3584)) != hidden_size:
        raise ModelError(f"vision_config: out_hidden_size={width!r:.80}, hidden_size={hidden_size}")
    full = block.get("fullatt_block_indexes", [7, 15, 23, 31])
    if not isinstance(full, list) or not all(type(n) is int and n >= 0 for n in full):
        raise ModelError(f"vision_config: fullatt_block_indexes={full!r:.80}: must be layers")
    read = {
        _VISION_NAMES.get(name, name): field.read(block, name, "vision_config: ")
        for name, field in _VISION_FIELDS.items()
    }
    ids = {
        name: _Field(int, 0, _INT32, default=usual).read(raw, stored)
        for name, (stored, usual) in _IMAGE_IDS.items()
    }
    return VisionConfig(**read, **ids, full_layers=tuple(full))


def _decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    family = _family(raw)
    _refuse_unsupported(raw, family)
    read = {name: field.read(raw, name) for name, field in _FAMILY_FIELDS[family].items()}
    heads, hidden = read["num_attention_heads"], read["hidden_size"]
    read["num_key_value_heads"] = read["num_key_value_heads"] or heads
    read["head_dim"] = read["head_dim"] or (128 if family == "qwen3" else hidden // heads)
    attention_bias = read.get("attention_bias", False)
    vision = _vision(raw, hidden) if family == _VL else None
    same: dict[str, Any] = {_NAMES.get(name, name): read[name] for name in _FIELDS}
    return DecoderConfig(
        model_type=family,  # pyright: ignore[reportArgumentType]
        **same,
        qkv_bias=family in ("qwen2", _VL) or attention_bias,
        output_bias=attention_bias,
        mlp_bias=read.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        rope=_rope(raw, read["max_position_embeddings"]),
        windows=_windows(raw, read),
        stored_dtype=_dtype(raw),
        bos_id=_optional_id(raw, "bos_token_id"),
        eos_ids=_ids(raw, "eos_token_id"),
        pad_id=_optional_id(raw, "pad_token_id"),
        vision=vision,
        never=() if vision is None else vision.reserved_ids,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a ``config.json``; transformers (4 and 5) reads the same architecture."""
    values, ends = vars(config), list(config.eos_ids)
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: values[_NAMES.get(name, name)] for name in _FIELDS},
        "hidden_act": "silu",
        "torch_dtype": config.stored_dtype,
        "bos_token_id": config.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_id,
        **_rope_to_hf(config.rope),
    }
    if config.model_type == "llama":
        return raw | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    sliding = [window for window in config.windows if window is not None]
    raw |= {
        "use_sliding_window": bool(sliding),
        "sliding_window": next(iter(sliding), None),
        "max_window_layers": config.num_layers - len(sliding),
        "layer_types": [_LAYER_TYPES[window is not None] for window in config.windows],
    }
    if config.model_type == "qwen3":
        raw["attention_bias"] = config.qkv_bias
    if config.vision is not None:
        raw |= _vision_to_hf(config.vision, config.hidden_size)
    return raw


def _vision_to_hf(vision: VisionConfig, width: int) -> dict[str, Any]:
    values = vars(vision)
    block = {name: values[_VISION_NAMES.get(name, name)] for name in _VISION_FIELDS}
    block |= {
        "model_type": _VL,
        "hidden_act": "silu",
        "out_hidden_size": width,
        "fullatt_block_indexes": list(vision.full_layers),
    }
    ids = {stored: values[name] for name, (stored, _) in _IMAGE_IDS.items()}
    return {"vision_config": block, **ids}


def _family(raw: Mapping[str, Any]) -> str:
    """The model type, if it and the named architecture are supported."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise ModelError(
            f"model_type {family!r:.80} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    name = _ARCHITECTURES[family]
    given = raw.get("architectures") or [name]
    # FSDP2 renames the class of a model, and its trainers save that name.
    if given not in ([name], [f"FSDP{name}"]):
        raise ModelError(f"architectures {given!r:.80} is not supported; for {family}: {name}")
    return family


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Raises for each field that would change the model in a way we do not implement."""
    for name, allowed in _REQUIRED.items():
        if name in raw and raw[name] not in allowed:
            raise ModelError(f"{name}={raw[name]!r:.80} is not supported; only {allowed[0]!r}")
    known = _FAMILY_FIELDS[family].keys() | _USED | _INERT | _REQUIRED.keys()
    if family == _VL:
        known |= {"vision_config", "vision_token_id", *(name for name, _ in _IMAGE_IDS.values())}
    unknown = {
        name: value
        for name, value in sorted(raw.items())
        # Null or false turns a feature off, so it needs no support.
        if name not in known and not name.startswith(_INERT_PREFIXES) and value not in (None, False)
    }
    if unknown:
        raise ModelError(f"unsupported field(s) for {family}: {unknown!r:.200}")


def _dtype(raw: Mapping[str, Any]) -> str:
    """The type of the stored tensors: ``bfloat16``, ``torch.bfloat16`` or ``bf16``."""
    given = raw.get("dtype") or raw.get("torch_dtype")
    spelling = str(given).lower().removeprefix("torch.")
    if spelling not in _SPELLINGS:
        raise ModelError(f"dtype {given!r:.80}: must be one of {', '.join(_DTYPES)}")
    return _SPELLINGS[spelling]


def _ids(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A token id or a list of token ids."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_TOKEN.read({name: one}, name) for one in ids)


def _optional_id(raw: Mapping[str, Any], name: str) -> int | None:
    """A token id or None, for which some published files write -1."""
    value = _Field(int, -1, _INT32, default=None).read(raw, name)
    return None if value == -1 else value


def _rope(raw: Mapping[str, Any], positions: int) -> RopeConfig:
    """Rope settings of ``rope_parameters`` (transformers 5), or of ``rope_theta`` and
    ``rope_scaling`` (transformers 4). Many files hold both, and users edit only one.
    """
    blocks = {
        name: _rope_block(raw, name, positions)
        for name in ("rope_parameters", "rope_scaling")
        if raw.get(name)
    }
    scaled = [block for block in blocks.values() if block["kind"] != "default"]
    if len(scaled) == 2 and scaled[0] != scaled[1]:
        both = f"{scaled[0]} and {scaled[1]}"
        raise ModelError(f"rope_parameters and rope_scaling disagree: {both}; keep one")
    sections = _sections(raw) if raw["model_type"] == _VL else ()
    theta = _rope_theta(raw, list(blocks))
    return RopeConfig(theta=theta, sections=sections, **(scaled[0] if scaled else {}))


def _rope_block(raw: Mapping[str, Any], name: str, positions: int) -> dict[str, Any]:
    """The scaling of ``rope_parameters`` or ``rope_scaling`` as fields of RopeConfig."""
    if not isinstance(raw[name], dict):
        raise ModelError(f"{name} must be an object, not {raw[name]!r:.80}")
    given = {key: value for key, value in raw[name].items() if value is not None}
    given.pop("rope_theta", None)
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    if raw["model_type"] == _VL:
        given.pop("mrope_section", None)
        kinds = ["default" if kind == "mrope" else kind for kind in kinds]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise ModelError(
            f"rope type {kind!r:.80} is not supported; supported: {', '.join(_ROPE_FIELDS)}"
        )
    if kinds[-1] != kind:
        raise ModelError(f"{name}: rope_type {kind!r}, but type {kinds[-1]!r}")
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ModelError(f"{name}: partial_rotary_factor other than 1 is not supported")
    fields = _ROPE_FIELDS[kind]
    missing = [key for key in fields if fields[key].default is ... and key not in given]
    unknown = sorted(given.keys() - fields.keys())
    if missing or unknown:
        raise ModelError(
            f"rope type {kind!r}: missing field(s) {missing}, unsupported field(s) {unknown!r:.200}"
        )
    read = {key: field.read(given, key, f"{name}: ") for key, field in fields.items()}
    for context in fields.keys() & _CONTEXT.keys():
        read[context] = read[context] or positions
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in fields and read[low] >= read[high]:
            raise ModelError(f"{name}: {low} must be below {high}")
    return {"kind": kind, **read}


def _sections(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Pairs of a head that turn with time, height and width."""
    blocks = [raw.get("rope_parameters"), raw.get("rope_scaling")]
    given: Any = next((b["mrope_section"] for b in blocks if b and "mrope_section" in b), None)
    numbers = isinstance(given, list) and all(type(n) is int and n > 0 for n in given)
    if not numbers or len(given) != 3:
        raise ModelError(f"mrope_section must be three numbers above 0, not {given!r:.80}")
    return tuple(given)


def _rope_theta(raw: Mapping[str, Any], blocks: list[str]) -> float:
    """The base frequency, which the file may hold in up to three fields."""
    holders = {"rope_theta": raw} | {f"{name}.rope_theta": raw[name] for name in blocks}
    given = {
        field: _THETA.read({field: holder["rope_theta"]}, field)
        for field, holder in holders.items()
        if holder.get("rope_theta") is not None
    }
    if len(set(given.values())) > 1:
        named = " but ".join(f"{field}={value:g}" for field, value in given.items())
        raise ModelError(f"{named}; make them equal")
    if given:
        return next(iter(given.values()))
    # Llama 1 and 2 omit theta and mean 10,000. A file with two blocks and no theta is incomplete.
    if len(blocks) == 2 or "rope_theta" in raw:
        return _THETA.read({}, "rope_theta")
    return 10_000.0


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, so that either major version of transformers reads the same rope."""
    given = {name: value for name, value in vars(rope).items() if value is not None}
    scaling = {name: given[name] for name in _ROPE_FIELDS[rope.kind] if name in given}
    scaling = {"rope_type": rope.kind, **scaling} if rope.kind != "default" else {}
    old = scaling
    if rope.sections:
        scaling = {"mrope_section": list(rope.sections), **scaling}
        old = {"type": "mrope"} | scaling
    return {
        "rope_theta": rope.theta,
        "rope_scaling": old or None,
        "rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling},
    }


def _windows(raw: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window: from ``layer_types`` if given, else in all layers from
    ``max_window_layers`` on.
    """
    layers, kinds = read["num_hidden_layers"], raw.get("layer_types")
    window = None
    if read.get("use_sliding_window"):
        window = read["sliding_window"] if "sliding_window" in raw else 4096
    if kinds is None:
        start = read.get("max_window_layers", layers)
        return tuple(window if layer >= start else None for layer in range(layers))
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        raise ModelError(f"layer_types {kinds!r:.80} are not supported")
    if len(kinds) != layers:
        raise ModelError(f"{len(kinds)} layer_types for {layers} layers")
    if "use_sliding_window" not in read and "sliding_attention" in kinds:
        raise ModelError(f"layer_types: {raw['model_type']} has no sliding windows")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
