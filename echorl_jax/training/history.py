"""The history of a run: each prompt's successes at its last visit, step entropies, success rates.

It lives on the host, is the same on every process, and is saved in each checkpoint, so that a run
goes on with it bit for bit.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from echorl_jax.training.batch import Assembled
from echorl_jax.training.experience import Experience
from echorl_jax.types import HostArray

# Training steps whose step entropies are kept, and the quantiles that stand for those of one step.
STEPS = 16
QUANTILES = 128


class History:
    """Successes of the rows of the training data, and recent step entropies.

    Args:
      rows: of the training data.
      retire_above: ``data.retire_above``; None retires no prompt.
      threshold: ``echo.threshold``; None keeps no entropies.
      min_step_tokens: shorter steps are not counted in the entropies.
      rate_steps: training steps whose groups' mean rewards are kept.
      groups: of a training step, at most.
    """

    def __init__(
        self,
        rows: int,
        *,
        retire_above: float | None = None,
        threshold: float | None = None,
        min_step_tokens: int = 1,
        rate_steps: int = 0,
        groups: int = 1,
    ) -> None:
        # Visits so far; correct and judged rows of the policy at the last one.
        self._prompts = {name: np.zeros(rows, np.int64) for name in ("visits", "correct", "judged")}
        # A prompt without a visit has rate 0, and the option is above 0.
        self._retire_above = np.inf if retire_above is None else retire_above
        self._threshold = threshold
        self._min_step_tokens = min_step_tokens
        self._entropies: collections.deque[list[float]] = collections.deque(maxlen=STEPS)
        self._groups = groups
        self._rates: collections.deque[list[float]] = collections.deque(maxlen=rate_steps)

    def retired(self, index: int) -> bool:
        """True if the prompt's success rate at its last visit was at least ``retire_above``."""
        return bool(self._are_retired(index))

    @property
    def retired_fraction(self) -> float:
        """The share of all rows of the training data that are retired."""
        return float(np.mean(self._are_retired(slice(None))))

    def _are_retired(self, index: int | slice) -> HostArray:
        rate = self._prompts["correct"][index] / np.maximum(self._prompts["judged"][index], 1)
        return rate >= self._retire_above

    @property
    def min_entropy(self) -> float:
        """The entropy (nats) above which a step may end a clip; -inf refuses none.

        It is the quantile ``threshold`` over the last :data:`STEPS` training steps that had any
        step of the policy, each with the same weight; a run's first step refuses no clip.
        """
        if self._threshold is None or not self._entropies:
            return -np.inf
        return float(np.quantile(np.array(self._entropies), self._threshold))

    @property
    def past_rates(self) -> np.ndarray | None:
        """Mean rewards in (0, 1) of the last steps' groups, f32 ``[W]``, NaN where there is none.

        W does not change during a run. None if none are kept.
        """
        if not self._rates.maxlen:
            return None
        rates = np.full(self._rates.maxlen * self._groups, np.nan, np.float32)
        known = [rate for step in self._rates for rate in step]
        rates[: len(known)] = known
        return rates

    def update(self, experience: Experience, made: Assembled) -> dict[str, float]:
        """Adds a training step (NumPy arrays); returns its metrics."""
        regressed = self._visit(experience)
        groups = experience.groups
        judged = groups.judged.sum(axis=1)
        # As the advantages see them; a row without a verdict has reward 0.
        rates = groups.rewards.sum(axis=1) / np.maximum(judged, 1)
        self._rates.append(rates[(rates > 0) & (rates < 1)].tolist())
        if self._threshold is not None:
            self._record(made)
        return {
            "group/regressed_fraction": regressed,
            "data/retired_fraction": self.retired_fraction,
        }

    def _visit(self, experience: Experience) -> float:
        """The share of prompts solved at their last visit, and visited again, that now are not.

        Only rows that the policy wrote and the grader judged count; a prompt without any is not
        visited. A prompt that a step has several times is visited once, with all its rows.
        """
        groups, prompts = experience.groups, self._prompts
        own = groups.on_policy & groups.judged  # [P, G]
        index = [prompt.index for prompt in experience.prompts]
        index, group = np.unique(np.array(index, np.int64), return_inverse=True)
        judged = np.bincount(group, own.sum(axis=1), len(index)).astype(np.int64)
        correct = np.bincount(group, (groups.correct & own).sum(axis=1), len(index))
        correct = correct.astype(np.int64)
        seen = judged > 0
        index, judged, correct = index[seen], judged[seen], correct[seen]
        before = prompts["judged"][index]
        solved = (before > 0) & (prompts["correct"][index] == before)
        prompts["visits"][index] += 1
        prompts["judged"][index], prompts["correct"][index] = judged, correct
        return float(np.mean(correct[solved] < judged[solved])) if solved.any() else 0.0

    def _record(self, made: Assembled) -> None:
        counts = made.step_tokens >= self._min_step_tokens
        values = made.step_entropy[counts & made.batch.on_policy[:, None]]
        if values.size:
            middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
            self._entropies.append(np.quantile(values.astype(np.float64), middles).tolist())

    def get_state(self) -> dict[str, Any]:
        """The history, as JSON can hold it; its size is bounded by the rows of the data."""
        index = np.flatnonzero(self._prompts["visits"])
        prompts = {name: values[index].tolist() for name, values in self._prompts.items()}
        return {
            "prompts": {"index": index.tolist(), **prompts},
            "step_entropies": list(self._entropies),
            "success_rates": list(self._rates),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`get_state`; an empty state, of an older checkpoint, is no history."""
        if state:
            prompts = dict(state["prompts"])
            index = np.array(prompts.pop("index"), np.int64)
            for name, values in prompts.items():
                self._prompts[name][index] = values
            self._entropies.extend(state["step_entropies"])
            self._rates.extend(state.get("success_rates", []))
