"""Token entropy over a run: how fast it falls, and how much reward its fall bought.

Cui et al. (arXiv 2505.22617) observe that, without a term that keeps entropy up, a policy trades
entropy H for reward R along R = -a exp(H) + b. Once fitted, the law gives a ceiling: R = b - a
where H reaches 0.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

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
from echorl_jax.tools.report.headline import edges, number, share
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


# Fewer points, or entropies closer together than this ratio of exp(H), fix no curve worth showing.
MIN_POINTS = 8
MIN_SPREAD = 1e-3
# A law that explains less of the variance of the reward predicts nothing.
MIN_EXPLAINED = 0.5


@dataclasses.dataclass(frozen=True)
class EntropyLaw:
    """R = -a exp(H) + b by least squares; ``r2`` is the explained share of the variance of R."""

    a: float
    b: float
    r2: float
    points: int

    @property
    def ceiling(self) -> float:
        """Reward that the law predicts at zero entropy, b - a."""
        return self.b - self.a

    def reward(self, entropy: float) -> float:
        """Reward that the law predicts at an entropy in nats."""
        return self.b - self.a * math.exp(entropy)


def fit_entropy_law(entropy: Sequence[float], reward: Sequence[float]) -> EntropyLaw | None:
    """Fits R = -a exp(H) + b; None where the points are too few or too close together.

    Linear in a and b, so the fit is exact least squares of R on exp(H).

    Args:
      entropy: mean token entropy at each point, nats.
      reward: mean reward, or success, at the same points.

    Raises:
      ValueError: the two differ in length.

    >>> entropy = [0.1 * i for i in range(10)]
    >>> law = fit_entropy_law(entropy, [0.9 - 0.2 * math.exp(h) for h in entropy])
    >>> round(law.a, 4), round(law.b, 4), round(law.ceiling, 4)
    (0.2, 0.9, 0.7)
    """
    if len(entropy) != len(reward):
        raise ValueError(f"entropy has {len(entropy)} points, reward has {len(reward)}")
    x, y = np.exp(np.asarray(entropy, np.float64)), np.asarray(reward, np.float64)
    if len(x) < MIN_POINTS or np.ptp(x) < MIN_SPREAD * x.mean():
        return None
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    b = y.mean() - slope * x.mean()
    residual, total = ((y - slope * x - b) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    r2 = 1.0 - residual / total if total > 0 else 1.0
    return EntropyLaw(a=float(-slope), b=float(b), r2=float(r2), points=len(x))


def points_of(run: Run) -> tuple[list[float], list[float]]:
    """``(entropy, reward)`` at the steps that logged both, averaged over spans in a long run."""
    rows = [r for r in run.metrics if "entropy/token_mean" in r and "reward/mean" in r]
    steps = [int(row["step"]) for row in rows]
    if not steps:
        return [], []
    start, span = min(steps), span_of(steps)
    columns = [
        list(bucket(steps, [row[key] for row in rows], start=start, span=span).values())
        for key in ("entropy/token_mean", "reward/mean")
    ]
    return columns[0], columns[1]


def law_rows(runs: Sequence[Run]) -> list[dict[str, float | str | int]]:
    """One row per run that a law can be fitted to, as written to JSONL."""
    rows = []
    for run in runs:
        entropy, reward = points_of(run)
        law = fit_entropy_law(entropy, reward)
        if law is not None:
            rows.append({"run": run.name, **dataclasses.asdict(law), "ceiling": law.ceiling})
    return rows


def law_section(runs: Sequence[Run]) -> Section | None:
    """The report's section: reward over entropy, the fitted curves and what they predict."""
    panels, table = [], []
    for colour, run in enumerate(runs):
        entropy, reward = points_of(run)
        law = fit_entropy_law(entropy, reward)
        if law is None:
            continue
        panels.append(_law_panel(run.name, entropy, reward, law, run_colour(colour)))
        reached = max(reward[-max(1, len(reward) // 10) :])
        cells = [number(law.a), number(law.b), share(law.r2), _ceiling(law), number(reached)]
        table.append([run.name, *cells])
    if not panels:
        return None
    notes = (
        "Reward over token entropy, and the law R = -a exp(H) + b fitted to it. Where the law "
        "holds, reward is bought with entropy, and b - a is reached when the entropy is spent.",
        "A fit to one run says nothing about cause. Where it explains less than half of the "
        "variance, no ceiling is named.",
    )
    columns = ["Run", "a", "b", "Variance explained", "Ceiling b - a", "Best of the last tenth"]
    return Section("entropy-law", "Entropy law", panels, notes, [(columns, table)])


def _ceiling(law: EntropyLaw) -> str:
    # With a below zero reward falls along with entropy: nothing is gained by spending it.
    if law.a <= 0:
        return "none, a is not positive"
    return number(law.ceiling) if law.r2 >= MIN_EXPLAINED else "unclear"


def _law_panel(
    name: str, entropy: list[float], reward: list[float], law: EntropyLaw, colour: str
) -> Panel:
    order = np.argsort(entropy, kind="stable")
    seen = [(entropy[i], reward[i]) for i in order]
    # The curve goes on to zero entropy, where the ceiling is read off.
    grid = [0.0, *(h for h, _ in seen)]
    return Panel(
        f"Reward over entropy: {name}",
        [rounded(h) or 0.0 for h in grid],
        [
            Series("steps", [None, *(rounded(r) for _, r in seen)], colour, paint="dots"),
            Series("law", [rounded(law.reward(h)) for h in grid], "ink"),
        ],
        x_name="token entropy, nats",
    )
