"""The precision of matrix products."""

import jax
import jax.numpy as jnp

from echorl_jax.types import Array


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision for f32 operands, which TPU and GPU would otherwise round; bf16 as it is."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum of two arrays of one type with an f32 result."""
    return jnp.einsum(
        subscripts, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )
