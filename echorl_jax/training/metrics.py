"""One place where numbers get their public names."""

import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np

from echorl_jax.training.batch import BatchStats
from echorl_jax.training.step import UpdateStats
from echorl_jax.types import LossTerm, TrainBatch


class CompileCounter:
    """Counts XLA compilations in this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        self._expected: int | None = None  # up to which count nobody is surprised
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def surprised(self) -> bool:
        """True once, if anything was compiled since the first call, which ends the warm-up."""
        if self._expected is None:
            self._expected = self.count
        found = self.count > self._expected
        if found:
            self._expected = sys.maxsize
        return found

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Compilations inside do not count as surprises, such as those of the first evaluation."""
        before = self.count
        yield
        if self._expected is not None:
            self._expected += self.count - before


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


def peak_memory_bytes() -> int:
    """The device's peak where it tells, else this process's largest resident size."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def learning_metrics(
    *, used: np.ndarray, trained_tokens: int, sampled_tokens: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """How much of the batch had a gradient, and how fast it went."""
    return {
        "train/rows_skipped_fraction": float(1.0 - np.mean(used)) if used.size else 0.0,
        "rollout/tokens_per_second": sampled_tokens / max(seconds.get("rollout", 0.0), 1e-9),
        "train/tokens_per_second": trained_tokens / max(seconds.get("update", 0.0), 1e-9),
        **{f"time/{name}_s": value for name, value in seconds.items()},
    }


def _mean(term: LossTerm) -> float:
    return float(np.asarray(term.sum) / max(float(term.count), 1e-12)) if term.count else 0.0
