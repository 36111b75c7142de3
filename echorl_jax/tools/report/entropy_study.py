"""The golden-entropy study: how uncertain a policy is along expert trajectories and along its own.

Source: the observation of EchoRL, arXiv 2605.31228. Both kinds of trajectories answer the same
prompts, and the entropy at every token is that of one and the same policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echorl_jax.data import encode_target, expert_text
from echorl_jax.errors import UserError
from echorl_jax.tools.report.policy import Policy, Trajectory
from echorl_jax.tools.report.runs import is_number, read_jsonl
from echorl_jax.tools.report.trajectories import step_means

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
    for number, row in read_rollouts(path, limit=limit):
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(response, str) or not isinstance(prompt, str | list) or not prompt:
            raise UserError(f"{path}, line {number}: needs prompt and response")
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
    for number, row in read_rollouts(path, limit=limit):
        entropy, steps = _numbers(row.get("entropy")), _numbers(row.get("step_ids"))
        if not entropy or len(entropy) != len(steps):
            raise UserError(
                f"{path}, line {number}: no entropy and step_ids of equal length; "
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
    for number, row in enumerate(rows):
        means = step_means(row["entropy"], row["step_ids"])
        if means:
            peak = max(range(len(means)), key=means.__getitem__)
            found.append(
                {
                    "source": row["source"],
                    "trajectory": number,
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
