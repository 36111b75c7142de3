"""Metrics of a step under their public keys, computed on the host from what the step made."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from echorl_jax.rewards import grading_failed
from echorl_jax.training.batch import Assembled
from echorl_jax.training.experience import Experience
from echorl_jax.training.setup import Setup
from echorl_jax.types import EchoClips, HostArray, TrainBatch


def step_metrics(experience: Experience, made: Assembled, *, hints: bool) -> dict[str, float]:
    """Rewards, groups, completions, clips and sampling of a step; expert rows are not counted.

    Args:
      experience: the step's experience.
      made: its batch and clips (NumPy).
      hints: whether prompts may end with a part of the solution (UFT).
    """
    return {
        **reward_metrics(experience),
        **completion_metrics(experience),
        **clip_metrics(made.clips),
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
        "group/in_policy_fraction": float(groups.in_policy.mean()),
    }


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
    """Metrics of the sampler, and of hints in prompts."""
    metrics = {
        "rollout/slot_occupancy": experience.slot_occupancy,
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
    advantages = np.broadcast_to(batch.advantages[:, None], kept.shape)[kept].astype(np.float64)
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
