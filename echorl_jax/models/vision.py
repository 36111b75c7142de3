"""Qwen2.5-VL's vision tower: patches of images to features that replace token embeddings.

Patches come window by window, ``[I, W, S]``: images, windows of an image, patches of a window. A
window at the edge of an image, and images with fewer windows, are padded. So attention inside
windows is a batched product of small matrices, and the layers that see the whole image mask the
padding alone. Source: Qwen2.5-VL, arXiv 2502.13923; :mod:`echorl_jax.models.images` makes the
arrays.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from echorl_jax.models.attention import HIDDEN
from echorl_jax.models.config import VisionConfig
from echorl_jax.models.modules import MLP, MakeLinear, RMSNorm
from echorl_jax.models.rope import Rotary, rotate
from echorl_jax.precision import precision_of, wide_einsum
from echorl_jax.types import Array, HostArray, PyTree

# Queries of a whole image whose scores exist at once.
_QUERIES = 512
_THETA = 10_000.0


class Patches(NamedTuple):
    """Images of the same padded size, window by window."""

    pixels: Array | HostArray  # f32 [I, W, S, patch_values], normalised colours
    # Row and column of each patch in its image, i32 [I, W, S, 2]; -1 for padding.
    place: Array | HostArray


class VisionLayer(nnx.Module):
    """One layer of the tower in two halves; attention runs between them."""

    def __init__(self, config: VisionConfig, linear: MakeLinear):
        c = config
        heads = ("heads", "head_dim")
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps)
        shape = (c.hidden_size, 3, c.num_heads, c.head_dim)
        self.qkv = linear("qkv", shape, ("embed", None, *heads), bias=True)
        outward = (c.num_heads, c.head_dim, c.hidden_size), (*heads, "embed")
        self.o = linear("o", *outward, bias=True, inputs=2)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c, linear)

    def project(self, x: Array, tables: Rotary) -> tuple[Array, Array, Array]:
        """q, k and v ``[I, N, heads, head_dim]`` of ``x [I, N, D]``."""
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = (qkv[:, :, part] for part in range(3))
        return rotate(q, tables), rotate(k, tables), v

    def finish(self, x: Array, attended: Array) -> Array:
        x = x + self.o(attended)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """Joins the patches of a merged patch and projects them to the decoder's width."""

    def __init__(self, config: VisionConfig, width: int, linear: MakeLinear):
        joined = config.hidden_size * config.merge**2
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.up = linear("merger/up", (joined, joined), ("embed", "mlp"), bias=True)
        self.down = linear("merger/down", (joined, width), ("mlp", "embed"), bias=True)

    def __call__(self, x: Array) -> Array:
        joined = self.norm(x).reshape(x.shape[0], -1, self.up.kernel.shape[0])
        return self.down(jax.nn.gelu(self.up(joined), approximate=False))


class Tower(nnx.Module):
    """The whole tower with one layer in place of all; ``width`` is the decoder's."""

    def __init__(self, config: VisionConfig, width: int, linear: MakeLinear):
        into = (config.patch_values, config.hidden_size), (None, "embed")
        self.patch = linear("patch", *into, bias=False)
        self.layers = VisionLayer(config, linear)
        self.merger = Merger(config, width, linear)


def encode(
    config: VisionConfig,
    modules: Mapping[str, Any],
    params: PyTree,
    patches: Patches,
    *,
    dtype: str,
    remat: bool,
) -> Array:
    """Features of merged patches, ``[I, W * S / merge^2, D]`` in the order of the patches.

    Args:
      config: the tower's.
      modules: static halves of the tower's ``patch``, ``layers`` (one of them) and ``merger``.
      params: the tower's weights.
      patches: the images.
      dtype: of the activations; rotary embedding, norms and softmax are f32.
      remat: whether the backward pass recomputes layers.
    """
    images, windows, size, _ = patches.place.shape
    pixels, place = jnp.asarray(patches.pixels), jnp.asarray(patches.place)
    flat = pixels.reshape(images, windows * size, -1).astype(dtype)
    tables = _rotary(config, place.reshape(images, windows * size, 2))
    real = place[..., 0] >= 0  # [I, W, S]
    kernels = [functools.partial(attention, real=real) for attention in (_inside, _across)]

    def body(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, None]:
        weights, whole = scanned
        module = nnx.merge(modules["layers"], weights)
        q, k, v = module.project(x, tables)
        return module.finish(x, jax.lax.switch(whole, kernels, q, k, v)), None

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    whole = jnp.array([n in config.full_layers for n in range(config.num_layers)], jnp.int32)
    x = nnx.merge(modules["patch"], params["patch"])(flat)
    x, _ = jax.lax.scan(body, x, (params["layers"], whole))
    return nnx.merge(modules["merger"], params["merger"])(x)


def _rotary(config: VisionConfig, place: Array) -> Rotary:
    """Half of the pairs turn with the row, half with the column; f32."""
    pairs = config.head_dim // 4
    frequencies = _THETA ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = place[..., None].astype(jnp.float32) * frequencies[None, None, None, :]
    angles = angles.reshape(*place.shape[:2], -1)  # [I, N, head_dim / 2]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def _inside(q: Array, k: Array, v: Array, *, real: Array) -> Array:
    """Attention between the patches of each window."""
    images, windows, size = real.shape
    small = (images * windows, size, *q.shape[2:])
    out = _attended(q.reshape(small), k.reshape(small), v.reshape(small), real.reshape(-1, size))
    return out.reshape(q.shape)


def _across(q: Array, k: Array, v: Array, *, real: Array) -> Array:
    """Attention between all patches of each image, some queries at a time."""
    real = real.reshape(real.shape[0], -1)
    count = q.shape[1]
    pieces = -(-count // _QUERIES)
    if pieces == 1:
        return _attended(q, k, v, real)
    padded = jnp.pad(q, ((0, 0), (0, pieces * _QUERIES - count), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(q.shape[0], pieces, _QUERIES, *q.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda piece: _attended(piece, k, v, real)), split)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :count]


def _attended(q: Array, k: Array, v: Array, real: Array) -> Array:
    """``softmax(q k^T / sqrt(head_dim)) v`` over real keys; softmax in f32."""
    scores = wide_einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(real[:, None, None, :], scores, HIDDEN), axis=-1)
    weights = weights.astype(v.dtype)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v, precision=precision_of(v.dtype))
