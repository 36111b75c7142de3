"""Expert against policy: token and step entropy of both kinds of trajectories under one policy.

The paper's observation is that expert trajectories run at higher entropy than the policy's own. The
rows that are compared here hold, for each trajectory, the entropy of the policy at each of its
tokens, whoever wrote it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from echorl_jax.evaluation.intervals import bootstrap_mean
from echorl_jax.tools.report.clips import histogram
from echorl_jax.tools.report.headline import number
from echorl_jax.tools.report.panels import Panel, Section, Series, rounded, run_colour

BINS = 40


@dataclasses.dataclass(frozen=True)
class Profile:
    """Entropy, in nats, of the trajectories of one source. Intervals are 95%, over trajectories."""

    source: str
    trajectories: int
    tokens: int
    steps: int
    token_mean: float
    token_low: float
    token_high: float
    step_mean: float
    step_low: float
    step_high: float
    peak_mean: float  # mean over trajectories of the highest step entropy
    token_limit: float  # bins cut [0, limit] into equal parts; the last holds all beyond
    token_histogram: tuple[float, ...]  # share of tokens per bin
    step_limit: float
    step_histogram: tuple[float, ...]  # share of steps per bin


def step_means(entropy: Sequence[float], step_ids: Sequence[int]) -> list[float]:
    """Mean entropy of each step of a trajectory in order; positions with an id below 0 are masked.

    Raises:
      ValueError: the two differ in length.

    >>> step_means([1.0, 3.0, 5.0, 9.0], [0, 0, 1, -1])
    [2.0, 5.0]
    """
    if len(entropy) != len(step_ids):
        raise ValueError(f"{len(entropy)} entropies, {len(step_ids)} step ids")
    ids, values = np.asarray(step_ids, np.int64), np.asarray(entropy, np.float64)
    ids, values = ids[ids >= 0], values[ids >= 0]
    if not ids.size:
        return []
    counts = np.bincount(ids)
    means = np.bincount(ids, values)[counts > 0] / counts[counts > 0]
    return means.tolist()


def entropy_profiles(rows: Iterable[dict[str, Any]]) -> list[Profile]:
    """One profile per source, in order of first appearance, with histograms over common bins.

    Args:
      rows: mappings with ``source`` (such as "expert" or "policy"), ``entropy`` (nats per token)
        and ``step_ids``. Rows without a token are left out.
    """
    tokens: dict[str, list[list[float]]] = {}
    steps: dict[str, list[list[float]]] = {}
    for row in rows:
        means = step_means(row["entropy"], row["step_ids"])
        if means:
            own = [h for h, i in zip(row["entropy"], row["step_ids"], strict=True) if i >= 0]
            tokens.setdefault(row["source"], []).append(own)
            steps.setdefault(row["source"], []).append(means)
    limits = (_limit(tokens), _limit(steps))
    return [_profile(source, tokens[source], steps[source], *limits) for source in tokens]


def profile_rows(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """One row per source, as written to JSONL."""
    return [dataclasses.asdict(profile) for profile in profiles]


def profile_section(rows: Sequence[dict[str, Any]]) -> Section | None:
    """The report's section from rows of :func:`profile_rows`: both histograms and the means."""
    if not rows:
        return None
    panels = [
        _histogram_panel("Token entropy", rows, "token"),
        _histogram_panel("Step entropy", rows, "step"),
    ]
    columns = [
        "Source",
        "Trajectories",
        "Tokens",
        "Steps",
        "Token entropy",
        "Step entropy",
        "Highest step",
    ]
    table = [
        [
            str(row["source"]),
            *(f"{row[key]:,}" for key in ("trajectories", "tokens", "steps")),
            _with_interval(row, "token"),
            _with_interval(row, "step"),
            number(row["peak_mean"]),
        ]
        for row in rows
    ]
    notes = (
        "Entropy of the policy, in nats, at each token of a trajectory, whoever wrote it. "
        "Brackets: 95% interval over trajectories.",
        *([str(rows[0]["about"])] if rows[0].get("about") else []),
    )
    return Section("trajectories", "Entropy of trajectories", panels, notes, [(columns, table)])


def _profile(
    source: str,
    tokens: list[list[float]],
    steps: list[list[float]],
    token_limit: float,
    step_limit: float,
) -> Profile:
    all_tokens = [h for t in tokens for h in t]
    all_steps = [h for s in steps for h in s]
    token_low, token_high = _interval(tokens)
    step_low, step_high = _interval(steps)
    return Profile(
        source=source,
        trajectories=len(tokens),
        tokens=len(all_tokens),
        steps=len(all_steps),
        token_mean=float(np.mean(all_tokens)),
        token_low=token_low,
        token_high=token_high,
        step_mean=float(np.mean(all_steps)),
        step_low=step_low,
        step_high=step_high,
        peak_mean=float(np.mean([max(s) for s in steps])),
        token_limit=token_limit,
        token_histogram=_shares(all_tokens, token_limit),
        step_limit=step_limit,
        step_histogram=_shares(all_steps, step_limit),
    )


def _interval(lists: list[list[float]]) -> tuple[float, float]:
    # Tokens of one trajectory depend on each other, so whole trajectories are redrawn.
    return bootstrap_mean([float(np.mean(x)) for x in lists], [float(len(x)) for x in lists])


def _shares(values: list[float], highest: float) -> tuple[float, ...]:
    return tuple(n / len(values) for n in histogram(values, low=0.0, high=highest, bins=BINS))


def _with_interval(row: dict[str, Any], what: str) -> str:
    low, high = number(row[f"{what}_low"]), number(row[f"{what}_high"])
    return f"{number(row[f'{what}_mean'])} [{low}, {high}]"


def _limit(lists: dict[str, list[list[float]]]) -> float:
    values = [h for source in lists.values() for one in source for h in one]
    # A few very surprising tokens must not squeeze all the others into the first bins.
    return float(np.quantile(values, 0.995)) or 1.0 if values else 1.0


def _histogram_panel(title: str, rows: Sequence[dict[str, Any]], what: str) -> Panel:
    width = rows[0][f"{what}_limit"] / BINS
    series = [
        Series(
            str(row["source"]),
            [rounded(v) for v in row[f"{what}_histogram"]],
            run_colour(i),
            dash=i,
        )
        for i, row in enumerate(rows)
    ]
    note = f"Share of {what}s by entropy; the last point holds all beyond."
    middles = [rounded(width * (i + 0.5)) or 0.0 for i in range(BINS)]
    return Panel(title, middles, series, note, "share", "nats")
