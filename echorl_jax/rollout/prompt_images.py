"""The images of prompts: where their features stand, and the positions of all tokens."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from echorl_jax.models import Decoder
from echorl_jax.models.config import ModelError
from echorl_jax.models.image_features import image_features
from echorl_jax.models.images import image_tokens
from echorl_jax.rollout.request import PromptImages
from echorl_jax.types import HostArray, Image, PyTree


def place_images(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image]],
    *,
    width: int,
) -> tuple[HostArray, HostArray, HostArray]:
    """Index i32 ``[P, S]``, positions i32 ``[P, S, 3]`` and delta i32 ``[P]`` of prompts.

    Features are counted over all prompts, in order. Columns after a prompt have no feature, and go
    on counting positions.

    Raises:
      ModelError: a prompt whose image tokens do not fit its images; the message names it.
    """
    config = model.config.vision
    assert config is not None
    index = np.full((len(prompts), width), -1, np.int32)
    positions = np.zeros((len(prompts), width, 3), np.int32)
    delta = np.zeros(len(prompts), np.int32)
    first = 0
    for row, (ids, own) in enumerate(zip(prompts, images, strict=True)):
        try:
            found = image_tokens(config, ids, [image.grid for image in own])
        except ModelError as error:
            raise ModelError(f"prompts[{row}]: {error}") from error
        if found.index[-1] >= 0:
            raise ModelError(f"prompts[{row}] ends inside an image; text has to follow it")
        count = len(ids)
        index[row, :count] = np.where(found.index >= 0, found.index + first, -1)
        positions[row] = (np.arange(width) + found.delta)[:, None]
        positions[row, :count] = found.positions
        delta[row] = found.delta
        first += int((found.index >= 0).sum())
    return index, positions, delta


def prompt_images(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image]],
    *,
    size: int = 0,
    mesh: Mesh | None = None,
) -> PromptImages:
    """The images of a call's prompts, for :func:`make_request`.

    Args:
      model: with a vision tower.
      params: its weights; the features are computed here, once for each image.
      prompts: P lists of token ids, with one image token for each feature.
      images: those of each prompt, in order.
      size: F, room for features, so that calls share a program; at least as many as there are.
      mesh: of the call.
    """
    index, positions, delta = place_images(model, prompts, images, width=max(map(len, prompts)))
    every = [image for own in images for image in own]
    features = image_features(
        model, params, every, size=max(size, int(index.max()) + 1, 1), mesh=mesh
    )
    return PromptImages(features, index, positions, delta)  # pyright: ignore[reportArgumentType]
