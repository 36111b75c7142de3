"""Pictures of rows: every form that public files have, damage, marks, and patches by hand."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from echorl_jax.data import load_rows
from echorl_jax.data.pictures import Processor, content_parts, located, pictures_of, widened
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
        image,
    ]
    for entry in entries:
        for given in ([entry], entry) if not isinstance(entry, str) else ([entry],):
            (found,) = pictures_of({"images": located({"images": given}, tmp_path)})
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    assert len(located({"images": entries}, tmp_path)) == len(entries)
    assert len(located({"image": entries[3]}, tmp_path)) == 1
    assert pictures_of({"images": None}) == pictures_of({}) == pictures_of({"images": []}) == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (b"\x89PNG\r\n\x1a\nshort", "picture 2 cannot be read"),
        (b"", "picture 2 cannot be read"),
        ("missing.png", "picture 2 cannot be read"),
        ({"bytes": None, "path": None}, "picture 2 cannot be read"),
        (7, "picture 2 cannot be read"),
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
