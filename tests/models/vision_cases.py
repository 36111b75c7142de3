"""A small Qwen2.5-VL model with images, shared by transformers and this package; NumPy alone.

Weights, pixels and prompts are drawn from seeds, so that the golden file holds results only.
"""

from typing import Any

import numpy as np

IMAGE_ID, VIDEO_ID, START_ID, END_ID = 50, 51, 52, 53
BANNED = (IMAGE_ID, VIDEO_ID, START_ID, END_ID)
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "window_size": 16,  # 2 x 2 merged patches
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1, 3],
}
TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIG: dict[str, Any] = {
    "text_config": TEXT,
    "vision_config": VISION,
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "tie_word_embeddings": False,
}
# Patches along height and width of each prompt's images: smaller than a window, exactly divisible,
# with ragged edges, two of different size, none.
PROMPTS: dict[str, list[tuple[int, int]]] = {
    "small": [(2, 2)],
    "divisible": [(8, 12)],
    "ragged": [(6, 10)],
    "two": [(10, 4), (2, 14)],
    "none": [],
}
GREEDY = 6
# PEFT's LoraConfig of an adapter of text and tower.
ADAPTER: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": "all-linear",
    "rank_pattern": {"visual.blocks.1.attn.qkv": 2, "merger.mlp.0": 4, "k_proj": 1},
    "alpha_pattern": {"attn.proj": 2},
}


def tokens_of(name: str) -> np.ndarray:
    """i32 ``[T]``: text, each image between its start and end, text."""
    rng = np.random.default_rng(sum(name.encode()))
    text = lambda: rng.integers(3, IMAGE_ID, rng.integers(3, 9)).tolist()  # noqa: E731
    tokens = text()
    for height, width in PROMPTS[name]:
        tokens += [START_ID, *[IMAGE_ID] * (height * width // 4), END_ID, *text()]
    return np.array(tokens, np.int32)


def pixels_of(name: str) -> list[np.ndarray]:
    """f32 ``[patches, values]`` of each image, in the image processor's order."""
    rng = np.random.default_rng(sum(name.encode()) + 1)
    values = 3 * 2 * VISION["patch_size"] ** 2
    return [rng.standard_normal((h * w, values)).astype(np.float32) for h, w in PROMPTS[name]]


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights of tensors by their published names: matrices that keep activations near 1."""
    weights = {}
    for name in sorted(shapes):
        rng = np.random.default_rng(sum(name.encode()) * 31 + len(name))
        values = rng.standard_normal(shapes[name]).astype(np.float32)
        if "norm" in name or "ln_q" in name:
            weights[name] = 1 + np.float32(0.2) * values
        elif name.endswith("bias"):
            weights[name] = np.float32(0.3) * values
        else:
            inputs = np.prod(shapes[name][1:])
            weights[name] = values * np.float32(inputs**-0.5)
    return weights


def projections(name: str, gradient: np.ndarray) -> np.ndarray:
    """Eight numbers that another gradient would not share: products with random directions."""
    rng = np.random.default_rng(sum(name.encode()))
    directions = rng.standard_normal((8, gradient.size)).astype(np.float32)
    return directions @ gradient.ravel().astype(np.float32)
