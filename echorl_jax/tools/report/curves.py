"""Turns logged metrics into the sections of the report: panels with series, tables and notes.

Long runs are averaged over equal spans of steps, all runs on one grid, so that 10,000 steps draw as
fast as 100 and overlaid runs stay comparable.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from echorl_jax.tools.report.runs import Run

Form = Literal["number", "share", "count", "bytes", "seconds"]
Numbers = Sequence[float | None]
RUN_COLOURS = 6
# Points that a curve is averaged down to, and the share of them in one smoothed point.
MAX_POINTS = 400
SMOOTHING = 0.06


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


@dataclasses.dataclass(frozen=True)
class Curve:
    """A panel over training steps. ``keys`` are metrics, split at spaces; ``*`` is any text."""

    title: str
    keys: str
    note: str = ""
    form: Form = "number"
    smooth: bool = True


SECTIONS: dict[str, Sequence[Curve]] = {
    "Learning": [
        Curve(
            "Held-out success", "eval/*/pass@1", "On problems kept out of training.", "share", False
        ),
        Curve("Reward", "reward/mean", "Mean reward of the rollouts sampled in a step."),
        Curve(
            "Held-out metrics", "eval/*/mean", "The grader's, means over attempts.", smooth=False
        ),
        Curve("Metrics in training", "reward/*/mean", "The grader's; no reward sees them."),
        Curve("Custom metrics", "custom/*", "Those of log.metrics."),
        Curve("Supervised loss", "loss/nll", "On demonstrations or hints, in nats."),
        Curve(
            "Success in training", "reward/correct", "Share of right rollouts in a step.", "share"
        ),
    ],
    "Signal": [
        Curve(
            "All-right groups", "group/all_success_fraction", "No advantage, yet a clip.", "share"
        ),
        Curve(
            "All-wrong groups", "group/all_failure_fraction", "No advantage and no clip.", "share"
        ),
        Curve(
            "Collapsed groups",
            "group/collapsed_fraction",
            "All judged rewards are equal: no advantage.",
            "share",
        ),
        Curve(
            "Weight on solved prompts",
            "echo/solved_weight",
            "Summed |weight| of a solved prompt's tokens in policy and echo loss.",
        ),
        Curve(
            "Regressed prompts",
            "group/regressed_fraction",
            "Solved at the last visit, but not at this one.",
            "share",
        ),
        Curve(
            "Retired prompts",
            "data/retired_fraction",
            "Share of the training data.",
            "share",
            False,
        ),
        Curve("EchoClips", "echo/clips", "Prompts of a step that gave a clip.", "count"),
        Curve("Refused clips", "echo/refused", "Not above the entropy threshold.", "count"),
        Curve("Clip length", "echo/clip_tokens_mean", "Mean tokens of a clip.", "count"),
        Curve("Echo loss", "loss/echo", "Negative log-likelihood per clip token, in nats."),
        Curve(
            "Rows skipped", "train/rows_skipped_fraction", "Rollouts without a gradient.", "share"
        ),
    ],
    "Policy": [
        Curve("Token entropy", "entropy/token_mean", "In nats. A fall to zero is a collapse."),
        Curve(
            "Entropy of the echoed steps",
            "echo/step_entropy_mean",
            "Mean entropy of the steps that end the clips, in nats.",
        ),
        Curve(
            "Covariance", "entropy/covariance", "Of logprob and advantage. Above 0, entropy falls."
        ),
        Curve("Response length", "completion/length_mean", "Mean tokens of a rollout.", "count"),
        Curve(
            "Truncated", "completion/truncated_fraction", "Cut off at the length limit.", "share"
        ),
        Curve("KL to the reference", "kl/ref", "Mean over tokens, in nats."),
        Curve(
            "Clipped ratios",
            "ratio/clip_fraction ratio/masked_fraction",
            "Tokens outside the clip range, and those that corrections leave out.",
            "share",
        ),
    ],
    "Cost": [
        Curve(
            "Throughput",
            "rollout/tokens_per_second train/tokens_per_second",
            "Tokens per second while sampling and while updating.",
            "count",
        ),
        Curve(
            "Time per step",
            "time/rollout_s time/update_s time/grade_s",
            "Of each phase.",
            "seconds",
        ),
        Curve("Memory", "memory/peak_bytes", "Peak use of a device so far.", "bytes"),
    ],
}


def build_sections(runs: Sequence[Run]) -> list[Section]:
    """Every section of curves that has data.

    The section "Signal" begins with the shares of mixed, all-right and all-wrong groups, one panel
    per run. The last section is folded: panels that are zero throughout, such as the KL of a run
    without reference, and metrics that no other panel shows. Every logged metric is on the page.
    """
    sections, claimed, flat = [], set(), []
    for title, curves in SECTIONS.items():
        panels = [_group_shares(run, len(runs) > 1) for run in runs] if title == "Signal" else []
        for curve in curves:
            keys = _matching(runs, curve.keys.split())
            claimed.update(keys)
            panels.append(_panel(curve, keys, runs))
        drawn = [panel for panel in panels if panel is not None]
        flat += [panel for panel in drawn if not _moves(panel)]
        sections.append(Section(title.lower(), title, [p for p in drawn if _moves(p)]))
    rest = sorted({key for run in runs for key in run.keys()} - claimed)
    others = [_panel(Curve(key, key), [key], runs) for key in rest]
    folded = [*flat, *(panel for panel in others if panel is not None)]
    sections.append(Section("more", "Other metrics", folded, folded=True))
    return [section for section in sections if section.panels]


def run_colour(number: int) -> str:
    """The CSS variable of the n-th run."""
    return f"run-{number % RUN_COLOURS}"


def rounded(value: float | None) -> float | None:
    """A number with five digits, to keep the page small; None stays None."""
    return None if value is None else float(f"{value:.5g}")


def on_grid(grid: Iterable[int], points: Mapping[int, float]) -> list[float | None]:
    """The rounded values of a curve at the steps of a grid, None where it has no point."""
    return [rounded(points.get(step)) for step in grid]


def thinned_steps(runs: Sequence[Run]) -> int:
    """Steps that one drawn point stands for: 1 unless a run is longer than ``MAX_POINTS``."""
    return span_of([int(row["step"]) for run in runs for row in run.metrics])


def span_of(steps: Sequence[int]) -> int:
    """Width of the equal spans that cut a range of steps into at most ``MAX_POINTS``.

    >>> span_of([0, 1, 2]), span_of([0, 9_999])
    (1, 25)
    """
    return -(-(max(steps) - min(steps) + 1) // MAX_POINTS) if steps else 1


def averaged(
    *curves: tuple[Sequence[int], Sequence[float]],
) -> tuple[list[int], list[dict[int, float]]]:
    """Averages curves of ``(steps, values)`` over spans of steps that are the same for all.

    Returns:
      The middle steps of all spans that have a value, and ``{middle step: mean}`` of each curve.

    >>> averaged(([0, 1, 2, 3], [1.0, 3.0, 5.0, 9.0]))
    ([0, 1, 2, 3], [{0: 1.0, 1: 3.0, 2: 5.0, 3: 9.0}])
    """
    every_step = [step for steps, _ in curves for step in steps]
    start, span = min(every_step, default=0), span_of(every_step)
    lines = []
    for steps, values in curves:
        spans: dict[int, list[float]] = {}
        for step, value in zip(steps, values, strict=True):
            middle = start + (step - start) // span * span + (span - 1) // 2
            spans.setdefault(middle, []).append(value)
        lines.append({middle: sum(found) / len(found) for middle, found in spans.items()})
    return sorted(set().union(*lines)), lines


def smoothed(points: Mapping[int, float]) -> dict[int, float]:
    """The running mean that the report draws; the points themselves where they are few."""
    width = int(len(points) * SMOOTHING) | 1
    values = list(points.values())
    means = rolling_mean(values, width=width) if width > 1 else values
    return dict(zip(points, means, strict=True))


def rolling_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Centred mean over ``width`` points, over fewer at the ends.

    >>> rolling_mean([0.0, 3.0, 6.0, 9.0], width=3)
    [1.5, 3.0, 6.0, 7.5]
    """
    place = np.arange(len(values))
    low = np.maximum(place - width // 2, 0)
    high = np.minimum(place + width // 2 + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def _moves(panel: Panel) -> bool:
    return any(value for series in panel.series for value in series.y)


def _matching(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    return list(
        dict.fromkeys(
            key
            for run in runs
            for pattern in patterns
            for key in fnmatch.filter(run.keys(), pattern)
        )
    )


def _panel(curve: Curve, keys: Sequence[str], runs: Sequence[Run]) -> Panel | None:
    logged = [(number, key, run.series(key)) for number, run in enumerate(runs) for key in keys]
    logged = [entry for entry in logged if entry[2][0]]
    if not logged:
        return None
    grid, lines = averaged(*(columns for _, _, columns in logged))
    series = []
    for (number, key, _), line in zip(logged, lines, strict=True):
        drawn = smoothed(line) if curve.smooth else line
        names = [runs[number].name] if len(runs) > 1 else []
        names += [_short(key)] if len(keys) > 1 else []
        series.append(
            Series(
                " · ".join(names),
                on_grid(grid, drawn),
                run_colour(number),
                dash=keys.index(key),
                paint="line" if curve.smooth and len(line) > 1 else "line+dots",
                raw=on_grid(grid, line) if drawn != line else None,
            )
        )
    return Panel(curve.title, grid, series, curve.note, curve.form)


def _group_shares(run: Run, named: bool) -> Panel | None:
    """The shares of all-right, mixed and all-wrong groups as stacked areas."""
    keys = ("group/all_success_fraction", "group/all_failure_fraction")
    rows = [row for row in run.metrics if all(key in row for key in keys)]
    if not rows:
        return None
    right, wrong = ([row[key] for row in rows] for key in keys)
    mixed = [max(0.0, 1.0 - r - w) for r, w in zip(right, wrong, strict=True)]
    steps = [int(row["step"]) for row in rows]
    grid, lines = averaged(*((steps, values) for values in (right, mixed, wrong)))
    names = (("all right", "right"), ("mixed", "mixed"), ("all wrong", "wrong"))
    series = [
        Series(label, on_grid(grid, smoothed(line)), colour, paint="area")
        for (label, colour), line in zip(names, lines, strict=True)
    ]
    title = f"Outcomes of groups: {run.name}" if named else "Outcomes of groups"
    note = "Only mixed groups give an advantage. All-right groups give an EchoClip."
    return Panel(title, grid, series, note, "share")


def _short(key: str) -> str:
    """The part of a key that tells it from the others of its panel.

    >>> _short("eval/aime/pass@1"), _short("rollout/tokens_per_second"), _short("time/grade_s")
    ('aime', 'rollout', 'grade')
    >>> _short("eval/aime/steps/mean"), _short("reward/steps/mean")
    ('aime/steps', 'steps')
    """
    first, last = key.split("/")[0], key.split("/")[-1]
    if first == "eval":
        return key.removeprefix("eval/").rsplit("/", 1)[0]
    if last == "mean":
        return key.split("/")[1]
    return first if last == "tokens_per_second" else last.removesuffix("_s")
