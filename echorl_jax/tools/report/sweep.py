"""The results of a sweep: each run's outcome, means over seeds with intervals, a report section.

Runs of one setting differ only in their seeds. Two settings are compared run by run: the same seed
means the same prompts in the same order, the same first weights and the same evaluation draws, so
the paired difference has less noise than the difference of the means.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from echorl_jax.tools.report import curves
from echorl_jax.tools.report.curves import Form, Panel, Section, Series, on_grid
from echorl_jax.tools.report.headline import edges, eval_keys, number, share
from echorl_jax.tools.report.runs import Run, read_run

_CURVES: tuple[tuple[str, str, Form], ...] = (
    ("Reward", "reward/mean", "number"),
    ("Token entropy", "entropy/token_mean", "number"),
    ("All-right groups", "group/all_success_fraction", "share"),
    ("Regressed prompts", "group/regressed_fraction", "share"),
    ("Response length", "completion/length_mean", "count"),
)
# Step metrics of an outcome, with their columns.
_LATE: dict[str, tuple[str, Callable[[float], str]]] = {
    "entropy/token_mean": ("Entropy", number),
    "group/all_success_fraction": ("All right", share),
    "group/regressed_fraction": ("Regressed", share),
    "completion/length_mean": ("Tokens", number),
    "echo/clip_tokens_mean": ("Clip tokens", number),
    "echo/solved_weight": ("Weight on solved", number),
    "memory/peak_bytes": ("Peak memory", lambda size: f"{size / 1e9:.2f} GB"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of one run.

    ``before`` and ``after`` are the evaluations before the first step and after the last, by keys
    such as ``countdown/pass@1`` and ``countdown/steps_right/mean``; ``late`` holds step metrics,
    means over the last tenth of the steps; ``step_s`` is the mean time of a step (seconds).
    """

    setting: str
    seed: int
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    late: dict[str, float]
    step_s: float

    @property
    def main(self) -> str:
        """The evaluation that counts: pass@1 of the first data source."""
        return next(key for key in self.after if key.endswith("/pass@1"))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval, Student's t; the interval is None for one seed.

    ``p`` is that of the two-sided t-test of a mean of 0; 1 for one seed.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    p: float = 1.0

    def text(self, form: Callable[[float], str] = share) -> str:
        """Such as ``45.2% [44.0%, 46.4%]``."""
        if self.low is None or self.high is None:
            return form(self.mean)
        return f"{form(self.mean)} [{form(self.low)}, {form(self.high)}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values, at least one.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (2.0, -0.484, 4.484, 0.0742)
    """
    sample = np.asarray(values, np.float64)
    mean, count = float(sample.mean()), len(sample)
    if count < 2:
        return Estimate(mean, None, None, count)
    error = float(sample.std(ddof=1) / np.sqrt(count))
    half = float(stdtrit(count - 1, 0.975)) * error
    p = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, count, p)


def holm(p: Sequence[float]) -> list[float]:
    """P-values that hold for all of several comparisons together (Holm 1979).

    >>> [round(each, 3) for each in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def detectable(deviation: float, *, seeds: int, comparisons: int = 1, power: float = 0.8) -> float:
    """The smallest true mean difference that a paired t-test shows with this power.

    Two-sided at 5%, which several comparisons share equally (the strictest step of Holm's).

    Args:
      deviation: of the differences between paired runs.
      seeds: pairs, at least 2.
      comparisons: tests of one table.
      power: chance that the test shows a difference of that size.

    >>> round(detectable(1.0, seeds=8), 2)
    1.16
    """
    limit = float(stdtrit(seeds - 1, 1 - 0.025 / comparisons))
    # The non-centrality at which P(t <= limit) is 1 - power.
    shift = float(nctdtrinc(seeds - 1, 1 - power, limit))
    return shift * deviation / float(np.sqrt(seeds))


def read_outcome(workdir: Path, *, setting: str, seed: int, steps: int) -> Outcome | None:
    """The outcome of a run; None until it has finished and evaluated step ``steps``, its last."""
    run = read_run(workdir) if workdir.is_dir() else None
    if run is None or not run.metrics or run.metrics[-1]["step"] != steps:
        return None
    first, last, keys = run.metrics[0], run.metrics[-1], eval_keys(run)
    if not keys or keys[0] not in last:
        return None
    before, after = (
        {
            key.removeprefix("eval/"): value
            for key, value in row.items()
            if key.startswith("eval/") and key != "eval/failed"
        }
        for row in (first, last)
    )
    late = {key: at[1] for key in _LATE if (at := edges(run, key)) is not None}
    times = [
        sum(value for key, value in row.items() if key.startswith("time/")) for row in run.metrics
    ]
    step_s = sum(times) / max(1, run.steps_done)
    return Outcome(setting, seed, steps, before, after, late, step_s)


def paired(own: Sequence[Outcome], other: Sequence[Outcome], key: str) -> Estimate | None:
    """Mean difference of an evaluation over the seeds that both have; None where there is none."""
    before = {outcome.seed: outcome.after[key] for outcome in other if key in outcome.after}
    pairs = [o.after[key] - before[o.seed] for o in own if o.seed in before and key in o.after]
    return estimate(pairs) if pairs else None


def shares(outcomes: Sequence[Outcome], key: str) -> bool:
    """True if an evaluation is a share in every outcome, which is written as per cent."""
    return all(0 <= o.after.get(key, 0.0) <= 1 for o in outcomes)


def points(value: float) -> str:
    """A difference of shares in points, with its sign.

    >>> points(0.0123)
    '+1.2'
    """
    return f"{100 * value:+.1f}"


Table = tuple[list[str], list[list[str]]]


def sweep_tables(outcomes: Sequence[Outcome], against: Mapping[str, str]) -> list[Table]:
    """Evaluations, paired differences and training: each with a row of text per setting.

    Args:
      outcomes: of all finished runs.
      against: setting -> the setting it is compared with.
    """
    groups: dict[str, list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault(each.setting, []).append(each)
    keys = list(dict.fromkeys(key for each in outcomes for key in each.after))
    titles = [key.removesuffix("/mean") for key in keys]
    form = {key: share if shares(outcomes, key) else number for key in keys}
    rows = [
        [name, str(len(own)), *(_estimated([o.after for o in own], key, form[key]) for key in keys)]
        for name, own in groups.items()
    ]
    tables: list[Table] = [(["Setting", "Seeds", *titles], rows)]
    if compared := [name for name in groups if against.get(name) in groups]:
        tables.append(_differences(groups, {name: against[name] for name in compared}, keys))
    late = {key: entry for key, entry in _LATE.items() if any(key in o.late for o in outcomes)}
    columns = ["Setting", *(title for title, _ in late.values()), "Seconds a step"]
    training = [
        [
            name,
            *(_estimated([o.late for o in own], key, form) for key, (_, form) in late.items()),
            number(sum(o.step_s for o in own) / len(own)),
        ]
        for name, own in groups.items()
    ]
    return [*tables, (columns, training)]


def _estimated(
    values: Sequence[Mapping[str, float]], key: str, form: Callable[[float], str]
) -> str:
    known = [each[key] for each in values if key in each]
    return estimate(known).text(form) if known else "–"


def _differences(
    groups: Mapping[str, Sequence[Outcome]], against: Mapping[str, str], keys: Sequence[str]
) -> Table:
    """Each column is a family of comparisons of its own for Holm's correction."""
    found = {
        key: [paired(groups[name], groups[other], key) for name, other in against.items()]
        for key in keys
    }
    cells: dict[str, list[str]] = {}
    everyone = [outcome for own in groups.values() for outcome in own]
    for key, column in found.items():
        corrected = iter(holm([each.p for each in column if each is not None]))
        form = points if shares(everyone, key) else number
        cells[key] = [
            "–" if each is None else f"{each.text(form)}, p {next(corrected):.2g}"
            for each in column
        ]
    rows = []
    for place, (name, other) in enumerate(against.items()):
        main = found[groups[name][0].main][place]
        pairs = str(main.seeds) if main else "0"
        rows.append([name, other, pairs, *(cells[key][place] for key in keys)])
    titles = [key.removesuffix("/mean") for key in keys]
    return ["Setting", "Compared with", "Pairs", *titles], rows


def sweep_section(
    outcomes: Sequence[Outcome], against: Mapping[str, str], runs: Mapping[str, Sequence[Run]]
) -> Section:
    """The report's section: the tables, and curves of each setting's mean over seeds.

    Args:
      outcomes, against: as in :func:`sweep_tables`.
      runs: setting -> its finished runs.
    """
    first = outcomes[0]
    before = share(estimate([o.before.get(first.main, 0.0) for o in outcomes]).mean)
    notes = (
        f"Evaluations on held-out problems after {first.steps:,} steps ({first.main} {before} "
        "before). Brackets: 95% intervals over seeds (Student's t). Differences are means, in "
        "points, over runs of the same seed; p is of the paired t-test, corrected by Holm's method "
        "for the comparisons of its column. Other columns: mean of the last tenth of the steps.",
        "Curves are means over seeds, bands from the lowest to the highest seed.",
    )
    held_out = list(
        dict.fromkeys(key for group in runs.values() for r in group for key in r.keys())
    )
    named: list[tuple[str, str, Form]] = [
        (key.removeprefix("eval/"), key, "share")
        for key in held_out
        if key.startswith("eval/") and key != "eval/failed"
    ]
    panels = [_panel(title, key, form, runs) for title, key, form in (*named, *_CURVES)]
    drawn = [panel for panel in panels if panel.x]
    return Section("sweep", "Settings compared", drawn, notes, sweep_tables(outcomes, against))


def _panel(title: str, key: str, form: Form, runs: Mapping[str, Sequence[Run]]) -> Panel:
    logged = [run.series(key) for group in runs.values() for run in group]
    grid, points = curves.averaged(*logged)
    lines = iter(map(curves.smoothed, points))
    series = []
    for i, (setting, group) in enumerate(runs.items()):
        own = [next(lines) for _ in group]
        at = {step: [line[step] for line in own if step in line] for step in grid}
        mean, low, high = (
            on_grid(grid, {step: summary(values) for step, values in at.items() if values})
            for summary in (lambda values: sum(values) / len(values), min, max)
        )
        colour = curves.run_colour(i)
        series.append(Series(setting, mean, colour, i // curves.RUN_COLOURS, low=low, high=high))
    return Panel(title, grid, series, "Running mean.", form)
