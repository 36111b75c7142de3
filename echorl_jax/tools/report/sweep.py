"""The results of a sweep: each run's outcome, means over seeds with intervals, a report section.

Runs of one setting differ only in their seeds. Two settings are compared run by run: the same seed
means the same prompts in the same order, the same first weights and the same evaluation draws, so
the paired difference has less noise than the difference of the means.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from echorl_jax.tools.report import curves
from echorl_jax.tools.report.curves import Form, Panel, Section, Series, on_grid
from echorl_jax.tools.report.headline import edges, eval_keys, number, share
from echorl_jax.tools.report.runs import Run, read_run

_CURVES: tuple[tuple[str, str, Form], ...] = (
    ("Reward", "reward/mean", "number"),
    ("Token entropy", "entropy/token_mean", "number"),
    ("All-right groups", "group/all_success_fraction", "share"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of one run: evaluations, and means over the last tenth of its steps."""

    setting: str
    seed: int
    steps: int
    before: float  # pass@1 on held-out problems before the first step
    pass_1: float  # after the last
    pass_k: float  # pass@k after the last, k the samples per problem
    k: int
    entropy: float  # nats
    all_right: float  # share of groups
    clips: float  # of a step
    clip_tokens: float
    tokens: float  # of a completion

    @property
    def clip_share(self) -> float:
        """Mean clip length over mean completion length."""
        return self.clip_tokens / self.tokens if self.tokens else 0.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval, Student's t; the interval is None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def text(self, form: Callable[[float], str] = share) -> str:
        """Such as ``45.2% [44.0%, 46.4%]``."""
        if self.low is None or self.high is None:
            return form(self.mean)
        return f"{form(self.mean)} [{form(self.low)}, {form(self.high)}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values, at least one.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    sample = np.asarray(values, np.float64)
    mean, count = float(sample.mean()), len(sample)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = float(stdtrit(count - 1, 0.975) * sample.std(ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def read_outcome(workdir: Path, *, setting: str, seed: int, steps: int) -> Outcome | None:
    """The outcome of a run; None until it has finished and evaluated step ``steps``, its last."""
    run = read_run(workdir) if workdir.is_dir() else None
    if run is None or not run.metrics or run.metrics[-1]["step"] != steps:
        return None
    last, keys = run.metrics[-1], eval_keys(run)
    if not keys or keys[0] not in last:
        return None
    source = keys[0].removesuffix("1")
    k = max(int(key.removeprefix(source)) for key in last if key.startswith(source))
    at_end = {
        field: (edges(run, key) or (0.0, 0.0))[1]
        for field, key in {
            "entropy": "entropy/token_mean",
            "all_right": "group/all_success_fraction",
            "clips": "echo/clips",
            "clip_tokens": "echo/clip_tokens_mean",
            "tokens": "completion/length_mean",
        }.items()
    }
    before, pass_1, pass_k = run.series(keys[0])[1][0], last[keys[0]], last[f"{source}{k}"]
    return Outcome(setting, seed, steps, before, pass_1, pass_k, k, **at_end)


def paired(own: Sequence[Outcome], other: Sequence[Outcome], field: str) -> Estimate | None:
    """Mean difference of a field over the seeds that both have; None where there is none."""
    before = {outcome.seed: vars(outcome)[field] for outcome in other}
    pairs = [vars(o)[field] - before[o.seed] for o in own if o.seed in before]
    return estimate(pairs) if pairs else None


def sweep_table(
    outcomes: Sequence[Outcome], against: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Columns and one row of text per setting, in order of first appearance.

    Args:
      outcomes: of all finished runs.
      against: setting -> the setting it is compared with.
    """
    k = max(outcome.k for outcome in outcomes)
    columns = ["Setting", "Seeds", "Success", f"pass@{k}", "Compared with"]
    columns += ["Success, paired", f"pass@{k}, paired", "Entropy", "All right", "Clip of response"]
    rows = []
    for setting in dict.fromkeys(outcome.setting for outcome in outcomes):
        own = [o for o in outcomes if o.setting == setting]
        others = [o for o in outcomes if o.setting == against.get(setting, "")]
        success, pass_k, entropy, all_right, clip_share = (
            estimate([getattr(o, field) for o in own])
            for field in ("pass_1", "pass_k", "entropy", "all_right", "clip_share")
        )
        differences = (paired(own, others, field) for field in ("pass_1", "pass_k"))
        cells = [success.text(), pass_k.text(), others[0].setting if others else "–"]
        cells += [d.text(lambda x: f"{100 * x:+.1f}") if d else "–" for d in differences]
        cells += [entropy.text(number), share(all_right.mean)]
        cells += [share(clip_share.mean) if any(o.clips for o in own) else "–"]
        rows.append([setting, str(len(own)), *cells])
    return columns, rows


def sweep_section(
    outcomes: Sequence[Outcome], against: Mapping[str, str], runs: Mapping[str, Sequence[Run]]
) -> Section:
    """The report's section: the table, and curves of each setting's mean over seeds.

    Args:
      outcomes, against: as in :func:`sweep_table`.
      runs: setting -> its finished runs.
    """
    first = outcomes[0]
    notes = (
        f"Success at temperature 1 and pass@{first.k} on held-out problems after "
        f"{first.steps:,} steps ({share(estimate([o.before for o in outcomes]).mean)} before). "
        "Brackets: 95% intervals over seeds (Student's t). Paired: mean difference, in points, "
        "over runs of the same seed. Other columns: mean of the last tenth of the steps.",
        "Curves are means over seeds, bands from the lowest to the highest seed.",
    )
    panels = [_panel(title, key, form, runs) for title, key, form in _CURVES]
    drawn = [panel for panel in panels if panel.x]
    return Section("sweep", "Settings compared", drawn, notes, [sweep_table(outcomes, against)])


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
