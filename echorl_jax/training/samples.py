"""Sampled groups and the signal ledger as JSON lines, for people and the report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.config import Config
from echorl_jax.parallel import is_first
from echorl_jax.training.batch import Assembled
from echorl_jax.training.experience import Experience
from echorl_jax.training.setup import Setup
from echorl_jax.types import EchoClips, HostArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def record_samples(
    workdir: Path,
    step: int,
    experience: Experience,
    made: Assembled,
    *,
    setup: Setup,
) -> None:
    """Adds a step to ``samples/ledger.jsonl`` and, when due, groups to ``samples/step_*.jsonl``.

    Of several processes the first one writes.

    Args:
      workdir: of the run.
      step: from 1.
      experience: of the step.
      made: its batch and clips (NumPy arrays).
      setup: of the run; ``log.samples_every`` and ``log.samples_groups`` say what is due.
    """
    if not is_first():
        return
    groups = groups_to_show(setup.config, step)
    directory = workdir / "samples"
    directory.mkdir(exist_ok=True)
    with (directory / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "groups": _ledger(experience, made)}) + "\n")
    if groups:
        clips = _clips_by_row(made.clips)
        rows = np.flatnonzero(np.isin(experience.rollouts.group, groups))
        lines = (
            _sample(step, row, experience, made, clips, setup.tokenizer) for row in rows.tolist()
        )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"step_{step:06d}.jsonl").write_text(text)


def groups_to_show(config: Config, step: int) -> range:
    """The prompts whose rollouts are written in full at this step."""
    every = config.log.samples_every
    due = every and (step % every == 0 or step in (1, config.steps))
    shown = min(config.log.samples_groups, config.rollout.prompts_per_step)
    return range(shown if due else 0)


def _ledger(experience: Experience, made: Assembled) -> list[dict[str, Any]]:
    """One entry per prompt: successes, group size, truncated rows, clip."""
    count = len(experience.prompts)

    def per_group(values: Any) -> list[int]:
        totals = np.bincount(experience.rollouts.group, weights=values, minlength=count)
        return totals.astype(int).tolist()

    correct = per_group(experience.graded.correct)
    truncated = per_group(experience.rollouts.truncated)
    size = per_group(experience.graded.with_verdict)
    clip = np.any(made.clips.valid, axis=1).tolist()
    return [
        {
            "index": prompt.index,
            "correct": correct[i],
            "size": size[i],
            "truncated": truncated[i],
            "clip": clip[i],
        }
        for i, prompt in enumerate(experience.prompts)
    ]


def _sample(
    step: int,
    row: int,
    experience: Experience,
    made: Assembled,
    clips: dict[int, tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    rollouts = experience.rollouts
    length, group = int(rollouts.completion_length[row]), int(rollouts.group[row])
    ids = rollouts.completion_ids[row, :length].tolist()
    steps = made.step_ids[row, :length]
    prompt = experience.prompts[group]
    clip_tokens, clip_step = clips.get(int(row), (0, -1))
    judged = bool(experience.graded.with_verdict[row])
    return {
        "step": step,
        "group": group,
        "row": int(row),
        "data_source": prompt.row["data_source"],
        "prompt": tokenizer.decode(list(prompt.ids)),
        "response": tokenizer.decode(ids, skip_special_tokens=True),
        "reward": float(experience.graded.rewards[row]) if judged else None,
        "correct": bool(experience.graded.correct[row]) if judged else None,
        "reason": experience.groups.reasons.flat[row],
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
