"""Turns logged metrics into the sections of the report: panels with series, tables and notes.

Long runs are averaged over equal spans of steps, all runs on one grid, so that 10,000 steps draw as
fast as 100 and overlaid runs stay comparable.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from echorl_jax.tools.report.runs import Run

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


# Points a curve is averaged down to, and the share of a curve that a smoothed point looks at.
MAX_POINTS = 400
SMOOTHING = 0.06


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one panel shows: metric keys (``*`` stands for any text), and how to read it."""

    title: str
    keys: tuple[str, ...]
    note: str
    form: Form = "number"
    smooth: bool = True


SECTIONS: tuple[tuple[str, tuple[Curve, ...]], ...] = (
    (
        "Learning",
        (
            Curve(
                "Held-out success",
                ("eval/*/pass@1",),
                "Share of right answers on problems kept out of training.",
                "share",
                smooth=False,
            ),
            Curve("Reward", ("reward/mean",), "Mean reward of the rollouts sampled in a step."),
            Curve("Supervised loss", ("loss/nll",), "On demonstrations or hints, in nats."),
            Curve(
                "Success in training",
                ("reward/correct",),
                "Share of right answers among the rollouts of a step.",
                "share",
            ),
        ),
    ),
    (
        "Signal",
        (
            Curve(
                "All-right groups",
                ("group/all_success_fraction",),
                "Every rollout right: no advantage, yet an EchoClip.",
                "share",
            ),
            Curve(
                "All-wrong groups",
                ("group/all_failure_fraction",),
                "Every rollout wrong: neither an advantage nor a clip.",
                "share",
            ),
            Curve("EchoClips", ("echo/clips",), "Prompts of a step that gave a clip.", "count"),
            Curve(
                "Clip length",
                ("echo/clip_tokens_mean",),
                "Mean length of the clips, in tokens.",
                "count",
            ),
            Curve("Echo loss", ("loss/echo",), "Negative log-likelihood per clip token, in nats."),
            Curve(
                "Rows skipped",
                ("train/rows_skipped_fraction",),
                "Rollouts with nothing to add to the gradient, left out of the update.",
                "share",
            ),
        ),
    ),
    (
        "Policy",
        (
            Curve(
                "Token entropy",
                ("entropy/token_mean",),
                "Mean over the sampled tokens, in nats. A fall to zero is entropy collapse.",
            ),
            Curve(
                "Entropy of the echoed steps",
                ("echo/step_entropy_mean",),
                "Mean entropy of the steps that end the clips, in nats.",
            ),
            Curve(
                "Covariance",
                ("entropy/covariance",),
                "Of log-probability and advantage; what is above zero drives entropy down.",
            ),
            Curve(
                "Response length",
                ("completion/length_mean",),
                "Mean length of a rollout, in tokens.",
                "count",
            ),
            Curve(
                "Truncated",
                ("completion/truncated_fraction",),
                "Rollouts cut off at the length limit.",
                "share",
            ),
            Curve("KL to the reference", ("kl/ref",), "Mean over tokens, in nats."),
            Curve(
                "Clipped ratios",
                ("ratio/clip_fraction",),
                "Tokens whose ratio to the old policy left the clip range.",
                "share",
            ),
        ),
    ),
    (
        "Cost",
        (
            Curve(
                "Throughput",
                ("rollout/tokens_per_second", "train/tokens_per_second"),
                "Tokens per second while sampling and while updating.",
                "count",
            ),
            Curve(
                "Time per step",
                ("time/rollout_s", "time/update_s", "time/grade_s"),
                "Seconds in each part of a step.",
                "seconds",
            ),
            Curve("Memory", ("memory/peak_bytes",), "Peak use of a device so far.", "bytes"),
        ),
    ),
)


def build_sections(runs: Sequence[Run]) -> list[Section]:
    """Every section of curves that has data.

    One stack per run with the shares of mixed, all-right and all-wrong groups opens the section
    "Signal". Panels of nothing but zeros, such as the KL of a run without reference, and metrics
    that no panel claims come last, folded, so that nothing logged is hidden.
    """
    sections, claimed, flat = [], set(), []
    for title, curves in SECTIONS:
        stacks = [_stack(run, len(runs) > 1) for run in runs] if title == "Signal" else []
        panels = [p for p in (*stacks, *(_panel(c, runs) for c in curves)) if p is not None]
        claimed |= {key for curve in curves for run in runs for key in _matching(run, curve.keys)}
        flat += [panel for panel in panels if not _moves(panel)]
        sections.append(Section(title.lower(), title, [p for p in panels if _moves(p)]))
    rest = sorted({key for run in runs for key in run.keys()} - claimed)
    others = [_panel(Curve(key, (key,), ""), runs) for key in rest]
    others = [*flat, *(panel for panel in others if panel is not None)]
    sections.append(Section("more", "Other metrics", others, folded=True))
    return [section for section in sections if section.panels]


def thinned_steps(runs: Sequence[Run]) -> int:
    """Steps that one drawn point stands for: 1 unless a run is longer than ``MAX_POINTS``."""
    return span_of([int(row["step"]) for run in runs for row in run.metrics])


def span_of(steps: Sequence[int]) -> int:
    """Width of the equal spans that cut a range of steps into at most ``MAX_POINTS``.

    >>> span_of([0, 1, 2]), span_of([0, 9_999])
    (1, 25)
    """
    return -(-(max(steps) - min(steps) + 1) // MAX_POINTS) if steps else 1


def bucket(
    steps: Sequence[int], values: Sequence[float], *, start: int, span: int
) -> dict[int, float]:
    """Averages values over spans of steps; a span is named after its middle step.

    >>> bucket([0, 1, 2, 3], [1.0, 3.0, 5.0, 9.0], start=0, span=2)
    {0: 2.0, 2: 7.0}
    """
    sums: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        middle = start + (step - start) // span * span + (span - 1) // 2
        total = sums.setdefault(middle, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    return {step: total / count for step, (total, count) in sums.items()}


def rolling_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Centred mean over ``width`` points, over fewer at the ends.

    >>> rolling_mean([0.0, 3.0, 6.0, 9.0], width=3)
    [1.5, 3.0, 6.0, 7.5]
    """
    half = width // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean that the report draws; the values themselves where they are few."""
    width = int(len(values) * SMOOTHING) | 1
    return rolling_mean(values, width=width) if width > 1 else list(values)


def _moves(panel: Panel) -> bool:
    return any(value for series in panel.series for value in series.y)


def _matching(run: Run, patterns: Sequence[str]) -> list[str]:
    regexes = [re.compile(re.escape(p).replace(r"\*", "(.+)")) for p in patterns]
    return [key for regex in regexes for key in run.keys() if regex.fullmatch(key)]


def _panel(curve: Curve, runs: Sequence[Run]) -> Panel | None:
    keys = list(dict.fromkeys(key for run in runs for key in _matching(run, curve.keys)))
    logged = [(number, key, *run.series(key)) for number, run in enumerate(runs) for key in keys]
    logged = [entry for entry in logged if entry[2]]
    if not logged:
        return None
    every_step = [step for _, _, steps, _ in logged for step in steps]
    start, span = min(every_step), span_of(every_step)
    points = [bucket(steps, values, start=start, span=span) for _, _, steps, values in logged]
    grid = sorted({step for p in points for step in p})
    series = [
        _series(curve, p, grid, number, _label(runs, number, key, keys), keys.index(key))
        for (number, key, *_), p in zip(logged, points, strict=True)
    ]
    return Panel(curve.title, grid, series, note=curve.note, form=curve.form)


def _series(
    curve: Curve, points: dict[int, float], grid: list[int], run: int, label: str, dash: int
) -> Series:
    values = list(points.values())
    line = smoothed(values) if curve.smooth else values
    by_step = dict(zip(points, line, strict=True))
    return Series(
        label=label,
        y=[rounded(by_step.get(step)) for step in grid],
        colour=run_colour(run),
        dash=dash,
        paint="line" if curve.smooth and len(values) > 1 else "line+dots",
        raw=[rounded(points.get(step)) for step in grid] if line != values else None,
    )


def _stack(run: Run, named: bool) -> Panel | None:
    right_key, wrong_key = "group/all_success_fraction", "group/all_failure_fraction"
    rows = [row for row in run.metrics if right_key in row and wrong_key in row]
    if not rows:
        return None
    steps = [int(row["step"]) for row in rows]
    right = [row[right_key] for row in rows]
    wrong = [row[wrong_key] for row in rows]
    mixed = [max(0.0, 1.0 - r - w) for r, w in zip(right, wrong, strict=True)]
    start, span = min(steps), span_of(steps)
    parts = (
        ("all right", right, "right"),
        ("mixed", mixed, "mixed"),
        ("all wrong", wrong, "wrong"),
    )
    points = {name: bucket(steps, values, start=start, span=span) for name, values, _ in parts}
    series = [
        Series(
            label,
            [rounded(v) for v in smoothed(list(points[label].values()))],
            colour,
            paint="area",
        )
        for label, _, colour in parts
    ]
    note = "Only mixed groups give an advantage. All-right groups teach through their clip."
    title = f"What the groups were: {run.name}" if named else "What the groups were"
    return Panel(title, list(points["mixed"]), series, note=note, form="share")


def _label(runs: Sequence[Run], number: int, key: str, keys: Sequence[str]) -> str:
    names = [runs[number].name] if len(runs) > 1 else []
    return " · ".join(names + ([_short(key)] if len(keys) > 1 else []))


def _short(key: str) -> str:
    """The part of a key that tells it from the others of its panel.

    >>> _short("eval/aime/pass@1"), _short("rollout/tokens_per_second"), _short("time/grade_s")
    ('aime', 'rollout', 'grade')
    """
    first, last = key.split("/")[0], key.split("/")[-1]
    if first == "eval":
        return key.removeprefix("eval/").rsplit("/", 1)[0]
    return first if last == "tokens_per_second" else last.removesuffix("_s")
