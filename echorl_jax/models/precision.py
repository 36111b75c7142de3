"""How exact a matrix product is."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision for f32 operands, which TPU and GPU would otherwise round; bf16 as it is."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
