"""Features of many images on the device, and the gradient of the tower that made them.

Images go through the tower in batches of a few fixed shapes, so that what is compiled does not
depend on the data. Features land in one array ``[F, D]`` in the order of the image tokens that they
replace: prompt by prompt, image by image, row by row.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from echorl_jax.models.config import VisionConfig
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.images import merged_grid, token_slots, window_count, window_patches
from echorl_jax.models.initialise import merge
from echorl_jax.models.lora import split_params
from echorl_jax.models.vision import Patches
from echorl_jax.parallel import constrain, place_rows, place_whole
from echorl_jax.types import Array, HostArray, Image, PyTree

# Patches that go through the tower at once, for each device.
PATCHES = 16384


class ImageBatch(NamedTuple):
    """Images of one padded size."""

    patches: Patches  # [I, W, S, ...]
    target: HostArray  # i32 [I, W * tokens of a window], a merged patch's feature; F for padding


def feature_counts(config: VisionConfig, images: Sequence[Image]) -> list[int]:
    """Features of each image."""
    sizes = [merged_grid(config, image.grid) for image in images]
    return [rows * columns for rows, columns in sizes]


def image_batches(
    config: VisionConfig,
    images: Sequence[Image],
    *,
    size: int,
    shards: int = 1,
    used: HostArray | None = None,
) -> Iterator[ImageBatch]:
    """The images in batches whose shapes are few: powers of two of images and of their windows.

    Args:
      images: in the order of their tokens.
      size: F, room for features.
      shards: devices that divide the images of a batch.
      used: bool ``[F]``; images without a used feature are left out. None takes all.
    """
    first = np.cumsum([0, *feature_counts(config, images)])
    assert first[-1] <= size, f"{first[-1]} image tokens, room for {size}"
    by_size: dict[int, list[int]] = {}
    for number, image in enumerate(images):
        windows = 1 << (window_count(config, image.grid) - 1).bit_length()
        by_size.setdefault(windows, []).append(number)
    for windows, numbers in sorted(by_size.items()):
        most = max(1, PATCHES // (windows * config.window_patches))
        needed = 1 << (-(-len(numbers) // shards) - 1).bit_length()
        count = shards * min(most, needed)
        if used is not None:  # the shape stays that of all images
            numbers = [n for n in numbers if used[first[n] : first[n + 1]].any()]
        for start in range(0, len(numbers), count):
            chosen = numbers[start : start + count]
            yield _batch(config, images, chosen, first, shape=(count, windows), size=size)


def _batch(
    config: VisionConfig,
    images: Sequence[Image],
    numbers: Sequence[int],
    first: HostArray,
    *,
    shape: tuple[int, int],
    size: int,
) -> ImageBatch:
    """The chosen images, padded to ``shape``: images and windows of each."""
    count, windows = shape
    target = np.full((count, windows * config.window_tokens**2), size, np.int32)
    for row, number in enumerate(numbers):
        slots = token_slots(config, images[number].grid)
        target[row, slots] = first[number] + np.arange(len(slots))
    patches = window_patches(config, [images[number] for number in numbers], windows)
    missing = [(0, count - len(numbers))]
    pixels = np.pad(patches.pixels, [*missing, (0, 0), (0, 0), (0, 0)])
    place = np.pad(patches.place, [*missing, (0, 0), (0, 0), (0, 0)], constant_values=-1)
    return ImageBatch(Patches(pixels, place), target)


def image_features(
    model: Decoder,
    params: PyTree,
    images: Sequence[Image],
    *,
    size: int,
    mesh: Mesh | None = None,
) -> Array:
    """Features ``[F, D]`` of all images, on every device; zeros where there are fewer.

    Args:
      model: with a vision tower.
      params: its weights.
      images: with at most F features in all.
      size: F.
      mesh: images are spread over ``data`` and ``fsdp``.
    """
    config, shards = _tower(model), _shards(mesh)
    features = jnp.zeros((size, model.config.hidden_size), model.dtype)
    if mesh is not None:
        features = place_whole(np.zeros(features.shape, features.dtype), mesh)
    for batch in image_batches(config, images, size=size, shards=shards):
        features = _encode_into(features, params, _placed(batch, mesh), model=model)
    return features


def tower_gradient(
    model: Decoder,
    frozen: PyTree,
    trainable: PyTree,
    images: Sequence[Image],
    of_features: Array,
    gradient: PyTree,
    *,
    mesh: Mesh | None = None,
) -> PyTree:
    """Adds to ``gradient`` what reaches the trainable parameters through the features.

    The gradient of the loss with respect to the features is summed over all rows first, so the
    tower's backward pass runs once for each image, however many rows show it.

    Args:
      model, images, mesh: see :func:`image_features`.
      frozen, trainable: the parameters that made the features, see :func:`merge`.
      of_features: ``[F, D]``, gradient of the loss with respect to the features.
      gradient: of the trainable parameters; donated.
    """
    size, used = of_features.shape[0], np.asarray((of_features != 0).any(axis=-1))
    for batch in image_batches(_tower(model), images, size=size, shards=_shards(mesh), used=used):
        placed = _placed(batch, mesh)
        gradient = _pull_back(gradient, frozen, trainable, of_features, placed, model=model)
    return gradient


def largest_batch(
    config: VisionConfig, *, most_tokens: int, shards: int
) -> tuple[tuple[int, int], ImageBatch]:
    """The shape of a full batch of the largest images: (images, windows), and its abstract arrays.

    Args:
      most_tokens: of an image, which is taken as square.
      shards: devices that divide the images.
    """
    side = math.isqrt(most_tokens - 1) + 1
    windows = 1 << ((-(-side // config.window_tokens)) ** 2 - 1).bit_length()
    images = shards * max(1, PATCHES // (windows * config.window_patches))
    patches = (images, windows, config.window_patches)
    batch = ImageBatch(
        Patches(
            jax.ShapeDtypeStruct((*patches, config.patch_values), np.float32),
            jax.ShapeDtypeStruct((*patches, 2), np.int32),
        ),
        jax.ShapeDtypeStruct((images, windows * config.window_tokens**2), np.int32),
    )
    return (images, windows), batch


def lower_encode(
    model: Decoder, params: PyTree, features: Array, batch: ImageBatch
) -> jax.stages.Lowered:
    """The program of a batch of images, from shapes with shardings: nothing is computed."""
    return _encode_into.lower(features, params, batch, model=model)


def lower_pull_back(
    model: Decoder,
    frozen: PyTree,
    trainable: PyTree,
    of_features: Array,
    batch: ImageBatch,
) -> jax.stages.Lowered:
    """The program of the tower's gradient, from shapes with shardings."""
    return _pull_back.lower(trainable, frozen, trainable, of_features, batch, model=model)


def _tower(model: Decoder) -> VisionConfig:
    assert model.config.vision is not None
    return model.config.vision


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _placed(batch: ImageBatch, mesh: Mesh | None) -> ImageBatch:
    return jax.tree.map(jnp.asarray, batch) if mesh is None else place_rows(batch, mesh)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="features")
def _encode_into(features: Array, params: PyTree, batch: ImageBatch, *, model: Decoder) -> Array:
    made = model.encode_images(params, batch.patches)
    target = constrain(batch.target.reshape(-1), None)
    made = constrain(made.astype(features.dtype), None, None)
    return constrain(features.at[target].set(made, mode="drop"), None, None)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="gradient")
def _pull_back(
    gradient: PyTree,
    frozen: PyTree,
    trainable: PyTree,
    of_features: Array,
    batch: ImageBatch,
    *,
    model: Decoder,
) -> PyTree:
    def made(trainable: PyTree) -> Array:
        return model.encode_images(merge(frozen, trainable), batch.patches)

    out, pull = jax.vjp(made, trainable)
    target = batch.target.reshape(-1)
    # Padding has no feature: its target is one past the last.
    padded = jnp.pad(of_features, ((0, 1), (0, 0)))
    (own,) = pull(padded[target].astype(out.dtype))
    # The sharding stays that of the parameters, so that the next batch takes the same program.
    axes = split_params(model, model.param_axes())[1]
    return jax.tree.map(lambda a, b, names: constrain(a + b, *names), gradient, own, axes)
