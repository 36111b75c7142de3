"""Pictures of rows: every form that public files have, damage, marks, and patches by hand."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from echorl_jax.data import load_rows
from echorl_jax.data.pictures import (
    Processor,
    content_parts,
    located,
    pictures_of,
    thumbnail,
    widened,
)
from echorl_jax.data.rows import BadRow

MODEL = {"image_id": 9, "most_tokens": 4096}
GEOMETRY = Path(__file__).parents[3] / "shared" / "data" / "geometry3k_6.parquet"


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> PIL.Image.Image:
    rng = np.random.default_rng(width * height)
    values = rng.integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def png(image: PIL.Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_every_form_of_the_column_gives_the_same_picture(tmp_path):
    image = picture()
    (tmp_path / "a.png").write_bytes(png(image))
    entries = [
        png(image),
        "a.png",
        {"bytes": png(image), "path": None},
        {"bytes": None, "path": "a.png"},
        {"path": str(tmp_path / "a.png")},
        {"path": Path("a.png")},
        bytearray(png(image)),
        memoryview(png(image)),
        image,
        np.asarray(image),
    ]
    for entry in entries:
        column = np.empty(1, object)
        column[0] = entry  # as pandas gives a list
        for given in ([entry], column) if isinstance(entry, str) else ([entry], column, entry):
            (found,) = pictures_of({"images": located({"images": given}, tmp_path)})
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    assert len(located({"images": entries}, tmp_path)) == len(entries)
    assert len(located({"image": entries[3]}, tmp_path)) == 1
    nothing = [None, [], "", np.array([]), [None], [{"bytes": None, "path": None}], float("nan")]
    assert all(pictures_of({"images": given}) == [] for given in nothing)
    assert all(located({"images": given, "image": given}, tmp_path) == [] for given in nothing)


def jpeg(image: PIL.Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("save", [png, jpeg])
def test_a_picture_is_turned_as_its_camera_says(orientation, save, tmp_path):
    """Four quarters of one colour each, stored turned, come out upright, as does the grid."""
    upright = np.zeros((56, 112, 3), np.uint8)
    upright[:28, :56], upright[:28, 56:], upright[28:, :56] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # The stored picture for each value, by the table of the Exif standard (0x0112).
    turn = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(turn[orientation]))
    out = io.BytesIO()
    stored.save(out, "PNG" if save is png else "JPEG", exif=exif)
    (found,) = pictures_of({"images": located({"images": out.getvalue()}, tmp_path)})
    assert found.size == (112, 56)
    np.testing.assert_allclose(np.asarray(found, int)[8::28, 8::28], upright[8::28, 8::28], atol=12)
    processor = Processor(28 * 28, 28 * 28 * 100, **MODEL)
    assert processor(found)[1] == processor.grid(found) == (4, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF as int32"])
def test_sixteen_bits_of_grey_look_like_eight(kind):
    """Pillow alone clips them to white."""
    ramp = np.arange(0, 2**16, 2**16 // (56 * 84))[: 56 * 84].reshape(56, 84)
    image = PIL.Image.fromarray(ramp.astype(np.uint16))
    image = image.convert("I") if "int32" in kind else image
    out = io.BytesIO()
    image.save(out, kind.partition(" ")[0])
    (deep,) = pictures_of({"images": out.getvalue()})
    processor = Processor(28 * 28, 28 * 28 * 100, **MODEL)
    eight = PIL.Image.fromarray((ramp // 256).astype(np.uint8))
    np.testing.assert_array_equal(processor(deep)[0], processor(eight)[0])
    assert thumbnail(deep) == thumbnail(eight)


def test_a_film_shows_its_first_picture_and_print_colours_are_read():
    red, blue = (PIL.Image.new("RGB", (56, 56), colour) for colour in ("red", "blue"))
    out = io.BytesIO()
    red.save(out, "GIF", save_all=True, append_images=[blue])
    (film,) = pictures_of({"images": out.getvalue()})
    (printed,) = pictures_of({"images": jpeg(red.convert("CMYK"))})
    processor = Processor(28 * 28, 28 * 28 * 100, **MODEL)
    for found in (film, printed):
        np.testing.assert_allclose(processor(found)[0], processor(red)[0], atol=0.1)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 150), (150, 1), (3, 150), (150, 3)])
def test_the_smallest_pictures_keep_their_colours(width, height):
    """A side of 1 or 3 pixels is not taken for the colours."""
    processor = Processor(56 * 56, 28 * 28 * 1280, **MODEL)
    small, large = (PIL.Image.new("RGB", size, "orange") for size in ((width, height), (56, 56)))
    colours = [
        processor(image)[0].reshape(-1, 3, 2 * 14**2).mean((0, 2)) for image in (small, large)
    ]
    np.testing.assert_allclose(*colours, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (b"\x89PNG\r\n\x1a\nshort", "picture 2 cannot be read"),
        (b"", "picture 2 cannot be read"),
        ("missing.png", "picture 2 cannot be read"),
        ({"bytes": None, "path": None}, "picture 2 cannot be read"),
        (7, "picture 2 cannot be read: TypeError: int is no picture"),
        (None, "picture 2 cannot be read: TypeError: NoneType is no picture"),
        ([b"x"], "picture 2 cannot be read: TypeError: list is no picture"),
        (np.zeros((4, 4, 3)), "picture 2 cannot be read: TypeError"),
        (png(picture(2010, 10)), "picture 2 has 2010 x 10 pixels"),
    ],
)
def test_a_broken_picture_is_named(entry, reason, tmp_path):
    with pytest.raises(BadRow, match=reason):
        located({"images": [png(picture()), entry]}, tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_patches_are_colours_by_the_formula(mode):
    """A picture whose size stays as it is: patches, frames and colours worked out from the text."""
    image = picture(84, 56, mode)
    processor = Processor(28 * 28, 28 * 28 * 100, **MODEL)
    assert processor.grid(image) == (4, 6) and processor.tokens(image) == 6
    pixels, grid = processor(image)
    assert grid == (4, 6) and pixels.shape == (24, 3 * 2 * 14**2)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    colours = (np.asarray(image.convert("RGB")) / 255 - mean) / deviation
    # The second patch of the merged patch in row 1, column 2 is at patch row 2, patch column 5.
    square = colours[2 * 14 : 3 * 14, 5 * 14 : 6 * 14].transpose(2, 0, 1)
    expected = np.repeat(square[:, None], 2, axis=1).ravel()
    np.testing.assert_allclose(pixels[(1 * 3 + 2) * 4 + 1], expected, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(300, 413), (5, 5), (4000, 3000), (30, 900)])
def test_the_grid_is_known_from_the_size_alone(width, height):
    processor = Processor(56 * 56, 28 * 28 * 1280, **MODEL)
    pixels, grid = processor(picture(width, height))
    assert processor.grid(picture(width, height)) == grid
    assert 56 * 56 <= grid[0] * grid[1] * 14**2 <= 28 * 28 * 1280


def test_marks_become_parts_of_the_content():
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    marked = [{"role": "user", "content": "Is <image> like <image>?"}]
    assert content_parts(text, 2)[1]["content"] == [
        *[{"type": "image"}] * 2,
        {"type": "text", "text": "Which?"},
    ]
    assert [part["type"] for part in content_parts(marked, 2)[0]["content"]] == [
        *("text", "image", "text", "image", "text"),
    ]
    with pytest.raises(BadRow, match="1 pictures, but <image> stands 2 times"):
        content_parts(marked, 1)
    with pytest.raises(BadRow, match="no message of the user"):
        content_parts(text[:1], 1)


def test_a_text_that_spells_an_image_token_is_refused():
    with pytest.raises(BadRow, match="1 pictures, but the prompt has 2 image tokens"):
        widened([9, 3, 9], 9, [4])


@pytest.mark.skipif(not GEOMETRY.exists(), reason="needs ../shared")
def test_rows_of_geometry3k():
    import pyarrow.parquet as pq

    # EasyR1's limits give 320 tokens and more for these drawings.
    processor = Processor(262_144, 4_194_304, **MODEL)
    for row in pq.read_table(GEOMETRY).to_pylist():
        (found,) = pictures_of(row)
        assert 300 < processor.tokens(found) < 500
        assert processor(found)[0].shape[0] == 4 * processor.tokens(found)
        (message,) = content_parts([{"role": "user", "content": row["problem"]}], 1)
        assert sum(part["type"] == "image" for part in message["content"]) == 1


def test_paths_begin_in_the_folder_of_each_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, side in (("one", 56), ("two", 84)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        picture(side, side).save(folder / "a.png")
        row = {"problem": "<image>What?", "answer": "1", "images": ["a.png"]}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_rows("data/*/rows.jsonl")
    assert [pictures_of(row)[0].width for row in rows] == [56, 84]
    assert pictures_of(load_rows("data/two/rows.jsonl")[0])[0].width == 84
