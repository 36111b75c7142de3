"""Injected faults (``config.debug.inject``): users and tests see that a run survives them.

Without any configured, the calls below do nothing.
"""

import dataclasses
import errno
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from echorl_jax.config import ConfigError
from echorl_jax.rewards import GraderPool
from echorl_jax.types import TrainBatch

PHASES = ("rollout", "grading", "update", "evaluation", "save")
REWARDS = ("hang", "crash", "leak")
FORMS = (
    *(f"kill@{phase}:STEP" for phase in PHASES),
    "term@STEP",
    "term@evaluation:STEP",
    "nan@STEP",
    "eval_fail@STEP",
    "disk_full@checkpoint:STEP",
    *(f"reward_{kind}@SHARE" for kind in REWARDS),
)
# Faults that end the process: they come once in a workdir, so that the same command goes on.
ONCE = ("kill", "term", "disk_full")
RECORD = "injected.txt"


@dataclasses.dataclass(frozen=True)
class Faults:
    """Faults to inject, and the file that records those that were injected."""

    at_steps: frozenset[str]  # as typed, such as "kill@rollout:3"
    rewards: Mapping[str, float]  # "hang", "crash", "leak" -> share of the graded items
    record: Path

    @classmethod
    def parse(cls, text: str, workdir: Path) -> "Faults":
        """Reads a list like ``"kill@rollout:3,nan@5,reward_hang@0.01"``.

        Faults that end the process are left out if ``workdir/injected.txt`` has them.

        Raises:
          ConfigError: names the fault that is none, and the forms there are.
        """
        faults = [part.strip() for part in text.split(",") if part.strip()]
        rewards = {}
        for fault in faults:
            shape, number = _shape(fault)
            if shape not in FORMS or (shape.endswith("SHARE") and not 0 <= float(number) <= 1):
                raise ConfigError(
                    f"config.debug.inject: {fault!r} is no fault; known: {', '.join(FORMS)} "
                    "(STEP from 1, SHARE in [0, 1])"
                )
            if shape.endswith("SHARE"):
                rewards[shape.removeprefix("reward_").removesuffix("@SHARE")] = float(number)
        if sum(rewards.values()) > 1:
            raise ConfigError("config.debug.inject: the shares of reward_* add up to more than 1")
        record = workdir / RECORD
        had = record.read_text(errors="replace").split() if faults and record.exists() else []
        return cls(frozenset(faults) - frozenset(had), rewards, record)

    def hits(self, kind: str, step: int) -> bool:
        """True if a fault such as ``nan`` or ``kill@save`` is due at this step."""
        fault = f"{kind}{':' if '@' in kind else '@'}{step}"
        if fault not in self.at_steps:
            return False
        if kind.split("@")[0] in ONCE:
            with self.record.open("a") as file:
                file.write(fault + "\n")
                file.flush()
                os.fsync(file.fileno())
        return True

    def reach(self, phase: str, step: int) -> None:
        """Marks a place in the program: dies here if asked to.

        Of several processes it is the last one; in a save the first, which commits it.
        """
        last = jax.process_index() == jax.process_count() - 1
        if not self.at_steps or not (last or phase == "save"):
            return
        if (phase == "update" and self.hits("term", step)) or self.hits(f"term@{phase}", step):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.hits(f"kill@{phase}", step):
            os.kill(os.getpid(), signal.SIGKILL)

    def grader(self, pool: GraderPool, step: int) -> GraderPool:
        """The pool; one that is closed where the evaluation at this step is to fail.

        Of several processes it is the last one whose evaluation does.
        """
        last = jax.process_index() == jax.process_count() - 1
        if not (last and self.hits("eval_fail", step)):
            return pool
        closed = GraderPool("countdown", workers=0)
        closed.close()
        return closed

    def spoil(self, batches: Sequence[TrainBatch], step: int) -> list[TrainBatch]:
        """The batches (NumPy); if a NaN is due, with one among the weights of the first."""
        batch, *others = batches
        if not self.hits("nan", step):
            return [batch, *others]
        row = int(np.argmax(np.any(batch.token_weights != 0, axis=1)))
        weights, advantages = np.array(batch.token_weights), np.array(batch.advantages)
        weights[row, 0] = advantages[row, ...] = np.nan
        batch = dataclasses.replace(batch, token_weights=weights, advantages=advantages)
        return [batch, *others]

    def checkpoint_path(
        self, plain: type[ocp.path.atomicity.AtomicRenameTemporaryPath]
    ) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
        """The class of a directory in progress, or a subclass that fails before the commit."""
        if not any(fault.startswith(("kill@save", "disk_full")) for fault in self.at_steps):
            return plain
        faults = self

        class FailingPath(plain):
            async def finalize(self) -> None:
                name = self.get_final().name
                # Orbax commits the directories inside a checkpoint before the checkpoint.
                if name.isdecimal():
                    faults.reach("save", int(name))
                    if faults.hits("disk_full@checkpoint", int(name)):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.get()))
                await super().finalize()

        return FailingPath


def _shape(fault: str) -> tuple[str, str]:
    """``("kill@save:STEP", "3")`` of ``"kill@save:3"``."""
    match = re.fullmatch(r"(\w+@(?:[a-z]+:)?)(\d+|\d*\.\d+)", fault)
    if match is None:
        return "", ""
    share = match[1].startswith("reward_")
    if not share and (not match[2].isdecimal() or int(match[2]) < 1):
        return "", ""
    return match[1] + ("SHARE" if share else "STEP"), match[2]
