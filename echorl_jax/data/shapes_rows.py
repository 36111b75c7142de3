"""Shapes, a task with pictures that needs no download: "How many squares are there?"

A picture is a grid whose cells are empty or hold a circle, a square or a triangle in one of three
colours. Without the picture the answer can only be guessed. Rows are made when they are read, see
generated.py; a problem is held out by its picture and question.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from echorl_jax.data.generated import (
    MAX_DRAWS,
    Draw,
    GeneratedRows,
    check_options,
    is_held_out,
    parse_options,
    require,
)
from echorl_jax.data.pictures import MARK, require_pillow
from echorl_jax.data.rows import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FORMS = ("circle", "square", "triangle")
COLOURS = {"red": (220, 40, 40), "green": (30, 150, 60), "blue": (40, 70, 220)}
# The task's share of a cell's side that the smallest and the largest shape take, in percent.
SMALLEST, LARGEST = 35, 85
MOST_CELLS = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape in a cell."""

    row: int
    column: int
    form: str
    colour: str
    size: int  # percent of the cell's side


@dataclasses.dataclass(frozen=True)
class ShapesProblem:
    """A picture, a question about it, and the lines of a solution; the last one is the answer."""

    shapes: tuple[Shape, ...]
    question: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """Tells this problem from others."""
        return f"{self.question} {self.shapes}"


@dataclasses.dataclass(frozen=True)
class ShapesRows(GeneratedRows):
    """Generated rows in verl's columns with a picture, read like a list.

    Each row's ``target`` is one assistant message: what is seen, line by line, then the answer.

    Raises:
      DataError: an option out of its range.
      UserError: (on reading) Pillow is not installed.
    """

    # The question: how many of a form there are, which of two forms there are more of, the colour
    # of the largest shape, or any of these.
    ask: Literal["count", "compare", "largest", "any"] = "any"
    # Cells along each side, and pixels of a cell.
    cells: int = 3
    cell_pixels: int = 28
    # The share of cells that hold a shape, in percent.
    filled: int = 60
    # A picture without shapes for every row, which leaves only guessing.
    blank: Literal["no", "yes"] = "no"
    # Name of the data source: evaluations are scored apart by it.
    name: str = "shapes"
    # Rows.
    count: int = 8192
    seed: int = 0
    # Which problems occur: those for training, the held-out ones, or both.
    split: Literal["train", "eval", "all"] = "train"

    def __post_init__(self) -> None:
        check_options("shapes", self, positive=("cells", "count"), pairs=())
        for name, low, high in (
            ("cells", 2, MOST_CELLS),
            ("cell_pixels", 8, 256),
            ("filled", 1, 100),
        ):
            value = getattr(self, name)
            require(low <= value <= high, "shapes", f"{name}={value}: from {low} to {high}")

    def row(self, index: int) -> dict[str, Any]:
        problem = self.problem(index)
        shown = () if self.blank == "yes" else problem.shapes
        return {
            "data_source": self.name,
            "prompt": [{"role": "user", "content": f"{MARK}{problem.question}"}],
            "images": [draw_shapes(shown, cells=self.cells, cell_pixels=self.cell_pixels)],
            "target": [{"role": "assistant", "content": "\n".join(problem.lines)}],
            "reward_model": {"style": "rule", "ground_truth": {"last_line": problem.lines[-1]}},
            "extra_info": {"index": index, "split": self.split, "seed": self.seed},
        }

    def problem(self, index: int) -> ShapesProblem:
        """The problem behind row ``index``."""
        draw = Draw(self.seed, index)
        asked = ("count", "compare", "largest")
        ask = asked[draw.between(0, 2)] if self.ask == "any" else self.ask
        for _ in range(MAX_DRAWS):
            shapes = self._shapes(draw, one_largest=ask == "largest")
            problem = {"count": _count, "compare": _compare, "largest": _largest}[ask](shapes, draw)
            if problem is not None and self._in_split(problem):
                return problem
        raise DataError(f"shapes: no problem found for {self}: widen the ranges")

    def _in_split(self, problem: ShapesProblem) -> bool:
        return self.split == "all" or (self.split == "eval") == is_held_out(problem.text)

    def _shapes(self, draw: Draw, *, one_largest: bool) -> tuple[Shape, ...]:
        most = (SMALLEST + LARGEST) // 2 if one_largest else LARGEST
        found = [
            Shape(
                row,
                column,
                FORMS[draw.between(0, len(FORMS) - 1)],
                list(COLOURS)[draw.between(0, len(COLOURS) - 1)],
                draw.between(SMALLEST, most),
            )
            for row in range(self.cells)
            for column in range(self.cells)
            if draw.between(1, 100) <= self.filled
        ]
        if one_largest and found:
            place = draw.between(0, len(found) - 1)
            found[place] = dataclasses.replace(found[place], size=LARGEST)
        return tuple(found)


def _count(shapes: tuple[Shape, ...], draw: Draw) -> ShapesProblem | None:
    form = FORMS[draw.between(0, len(FORMS) - 1)]
    rows = range(1 + max((shape.row for shape in shapes), default=0))
    counts = [sum(s.form == form and s.row == row for s in shapes) for row in rows]
    lines = [f"row {row + 1}: {count}" for row, count in enumerate(counts)]
    return ShapesProblem(shapes, f"How many {form}s are there?", (*lines, str(sum(counts))))


def _compare(shapes: tuple[Shape, ...], draw: Draw) -> ShapesProblem | None:
    """Which of two forms there are more of; None where there are as many of both."""
    left_out = draw.between(0, len(FORMS) - 1)
    first, second = (form for place, form in enumerate(FORMS) if place != left_out)
    counts = {form: sum(shape.form == form for shape in shapes) for form in (first, second)}
    if counts[first] == counts[second]:
        return None
    lines = [f"{form}s: {count}" for form, count in counts.items()]
    more = max(counts, key=lambda form: counts[form])
    question = f"Are there more {first}s or {second}s?"
    return ShapesProblem(shapes, question, (*lines, f"{more}s"))


def _largest(shapes: tuple[Shape, ...], draw: Draw) -> ShapesProblem | None:
    if not shapes:
        return None
    largest = max(shapes, key=lambda shape: shape.size)
    place = f"row {largest.row + 1}, column {largest.column + 1}"
    return ShapesProblem(
        shapes, "Which colour is the largest shape?", (place, largest.form, largest.colour)
    )


def draw_shapes(shapes: tuple[Shape, ...], *, cells: int, cell_pixels: int) -> "Picture":
    """The picture: shapes on white, each in the middle of its cell."""
    pillow = require_pillow()
    from PIL import ImageDraw

    side = cells * cell_pixels
    picture = pillow.new("RGB", (side, side), (255, 255, 255))
    canvas = ImageDraw.Draw(picture)
    for shape in shapes:
        half = shape.size * cell_pixels / 200
        x, y = ((place + 0.5) * cell_pixels for place in (shape.column, shape.row))
        box, colour = (x - half, y - half, x + half, y + half), COLOURS[shape.colour]
        if shape.form == "circle":
            canvas.ellipse(box, fill=colour)
        elif shape.form == "square":
            canvas.rectangle(box, fill=colour)
        else:
            corners = [(x, y - half), (x - half, y + half), (x + half, y + half)]
            canvas.polygon(corners, fill=colour)
    return picture


def parse_shapes(options: str) -> ShapesRows:
    """Reads the part of a spec after ``shapes:``, ``key=value`` pairs joined by ``&``.

    Raises:
      DataError: an unknown key, or a value that is not of its type or range.

    >>> parse_shapes("ask=count&cells=4").cells
    4
    """
    return parse_options(ShapesRows, "shapes", options)
