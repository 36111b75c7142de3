"""The public names of what a step found and did."""

from collections.abc import Mapping

import numpy as np

from echorl_jax.rewards import grading_failed
from echorl_jax.training.batch import BatchStats
from echorl_jax.training.collect import Experience
from echorl_jax.training.step import UpdateStats
from echorl_jax.types import LossTerm, TrainBatch


def batch_metrics(stats: BatchStats) -> dict[str, float]:
    """What the rollouts looked like (NumPy leaves)."""
    return {
        "reward/mean": _mean(stats.reward),
        "reward/correct": _mean(stats.correct),
        "group/all_success_fraction": _mean(stats.all_success),
        "group/all_failure_fraction": _mean(stats.all_failure),
        "completion/length_mean": _mean(stats.length),
        "completion/truncated_fraction": _mean(stats.truncated),
        "entropy/token_mean": _mean(stats.token_entropy),
        "echo/clips": float(stats.clips),
        "echo/clip_tokens_mean": _mean(stats.clip_tokens),
        "echo/step_entropy_mean": _mean(stats.clip_entropy),
        "echo/joined_steps_fraction": _mean(stats.joined_steps),
    }


def covariance_metric(batch: TrainBatch) -> dict[str, float]:
    """Covariance of log-probability and advantage over the step's own tokens (NumPy leaves).

    mean((log pi - mean log pi) (A - mean A)) over the tokens of the policy loss that the policy
    sampled itself, log pi the sampler's. To first order the update lowers the entropy in proportion
    to it. Source: arXiv 2505.22617, section 3.2.
    """
    kept = (batch.loss_mask > 0) & batch.on_policy[:, None]
    logprobs = np.asarray(batch.rollout_logprobs, np.float64)[kept]
    if not logprobs.size:
        return {"entropy/covariance": 0.0}
    advantages = np.broadcast_to(batch.advantages[:, None], kept.shape)[kept].astype(np.float64)
    shares = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    return {"entropy/covariance": float(shares.mean())}


def update_metrics(stats: UpdateStats) -> dict[str, float]:
    """What the update did (NumPy leaves)."""
    terms = stats.terms
    return {
        "loss/total": float(stats.loss),
        "loss/policy": float(terms.policy.sum),
        "loss/echo": float(terms.echo.sum),
        "loss/nll": float(terms.nll.sum),
        "kl/ref": _mean(terms.kl),
        "ratio/clip_fraction": _mean(terms.clip_fraction),
        "rollout/logprob_gap_max": float(stats.logprob_gap),
        "rollout/logprob_gap_mean": _mean(stats.mean_gap),
        "optim/grad_norm": float(stats.grad_norm),
        "optim/skipped": float(not stats.finite),
    }


def sampling_metrics(found: Experience, *, hints: bool) -> dict[str, float]:
    """How the rollouts came about; ``hints``: whether prompts end with a part of a solution."""
    metrics = {
        "rollout/slot_occupancy": found.slot_occupancy,
        "rollout/rounds": found.rounds,
        "group/in_policy_fraction": float(found.in_policy.mean()),
        "reward/ungraded_fraction": float(np.mean([*map(grading_failed, found.reasons)])),
    }
    if hints:
        tokens = [prompt.hint_tokens for prompt in found.prompts]
        metrics["prompt/hint_tokens_mean"] = float(np.mean(tokens))
    return metrics


def learning_metrics(
    *, used: np.ndarray, trained_tokens: int, sampled_tokens: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """How much of the batch had a gradient, and how fast it went.

    Args:
      used: ``[N]``, tokens of each row that had one.
      trained_tokens: computed by the updates, padding not counted.
      sampled_tokens: written by the policy.
      seconds: by part of the step.
    """
    return {
        "train/rows_skipped_fraction": float(np.mean(used == 0)) if used.size else 0.0,
        "rollout/tokens_per_second": sampled_tokens / max(seconds.get("rollout", 0.0), 1e-9),
        "train/tokens_per_second": trained_tokens / max(seconds.get("update", 0.0), 1e-9),
        **{f"time/{name}_s": value for name, value in seconds.items()},
    }


def _mean(term: LossTerm) -> float:
    return float(np.asarray(term.sum) / max(float(term.count), 1e-12)) if term.count else 0.0
