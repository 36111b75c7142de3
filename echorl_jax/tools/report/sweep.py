"""What a sweep found: each run's outcome, means over seeds with intervals, a section of the report.

Runs of one setting differ in their seeds alone. A setting is compared with another one run by run:
the same seed means the same prompts in the same order, the same first weights and the same
evaluation draws, so the paired difference has less noise than the difference of the means.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from echorl_jax.tools.report.curves import (
    Panel,
    Section,
    Series,
    bucket,
    rounded,
    run_colour,
    smoothed,
    span_of,
)
from echorl_jax.tools.report.headline import edges, eval_keys, number, share
from echorl_jax.tools.report.runs import Run, read_run

_CURVES = (
    ("Reward", "reward/mean", "number"),
    ("Token entropy", "entropy/token_mean", "number"),
    ("All-right groups", "group/all_success_fraction", "share"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run ended. Means over the last tenth of its steps, but for the evaluations."""

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

    def text(self, form: Any = share) -> str:
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
    """The outcome of a run; None while it has not done and evaluated step ``steps``, its last."""
    if not workdir.is_dir():
        return None
    run = read_run(workdir)
    keys = eval_keys(run)
    if not keys or run.metrics[-1]["step"] != steps:
        return None
    last = run.metrics[-1]
    if keys[0] not in last:
        return None
    source = keys[0].removesuffix("1")
    attempts = sorted(int(k.removeprefix(source)) for k in last if k.startswith(source))

    def end(key: str) -> float:
        found = edges(run, key)
        return found[1] if found else 0.0

    return Outcome(
        setting=setting,
        seed=seed,
        steps=steps,
        before=run.series(keys[0])[1][0],
        pass_1=last[keys[0]],
        pass_k=last[f"{source}{attempts[-1]}"],
        k=attempts[-1],
        entropy=end("entropy/token_mean"),
        all_right=end("group/all_success_fraction"),
        clips=end("echo/clips"),
        clip_tokens=end("echo/clip_tokens_mean"),
        tokens=end("completion/length_mean"),
    )


def paired(own: Sequence[Outcome], other: Sequence[Outcome], field: str) -> Estimate | None:
    """Mean difference of a field over the seeds that both have; None where there is none."""
    before = {outcome.seed: vars(outcome)[field] for outcome in other}
    pairs = [vars(o)[field] - before[o.seed] for o in own if o.seed in before]
    return estimate(pairs) if pairs else None


def sweep_table(
    outcomes: Sequence[Outcome], against: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """One row of text per setting, in order of first appearance.

    Args:
      outcomes: of all finished runs.
      against: setting -> the setting it is compared with.
    """
    settings = dict.fromkeys(outcome.setting for outcome in outcomes)
    k = max(outcome.k for outcome in outcomes)
    columns = ["Setting", "Seeds", "Success", f"pass@{k}", "Compared with"]
    columns += ["Success, paired", f"pass@{k}, paired", "Entropy", "All right", "Clip of response"]
    rows = []
    for setting in settings:
        own = [o for o in outcomes if o.setting == setting]
        rival = against.get(setting, "")
        others = [o for o in outcomes if o.setting == rival]
        differences = [paired(own, others, field) for field in ("pass_1", "pass_k")]
        rows.append(
            [
                setting,
                str(len(own)),
                estimate([o.pass_1 for o in own]).text(),
                estimate([o.pass_k for o in own]).text(),
                rival if others else "–",
                *(d.text(_points) if d else "–" for d in differences),
                estimate([o.entropy for o in own]).text(number),
                share(sum(o.all_right for o in own) / len(own)),
                share(sum(o.clip_share for o in own) / len(own))
                if any(o.clips for o in own)
                else "–",
            ]
        )
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
    panels = [
        panel
        for title, key, form in _CURVES
        if (panel := _curves(title, key, form, runs)) is not None
    ]
    return Section("sweep", "Settings compared", panels, notes, [sweep_table(outcomes, against)])


def _curves(title: str, key: str, form: Any, runs: Mapping[str, Sequence[Run]]) -> Panel | None:
    steps = [s for group in runs.values() for run in group for s in run.series(key)[0]]
    if not steps:
        return None
    start, span = min(steps), span_of(steps)
    series, lines = [], {}
    for setting, group in runs.items():
        lines[setting] = [_line(run, key, start, span) for run in group]
    grid = sorted({step for found in lines.values() for line in found for step in line})
    for colour, (setting, found) in enumerate(lines.items()):
        at = [[line[step] for line in found if step in line] for step in grid]
        series.append(
            Series(
                setting,
                [rounded(sum(v) / len(v)) if v else None for v in at],
                run_colour(colour),
                dash=colour // 6,
                low=[rounded(min(v)) if v else None for v in at],
                high=[rounded(max(v)) if v else None for v in at],
            )
        )
    return Panel(title, grid, series, "Running mean.", form)


def _line(run: Run, key: str, start: int, span: int) -> dict[int, float]:
    points = bucket(*run.series(key), start=start, span=span)
    return dict(zip(points, smoothed(list(points.values())), strict=True))


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"
