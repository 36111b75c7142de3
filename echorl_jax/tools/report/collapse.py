"""Entropy collapse: how fast runs spend their entropy, such as with and without the echo loss."""

import dataclasses
from collections.abc import Sequence

from echorl_jax.tools.report.curves import bucket, smoothed, span_of
from echorl_jax.tools.report.headline import edges, number
from echorl_jax.tools.report.panels import Panel, Section, Series, rounded, run_colour
from echorl_jax.tools.report.runs import Run

KEY = "entropy/token_mean"


@dataclasses.dataclass(frozen=True)
class Collapse:
    """What became of a run's token entropy."""

    run: str
    start: float  # nats, mean of the first tenth of the steps
    end: float  # nats, mean of the last tenth
    kept: float  # end / start
    half_step: int | None  # first step whose running mean is at or below start / 2, if any
    last_step: int


def entropy_collapse(run: Run) -> Collapse | None:
    """Measures a run's loss of token entropy; None where it was not logged or starts at zero."""
    edge = edges(run, KEY)
    if edge is None or edge[0] <= 0:
        return None
    start, end = edge
    steps, values = run.series(KEY)
    below = (s for s, v in zip(steps, smoothed(values), strict=True) if v <= start / 2)
    return Collapse(run.name, start, end, end / start, next(below, None), steps[-1])


def collapse_rows(runs: Sequence[Run]) -> list[dict]:
    """One row per run that logged entropy, as written to JSONL."""
    found = (entropy_collapse(run) for run in runs)
    return [dataclasses.asdict(collapse) for collapse in found if collapse is not None]


def collapse_section(runs: Sequence[Run]) -> Section | None:
    """The report's section: entropy as a share of its start, one curve per run, and a table."""
    found = [(i, run, entropy_collapse(run)) for i, run in enumerate(runs)]
    found = [(i, run, collapse) for i, run, collapse in found if collapse is not None]
    if len(found) < 2:
        return None
    every_step = [step for _, run, _ in found for step in run.series(KEY)[0]]
    start, span = min(every_step), span_of(every_step)
    curves = [_kept(run, collapse, start, span) for _, run, collapse in found]
    grid = sorted({step for points in curves for step in points})
    series = [
        Series(run.name, [rounded(points.get(step)) for step in grid], run_colour(i))
        for (i, run, _), points in zip(found, curves, strict=True)
    ]
    table = [
        [
            c.run,
            number(c.start),
            number(c.end),
            f"{100 * c.kept:.0f}%",
            f"step {c.half_step:,}" if c.half_step is not None else "never",
        ]
        for _, _, c in found
    ]
    columns = ["Run", "Start, nats", "End, nats", "Kept", "Down to half"]
    panel = Panel("Entropy kept", grid, series, "Running mean over its start.", form="share")
    notes = (
        "How much of its token entropy each run kept. Start and end are means over a tenth of it.",
    )
    return Section("collapse", "Entropy collapse", [panel], notes, [(columns, table)])


def _kept(run: Run, collapse: Collapse, start: int, span: int) -> dict[int, float]:
    steps, values = run.series(KEY)
    points = bucket(steps, values, start=start, span=span)
    line = smoothed(list(points.values()))
    return {step: value / collapse.start for step, value in zip(points, line, strict=True)}
