"""Checks of each step: finite gradients and rollouts, agreement of sampler and trainer."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from echorl_jax.errors import RunStopped
from echorl_jax.parallel import place_whole
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import GAP_MEAN, GAP_WIDE, WIDE_GAP, UpdateStats
from echorl_jax.types import Rollouts


class GapBounds(NamedTuple):
    """Largest accepted gaps between sampler and trainer."""

    largest: float  # nats
    mean: float = math.inf  # nats
    wide: float = 1.0  # share of tokens past WIDE_GAP


# By the narrowest type in use, computation's or cache's. Measured gaps: docs/performance.md.
LOGPROB_GAP = {
    "float32": GapBounds(largest=1e-2, mean=1e-3, wide=0.0),
    "bfloat16": GapBounds(largest=2.0, mean=0.1, wide=0.01),
    "int8": GapBounds(largest=4.0, mean=0.2, wide=0.05),
}


class Health:
    """Checks each step of a run.

    The gap between sampler and trainer is judged at the first step of a process, then every
    ``rollout.check_every`` steps. A step without trainable tokens postpones the check.

    Args:
      bad_updates: in a row, when the run was opened.
      warn: is called with a line about a step that looks bad.
    """

    def __init__(self, setup: Setup, bad_updates: int, warn: Callable[[str], None]) -> None:
        self._setup = setup
        self._bad = bad_updates
        self._warn = warn
        self._gap_due = bool(setup.config.rollout.check_every)

    def check(
        self,
        step: int,
        state: TrainState,
        updates: Sequence[UpdateStats],
        rollouts: Rollouts | None = None,
    ) -> TrainState:
        """Judges a step after its updates.

        Args:
          step: from 1.
          state: after the updates.
          updates: their results (NumPy).
          rollouts: of the policy before them (NumPy); None where nothing was sampled.

        Returns:
          The state; a step whose rollouts are not finite counts as one of bad updates.

        Raises:
          RunStopped: the run cannot be trusted any more.
        """
        config = self._setup.config
        limit = config.optim.max_bad_steps * len(updates)
        if rollouts is not None:
            self._check_gap(step, updates[0])
        if not updates[-1].finite and int(state.bad_updates) >= limit:
            raise RunStopped(
                f"step {step}: the gradient was not finite for {int(state.bad_updates)} updates in "
                f"a row (optim.max_bad_steps = {config.optim.max_bad_steps}); parameters are as "
                "before the first of them"
            )
        if rollouts is not None and (line := dead_rollouts(step, rollouts)):
            # The rewards of a policy whose logits are NaN are equal: no gradient shows it.
            bad = self._bad + len(updates)
            if bad >= limit:
                raise RunStopped(
                    f"{line}, at the end of {config.optim.max_bad_steps} bad step(s) in a row "
                    "(optim.max_bad_steps); the policy may have diverged: go on from an earlier "
                    "checkpoint (checkpoint.resume)"
                )
            self._warn(f"warning: {line}")
            state = dataclasses.replace(
                state, bad_updates=place_whole(np.int32(bad), self._setup.mesh)
            )
        self._bad = int(state.bad_updates)
        return state

    def _check_gap(self, step: int, first: UpdateStats) -> None:
        rollout, dtype = self._setup.config.rollout, self._setup.config.model.dtype
        self._gap_due |= bool(rollout.check_every) and (step - 1) % rollout.check_every == 0
        if not self._gap_due or not first.terms[GAP_MEAN].count > 0:
            return
        largest, types = rollout.max_logprob_gap, (dtype, rollout.kv_dtype or dtype)
        bounds = GapBounds(largest) if largest else max(LOGPROB_GAP[name] for name in types)
        require_agreement(first, step, bounds)
        self._gap_due = False


def dead_rollouts(step: int, rollouts: Rollouts) -> str:
    """A line on rollouts (NumPy) whose log-probabilities or entropies are not finite, or ""."""
    written = np.arange(rollouts.completion_ids.shape[1]) < rollouts.completion_length[:, None]
    finite = np.isfinite(rollouts.rollout_logprobs) & np.isfinite(rollouts.token_entropy)
    dead = int(np.any(written & ~finite, axis=1).sum())
    if not dead:
        return ""
    return (
        f"step {step}: log-probabilities or entropies of {dead} of {len(finite)} rollouts are not "
        "finite"
    )


def require_agreement(done: UpdateStats, step: int, bounds: GapBounds) -> None:
    """Compares the log-probabilities of sampler and trainer before an update.

    Raises:
      RunStopped: a gap is past its bound, or NaN.
    """
    mean, wide = (
        float(term.sum) / max(float(term.count), 1.0)
        for term in (done.terms[GAP_MEAN], done.terms[GAP_WIDE])
    )
    for name, value, bound in (
        ("the largest difference is", float(done.logprob_gap), bounds.largest),
        ("the mean difference is", mean, bounds.mean),
        (f"the share of tokens past {WIDE_GAP:g} nats is", wide, bounds.wide),
    ):
        if not value <= bound:  # NaN included
            raise RunStopped(
                f"step {step}: sampler and trainer disagree on the log-probabilities of the same "
                f"tokens: {name} {value:.3g}, more than {bound:g} (rollout.max_logprob_gap sets "
                "another bound on the largest and drops the others)"
            )
