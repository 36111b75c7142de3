"""Metrics of a step under their public keys, and sampled groups as JSON lines."""

import inspect
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.config import Config
from echorl_jax.custom import accepted, load_custom
from echorl_jax.data import Prompt
from echorl_jax.data.pictures import narrowed, pictures_of, thumbnail
from echorl_jax.errors import UserError, one_line
from echorl_jax.files import write_jsonl
from echorl_jax.parallel import is_first
from echorl_jax.rewards import grading_failed, metric_values
from echorl_jax.training.batch import Assembled
from echorl_jax.training.experience import Experience
from echorl_jax.training.setup import Setup
from echorl_jax.types import EchoClips, HostArray, TrainBatch


def step_metrics(
    experience: Experience, made: Assembled, *, hints: bool, echo_coef: float
) -> dict[str, float]:
    """Rewards, groups, completions, clips and sampling of a step; expert rows are not counted.

    Args:
      experience: the step's experience.
      made: its batch and clips (NumPy).
      hints: whether prompts may end with a part of the solution (UFT).
      echo_coef: lambda at this step.
    """
    return {
        **reward_metrics(experience),
        **verdict_metrics(experience),
        **completion_metrics(experience),
        **clip_metrics(made.clips),
        "echo/refused": float(made.refused.sum()),
        "echo/solved_weight": solved_weight(experience, made.batch, echo_coef=echo_coef),
        **sampling_metrics(experience, hints=hints),
        "echo/joined_steps_fraction": _mean(
            made.step_ids.max(axis=1) >= made.step_entropy.shape[1], experience.graded.on_policy
        ),
        "entropy/covariance": covariance(made.batch),
    }


def reward_metrics(experience: Experience) -> dict[str, float]:
    """Rewards and successes of the policy's judged rows, and groups with a single outcome."""
    groups = experience.groups
    own = groups.on_policy & groups.judged  # [P, G]
    correct = groups.correct & own
    size, successes = own.sum(axis=1), correct.sum(axis=1)
    failed = np.reshape([grading_failed(reason) for reason in groups.reasons.flat], own.shape)
    return {
        "reward/mean": _mean(groups.rewards, own),
        "reward/correct": _mean(correct, own),
        "reward/ungraded_fraction": float(np.mean(failed | ~groups.judged)),
        "group/all_success_fraction": _mean(successes == size, size > 0),
        "group/all_failure_fraction": _mean(successes == 0, size > 0),
        "group/collapsed_fraction": collapsed_fraction(groups.rewards, groups.judged),
        "group/in_policy_fraction": float(groups.in_policy.mean()),
    }


def verdict_metrics(experience: Experience) -> dict[str, float]:
    """Mean and sample deviation of each metric of the grader, over the policy's rows that have it.

    The scores of a list of graders are among them, unweighted.
    """
    own = experience.groups.metrics[experience.groups.on_policy]
    found: dict[str, float] = {}
    for name, values in metric_values(own).items():
        found[f"reward/{name}/mean"] = statistics.fmean(values)
        found[f"reward/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def custom_metrics(
    paths: Sequence[str], experience: Experience, made: Assembled
) -> dict[str, float]:
    """``custom/<name>`` of the functions in ``log.metrics``.

    A function gets those of ``rollouts``, ``graded``, ``batch``, ``clips``, ``step_ids``,
    ``step_entropy`` and ``step_tokens`` (NumPy, N rows) that its parameters name. It returns a
    number, logged under the function's name, or a mapping from names to numbers.

    Raises:
      UserError: a function that fails, or returns something else.
    """
    offered = {"rollouts": experience.rollouts, "graded": experience.graded, **vars(made)}
    metrics: dict[str, float] = {}
    for path in paths:
        function = load_custom(path, "config.log.metrics =")
        try:
            found = function(**accepted(inspect.signature(function).parameters, offered))
            named = found if isinstance(found, Mapping) else {path.rpartition(":")[2]: found}
            metrics |= {f"custom/{name}": float(value) for name, value in named.items()}
        # The function is the user's program: anything can go wrong in it.
        except Exception as error:
            raise UserError(f"config.log.metrics = {path!r}: {one_line(error)}") from error
    return metrics


def collapsed_fraction(rewards: HostArray, judged: HostArray) -> float:
    """The share of groups whose judged rewards are all equal, among those with at least two.

    An expert's row counts. Source: the advantage collapse rate of AVSPO, arXiv 2605.21125.

    Args:
      rewards: f32 ``[P, G]``.
      judged: bool ``[P, G]``.
    """
    highest = np.max(np.where(judged, rewards, -np.inf), axis=1)
    lowest = np.min(np.where(judged, rewards, np.inf), axis=1)
    return _mean(highest == lowest, judged.sum(axis=1) >= 2)


def solved_weight(experience: Experience, batch: TrainBatch, *, echo_coef: float) -> float:
    """Mean over solved prompts of the summed |weight| of the tokens of all rows of the prompt.

    A token's weight is |token_weights A| + |lambda echo_weights|: the factor of its log-probability
    in the loss of an update that starts from the policy that sampled. Methods of different lambda
    or advantages push solved prompts equally hard where it is equal. KL, entropy bonus and hints
    do not count. A prompt is solved if all judged rows of the policy are correct.

    Args:
      experience: of the step.
      batch: its rows in the same order, with final weights (NumPy).
      echo_coef: lambda at this step.
    """
    groups = experience.groups
    own = groups.on_policy & groups.judged  # [P, G]
    solved = own.any(axis=1) & (groups.correct | ~own).all(axis=1)
    advantages = batch.advantages  # [N] or [N, T]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    policy = np.where(batch.token_weights != 0, np.abs(batch.token_weights * advantages), 0.0)
    weight = policy + np.abs(echo_coef * batch.echo_weights)
    return _mean(weight.sum(axis=1, dtype=np.float64).reshape(own.shape).sum(axis=1), solved)


def completion_metrics(experience: Experience) -> dict[str, float]:
    """Lengths (tokens) and token entropies (nats) of the policy's completions."""
    rollouts, own = experience.rollouts, experience.graded.on_policy
    places = np.arange(rollouts.completion_ids.shape[1])
    tokens = own[:, None] & (places[None, :] < rollouts.completion_length[:, None])
    return {
        "completion/length_mean": _mean(rollouts.completion_length, own),
        "completion/truncated_fraction": _mean(rollouts.truncated, own),
        "entropy/token_mean": _mean(rollouts.token_entropy, tokens),
    }


def clip_metrics(clips: EchoClips) -> dict[str, float]:
    """The number of EchoClips, their length (tokens) and the entropy of their last step (nats)."""
    return {
        "echo/clips": float(clips.valid.sum()),
        "echo/clip_tokens_mean": _mean(clips.length, clips.valid),
        "echo/step_entropy_mean": _mean(clips.entropy, clips.valid),
    }


def sampling_metrics(experience: Experience, *, hints: bool) -> dict[str, float]:
    """Metrics of the sampler and of hints in prompts.

    A row restarts when the pages of completions run out (``rollout.expected_tokens`` too small).
    """
    metrics = {
        "rollout/slot_occupancy": experience.slot_occupancy,
        "rollout/restarted_rows": experience.restarted_rows,
        "rollout/rounds": experience.rounds,
    }
    if hints:
        tokens = [prompt.hint_tokens for prompt in experience.prompts]
        metrics["prompt/hint_tokens_mean"] = float(np.mean(tokens))
    return metrics


def covariance(batch: TrainBatch) -> float:
    """Covariance of log-probability and advantage over the policy's tokens in its loss.

    mean((log pi - mean log pi) (A - mean A)), log pi the sampler's. To first order the update
    lowers the entropy in proportion to it. Source: arXiv 2505.22617, section 3.2.
    """
    kept = (batch.loss_mask > 0) & batch.on_policy[:, None]
    logprobs = np.asarray(batch.rollout_logprobs, np.float64)[kept]
    if not logprobs.size:
        return 0.0
    advantages = batch.advantages.reshape(len(kept), -1)
    advantages = np.broadcast_to(advantages, kept.shape)[kept].astype(np.float64)
    shares = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    return float(shares.mean())


def throughput_metrics(setup: Setup, experience: Experience, used: HostArray) -> dict[str, float]:
    """The share of rows without a gradient, and the speed of sampling and training.

    Args:
      setup: of the run.
      experience: of the step, with the seconds of its phases.
      used: ``[N]``, tokens of each row that had a gradient; 0 for a row that was left out.
    """
    sampled = experience.rollouts.completion_length[experience.graded.on_policy].sum()
    seconds = experience.seconds
    return {
        "train/rows_skipped_fraction": float(np.mean(used == 0)),
        "rollout/tokens_per_second": per_second(sampled, seconds["rollout"]),
        **training_speed(used.sum() * setup.config.objective.epochs, seconds),
    }


def training_speed(tokens: Any, seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens of updates (padding not counted) per second, and the seconds of each phase."""
    return {
        "train/tokens_per_second": per_second(tokens, seconds["update"]),
        **{f"time/{name}_s": value for name, value in seconds.items()},
    }


def per_second(count: Any, seconds: float) -> float:
    """A rate; finite for no time at all."""
    return float(count) / max(seconds, 1e-9)


def _mean(values: HostArray, kept: HostArray) -> float:
    """The mean of the kept entries, 0 where there are none; the others may be NaN."""
    chosen = np.asarray(values, np.float64)[kept]
    return float(chosen.mean()) if chosen.size else 0.0


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
        lines = (_sample(step, row, experience, made, clips, setup) for row in rows.tolist())
        write_jsonl(directory / f"step_{step:06d}.jsonl", lines)


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
    setup: Setup,
) -> dict[str, Any]:
    tokenizer, rollouts = setup.tokenizer, experience.rollouts
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
        **_prompt_shown(prompt, setup, with_pictures=row % setup.config.rollout.group_size == 0),
        "response": tokenizer.decode(ids, skip_special_tokens=True),
        "reward": float(experience.graded.rewards[row]) if judged else None,
        "correct": bool(experience.graded.correct[row]) if judged else None,
        "reason": experience.groups.reasons.flat[row],
        "truncated": bool(rollouts.truncated[row]),
        # The mean over its tokens, where they have their own.
        "advantage": float(np.mean(np.atleast_1d(made.batch.advantages[row])[:length])),
        "tokens": tokenizer.batch_decode([[i] for i in ids]),
        "entropy": _rounded(rollouts.token_entropy[row, :length]),
        "logprobs": _rounded(rollouts.rollout_logprobs[row, :length]),
        "step_ids": steps.tolist(),
        "step_entropy": _rounded(made.step_entropy[row, : int(steps.max(initial=-1)) + 1]),
        "clip_tokens": clip_tokens,
        "clip_step": clip_step,
    }


def _prompt_shown(prompt: Prompt, setup: Setup, *, with_pictures: bool) -> dict[str, Any]:
    """The prompt's text, and small pictures in the first row of a group."""
    if setup.processor is None:
        return {"prompt": setup.tokenizer.decode(list(prompt.ids))}
    text = setup.tokenizer.decode(narrowed(prompt.ids, setup.processor.image_id))
    pictures = pictures_of(prompt.row) if with_pictures else []
    return {"prompt": text, "pictures": [thumbnail(picture) for picture in pictures]}


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
