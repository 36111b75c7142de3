"""An engine that replays recorded completions and knows no entropies."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.data import Prompt
from echorl_jax.environment import Engine
from echorl_jax.rollout import Sampling
from echorl_jax.types import Rollouts

# The directory with the recorded calls: call_0.npz, call_1.npz, ...
RECORDED = "TEST_REPLAY_ENGINE_RECORDED"


class ReplayEngine(Engine):
    """Returns the rollouts of its n-th call from the n-th file."""

    entropies = False

    def __init__(self, **settings: Any) -> None:
        assert {"config", "model", "tokenizer", "mesh"} <= settings.keys()
        self.calls, self.closed = 0, False
        self._folder = Path(os.environ[RECORDED])

    def sample(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        key: Any,
        *,
        sampling: Sampling,
        finished: Any = None,
        progress: Any = None,
    ) -> Rollouts:
        arrays = dict(np.load(self._folder / f"call_{self.calls}.npz"))
        self.calls += 1
        arrays["token_entropy"] = np.full_like(arrays["rollout_logprobs"], np.nan)
        rollouts = Rollouts(**arrays)
        rows = range(len(rollouts.group))
        assert len(rows) == len(prompts) * sampling.group_size
        if finished is not None:
            ids, length = rollouts.completion_ids, rollouts.completion_length
            finished(rows, [ids[row, : length[row]] for row in rows])
        return rollouts

    def warm_up(self, params: Any, prompts: Any, key: Any, *, sampling: Sampling) -> Rollouts:
        rollouts = self.sample(params, prompts, key, sampling=sampling)
        self.calls = 0
        return rollouts

    def close(self) -> None:
        self.closed = True


def fails(**settings: Any) -> Engine:
    raise RuntimeError("no server answers")


def leaves_python(**settings: Any) -> Engine:
    raise SystemExit(7)
