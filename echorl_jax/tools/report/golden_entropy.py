"""Golden entropy: the policy's entropy along expert trajectories and along its own.

Source: the observation of EchoRL, arXiv 2605.31228. Both kinds of trajectories answer the same
prompts, and the entropy at every token is that of the same policy.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.data import encode_target, expert_text
from echorl_jax.errors import UserError
from echorl_jax.evaluation.intervals import bootstrap_mean
from echorl_jax.tools.report.curves import Panel, Section, Series, rounded, run_colour
from echorl_jax.tools.report.headline import number
from echorl_jax.tools.report.policy import Policy, Trajectory
from echorl_jax.tools.report.runs import is_number, read_jsonl

Row = dict[str, Any]


def expert_rows(
    policy: Policy, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """Scores the expert trajectory of each row that has one, up to the policy's longest answer.

    Args:
      policy: whose entropy counts.
      rows: in verl's columns.

    Returns:
      Rows for :func:`~trajectories.entropy_profiles`, and the rows of the data
      that they come from.

    Raises:
      UserError: no row has an expert trajectory behind a prompt that is short enough.
    """
    used, prompts, targets = [], [], []
    for row in rows:
        prompt = policy.prompt(row)
        if expert_text(row) is not None and len(prompt) <= policy.max_prompt_tokens:
            used.append(row)
            prompts.append(prompt)
            targets.append(encode_target(policy.tokenizer, row)[: policy.max_new_tokens])
    if not used:
        raise UserError(
            "--data: no row has an expert trajectory (column target or solution) "
            f"and a prompt within --max_prompt_tokens={policy.max_prompt_tokens}"
        )
    scored = policy.score(prompts, targets, "expert trajectories")
    return [_row("expert", trajectory) for trajectory in scored], used


def policy_rows(policy: Policy, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Samples one trajectory of the policy for each row."""
    answers = policy.answer(list(map(policy.prompt, rows)), rows, "policy trajectories")
    return [
        _row("policy", a.trajectory) | {"correct": a.correct} for found in answers for a in found
    ]


def rescored_rows(policy: Policy, path: Path, *, limit: int) -> list[Row]:
    """Scores the responses of a file under ``policy``, up to its longest answer.

    Args:
      path: samples of a run or ``generations.jsonl`` of ``echorl evaluate``: objects with
        ``prompt`` (messages or text) and ``response``.
      limit: rows that are read; 0 reads all.

    Raises:
      UserError: the file is missing, empty or of another kind.
    """
    prompts, completions, found = [], [], []
    for line, row in read_rollouts(path, limit=limit):
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(response, str) or not isinstance(prompt, str | list) or not prompt:
            raise UserError(f"{path}, line {line}: needs prompt and response")
        encode = policy.tokenizer.encode
        text = isinstance(prompt, str)
        ids = encode(response, add_special_tokens=False)[: policy.max_new_tokens]
        if ids:
            prompts.append(encode(prompt) if text else policy.prompt(row))
            completions.append(ids)
            found.append(row)
    if not found:
        raise UserError(f"{path}: every response is empty")
    scored = policy.score(prompts, completions, "policy trajectories")
    return [
        _row("policy", trajectory) | {"correct": bool(row.get("correct"))}
        for trajectory, row in zip(scored, found, strict=True)
    ]


def stored_rows(path: Path, *, limit: int) -> list[Row]:
    """Right and wrong rollouts with the entropies that the sampler stored: no model is needed.

    Raises:
      UserError: the file is missing, empty, or a line has no entropies.
    """
    found = []
    for line, row in read_rollouts(path, limit=limit):
        entropy, steps = _numbers(row.get("entropy")), _numbers(row.get("step_ids"))
        if not entropy or len(entropy) != len(steps):
            raise UserError(
                f"{path}, line {line}: no entropy and step_ids of equal length; "
                "with --model and --data they are computed"
            )
        source = "right answers" if row.get("correct") else "wrong answers"
        found.append({"source": source, "entropy": entropy, "step_ids": [int(i) for i in steps]})
    # Whichever the file begins with, right ones come first.
    return sorted(found, key=lambda row: row["source"])


def read_rollouts(path: Path, *, limit: int = 0) -> Iterator[tuple[int, Row]]:
    """The first rows of a JSONL file, numbered from 1.

    Raises:
      UserError: there is no such file, or nothing in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    count = 0
    for count, row in enumerate(read_jsonl(path), start=1):
        if limit and count > limit:
            return
        yield count, row
    if not count:
        raise UserError(f"{path}: no line holds a JSON object")


def step_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per trajectory, as written to JSONL: its step entropies and where they peak."""
    found = []
    for place, row in enumerate(rows):
        means = step_means(row["entropy"], row["step_ids"])
        if means:
            peak = max(range(len(means)), key=means.__getitem__)
            found.append(
                {
                    "source": row["source"],
                    "trajectory": place,
                    "correct": row.get("correct"),
                    "tokens": len(row["entropy"]),
                    "token_entropy": sum(row["entropy"]) / len(row["entropy"]),
                    "step_entropy": [round(value, 5) for value in means],
                    "peak_step": peak,
                }
            )
    return found


def _row(source: str, trajectory: Trajectory) -> Row:
    return {"source": source, "entropy": trajectory.entropy, "step_ids": trajectory.step_ids}


def _numbers(values: Any) -> list[float]:
    """The list, or none if it is not one of numbers."""
    return values if isinstance(values, list) and all(map(is_number, values)) else []


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
    # Values beyond the last bin are counted in it.
    counts, _ = np.histogram(np.minimum(values, highest), BINS, range=(0.0, highest))
    return tuple((counts / len(values)).tolist())


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
