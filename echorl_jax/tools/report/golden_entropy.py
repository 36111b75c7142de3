"""Golden entropy: the policy's entropy along expert trajectories and along its own.

Source: the observation of EchoRL, arXiv 2605.31228. Both kinds of trajectories answer the same
prompts, and the same policy gives the entropy at every token.

A trajectory is a row with ``source`` (such as "expert" or "policy"), ``entropy`` (nats per token)
and ``step_ids`` (the step of each token, below 0 where masked).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.data import encode_target, expert_text
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import bootstrap_mean
from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.curves import Panel, Section, Series, rounded, run_colour
from echorl_jax.tools.report.headline import number
from echorl_jax.tools.report.policy import Policy, Trajectory
from echorl_jax.tools.report.runs import is_number

Row = dict[str, Any]
BINS = 40
# The last bin also counts values above this quantile, so that rare large ones do not squeeze the
# others into the first bins.
LAST_BIN = 0.995


def expert_rows(
    policy: Policy, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """Scores the expert trajectory of each row that has one, up to ``max_new_tokens`` of it.

    Args:
      policy: gives the entropies.
      rows: in verl's columns.

    Returns:
      The trajectories, and the rows of the data that they come from.

    Raises:
      UserError: no row has an expert trajectory behind a prompt that is short enough.
    """
    options = policy.options
    used, prompts, targets = [], [], []
    for row in rows:
        prompt = policy.prompt(row)
        if expert_text(row) is not None and len(prompt) <= options.max_prompt_tokens:
            used.append(row)
            prompts.append(prompt)
            targets.append(encode_target(policy.tokenizer, row)[: options.max_new_tokens])
    if not used:
        raise UserError(
            "--data: no row has an expert trajectory (column target or solution) "
            f"and a prompt within --max_prompt_tokens={options.max_prompt_tokens}"
        )
    return [_row("expert", t) for t in policy.score(prompts, targets, "expert trajectories")], used


def policy_rows(policy: Policy, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Samples one trajectory of the policy for each row."""
    answers = policy.answer(list(map(policy.prompt, rows)), rows, "policy trajectories")
    return [_row("policy", a.trajectory, a.correct) for found in answers for a in found]


def rescored_rows(policy: Policy, path: Path, *, limit: int) -> list[Row]:
    """Scores the responses of a file under ``policy``, up to ``max_new_tokens`` of each.

    Args:
      policy: gives the entropies.
      path: samples of a run or ``generations.jsonl`` of ``echorl evaluate``: objects with
        ``prompt`` (messages or text) and ``response``.
      limit: rows that are read; 0 reads all.

    Raises:
      UserError: the file is missing or empty, or a row has no prompt or response.
    """
    prompts, completions, verdicts = [], [], []
    encode = policy.tokenizer.encode
    for line, row in read_rollouts(path, limit=limit):
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(response, str) or not isinstance(prompt, str | list) or not prompt:
            raise UserError(f"{path}, line {line}: needs prompt and response")
        if ids := encode(response, add_special_tokens=False)[: policy.options.max_new_tokens]:
            prompts.append(encode(prompt) if isinstance(prompt, str) else policy.prompt(row))
            completions.append(ids)
            verdicts.append(row.get("correct", False))
    if not completions:
        raise UserError(f"{path}: every response is empty")
    scored = policy.score(prompts, completions, "policy trajectories")
    return [_row("policy", *pair) for pair in zip(scored, verdicts, strict=True)]


def stored_rows(path: Path, *, limit: int) -> list[Row]:
    """Right, unjudged and wrong rollouts with the entropies that the sampler stored.

    No model is needed.

    Raises:
      UserError: the file is missing or empty, or a line has no entropies.
    """
    found = []
    for line, row in read_rollouts(path, limit=limit):
        entropy, steps = (_numbers(row.get(key)) for key in ("entropy", "step_ids"))
        if not entropy or len(entropy) != len(steps):
            raise UserError(
                f"{path}, line {line}: no entropy and step_ids of equal length; "
                "with --model and --data they are computed"
            )
        correct = row.get("correct", False)
        outcome = "unjudged" if correct is None else "right" if correct else "wrong"
        source, ids = f"{outcome} answers", list(map(int, steps))
        found.append({"source": source, "entropy": entropy, "step_ids": ids})
    return sorted(found, key=lambda row: row["source"])  # right answers first


def read_rollouts(path: Path, *, limit: int = 0) -> Iterator[tuple[int, Row]]:
    """The first rows of a JSONL file, numbered from 1.

    Raises:
      UserError: the file does not exist or has no rows.
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
    """One row per trajectory, as written to JSONL: its step entropies and the highest of them."""
    found = []
    for place, row in enumerate(rows):
        if means := step_means(row["entropy"], row["step_ids"]):
            found.append(
                {
                    "source": row["source"],
                    "trajectory": place,
                    "correct": row.get("correct"),
                    "tokens": len(row["entropy"]),
                    "token_entropy": sum(row["entropy"]) / len(row["entropy"]),
                    "step_entropy": [round(value, 5) for value in means],
                    "peak_step": means.index(max(means)),
                }
            )
    return found


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
    counts, sums = np.bincount(ids[ids >= 0]), np.bincount(ids[ids >= 0], values[ids >= 0])
    return (sums[counts > 0] / counts[counts > 0]).tolist()


def entropy_profiles(rows: Iterable[Row]) -> list[Row]:
    """One row per source, in order of first appearance, with histograms over common bins.

    Args:
      rows: trajectories; those without a token are left out.

    Returns:
      Rows with ``source`` and the numbers of ``trajectories``, ``tokens`` and ``steps``. For token
      and step entropy (nats) there are mean, 95% interval over trajectories (``token_low``,
      ``token_high``) and histogram: the share of tokens in each of ``BINS`` equal parts of
      ``[0, token_limit]``, the last of which holds all beyond. ``peak_mean`` is the mean over
      trajectories of the highest step entropy.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        if means := step_means(row["entropy"], row["step_ids"]):
            lists = found.setdefault(row["source"], {"token": [], "step": []})
            pairs = zip(row["entropy"], row["step_ids"], strict=True)
            lists["token"].append([value for value, step in pairs if step >= 0])
            lists["step"].append(means)
    profiles = []
    for source, lists in found.items():
        profile: Row = {"source": source, "trajectories": len(lists["token"])}
        for what, own in lists.items():
            values = np.concatenate(own)
            limit = _last_bin([one for other in found.values() for one in other[what]])
            counts, _ = np.histogram(np.minimum(values, limit), BINS, range=(0.0, limit))
            # Tokens of one trajectory depend on each other, so whole trajectories are redrawn.
            low, high = bootstrap_mean([float(np.mean(one)) for one in own], list(map(len, own)))
            profile |= {
                f"{what}s": len(values),
                f"{what}_mean": float(np.mean(values)),
                f"{what}_low": low,
                f"{what}_high": high,
                f"{what}_limit": limit,
                f"{what}_histogram": (counts / len(values)).tolist(),
            }
        peak_mean = float(np.mean([max(means) for means in lists["step"]]))
        profiles.append(profile | {"peak_mean": peak_mean})
    return profiles


def profile_section(rows: Sequence[Row]) -> Section | None:
    """The report's section from rows of :func:`entropy_profiles`: both histograms and the means."""
    if not rows:
        return None
    panels = [_histogram_panel(rows, what) for what in ("token", "step")]
    columns = ["Source", "Trajectories", "Tokens", "Steps"]
    columns += ["Token entropy", "Step entropy", "Highest step"]
    table = [
        [
            str(row["source"]),
            *(f"{row[key]:,}" for key in ("trajectories", "tokens", "steps")),
            *(mean_with_interval(row, what, number) for what in ("token", "step")),
            number(row["peak_mean"]),
        ]
        for row in rows
    ]
    notes = [
        "Entropy of the policy, in nats, at each token of a trajectory, also of the expert's. "
        "Brackets: 95% interval over trajectories."
    ]
    notes += [str(rows[0]["about"])] if rows[0].get("about") else []
    return Section("trajectories", "Entropy of trajectories", panels, notes, [(columns, table)])


def mean_with_interval(row: Row, what: str, form: Callable[[float], str]) -> str:
    """Such as ``0.15 [0.14, 0.16]``."""
    mean, low, high = (form(row[f"{what}_{key}"]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _row(source: str, trajectory: Trajectory, correct: bool | None = None) -> Row:
    row = {"source": source, "entropy": trajectory.entropy, "step_ids": trajectory.step_ids}
    return row if correct is None else row | {"correct": correct}


def _numbers(values: Any) -> list[float]:
    """The list, or an empty one if it is not a list of numbers."""
    return values if isinstance(values, list) and all(map(is_number, values)) else []


def _last_bin(lists: Sequence[Sequence[float]]) -> float:
    return float(np.quantile(np.concatenate(lists), LAST_BIN)) or 1.0


def _histogram_panel(rows: Sequence[Row], what: str) -> Panel:
    width = rows[0][f"{what}_limit"] / BINS
    series = [
        Series(str(row["source"]), list(map(rounded, row[f"{what}_histogram"])), run_colour(i), i)
        for i, row in enumerate(rows)
    ]
    note = f"Share of {what}s by entropy; the last point holds all beyond."
    middles = [rounded(width * (i + 0.5)) or 0.0 for i in range(BINS)]
    return Panel(f"{what.title()} entropy", middles, series, note, "share", "nats")
