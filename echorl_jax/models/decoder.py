"""The decoder: a static description whose methods take the weights as a plain pytree."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from echorl_jax.choices import Kernel, Remat
from echorl_jax.models.attention import attend
from echorl_jax.models.config import DecoderConfig, Lora, ModelError
from echorl_jax.models.modules import Trunk, linear_maker
from echorl_jax.models.rope import Rotary, rotary
from echorl_jax.parallel import constrain
from echorl_jax.precision import precision_of
from echorl_jax.types import Array, PyTree

if TYPE_CHECKING:
    from echorl_jax.models.vision import Patches

_TOWER = ("patch", "layers", "merger")
_REMAT_POLICIES = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal language model without weights, hashable as a static argument of ``jax.jit``.

    ``params`` is a nested dict; the leaves under ``layers`` are stacked ``[num_layers, ...]``.
    Weights are stored as ``param_dtype`` and cast to ``dtype`` where they are used; norms, rotary
    embedding, softmax and logits are f32. Adapters are stored as f32. With "int8" the kernels of
    layers are, each output with a factor, and all else is bfloat16.
    """

    config: DecoderConfig
    # Activations and matrix products.
    dtype: str = "bfloat16"
    # Stored weights.
    param_dtype: str = "float32"
    # What the backward pass recomputes: a whole layer, all but the matrix products, or nothing.
    remat: Remat = "layer"
    attention: Kernel = "auto"
    lora: Lora | None = None
    # Parts of the parameters that are not trained, such as "vision".
    frozen: tuple[str, ...] = ()

    @property
    def base(self) -> "Decoder":
        """The same model without adapters, for the weights of :func:`base_params`."""
        return dataclasses.replace(self, lora=None)

    @property
    def text(self) -> "Decoder":
        """The same model without its vision tower."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, vision=None))

    def __post_init__(self) -> None:
        for name, allowed in (("remat", get_args(Remat)), ("attention", get_args(Kernel))):
            if (value := vars(self)[name]) not in allowed:
                raise ModelError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    def hidden(
        self,
        params: PyTree,
        tokens: Array,
        *,
        lengths: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        features: Array | None = None,
        feature_index: Array | None = None,
    ) -> Array:
        """Final-normed hidden states.

        Args:
          tokens: i32 ``[B, T]``, padded on the right.
          lengths: i32 ``[B]``, real tokens of each row, all unless given; padding is not attended
            to.
          segment_ids: i32 ``[B, T]``, for several sequences packed into one row.
          positions: i32 ``[B, T]``, from 0 along the row unless given (packed rows start again with
            each segment); ``[B, T, 3]`` with images.
          features: ``[F, D]`` of :meth:`encode_images`.
          feature_index: i32 ``[B, T]``, the feature that stands in a token's place, -1 for the
            token's own embedding.

        Returns:
          ``[B, T, D]`` in the compute dtype; finite but meaningless at padding positions.
        """
        if positions is None:
            positions = _row_positions(tokens.shape, lengths)
        tables = self.rotary(positions)
        masks = {"lengths": lengths, "segment_ids": segment_ids, "kernel": self.attention}
        windows = tuple(dict.fromkeys(self.config.windows))
        kernels = [functools.partial(attend, window=window, **masks) for window in windows]

        def body(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, None]:
            layer, kind = scanned
            q, k, v = self.qkv(layer, x, tables)
            if len(kernels) == 1:
                attended = kernels[0](q, k, v)
            else:
                attended = jax.lax.switch(kind, kernels, q, k, v)
            return self.finish_layer(layer, x, attended), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT_POLICIES[self.remat], prevent_cse=False)
        kinds = jnp.array([windows.index(window) for window in self.config.windows], jnp.int32)
        x = self._look_up(params, tokens)
        if features is not None and feature_index is not None:
            x = placed(x, features, feature_index)
        x, _ = jax.lax.scan(body, x, (self.layers(params), kinds))
        return self.final_norm(params, x)

    def logits(self, params: PyTree, tokens: Array, *, lengths: Array | None = None) -> Array:
        """Logits of all positions, f32 ``[B, T, V]``; large, so for tests and small models only."""
        hidden = self.hidden(params, tokens, lengths=lengths)
        head, precision = self.head(params).astype(hidden.dtype), precision_of(hidden.dtype)
        return jnp.matmul(hidden, head, precision=precision, preferred_element_type=jnp.float32)

    def head(self, params: PyTree) -> Array:
        """The output projection ``[D, V]``: the transposed embedding if the two are tied.

        It has the dtype of ``params``; cast it where it is used, so that its gradient is f32.
        """
        if self.config.tied_embeddings:
            return params["embed"]["table"].T
        return params["head"]["kernel"]

    def embed(self, params: PyTree, tokens: Array) -> Array:
        """i32 ``[..., T]`` to ``[..., T, D]``."""
        x = self._part("embed", params["embed"])(tokens, jnp.dtype(self.dtype))
        return constrain(x, "batch", "length", "feature") if x.ndim == 3 else x

    def encode_images(self, params: PyTree, patches: "Patches") -> Array:
        """Features ``[F, D]`` of the images' merged patches, in the order of the patches.

        Raises:
          ModelError: the model has no vision tower.
        """
        from echorl_jax.models.vision import encode

        config = self.config.vision
        if config is None:
            raise ModelError(f"{self.config.model_type} has no vision tower")
        graphs = _graphs(*self._structure)
        modules = {name: graphs[f"vision/{name}"] for name in _TOWER}
        remat = self.remat != "none"
        out = encode(config, modules, params["vision"], patches, dtype=self.dtype, remat=remat)
        return out.reshape(-1, out.shape[-1])

    def _look_up(self, params: PyTree, tokens: Array) -> Array:
        """:meth:`embed` for a table that is split along its features.

        Each device looks up its share of the features for all rows of its ``fsdp`` neighbours, then
        they exchange. Without these constraints XLA copies every row to every device.
        """
        tokens = constrain(tokens, "table_batch", "length")
        x = self._part("embed", params["embed"])(tokens, jnp.dtype(self.dtype))
        x = constrain(x, "table_batch", "length", "embed")
        return constrain(x, "batch", "length", "feature")

    def layers(self, params: PyTree) -> PyTree:
        """The layers' weights, stacked ``[L, ...]``, to scan over."""
        return params["layers"]

    def rotary(self, positions: Array) -> Rotary:
        """Tables for :meth:`qkv`, the same in every layer."""
        return rotary(self.config, positions)

    def qkv(self, layer: PyTree, x: Array, tables: Rotary) -> tuple[Array, Array, Array]:
        """First half of a layer: norm, projections, biases, query/key norms, rotary embedding.

        Args:
          layer: one layer's weights.
          x: ``[B, T, D]``.
          tables: :meth:`rotary` of the positions.

        Returns:
          q ``[B, T, H, K]``, k and v ``[B, T, KV, K]``.
        """
        return self._part("layers", layer).qkv(x, tables)

    def finish_layer(self, layer: PyTree, x: Array, attended: Array) -> Array:
        """Second half of a layer, after attention ``[B, T, H, K]``: projection, residual, MLP."""
        return self._part("layers", layer).finish(x, attended)

    def final_norm(self, params: PyTree, x: Array) -> Array:
        return self._part("final_norm", params["final_norm"])(x)

    def param_shapes(self) -> PyTree:
        """``jax.ShapeDtypeStruct`` for each parameter."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, self._stored_dtype(path)),
            _shapes(*self._structure),
        )

    def _stored_dtype(self, path: tuple[Any, ...]) -> str:
        names = [key.key for key in path]
        if "lora" in names or names[-1] == "kernel_scale":
            return "float32"
        if self.param_dtype != "int8":
            return self.param_dtype
        return "int8" if names[0] == "layers" and names[-1] == "kernel" else "bfloat16"

    def param_axes(self) -> PyTree:
        """The logical axes of each parameter, a tuple of names, for the sharding table."""
        return _axes(*self._structure)

    def cast(self, params: PyTree) -> PyTree:
        """Weights for sampling: those wider than the compute dtype in it. Norms and factors of
        int8 kernels and of adapters stay f32, as in training.
        """
        width = jnp.dtype(self.dtype).itemsize

        def narrowed(path: tuple[Any, ...], leaf: Array) -> Array:
            keep = path[-1].key.endswith("scale") or leaf.dtype.itemsize <= width
            return leaf if keep else leaf.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(narrowed, params)

    @property
    def _structure(self) -> tuple[DecoderConfig, Lora | None, bool]:
        return self.config, self.lora, self.param_dtype == "int8"

    def _part(self, name: str, params: PyTree) -> Any:
        return nnx.merge(_graphs(*self._structure)[name], params)


def _row_positions(shape: tuple[int, ...], lengths: Array | None) -> Array:
    """0, 1, ... along each row. Padding repeats the last real position, so that it does not count
    as length.
    """
    row = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    if lengths is None:
        return row
    last = jnp.maximum(lengths.astype(jnp.int32) - 1, 0)
    return jnp.minimum(row, last[:, None])


def placed(x: Array, features: Array, index: Array) -> Array:
    """Embeddings ``[B, T, D]`` with the features ``[F, D]`` that ``index`` (-1: none) names."""
    chosen = jnp.take(features, jnp.maximum(index, 0), axis=0).astype(x.dtype)
    return jnp.where(index[..., None] >= 0, chosen, x)


@functools.cache
def _trunk(config: DecoderConfig, lora: Lora | None, int8: bool) -> Trunk:
    def make() -> Trunk:
        trunk = Trunk(config, linear_maker(lora, int8=int8))
        if config.vision is not None:
            from echorl_jax.models.vision import Tower

            linear = linear_maker(lora, int8=False, prefix="vision/")
            trunk.vision = Tower(config.vision, config.hidden_size, linear)
        return trunk

    return nnx.eval_shape(make)


@functools.cache
def _graphs(config: DecoderConfig, lora: Lora | None, int8: bool) -> dict[str, Any]:
    """The static half of each part of the model."""
    trunk = _trunk(config, lora, int8)
    parts = {"embed": trunk.embed, "layers": trunk.layers, "final_norm": trunk.final_norm}
    if config.vision is not None:
        parts |= {f"vision/{name}": getattr(trunk.vision, name) for name in _TOWER}
    return {name: nnx.split(part)[0] for name, part in parts.items()}


@functools.cache
def _shapes(config: DecoderConfig, lora: Lora | None, int8: bool) -> PyTree:
    shapes = nnx.to_pure_dict(nnx.state(_trunk(config, lora, int8)))

    def stack(node: PyTree, count: int) -> None:
        node["layers"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), node["layers"]
        )

    stack(shapes, config.num_layers)
    if config.vision is not None:
        stack(shapes["vision"], config.vision.num_layers)
    return shapes


@functools.cache
def _axes(config: DecoderConfig, lora: Lora | None, int8: bool) -> PyTree:
    axes: dict[str, Any] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(_trunk(config, lora, int8))):
        path = [str(key) for key in keys]
        node = axes
        for key in path[:-1]:
            node = node.setdefault(key, {})
        names = variable.get_metadata()["axes"]
        node[path[-1]] = ("layers", *names) if "layers" in path else names
    return axes
