"""Pictures of prompts: the columns of public data sets, and the image processor of the model.

A row's ``images`` column holds bytes, a path, ``{"bytes": ..., "path": ...}`` (verl, EasyR1, files
of Hugging Face), or a Pillow image or an array of colours (an opened data set of Hugging Face).
An animation counts with its first picture, and pictures are turned as their Exif data say. The text
says where pictures stand with ``<image>``; without a mark they stand before the first question, as
in TRL.
"""

import base64
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.config import Config
from echorl_jax.data.rows import BadRow, holds_something
from echorl_jax.errors import UserError, one_line
from echorl_jax.types import HostArray, Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MARK = "<image>"
# A picture whose sides differ more is refused by the image processor.
MOST_ASPECT = 200
# Pillow decodes lazily, and a small file may claim any size.
MOST_PIXELS = 2**26
_ORIENTATION = 0x0112  # of Exif
_Bytes = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True)
class Processor:
    """Makes patches of pictures as Qwen2.5-VL's image processor does, by transformers' own code.

    Args:
      min_pixels, max_pixels: a picture is scaled into this range, its sides to whole merged
        patches. They decide how many tokens a picture has, so they belong to a run's record.
      image_id: the token that stands for a merged patch.
      most_tokens: the most image tokens that a prompt may have.
      patch_size, frames, merge: of the vision tower, see ``models.VisionConfig``.
    """

    min_pixels: int
    max_pixels: int
    image_id: int
    most_tokens: int
    patch_size: int = 14
    frames: int = 2
    merge: int = 2

    def images(self, row: Mapping[str, Any]) -> tuple[Image, ...]:
        """The row's pictures, decoded and processed.

        Raises:
          BadRow: a picture that cannot be decoded.
        """
        made = []
        for number, picture in enumerate(pictures_of(row), start=1):
            try:
                made.append(Image(*self(picture)))
            # Pillow's readers raise many kinds for damaged files.
            except Exception as error:
                reason = f"picture {number} cannot be read: {one_line(error)}"
                raise BadRow("images", reason) from None
        return tuple(made)

    def has_too_many(self, ids: Sequence[int]) -> bool:
        """True if a prompt has more image tokens than it may."""
        return sum(token == self.image_id for token in ids) > self.most_tokens

    def grid(self, picture: "Picture") -> tuple[int, int]:
        """Patches along height and width; reads the size alone."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = smart_resize(
            picture.height,
            picture.width,
            factor=self.patch_size * self.merge,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return height // self.patch_size, width // self.patch_size

    def tokens(self, picture: "Picture") -> int:
        """Tokens that the picture takes in a prompt."""
        height, width = self.grid(picture)
        return height * width // self.merge**2

    def __call__(self, picture: "Picture") -> tuple[HostArray, tuple[int, int]]:
        """Patches f32 ``[patches, values]`` of the scaled and normalised picture, and its grid."""
        made = self._library(_eight_bits(picture), return_tensors="np")
        _, height, width = np.asarray(made["image_grid_thw"])[0].tolist()
        return np.asarray(made["pixel_values"], np.float32), (height, width)

    @functools.cached_property
    def _library(self) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            patch_size=self.patch_size,
            temporal_patch_size=self.frames,
            merge_size=self.merge,
        )


def make_processor(
    vision: Any, *, min_pixels: int, max_pixels: int, most_tokens: int
) -> Processor | None:
    """The processor for a vision tower (``models.VisionConfig``); None without one.

    Raises:
      UserError: Pillow is not installed.
    """
    if vision is None:
        return None
    require_pillow()
    return Processor(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_id=vision.image_id,
        most_tokens=most_tokens,
        patch_size=vision.patch_size,
        frames=vision.frames,
        merge=vision.merge,
    )


def configured_processor(config: Config, vision: Any) -> Processor | None:
    """:func:`make_processor` with the limits of a run."""
    data = config.data
    return make_processor(
        vision,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        most_tokens=min(data.max_image_tokens, data.max_prompt_tokens),
    )


def require_pillow() -> ModuleType:
    """Pillow's module ``PIL.Image``.

    Raises:
      UserError: it is not installed.
    """
    try:
        import PIL.Image
    except ImportError:
        raise UserError("pictures need a package: pip install 'pillow>=11'") from None
    return PIL.Image


class UnreadImages(Sequence[Image]):
    """The images of a row, read at each access: for rows that are all held, such as held-out ones.

    Args:
      row: with pictures.
      processor: of the model.
    """

    def __init__(self, row: Mapping[str, Any], processor: Processor) -> None:
        self._row = row
        self._processor = processor

    def __len__(self) -> int:
        return len(entries_of(self._row))

    def __getitem__(self, index: int) -> Image:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._processor.images(self._row)[index]

    def __iter__(self) -> Iterator[Image]:
        return iter(self._processor.images(self._row))


def entries_of(row: Mapping[str, Any]) -> list[Any]:
    """The entries of the row's columns ``images`` and ``image``, one for each picture."""
    entries: list[Any] = []
    for column in ("images", "image"):
        given = row.get(column)
        if isinstance(given, np.ndarray) and given.dtype == object:
            given = given.tolist()
        if isinstance(given, Sequence) and not isinstance(given, str | _Bytes):
            entries += given if holds_something(given) else []
        elif holds_something(given):
            entries.append(given)
    return entries


def located(row: Mapping[str, Any], folder: Path) -> list[Any]:
    """The row's entries, with paths from ``folder``, after a look at each picture's size.

    Raises:
      BadRow: no picture can be read from an entry; says which and why.
    """
    found = []
    for number, entry in enumerate(entries_of(row), start=1):
        if isinstance(entry, Mapping):
            entry = entry.get("bytes") or entry.get("path")
        if isinstance(entry, str | Path):
            entry = str(folder / entry)
        _opened(entry, number)
        found.append(entry)
    return found


def pictures_of(row: Mapping[str, Any]) -> list["Picture"]:
    """The row's pictures, opened but not decoded.

    Raises:
      BadRow: no picture can be read from an entry; says which and why.
      UserError: Pillow is not installed.
    """
    return [_opened(entry, number) for number, entry in enumerate(entries_of(row), start=1)]


def _opened(entry: Any, number: int) -> "Picture":
    if isinstance(entry, Mapping):
        entry = entry.get("bytes") or entry.get("path")
    try:
        picture = _parsed(entry)
        width, height = picture.size
        if width * height <= MOST_PIXELS and max(width, height) <= MOST_ASPECT * min(width, height):
            return _upright(picture)
    # Pillow's readers raise many kinds for damaged files.
    except Exception as error:
        raise BadRow("images", f"picture {number} cannot be read: {one_line(error)}") from None
    raise BadRow("images", f"picture {number} has {width} x {height} pixels")


def _parsed(entry: Any) -> "Picture":
    """The picture of an entry, whose file is read as far as its size."""
    pillow = require_pillow()
    if isinstance(entry, str | Path):
        entry = Path(entry).read_bytes()
    if isinstance(entry, _Bytes):
        return pillow.open(io.BytesIO(entry))
    if isinstance(entry, np.ndarray):
        return pillow.fromarray(entry)
    if not isinstance(entry, pillow.Image):
        raise TypeError(f"{type(entry).__name__} is no picture, and neither bytes nor a path")
    return entry


def _upright(picture: "Picture") -> "Picture":
    """The picture turned as its Exif data say, as Hugging Face's data sets show it."""
    from PIL import ImageOps

    # Other files would have to be decoded whole to look for Exif data at their end.
    if "exif" not in picture.info and picture.format != "TIFF":
        return picture
    turned = picture.getexif().get(_ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture


def _eight_bits(picture: "Picture") -> "Picture":
    """The picture, with 16 bits of grey cut to 8, which Pillow would clip to white."""
    if not picture.mode.startswith("I"):
        return picture
    grey = np.asarray(picture, np.int64).clip(0, 2**16 - 1)
    if picture.mode != "I" or grey.max() > 255:
        grey >>= 8
    return require_pillow().fromarray(grey.astype(np.uint8))


# Pixels along the larger side of a thumbnail; its JPEG then has some kilobytes.
THUMBNAIL = 160


def thumbnail(picture: "Picture") -> str:
    """A small JPEG of the picture as base64, for a page that shows samples."""
    small, out = _eight_bits(picture).convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(out, "JPEG", quality=75)
    return base64.b64encode(out.getvalue()).decode()


def content_parts(messages: Sequence[Mapping[str, Any]], pictures: int) -> list[dict[str, Any]]:
    """The messages with their text split at each mark, as chat templates take pictures.

    Raises:
      BadRow: other numbers of marks and pictures.

    >>> content_parts([{"role": "user", "content": "<image>How many?"}], 1)[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'How many?'}]
    """
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks not in (0, pictures):
        raise BadRow("images", f"{pictures} pictures, but {MARK} stands {marks} times in the text")
    before = pictures - marks
    split = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        if before and message["role"] == "user":
            parts, before = [{"type": "image"}] * before, 0
        for number, text in enumerate(message["content"].split(MARK)):
            parts += [{"type": "image"}] * (number > 0)
            parts += [{"type": "text", "text": text}] if text else []
        split.append({"role": message["role"], "content": parts})
    if before:
        raise BadRow("images", "pictures, but no message of the user to put them before")
    return split


def narrowed(ids: Sequence[int], image_id: int) -> list[int]:
    """Token ids to read: one image token for each run of them.

    >>> narrowed([5, 9, 9, 6, 9, 9, 9], 9)
    [5, 9, 6, 9]
    """
    pairs = zip([None, *ids], ids, strict=False)
    return [token for before, token in pairs if not token == before == image_id]


def widened(ids: Sequence[int], image_id: int, tokens: Sequence[int]) -> list[int]:
    """Token ids with one image token for each feature, in place of one for each picture.

    Raises:
      BadRow: the text holds other numbers of image tokens, say because it spells one itself.

    >>> widened([5, 9, 6, 9], 9, [2, 3])
    [5, 9, 9, 6, 9, 9, 9]
    """
    places = sum(token == image_id for token in ids)
    if places != len(tokens):
        raise BadRow("images", f"{len(tokens)} pictures, but the prompt has {places} image tokens")
    counts = iter(tokens)
    wide: list[int] = []
    for token in ids:
        wide += [token] * (next(counts) if token == image_id else 1)
    return wide
