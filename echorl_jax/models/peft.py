"""Reads and writes PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each field of the config is read, ignored because it has no effect, or refused unless it is empty.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import regex
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from echorl_jax.files import replace_json
from echorl_jax.models.config import LINEAR_PATHS, Adapted, Lora, ModelError
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.hf_names import TensorName, tensor_names
from echorl_jax.models.lora import by_linear, linears, of_layers, with_adapters
from echorl_jax.models.tensor_files import StoredTensor, read_header, read_json
from echorl_jax.parallel import Layout
from echorl_jax.types import Array, PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
    "init_lora_weights",
)
# Initialisations that leave the base weights unchanged. With others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA), PEFT changes the base weights when it loads the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Timeout of a pattern: a hostile one could backtrack without end, others take microseconds.
_PATTERN_SECONDS = 1.0
# Origin, training and initialisation of the adapters, and lists of the adapted modules, which the
# names of the tensors give.
_NO_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size"),
)


def load_adapter(
    directory: str | Path,
    model: Decoder,
    params: PyTree,
    *,
    mesh: Mesh | None = None,
    layout: Layout = "train",
) -> tuple[Decoder, PyTree]:
    """The model and its parameters with the adapters of a PEFT directory.

    Args:
      directory: holds the config and the tensors, which become f32 whatever their type.
      model, params: the base model.
      mesh: where the parameters are; one device unless given.
      layout: column of the sharding table.

    Raises:
      ModelError: the adapter is of another kind or for another model, or a file is damaged.
    """
    lora, host = read_adapter(directory, model)
    return with_adapters(model, params, lora, host, mesh, layout=layout)


def read_adapter(directory: str | Path, model: Decoder) -> tuple[Lora, PyTree]:
    """Ranks and alphas of a PEFT directory, and a and b as NumPy arrays; see load_adapter."""
    directory = Path(directory)
    raw = _read_config(directory)
    found = _pairs(directory, model)
    adapted, parts = [], {}
    for linear, name in _kernels(model):
        pairs = [found.get(stored) for stored in name.stored]
        if not any(pairs):
            continue
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        modules = [_module(stored, model) for stored in name.stored]
        wanted = [_module_value(raw, "rank_pattern", "r", module) for module in modules]
        for module, rank, want in zip(modules, ranks, wanted, strict=True):
            if rank not in (0, want):
                raise ModelError(f"{directory}: {module} has rank {rank}, but {CONFIG} says {want}")
        alphas = [_module_value(raw, "alpha_pattern", "lora_alpha", module) for module in modules]
        adapted.append(Adapted(linear, ranks, tuple(map(float, alphas))))
        stacked = _stack(directory, name, pairs, max(ranks))
        parts[linear] = {"lora": {key: of_layers(linear, x) for key, x in stacked.items()}}
    return Lora(tuple(adapted), rslora=bool(raw.get("use_rslora"))), by_linear(parts)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    raw = read_json(file)
    kind, bias = raw.get("peft_type"), raw.get("bias", "none")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type {kind!r:.80} is not supported; only 'LORA'")
    if bias != "none":
        raise ModelError(f"{file}: bias {bias!r:.80} is not supported; only 'none'")
    init = raw.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ModelError(
            f"{file}: init_lora_weights = {init!r:.80} not supported: it changes the base model; "
            "PEFT converts it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not isinstance(raw.get("use_rslora", False), bool):
        raise ModelError(f"{file}: use_rslora must be true or false")
    for name, value in raw.items():
        if value and name not in (*_READ, *_NO_EFFECT):
            raise ModelError(f"{file}: {name} = {value!r:.80} is not supported")
    number_fields = ("r", "rank_pattern", (int,)), ("lora_alpha", "alpha_pattern", (int, float))
    for name, pattern, types in number_fields:
        patterns = raw.get(pattern) or {}
        fields = f"{file}: {name} and the values of {pattern}"
        values = patterns.values() if isinstance(patterns, dict) else [None]
        numbers = [raw.get(name, 8), *values]
        # type() and not isinstance(), for which True is an int.
        if not all(type(n) in types for n in numbers):
            raise ModelError(f"{fields} must be numbers")
        if not all(0 < n < 2**24 for n in numbers):
            raise ModelError(f"{fields} must be above 0 and below 2**24")
    return raw


def _module_value(raw: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """The value of the first pattern that matches the module, as PEFT matches; else the default."""
    for pattern, value in (raw.get(patterns) or {}).items():
        try:
            matches = any(
                regex.match(rf"(.*\.)?({pattern})$", name, timeout=_PATTERN_SECONDS)
                for name in (module, _older(module))
            )
        except (regex.error, TimeoutError) as error:
            raise ModelError(f"{CONFIG}: {patterns} has {pattern!r:.80}: {error}") from None
        if matches:
            return value
    return raw.get(default, 8)


def _kernels(model: Decoder) -> Iterator[tuple[str, TensorName]]:
    """Each linear that may have adapters, with the tensors of its kernel."""
    names = {name.path: name for name in tensor_names(model)}
    for linear, path in LINEAR_PATHS.items():
        if name := names.get((*path, "kernel")):
            yield linear, name


def _pairs(directory: Path, model: Decoder) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B of each adapted tensor of the base model; all other tensors are refused."""
    file = directory / WEIGHTS
    if not file.exists() and (pickled := directory / "adapter_model.bin").exists():
        raise ModelError(f"{file} does not exist; {pickled.name} is a pickle, never loaded")
    tensors = read_header(file)
    if model.config.vision is not None:
        # Older files have the names of published files.
        for older in ("model.layers.", "visual."):
            newer = _PREFIX + _module(older, model)
            tensors = {name.replace(_PREFIX + older, newer): x for name, x in tensors.items()}
    found = {}
    for _, name in _kernels(model):
        outputs, inputs = name.stored_shape
        for stored in name.stored:
            module = _PREFIX + _module(stored, model)
            names = [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
            pair = [tensors.pop(each, None) for each in names]
            if pair == [None, None]:
                continue
            shapes = [None if one is None else one.shape for one in pair]
            a, b = pair
            if a is None or b is None or shapes != [(b.shape[-1], inputs), (outputs, a.shape[0])]:
                raise ModelError(
                    f"{file}: A and B of {module} have shapes {shapes}, expected [r, {inputs}] and "
                    f"[{outputs}, r]"
                )
            found[stored] = (a, b)
    if tensors:
        raise ModelError(f"{file}: {min(tensors)} is no adapter of a linear of this model")
    if not found:
        raise ModelError(f"{file} holds no adapter")
    return found


def _stack(directory: Path, name: TensorName, pairs: list[Any], rank: int) -> dict[str, np.ndarray]:
    """a and b of one linear, with zeros where a layer has a lower rank."""
    inputs, outputs = name.shape[: name.inputs], name.shape[name.inputs :]
    a = np.zeros((len(pairs), *inputs, rank), np.float32)
    b = np.zeros((len(pairs), rank, *outputs), np.float32)
    for layer, pair in enumerate(pairs):
        if pair is not None:
            r = pair[0].shape[0]
            a[layer, ..., :r] = pair[0].view().T.reshape(*inputs, r)
            b[layer, :r] = pair[1].view().T.reshape(r, *outputs)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ModelError(f"{directory / WEIGHTS}: values that are not finite: {name.stored[0]}")
    return {"a": a, "b": b}


def save_adapter(path: str | Path, model: Decoder, params: PyTree, *, base: str = "") -> None:
    """Writes the directory that :func:`load_adapter` reads; PEFT and transformers load it.

    Every process of a multi-process run calls this; the first one writes.

    Args:
      path: the directory, created if missing.
      model: with adapters.
      params: all parameters, or the adapters alone.
      base: path or repository of the base model.

    Raises:
      ModelError: the model has no adapters.
    """
    if model.lora is None:
        raise ModelError("save_adapter: the model has no adapters")
    names = dict(_kernels(model))
    tensors = {}
    for adapted, linear in linears(model.lora, params):
        a, b = (_gathered(linear["lora"][part]) for part in "ab")
        if not names[adapted.linear].stacked:
            a, b = a[None], b[None]
        stored_names = names[adapted.linear].stored
        for layer, (stored, rank) in enumerate(zip(stored_names, adapted.ranks, strict=True)):
            if rank:
                module = _PREFIX + _module(stored, model)
                a_kept = a[layer].reshape(-1, a.shape[-1])[:, :rank]  # [in, rank]
                b_kept = b[layer].reshape(b.shape[1], -1)[:rank]  # [rank, out]
                tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_kept.T)
                tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_kept.T)
    if jax.process_index() != 0:
        return
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{WEIGHTS}.part"
    save_file(tensors, partial, {"format": "pt"})
    partial.rename(directory / WEIGHTS)
    replace_json(directory / CONFIG, _config(model, model.lora, names, base))


def _gathered(values: Array) -> np.ndarray:
    """The whole array on the host of every process."""
    if isinstance(values.sharding, NamedSharding):
        whole = NamedSharding(values.sharding.mesh, PartitionSpec())
        values = jax.jit(jnp.asarray, out_shardings=whole)(values)
    return np.asarray(values)


def _module(stored: str, model: Decoder) -> str:
    """The module of a tensor in transformers' model; a vision model has the text's in a part."""
    module = stored.removesuffix(".weight")
    if model.config.vision is None:
        return module
    if module.startswith("visual."):
        return f"model.{module}"
    return module.replace("model.", "model.language_model.", 1)


def _older(module: str) -> str:
    """The module's name in older versions of transformers, which is that in published files."""
    return module.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _config(
    model: Decoder, lora: Lora, names: Mapping[str, TensorName], base: str
) -> dict[str, Any]:
    """The content of adapter_config.json: the most common rank and alpha are the defaults.

    Other ranks and alphas are patterns, which PEFT matches with the end of a module's name.
    """
    modules = {
        _module(stored, model).removeprefix("model."): (rank, alpha)
        for one in lora.adapted
        for stored, rank, alpha in zip(names[one.linear].stored, one.ranks, one.alphas, strict=True)
        if rank
    }
    rank, alpha = Counter(modules.values()).most_common(1)[0][0]
    # The tower of a vision model has linears of the same names.
    by_name = model.config.vision is None and all(all(one.ranks) for one in lora.adapted)
    targets = [f"{one.linear}_proj" for one in lora.adapted]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets if by_name else [*modules],
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in modules.items() if a != alpha},
    }
