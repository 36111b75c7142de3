"""Token entropy over a run: how fast it falls, and how reward rises with its fall.

Cui et al. (arXiv 2505.22617) observe that, without a term that keeps entropy up, a policy trades
entropy H for reward R along R = -a exp(H) + b. Once fitted, the law gives a ceiling: R = b - a
where H reaches 0.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from echorl_jax.tools.report.curves import (
    Panel,
    Section,
    Series,
    averaged,
    on_grid,
    rounded,
    run_colour,
    smoothed,
)
from echorl_jax.tools.report.headline import edges, number, share
from echorl_jax.tools.report.runs import Run

Row = dict[str, Any]
KEY = "entropy/token_mean"
# Fewer points, or entropies closer together than this ratio of exp(H), do not determine a curve.
MIN_POINTS = 8
MIN_SPREAD = 1e-3
# The report names no ceiling for a law that explains a smaller share of the variance of reward.
MIN_EXPLAINED = 0.5


def entropy_collapse(run: Run) -> Row | None:
    """Measures a run's loss of token entropy.

    Returns:
      ``run``, ``start`` and ``end`` (means over the first and last tenth of the steps, nats),
      ``kept`` (end / start), ``half_step`` (the first step whose running mean is at most start / 2,
      or None) and ``last_step``. None if entropy was not logged or starts at zero.
    """
    edge = edges(run, KEY)
    if edge is None or edge[0] <= 0:
        return None
    start, end = edge
    steps, values = run.series(KEY)
    means = smoothed(dict(zip(steps, values, strict=True)))
    half_step = next((step for step, mean in means.items() if mean <= start / 2), None)
    row = {"run": run.name, "start": start, "end": end, "kept": end / start}
    return row | {"half_step": half_step, "last_step": steps[-1]}


def collapse_section(runs: Sequence[Run]) -> Section | None:
    """The report's section: entropy as a share of its start, one curve per run, and a table."""
    measured = ((i, run, entropy_collapse(run)) for i, run in enumerate(runs))
    found = [(i, run, row) for i, run, row in measured if row is not None]
    if len(found) < 2:
        return None
    grid, lines = averaged(*(run.series(KEY) for _, run, _ in found))
    series, table = [], []
    for (i, run, row), line in zip(found, lines, strict=True):
        kept = {step: mean / row["start"] for step, mean in smoothed(line).items()}
        series.append(Series(run.name, on_grid(grid, kept), run_colour(i)))
        half = "never" if row["half_step"] is None else f"step {row['half_step']:,}"
        cells = [number(row["start"]), number(row["end"]), f"{100 * row['kept']:.0f}%", half]
        table.append([run.name, *cells])
    columns = ["Run", "Start, nats", "End, nats", "Kept", "Down to half"]
    panel = Panel("Entropy kept", grid, series, "Running mean over its start.", form="share")
    notes = (
        "How much of its token entropy each run kept. Start and end are means over a tenth of it.",
    )
    return Section("collapse", "Entropy collapse", [panel], notes, [(columns, table)])


def entropy_law(run: Run) -> Row | None:
    """The law of a run: ``run`` and the fields of :func:`fit_entropy_law`, None without a fit."""
    law = fit_entropy_law(*points_of(run))
    return law and {"run": run.name, **law}


def fit_entropy_law(entropy: Sequence[float], reward: Sequence[float]) -> dict[str, float] | None:
    """Fits R = -a exp(H) + b by least squares.

    Args:
      entropy: mean token entropy at each point, nats.
      reward: mean reward, or success, at the same points.

    Returns:
      ``a``, ``b``, ``r2`` (the explained share of the variance of R), ``points`` (their number)
      and ``ceiling`` (b - a, the reward at zero entropy). None if the points are too few or too
      close together.

    Raises:
      ValueError: the two differ in length.

    >>> entropy = [0.1 * i for i in range(10)]
    >>> law = fit_entropy_law(entropy, [0.9 - 0.2 * math.exp(h) for h in entropy])
    >>> round(law["a"], 4), round(law["b"], 4), round(law["ceiling"], 4)
    (0.2, 0.9, 0.7)
    """
    if len(entropy) != len(reward):
        raise ValueError(f"entropy has {len(entropy)} points, reward has {len(reward)}")
    x, y = np.exp(np.asarray(entropy, np.float64)), np.asarray(reward, np.float64)
    if len(x) < MIN_POINTS or np.ptp(x) < MIN_SPREAD * x.mean():
        return None
    # The closed form gives a slope of exactly 0 for a constant reward; np.polyfit does not.
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    b = float(y.mean()) - slope * float(x.mean())
    total = float(len(y) * y.var())
    # A constant reward has no variance to explain.
    r2 = 1.0 - float(((y - slope * x - b) ** 2).sum()) / total if total and np.ptp(y) else 1.0
    return {"a": -slope, "b": b, "r2": r2, "points": len(x), "ceiling": b + slope}


def points_of(run: Run) -> tuple[list[float], list[float]]:
    """``(entropy, reward)`` at the steps that logged both, averaged over spans in a long run."""
    rows = [row for row in run.metrics if KEY in row and "reward/mean" in row]
    # Damaged lines hold numbers whose exponential or square overflows.
    rows = [row for row in rows if abs(row[KEY]) < 100 and abs(row["reward/mean"]) < 1e100]
    steps = [int(row["step"]) for row in rows]
    _, lines = averaged(*((steps, [row[key] for row in rows]) for key in (KEY, "reward/mean")))
    return list(lines[0].values()), list(lines[1].values())


def law_section(runs: Sequence[Run]) -> Section | None:
    """The report's section: reward over entropy, the fitted curves and their ceilings."""
    panels, table = [], []
    for colour, run in enumerate(runs):
        if (law := entropy_law(run)) is not None:
            entropy, reward = points_of(run)
            panels.append(_law_panel(law, entropy, reward, run_colour(colour)))
            reached = max(reward[-max(1, len(reward) // 10) :])
            cells = [number(law["a"]), number(law["b"]), share(law["r2"]), _ceiling(law)]
            table.append([run.name, *cells, number(reached)])
    if not panels:
        return None
    notes = (
        "Reward over token entropy, and the law R = -a exp(H) + b fitted to it. Where the law "
        "holds, reward rises as entropy falls, up to b - a at zero entropy.",
        "A fit to one run does not show a cause. A law that explains less than half of the "
        "variance gets no ceiling.",
    )
    columns = ["Run", "a", "b", "Variance explained", "Ceiling b - a", "Best of the last tenth"]
    return Section("entropy-law", "Entropy law", panels, notes, [(columns, table)])


def _ceiling(law: Row) -> str:
    # With a below zero, reward falls together with entropy: there is no trade.
    if law["a"] <= 0:
        return "none, a is not positive"
    return number(law["ceiling"]) if law["r2"] >= MIN_EXPLAINED else "unclear"


def _law_panel(law: Row, entropy: list[float], reward: list[float], colour: str) -> Panel:
    order = np.argsort(entropy, kind="stable")
    # The curve starts at zero entropy, where its value is the ceiling.
    grid = [0.0, *(entropy[i] for i in order)]
    steps = Series("steps", [None, *(rounded(reward[i]) for i in order)], colour, paint="dots")
    curve = Series("law", [rounded(law["b"] - law["a"] * math.exp(h)) for h in grid], "ink")
    x = [rounded(h) or 0.0 for h in grid]
    title = f"Reward over entropy: {law['run']}"
    return Panel(title, x, [steps, curve], x_name="token entropy, nats")
