"""Fresh weights, drawn straight into their shards."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from echorl_jax.models.decoder import Decoder
from echorl_jax.models.modules import Layer, Trunk
from echorl_jax.parallel import Layout, tree_shardings
from echorl_jax.types import Array, PyTree


def param_shardings(model: Decoder, mesh: Mesh, *, layout: Layout = "train") -> PyTree:
    """Where each parameter lives on ``mesh``, in the training or the rollout layout."""
    return tree_shardings(model.param_axes(), model.param_shapes(), mesh, layout)


def init_params(model: Decoder, key: Array, mesh: Mesh | None = None) -> PyTree:
    """Draws weights: normal with the config's ``initializer_range``, biases 0, norms 1.

    The values depend on the key alone, not on the mesh.

    Args:
      model: what to initialise.
      key: PRNG key.
      mesh: where the weights go; one device unless given.

    Returns:
      The params pytree in ``model.param_dtype``.
    """
    shardings = None if mesh is None else param_shardings(model, mesh)
    return jax.jit(functools.partial(_draw, model), out_shardings=shardings)(key)


def _draw(model: Decoder, key: Array) -> PyTree:
    config = model.config
    trunk_key, layers_key = jax.random.split(key)

    def layer(layer_key: Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(Layer(config, nnx.Rngs(params=layer_key))))

    params = nnx.to_pure_dict(nnx.state(Trunk(config, nnx.Rngs(params=trunk_key))))
    params["layers"] = jax.vmap(layer)(jax.random.split(layers_key, config.num_layers))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, model.param_dtype), params)
