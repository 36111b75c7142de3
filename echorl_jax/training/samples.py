"""Sampled groups and the signal ledger as JSON lines, for people and the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.parallel import is_first
from echorl_jax.training.batch import Assembled
from echorl_jax.training.collect import Experience
from echorl_jax.types import EchoClips, HostArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def record_samples(
    workdir: Path,
    step: int,
    found: Experience,
    made: Assembled,
    *,
    groups: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Adds a step to ``samples/ledger.jsonl`` and writes ``groups`` to ``samples/step_*.jsonl``.

    Of several processes the first one writes.

    Args:
      found: the step's experience.
      made: its batch and clips (NumPy arrays).
      groups: prompts whose rollouts are written in full; none writes no file.
      tokenizer: for the text of each token.
    """
    if not is_first():
        return
    directory = workdir / "samples"
    directory.mkdir(exist_ok=True)
    with (directory / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "groups": _ledger(found, made)}) + "\n")
    if groups:
        clips = _clips_by_row(made.clips)
        rows = np.flatnonzero(np.isin(found.rollouts.group, groups))
        lines = (_sample(step, row, found, made, clips, tokenizer) for row in rows.tolist())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"step_{step:06d}.jsonl").write_text(text)


def _ledger(found: Experience, made: Assembled) -> list[dict[str, Any]]:
    """How each prompt's group came out."""
    count = len(found.prompts)

    def per_group(values: Any) -> list[int]:
        totals = np.bincount(found.rollouts.group, weights=values, minlength=count)
        return totals.astype(int).tolist()

    correct, truncated = per_group(found.graded.correct), per_group(found.rollouts.truncated)
    size = per_group(found.graded.with_verdict)
    clip = np.any(made.clips.valid, axis=1).tolist()
    return [
        {
            "index": prompt.index,
            "correct": correct[i],
            "size": size[i],
            "truncated": truncated[i],
            "clip": clip[i],
        }
        for i, prompt in enumerate(found.prompts)
    ]


def _sample(
    step: int,
    row: int,
    found: Experience,
    made: Assembled,
    clips: dict[int, tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    rollouts = found.rollouts
    length, group = int(rollouts.completion_length[row]), int(rollouts.group[row])
    ids = rollouts.completion_ids[row, :length].tolist()
    steps = made.step_ids[row, :length]
    prompt = found.prompts[group]
    clip_tokens, clip_step = clips.get(int(row), (0, -1))
    judged = bool(found.graded.with_verdict[row])
    return {
        "step": step,
        "group": group,
        "row": int(row),
        "data_source": prompt.row["data_source"],
        "prompt": tokenizer.decode(prompt.ids),
        "response": tokenizer.decode(ids, skip_special_tokens=True),
        "reward": float(found.graded.rewards[row]) if judged else None,
        "correct": bool(found.graded.correct[row]) if judged else None,
        "reason": found.reasons[row],
        "truncated": bool(rollouts.truncated[row]),
        "advantage": float(made.batch.advantages[row]),
        "tokens": tokenizer.batch_decode([[i] for i in ids]),
        "entropy": _rounded(rollouts.token_entropy[row, :length]),
        "logprobs": _rounded(rollouts.rollout_logprobs[row, :length]),
        "step_ids": steps.tolist(),
        "step_entropy": _rounded(made.step_entropy[row, : int(steps.max(initial=-1)) + 1]),
        "clip_tokens": clip_tokens,
        "clip_step": clip_step,
    }


def _clips_by_row(clips: EchoClips) -> dict[int, tuple[int, int]]:
    """Row -> (tokens, step) of its longest clip."""
    found: dict[int, tuple[int, int]] = {}
    for row, length, step, valid in zip(
        *(np.ravel(a) for a in (clips.row, clips.length, clips.step, clips.valid)), strict=True
    ):
        if valid:
            found[int(row)] = max(found.get(int(row), (0, -1)), (int(length), int(step)))
    return found


def _rounded(values: HostArray) -> list[float]:
    return [round(float(v), 4) for v in values]
