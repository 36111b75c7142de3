"""The parts of the decoder as Flax NNX modules.

Each declares its parameters once, with shape and logical axes. Weights are passed in, so a module
is built abstractly (the zeros below are never allocated) and merged with arrays where it is used.
Matrix products run in the dtype of their input; norms and rotary embedding in f32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from echorl_jax.models.config import DecoderConfig
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


class Linear(nnx.Module):
    """A matrix product over the last ``inputs`` axes, with an optional bias."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], *, bias: bool, inputs: int = 1
    ):
        self.inputs = inputs
        self.kernel = nnx.Param(jnp.zeros(shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[inputs:]), axes=axes[inputs:]) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        leading, features = x.shape[: x.ndim - self.inputs], kernel.shape[self.inputs :]
        # Multiply plain matrices: with more axes XLA copies activations to transpose them for the
        # weight gradient (a quarter of the backward pass on CPU).
        rows = x.reshape(math.prod(leading), -1)
        out = jnp.matmul(
            rows, kernel.reshape(rows.shape[1], -1), precision=precision_of(x.dtype)
        ).reshape(*leading, *features)
        if self.bias is None:
            return out
        bias = self.bias[...].astype(x.dtype)
        return out + jnp.expand_dims(bias, range(out.ndim - bias.ndim))


class Attention(nnx.Module):
    """The projections before and after attention, which the caller computes."""

    def __init__(self, config: DecoderConfig):
        c = config
        width, heads, kv_heads = c.head_dim, c.num_heads, c.num_kv_heads

        def into(count: int, axis: str) -> Linear:
            shape, axes = (c.hidden_size, count, width), ("embed", axis, "head_dim")
            return Linear(shape, axes, bias=c.qkv_bias)

        self.q = into(heads, "heads")
        self.k = into(kv_heads, "kv_heads")
        self.v = into(kv_heads, "kv_heads")
        self.o = Linear(
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

    def __init__(self, config: DecoderConfig):
        c = config
        inward = (c.hidden_size, c.intermediate_size), ("embed", "mlp")
        outward = (c.intermediate_size, c.hidden_size), ("mlp", "embed")
        self.gate = Linear(*inward, bias=c.mlp_bias)
        self.up = Linear(*inward, bias=c.mlp_bias)
        self.down = Linear(*outward, bias=c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(inner, "batch", "length", "mlp"))


class Layer(nnx.Module):
    """One decoder layer in two halves; attention runs between them."""

    def __init__(self, config: DecoderConfig):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def qkv(self, x: Array, tables: Rotary) -> tuple[Array, Array, Array]:
        return self.attention.qkv(self.attention_norm(x), tables)

    def finish(self, x: Array, attended: Array) -> Array:
        x = x + self.attention.o(attended)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "length", "feature")


class Trunk(nnx.Module):
    """The whole model with one layer in place of all; the weights of layers are ``[L, ...]``."""

    def __init__(self, config: DecoderConfig):
        self.embed = Embedding(config)
        self.layers = Layer(config)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_embeddings:
            shape, axes = (config.hidden_size, config.vocab_size), ("embed", "vocab")
            self.head = Linear(shape, axes, bias=False)
