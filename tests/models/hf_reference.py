"""Small model configurations and weights, shared by transformers and this package.

Weights are drawn from the case's seed in the order of the tensor names, so that golden files need
to hold results only. NumPy alone: the script that runs transformers and the tests both import this.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 61
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _case(family: str, rows: list[int], **changes: Any) -> dict[str, Any]:
    return {"config": {"model_type": family, **_BASE, **changes}, "rows": rows}


CASES: dict[str, dict[str, Any]] = {
    "llama_plain": _case("llama", [1, 9, 40], rope_parameters={"rope_theta": 5000.0}),
    "llama_mha_bias": _case(
        "llama", [30, 30], num_key_value_heads=4, attention_bias=True, mlp_bias=True
    ),
    "llama_linear": _case("llama", [50, 3], rope_parameters={"rope_type": "linear", "factor": 2.5}),
    "llama_dynamic_short": _case(
        "llama", [60, 20], rope_parameters={"rope_type": "dynamic", "factor": 2.0}
    ),
    "llama_dynamic_long": _case(
        "llama", [150], rope_parameters={"rope_type": "dynamic", "factor": 2.0}
    ),
    "llama_llama3": _case("llama", [64, 33], rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "llama_head_dim": _case("llama", [20, 5], head_dim=12, num_key_value_heads=1),
    "qwen2_plain": _case("qwen2", [40, 17, 1], tie_word_embeddings=True),
    "qwen2_yarn": _case("qwen2", [64, 40], rope_parameters=_YARN),
    "qwen2_yarn_factors": _case(
        "qwen2",
        [48],
        rope_parameters=_YARN
        | {"attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ),
    "qwen2_yarn_mscale": _case(
        "qwen2", [48], rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}
    ),
    "qwen2_window": _case(
        "qwen2",
        [300, 100],
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        max_position_embeddings=512,
    ),
    "qwen3_plain": _case("qwen3", [40, 21], head_dim=16),
    "qwen3_window_bias": _case(
        "qwen3",
        [90, 70],
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# PEFT adapters of these cases: the case, and the settings of LoraConfig.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft_llama": ("llama_head_dim", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "peft_qwen2": (
        "qwen2_plain",
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"v_proj": 5, r"layers\.0\..*\.down_proj": 3},
        },
    ),
    "peft_qwen3": (
        "qwen3_plain",
        {
            "r": 3,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj", "o_proj"],
            "layers_to_transform": [1],
        },
    ),
}
# Cases whose loss gradients are compared too, and those that also generate.
GRADIENTS = ("llama_llama3", "qwen2_window", "qwen3_plain")
GREEDY = ("llama_llama3", "qwen2_yarn", "qwen3_window_bias")
GREEDY_PROMPT, GREEDY_TOKENS = 5, 12


def random_cases(seed: int, count: int) -> dict[str, dict[str, Any]]:
    """Configurations drawn over all options at once, rows of 1 to 300 tokens."""
    rng = np.random.default_rng(seed)
    families = ["llama", "qwen2", "qwen3"]
    return {f"random_{i:02d}": _random_case(rng, families[i % 3]) for i in range(count)}


def _random_case(rng: np.random.Generator, family: str) -> dict[str, Any]:
    kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 4]))
    head_dim = int(rng.choice([8, 16, 20]))
    layers = int(rng.integers(1, 5))
    flag = lambda: bool(rng.integers(2))  # noqa: E731
    changes: dict[str, Any] = {
        "hidden_size": kv_heads * group * int(rng.choice([8, 12])),
        "intermediate_size": int(rng.integers(16, 90)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "tie_word_embeddings": flag(),
        "max_position_embeddings": 320,
        "rope_parameters": _random_rope(rng),
    }
    if family == "llama":
        changes |= {"attention_bias": flag(), "mlp_bias": flag()}
    else:
        changes |= {
            "use_sliding_window": flag(),
            "sliding_window": int(rng.integers(1, 200)),
            "max_window_layers": int(rng.integers(0, layers + 1)),
        }
    if family == "qwen3":
        changes["attention_bias"] = flag()
    rows = [int(n) for n in rng.integers(1, 301, size=3)]
    return _case(family, rows, **changes)


def _random_rope(rng: np.random.Generator) -> dict[str, Any]:
    kind = str(rng.choice(["default", "linear", "dynamic", "llama3", "yarn"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rng.choice([1e4, 1e6]))}
    if kind != "default":
        rope["factor"] = float(rng.choice([2.0, 4.0]))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 80
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope


def tokens_of(case: dict[str, Any]) -> np.ndarray:
    """i32 ``[rows, longest]``; padding is filled with ordinary ids, which must not be read."""
    rng = np.random.default_rng(_seed(case))
    return rng.integers(3, VOCAB, size=(len(case["rows"]), max(case["rows"]))).astype(np.int32)


def fill_weights(case: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights for the named tensors: matrices scaled to keep activations near 1, biases and
    norms not trivial.
    """
    rng = np.random.default_rng(_seed(case) + 1)
    weights = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name]).astype(np.float32)
        if name.endswith("norm.weight"):
            weights[name] = 1 + np.float32(0.2) * values
        elif name.endswith("bias"):
            weights[name] = np.float32(0.3) * values
        else:
            weights[name] = values * np.float32(shapes[name][-1] ** -0.5)
    return weights


def _seed(case: dict[str, Any]) -> int:
    return sum(json.dumps(case, sort_keys=True).encode())


def load_golden(directory: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(directory / f"{name}.npz") as arrays:
        return dict(arrays)
