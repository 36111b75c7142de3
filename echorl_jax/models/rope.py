"""Rotary position embedding with the scalings of published Llama and Qwen models."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from echorl_jax.models.config import DecoderConfig, RopeConfig
from echorl_jax.types import Array


class Rotary(NamedTuple):
    """Cosine and sine of angles times the attention factor, f32 ``[B, T, head_dim / 2]``."""

    cos: Array
    sin: Array


def rotary(config: DecoderConfig, positions: Array) -> Rotary:
    """The tables for ``positions`` i32 ``[B, T]``; compute them once for all layers.

    Tokens of images have three positions, ``[B, T, 3]``: time, height and width. Each turns its
    section of the pairs; where the three are equal, they are one position.

    ``angle = position * theta ** (-2 i / head_dim)`` before scaling. Sources: RoFormer, arXiv
    2104.09864; dynamic NTK and YaRN, arXiv 2309.00071; Llama 3, arXiv 2407.21783. With dynamic NTK
    the base grows with the row's last position beyond ``max_position_embeddings``, so the keys of a
    prefix change when its row grows; with all other scalings they do not.
    """
    if positions.ndim == 3:
        axes = np.repeat(np.arange(3), config.rope.sections)
        of_pairs = positions[..., axes]  # [B, T, head_dim / 2]
    else:
        of_pairs = positions[..., None]
    angles = of_pairs.astype(jnp.float32) * _frequencies(config, positions)
    scale = _attention_factor(config.rope)
    return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: Array, tables: Rotary) -> Array:
    """Rotates pairs ``(x_i, x_{i + head_dim / 2})`` of ``x [B, T, heads, head_dim]``, in f32."""
    cos, sin = tables.cos[:, :, None, :], tables.sin[:, :, None, :]  # [B, T, 1, head_dim / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _frequencies(config: DecoderConfig, positions: Array) -> Array:
    """f32, broadcastable against ``[B, T, head_dim / 2]``."""
    rope = config.rope
    if rope.kind == "dynamic":
        return _dynamic(config, positions)
    plain = _inverse(rope.theta, config.head_dim)
    if rope.kind == "linear":
        plain = plain / np.float32(rope.factor)
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, config.head_dim)
    return jnp.asarray(plain, jnp.float32)[None, None, :]


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _inverse(theta: float, head_dim: int) -> np.ndarray:
    return np.float32(1) / np.float32(theta) ** _exponents(head_dim)


def _dynamic(config: DecoderConfig, positions: Array) -> Array:
    """NTK-aware base: ``theta * (factor * n / limit - (factor - 1)) ** (d / (d - 2))`` for a row
    of ``n > limit`` tokens.
    """
    limit, width, rope = config.max_position_embeddings, config.head_dim, config.rope
    length = jnp.maximum(jnp.max(positions, axis=-1) + 1, limit).astype(jnp.float32)  # [B]
    stretch = rope.factor * length / limit - (rope.factor - 1)
    base = rope.theta * stretch ** (width / (width - 2))
    return (1.0 / base[:, None] ** _exponents(width)[None, :])[:, None, :]


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Stretches long wavelengths by ``factor``, keeps short ones and blends those between."""
    context = rope.original_max_position_embeddings
    turns = context * plain / np.float32(2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return (1 - blend) * plain / np.float32(rope.factor) + blend * plain


def _yarn(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Keeps dimensions that turn often within the original context, interpolates slow ones, and
    blends those between by a ramp.
    """

    def dimension_of(turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001) if high == low else high - low
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    plain = _inverse(rope.theta, head_dim)
    return plain / np.float32(rope.factor) * ramp + plain * (1 - ramp)


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's factor of cosines and sines: ``0.1 ln(factor) + 1`` unless given."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
