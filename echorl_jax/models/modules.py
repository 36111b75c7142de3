"""The parts of the decoder as Flax NNX modules.

Each declares its parameters once, with shape and logical axes. Weights are passed in, so a module
is built abstractly (the zeros below are never allocated) and merged with arrays where it is used.
Matrix products run in the dtype of their input; norms and rotary embedding in f32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from echorl_jax.models.config import DecoderConfig, Lora, VisionConfig
from echorl_jax.models.rope import Rotary, rotate
from echorl_jax.parallel import constrain
from echorl_jax.precision import precision_of
from echorl_jax.types import Array


class Embedding(nnx.Module):
    """Looks up the vectors of token ids."""

    def __init__(self, config: DecoderConfig):
        shape = (config.vocab_size, config.hidden_size)
        self.table = nnx.Param(jnp.zeros(shape), axes=("vocab", "embed"))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        return jnp.take(self.table[...], tokens, axis=0, mode="clip").astype(dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in f32."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(size), axes=("norm",))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (wide * inverse * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Adapter(nnx.Module):
    """The low-rank term of a linear, ``scale (x a) b``; a and b are f32."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], *, inputs: int, rank: int
    ):
        self.a = nnx.Param(jnp.zeros((*shape[:inputs], rank)), axes=(*axes[:inputs], "rank"))
        self.b = nnx.Param(jnp.zeros((rank, *shape[inputs:])), axes=("rank", *axes[inputs:]))
        # One number a layer, f32 and whole on every device as norms are.
        self.scale = nnx.Param(jnp.zeros(1), axes=("norm",))

    def __call__(self, rows: Array) -> Array:
        inner = _product(rows, self.a[...].reshape(rows.shape[1], -1))
        inner = _scaled(inner, self.scale[...])
        return _product(inner, self.b[...].reshape(inner.shape[1], -1))


class Linear(nnx.Module):
    """A matrix product over the last ``inputs`` axes, with an optional bias and adapter.

    An int8 kernel has a factor for each output. Rank 0 is no adapter.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool,
        inputs: int = 1,
        rank: int = 0,
        int8: bool = False,
    ):
        outputs, names = shape[inputs:], axes[inputs:]
        self.inputs = inputs
        self.kernel = nnx.Param(jnp.zeros(shape), axes=axes)
        self.kernel_scale = nnx.Param(jnp.zeros(outputs), axes=names) if int8 else None
        self.bias = nnx.Param(jnp.zeros(outputs), axes=names) if bias else None
        self.lora = Adapter(shape, axes, inputs=inputs, rank=rank) if rank else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        leading, features = x.shape[: x.ndim - self.inputs], kernel.shape[self.inputs :]
        # Multiply plain matrices: with more axes XLA copies activations to transpose them for the
        # weight gradient (a quarter of the backward pass on CPU).
        rows = x.reshape(math.prod(leading), -1)
        out = _product(rows, kernel.reshape(rows.shape[1], -1))
        if self.kernel_scale is not None:
            out = _scaled(out, self.kernel_scale[...].reshape(-1))
        if self.lora is not None:
            out = out + self.lora(rows)
        out = out.reshape(*leading, *features)
        if self.bias is None:
            return out
        bias = self.bias[...].astype(x.dtype)
        return out + jnp.expand_dims(bias, range(out.ndim - bias.ndim))


def _product(rows: Array, matrix: Array) -> Array:
    return jnp.matmul(rows, matrix.astype(rows.dtype), precision=precision_of(rows.dtype))


def _scaled(rows: Array, factors: Array) -> Array:
    """Rows times a factor for each column, in f32."""
    return (rows.astype(jnp.float32) * factors[None, :]).astype(rows.dtype)


# Makes a linear by its name in the layer; adapters and int8 kernels are decided here.
MakeLinear = Callable[..., Linear]


def linear_maker(lora: Lora | None, *, int8: bool, prefix: str = "") -> MakeLinear:
    """The constructor of a layer's linears, ``(name, shape, axes, *, bias, inputs)``.

    Args:
      lora: adapters, by names that begin with ``prefix``.
      int8: whether kernels are int8.
      prefix: of the part of the model.
    """

    def make(
        name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], **options: Any
    ) -> Linear:
        rank = lora.rank(prefix + name) if lora else 0
        return Linear(shape, axes, rank=rank, int8=int8, **options)

    return make


class Attention(nnx.Module):
    """The projections before and after attention, which the caller computes."""

    def __init__(self, config: DecoderConfig, linear: MakeLinear):
        c = config
        width, heads, kv_heads = c.head_dim, c.num_heads, c.num_kv_heads

        def into(name: str, count: int, axis: str) -> Linear:
            shape, axes = (c.hidden_size, count, width), ("embed", axis, "head_dim")
            return linear(name, shape, axes, bias=c.qkv_bias)

        self.q = into("q", heads, "heads")
        self.k = into("k", kv_heads, "kv_heads")
        self.v = into("v", kv_heads, "kv_heads")
        self.o = linear(
            "o",
            (heads, width, c.hidden_size),
            ("heads", "head_dim", "embed"),
            bias=c.output_bias,
            inputs=2,
        )
        self.q_norm = RMSNorm(width, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(width, c.norm_eps) if c.qk_norm else None

    def qkv(self, x: Array, tables: Rotary) -> tuple[Array, Array, Array]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(rotate(q, tables), "batch", "length", "heads", "head_dim")
        k = constrain(rotate(k, tables), "batch", "length", "kv_heads", "head_dim")
        return q, k, constrain(v, "batch", "length", "kv_heads", "head_dim")


class MLP(nnx.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, config: DecoderConfig | VisionConfig, linear: MakeLinear):
        c = config
        inward = (c.hidden_size, c.intermediate_size), ("embed", "mlp")
        outward = (c.intermediate_size, c.hidden_size), ("mlp", "embed")
        self.gate = linear("gate", *inward, bias=c.mlp_bias)
        self.up = linear("up", *inward, bias=c.mlp_bias)
        self.down = linear("down", *outward, bias=c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(inner, "batch", "length", "mlp"))


class Layer(nnx.Module):
    """One decoder layer in two halves; attention runs between them."""

    def __init__(self, config: DecoderConfig, linear: MakeLinear):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, linear)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, linear)

    def qkv(self, x: Array, tables: Rotary) -> tuple[Array, Array, Array]:
        return self.attention.qkv(self.attention_norm(x), tables)

    def finish(self, x: Array, attended: Array) -> Array:
        x = x + self.attention.o(attended)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "length", "feature")


class Trunk(nnx.Module):
    """The whole model with one layer in place of all; the weights of layers are ``[L, ...]``."""

    # The vision tower, of models that have one.
    vision: Any

    def __init__(self, config: DecoderConfig, linear: MakeLinear):
        self.embed = Embedding(config)
        self.layers = Layer(config, linear)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_embeddings:
            shape, axes = (config.hidden_size, config.vocab_size), ("embed", "vocab")
            self.head = Linear(shape, axes, bias=False)
