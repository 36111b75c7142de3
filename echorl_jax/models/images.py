"""Images and their tokens on the host, in NumPy: window order, padding, positions of three axes.

The image processor of transformers makes patches in the order of merged patches, row by row; the
vision tower wants them window by window (:mod:`echorl_jax.models.vision`). Features take the places
of image tokens by their position in the prompt, never by token id, so a sampled image token cannot
shift them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from echorl_jax.models.config import ModelError, VisionConfig
from echorl_jax.models.vision import Patches
from echorl_jax.types import HostArray, Image


def merged_grid(config: VisionConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Merged patches along height and width: their product is the number of tokens.

    Raises:
      ModelError: a side that does not divide.
    """
    height, width = grid
    if height < 1 or width < 1 or height % config.merge or width % config.merge:
        raise ModelError(
            f"an image of {height} x {width} patches does not divide by {config.merge}"
        )
    return height // config.merge, width // config.merge


def window_count(config: VisionConfig, grid: tuple[int, int]) -> int:
    """Windows that an image takes, those at its edges included."""
    rows, columns = (-(-side // config.window_tokens) for side in merged_grid(config, grid))
    return rows * columns


def token_slots(config: VisionConfig, grid: tuple[int, int]) -> HostArray:
    """The slot of each merged patch in window order, i32 ``[tokens]``, row by row of the image.

    >>> config = VisionConfig(1, 8, 8, 1, (), 1, 2, 3, 4, patch_size=1, window=4)
    >>> token_slots(config, (2, 6))  # 1 x 3 merged patches in windows of 2 x 2
    array([0, 1, 4], dtype=int32)
    """
    rows, columns = merged_grid(config, grid)
    side = config.window_tokens
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    window = (row // side) * -(-columns // side) + column // side
    return window * side**2 + (row % side) * side + column % side


def window_patches(config: VisionConfig, images: Sequence[Image], windows: int) -> Patches:
    """The images window by window, each padded to ``windows`` windows.

    Raises:
      ModelError: an image with more windows, or of another number of patches than its grid says.
    """
    merged = config.merge**2
    shape = len(images), windows * config.window_patches
    pixels = np.zeros((*shape, config.patch_values), np.float32)
    place = np.full((*shape, 2), -1, np.int32)
    for index, (values, grid) in enumerate(images):
        if values.shape[0] != grid[0] * grid[1]:
            raise ModelError(f"image {index + 1} has {values.shape[0]} patches, its grid is {grid}")
        if (count := window_count(config, grid)) > windows:
            raise ModelError(f"image {index + 1} has {count} windows, more than {windows}")
        slots = token_slots(config, grid)[:, None] * merged + np.arange(merged)
        row, column = np.divmod(np.arange(slots.shape[0]), merged_grid(config, grid)[1])
        inner_row, inner_column = np.divmod(np.arange(merged), config.merge)
        rows = row[:, None] * config.merge + inner_row
        columns = column[:, None] * config.merge + inner_column
        pixels[index, slots.ravel()] = values
        place[index, slots.ravel()] = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    split = len(images), windows, config.window_patches
    return Patches(pixels.reshape(*split, -1), place.reshape(*split, 2))


class ImageTokens(NamedTuple):
    """Positions of a prompt's tokens, and the features that stand in their places."""

    positions: HostArray  # i32 [T, 3]: time, height and width
    delta: int  # position of a later token, less its index in the row
    index: HostArray  # i32 [T]: a token's feature among those of the prompt in order, -1 for text


def image_tokens(
    config: VisionConfig,
    tokens: Sequence[int] | HostArray,
    grids: Sequence[tuple[int, int]],
) -> ImageTokens:
    """Positions and features of a prompt whose image tokens are already as many as the features.

    Text goes on at the position after the larger side of an image's merged grid.

    Args:
      config: of the vision tower.
      tokens: ``[T]`` ids.
      grids: patches along height and width of each image, in order.

    Raises:
      ModelError: other numbers of image tokens than the grids ask for.
    """
    tokens = np.asarray(tokens)
    is_image = tokens == config.image_id
    sizes = [merged_grid(config, grid) for grid in grids]
    wanted = sum(rows * columns for rows, columns in sizes)
    if is_image.sum() != wanted:
        raise ModelError(f"the prompt has {is_image.sum()} image tokens, its images have {wanted}")
    positions = np.zeros((len(tokens), 3), np.int32)
    index = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
    at, now = 0, 0
    for number, (rows, columns) in enumerate(sizes):
        # Text up to the image's first token, then the image's rows and columns.
        first = at + int(np.argmax(is_image[at:]))
        last = first + rows * columns
        if not is_image[first:last].all():
            raise ModelError(f"text stands inside the tokens of image {number + 1} of the prompt")
        positions[at:first] = (now + np.arange(first - at))[:, None]
        now += first - at
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[first:last] = now + np.stack([np.zeros_like(row), row, column], axis=-1)
        at, now = last, now + max(rows, columns)
    positions[at:] = (now + np.arange(len(tokens) - at))[:, None]
    return ImageTokens(positions, now - at, index)
