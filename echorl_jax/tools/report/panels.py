"""What a section of the report is made of: panels with series, tables and notes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

Form = Literal["number", "share", "count", "bytes", "seconds"]
Numbers = Sequence[float | None]
RUN_COLOURS = 6


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve, cloud of dots, set of bars or stacked area over the panel's ``x``.

    ``colour`` names a CSS variable of the page. ``raw`` is drawn thinly behind a smoothed curve,
    ``low`` and ``high`` bound a band.
    """

    label: str
    y: Numbers
    colour: str = "run-0"
    dash: int = 0
    paint: Literal["line", "line+dots", "dots", "bars", "area"] = "line"
    raw: Numbers | None = None
    low: Numbers | None = None
    high: Numbers | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart. Those over training steps (``x_name`` "step") share one cursor.

    Areas are stacked, the last series at the bottom.
    """

    title: str
    x: Sequence[float]
    series: Sequence[Series]
    note: str = ""
    form: Form = "number"
    x_name: str = "step"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. A table is ``(column titles, rows of text)``."""

    id: str
    title: str
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    folded: bool = False  # drawn only once the reader opens it

    def payload(self) -> dict[str, Any]:
        """The part that the page's scripts draw."""
        return {"panels": [dataclasses.asdict(panel) for panel in self.panels]}


def run_colour(number: int) -> str:
    """The CSS variable of the n-th run."""
    return f"run-{number % RUN_COLOURS}"


def rounded(value: float | None) -> float | None:
    """A number with five digits, so that the page stays small; None stays None."""
    return None if value is None else float(f"{value:.5g}")
